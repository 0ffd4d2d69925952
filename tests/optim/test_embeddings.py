"""Embeddings, positions and head: Adam in coordinates of the stream that stay."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import quotientopt as qo
from quotientopt.models import reference_model
from quotientopt.optim.bookkeeping import slices
from quotientopt.optim.update import embedding_width_factor, scale_of
from tests.optim.training import small_model, train, twin_of

OPTIONS = {"lr": 7.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def hf_llama():
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def hf_gpt2():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=13)
    return GPT2LMHeadModel(config)


def hf_electra():
    """Embeddings are narrower than the stream, to which a linear layer takes them."""
    config = ElectraConfig(
        vocab_size=13,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return ElectraForMaskedLM(config)


def small_vit():
    return reference_model("vit", 0, layers=2, width=32, heads=4).double()


def train_on_images(model, optimizer, steps, seed=1):
    """Losses of steps on noise of two kinds."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        classes = torch.randint(2, (8,), generator=generator)
        noise = torch.randn(8, 28, 28, generator=generator, dtype=torch.float64)
        images = noise + classes[:, None, None] * torch.linspace(-1, 1, 28)
        loss = nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def kept_frames(optimizer, model):
    """Names of the matrices whose frame follows no covariance."""
    return {
        name
        for name, parameter in model.named_parameters()
        if "residual_frame" in optimizer.state[parameter]
        and "residual_covariance" not in optimizer.state[parameter]
    }


@pytest.mark.parametrize(
    ("make", "names", "head"),
    [
        (
            lambda: small_model("gpt"),
            {"embedding.weight", "positions.weight", "head.weight"},
            {"head.weight"},
        ),
        (hf_llama, {"model.embed_tokens.weight", "lm_head.weight"}, {"lm_head.weight"}),
        (hf_gpt2, {"transformer.wte.weight", "transformer.wpe.weight"}, set()),
        (small_vit, {"positions.weight", "head.weight"}, {"head.weight"}),
        (hf_electra, *[{"generator_predictions.dense.weight"}] * 2),
    ],
)
def test_which_matrices_they_are(make, names, head):
    """A head that is tied to the embedding is one with it, and stays as that.

    Linear layers in front, of patches or of narrower embeddings, are none of them.
    """
    expected = {"fixed": names, "fixed_but_head": names - head, "per_matrix": set()}
    for embedding_frame, kept in expected.items():
        model = make()
        optimizer = qo.QuotientAdam(model, embedding_frame=embedding_frame)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert kept_frames(optimizer, model) == kept
        outputs = {
            s.name for b in optimizer._current_engine().buckets for s in b.slices if s.output
        }
        assert outputs == (head if embedding_frame == "fixed_but_head" else set())


def test_frames_stay_and_are_orthogonal():
    model = small_model("gpt")
    optimizer = qo.QuotientAdam(model, **OPTIONS, refresh_every=3)
    train(model, optimizer, 2)
    table, inner = (p.weight for p in (model.embedding, model.blocks[0].mlp.up))
    frames = [optimizer.state[p]["residual_frame"].clone() for p in (table, inner)]
    train(model, optimizer, 10)
    now = [optimizer.state[p]["residual_frame"] for p in (table, inner)]
    assert torch.equal(frames[0], now[0])
    assert not torch.allclose(frames[1], now[1])
    assert (now[0].mT @ now[0] - torch.eye(now[0].size(-1), dtype=now[0].dtype)).abs().max() < 1e-12


@pytest.mark.parametrize("embedding_frame", ["fixed", "fixed_but_head", "per_matrix"])
def test_twins_under_rotations_of_the_stream(embedding_frame):
    model = small_model("gpt")
    twin, element = twin_of(model, cond=1.0, only=lambda name: name == "residual")
    assert set(element) == {"residual"}

    def curve(m):
        own = copy.deepcopy(m)
        return train(own, qo.QuotientAdam(own, **OPTIONS, embedding_frame=embedding_frame), 30)

    assert (curve(model) - curve(twin)).abs().max() < 1e-10


def test_adam_without_frames_sees_rotations():
    """The control: the same embeddings by AdamW, all else by QuotientAdam."""
    model = small_model("gpt")
    twin, _ = twin_of(model, cond=1.0, only=lambda name: name == "residual")
    curves = []
    for own in (model, twin):
        symmetries = qo.find_symmetries(own)
        inner = [p for n, p in own.named_parameters() if n.startswith("blocks.")]
        outer = [p for n, p in own.named_parameters() if not n.startswith("blocks.")]
        groups = [{"params": inner}, {"params": outer, "residual_frame": None}]
        optimizer = qo.QuotientAdam(groups, **OPTIONS, symmetries=symmetries)
        curves.append(train(own, optimizer, 30))
    assert (curves[0] - curves[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("width", "factor"), [(32, 1), (128, 1), (192, 2 / 3)])
def test_the_update_is_adams_in_the_frame(width, factor):
    """Adam of the reference, on ∂Q, at its own scale and with Nesterov momentum.

    The scale is 128/d of what is asked for between d = 128 and 1024.
    """
    model = small_model("gpt", layers=1, width=width)
    table = model.embedding.weight
    optimizer = qo.QuotientAdam(model, **OPTIONS, update_scale=3.0, embedding_scale=1.5)
    mean = square = 0.0
    for step in range(1, 5):
        before = table.detach().clone()
        train(model, optimizer, 1, seed=step)
        Q = optimizer.state[table]["residual_frame"]
        z = table.grad @ Q
        mean, square = 0.9 * mean + 0.1 * z, 0.95 * square + 0.05 * z.square()
        ahead = 0.9 * mean / (1 - 0.9 ** (step + 1)) + 0.1 * z / (1 - 0.9**step)
        update = ahead / ((square / (1 - 0.95**step)).sqrt() + 1e-8) @ Q.mT
        rate = OPTIONS["lr"] * 4.5 * factor
        expected = (1 - rate * OPTIONS["weight_decay"]) * before - rate * update
        assert (table - expected).abs().max() < 1e-13


@pytest.mark.parametrize(("width", "factor"), [(128, 1), (192, 2 / 3)])
def test_sizes_of_a_head_that_follows(width, factor):
    """Those of the other matrices, less on wide streams as embeddings are; never theirs."""
    model = small_model("gpt", layers=1, width=width)
    own = {"update_scale": 3.0, "embedding_scale": 1.5, "embedding_frame": "fixed_but_head"}
    optimizer = qo.QuotientAdam(model, **OPTIONS, **own)
    train(model, optimizer, 1)
    slices = [s for b in optimizer._current_engine().buckets for s in b.slices]
    sizes = {s.name: scale_of(s, optimizer.param_groups[0]) for s in slices}
    assert sizes["head.weight"] == pytest.approx(3.0 * factor)
    assert sizes["embedding.weight"] == pytest.approx(4.5 * factor)
    assert sizes["blocks.0.mlp.up.weight"] == 3.0


def test_embeddings_shrink_with_the_width_between_two():
    factors = [embedding_width_factor(width) for width in (1, 128, 256, 768, 1024, 8192)]
    assert factors == [1, 1, 1 / 2, 1 / 6, 1 / 8, 1 / 8]


def test_state_moves_with_a_rotation():
    model = small_model("gpt")
    optimizer = qo.QuotientAdam(model, **OPTIONS)
    train(model, optimizer, 5)
    twin, state = copy.deepcopy((model, optimizer))
    element = state.symmetries.random_element(generator=torch.Generator().manual_seed(1))
    element = {"residual": element["residual"]}
    state.symmetries.act_(element)
    state.move_state_(element)
    losses = train(model, optimizer, 12, seed=3)
    assert (losses - train(twin, state, 12, seed=3)).abs().max() < 1e-10


def test_a_linear_layer_in_front_is_a_matrix_as_those_inside():
    """Its frame follows, it gets the polar step and no size of embeddings; twins stay together."""
    model = small_vit()
    twin, element = twin_of(model, cond=1000.0)
    assert "residual" in element
    optimizer = qo.QuotientAdam(model, **OPTIONS)
    losses = train_on_images(model, optimizer, 30)
    [bucket] = [
        b
        for b in optimizer._current_engine().buckets
        if any(s.name == "patches.weight" for s in b.slices)
    ]
    assert bucket.orthogonalises
    assert scale_of(bucket.slices[0], optimizer.param_groups[0]) == 4.0
    other = qo.QuotientAdam(twin, **OPTIONS)
    assert (train_on_images(twin, other, 30) - losses).abs().max() < 1e-10


def test_a_matrix_in_front_that_is_no_layer_may_be_a_head():
    """Which some models list first, and multiply from the right."""
    model = small_vit()
    symmetries = qo.find_symmetries(model)
    patches = id(model.patches.weight)
    assert patches not in slices._outside_of_layers(symmetries)
    stream = symmetries.residual
    own = {
        name: {
            key.removesuffix(".weight") if key == "patches.weight" else key: value
            for key, value in getattr(stream, name).items()
        }
        for name in ("axes", "parameters")
    }
    stream = dataclasses.replace(stream, **own)
    renamed = SimpleNamespace(heads=symmetries.heads, residual=stream)
    assert slices._outside_of_layers(renamed)[patches] is False


def test_a_head_stays_one_whichever_way_it_is_stored():
    """As GPT-2's layers are, the stream on their first axis."""
    model = small_vit()
    symmetries = qo.find_symmetries(model)
    stream = symmetries.residual
    axes = dict(stream.axes) | {"head.weight": 0}
    turned = SimpleNamespace(
        heads=symmetries.heads, residual=dataclasses.replace(stream, axes=axes)
    )
    assert slices._outside_of_layers(turned)[id(model.head.weight)] is True


def test_a_state_in_which_a_layer_in_front_was_an_embedding(monkeypatch):
    """As in version 0.2.0: it goes on from the frame; the control lacks one of another matrix."""
    of_now, model = slices._outside_of_layers, small_vit()
    front = {id(model.patches.weight): False}
    monkeypatch.setattr(slices, "_outside_of_layers", lambda found: of_now(found) | front)
    optimizer = qo.QuotientAdam(model, **OPTIONS)
    train_on_images(model, optimizer, 12)
    assert "patches.weight" in kept_frames(optimizer, model)
    monkeypatch.setattr(slices, "_outside_of_layers", of_now)
    other = copy.deepcopy(model)
    again = qo.QuotientAdam(other, **OPTIONS)
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    assert torch.equal(
        again.state[other.patches.weight]["residual_frame"],
        optimizer.state[model.patches.weight]["residual_frame"],
    )
    losses = train_on_images(other, again, 30, seed=2)
    assert losses.isfinite().all()
    assert again.state[other.patches.weight]["residual_covariance"].norm() > 0
    inner = [n for n, _ in model.named_parameters()].index("blocks.0.mlp.up.weight")
    del saved["state"][inner]["residual_covariance"]
    with pytest.raises(ValueError, match=r"'residual_covariance' of 'blocks.0.mlp.up.weight' is"):
        qo.QuotientAdam(small_vit(), **OPTIONS).load_state_dict(saved)


def test_a_model_without_numbered_layers_has_none():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model("gpt").blocks[0]
            self.embedding = nn.Embedding(7, 32, dtype=torch.float64)
            self.head = nn.Linear(32, 7, bias=False, dtype=torch.float64)

        def forward(self, tokens):
            return self.head(self.inner(self.embedding(tokens)))

    model, tokens = Single(), torch.arange(7)[None]
    optimizer = qo.QuotientAdam(model, **OPTIONS, example_inputs=tokens)
    model(tokens).square().sum().backward()
    optimizer.step()
    assert kept_frames(optimizer, model) == set()


def test_an_unknown_choice_is_refused():
    with pytest.raises(
        ValueError, match="embedding_frame must be 'fixed' or 'fixed_but_head' or 'per_matrix'"
    ):
        qo.QuotientAdam(small_model("gpt"), embedding_frame="none")

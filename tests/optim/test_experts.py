"""Matrices in parameters of more than two axes: experts, convolutions of patches, positions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.optim.bookkeeping import slices
from quotientopt.optim.reference import PlainQuotientAdam
from tests.optim.training import (
    EXPERTS,
    Experts,
    batches,
    in_two_axes_alone,
    loss_of,
    small_model,
    train,
)

SETTINGS = {"lr": 7.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def with_experts(transposed=False):
    """The small GPT with experts in place of its MLPs."""
    torch.manual_seed(3)
    model = small_model("gpt")
    for block in model.blocks:
        block.mlp = Experts(32, 24, transposed)
    return model.double()


def example():
    return next(batches(1))[:, :-1]


def adam(model, **options):
    return qo.QuotientAdam(
        model, **SETTINGS | options, symmetries=qo.find_symmetries(model, example())
    )


def slices_of(optimizer, name):
    return [s for s in optimizer._slices.framed if s.name == name]


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_share_a_frame(transposed):
    optimizer = adam(with_experts(transposed))
    assert not any(p.ndim > 1 for own in optimizer._slices.plain for p in own)
    for part, rows in (("up", 24), ("down", 24)):
        [slice_] = slices_of(optimizer, f"blocks.1.mlp.{part}")
        assert slice_.stacked
        assert slice_.shape == (1, EXPERTS, rows, 32)
        assert slice_.residual
        assert not slice_.embedding


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, {}),
        ({"polar": "step", "row_frame": "per_head"}, {}),
        ({"hidden_frame": "per_matrix"}, {"hidden": "per_matrix"}),
        ({"second_moment": "factored"}, {"factored": True}),
    ],
)
def test_equals_the_plain_form(options, plain):
    model = with_experts()
    fast = copy.deepcopy(model)
    found = train(fast, adam(fast, **options), 25)
    own = {"nesterov": True, "polar": True, "row_frame": "per_matrix"}
    own |= {key: value for key, value in options.items() if key in own}
    deviation = (found - by_the_plain_form(model, **own, **plain)).abs()
    assert deviation[:10].max() < 1e-11
    assert deviation.max() < 1e-9


def by_the_plain_form(model, **options):
    pairs, matrices = [], []
    for block in model.blocks:
        a = block.attention
        pairs += [(a.query.weight, None), (a.key.weight, None)]
        pairs += [(a.output.weight, 1), (a.value.weight, None)]
        matrices += [(block.mlp.router.weight, None), (block.mlp.up, None), (block.mlp.down, 1)]
    tables = [(m.weight, None) for m in (model.head, model.embedding, model.positions)]

    def read(tensor, axis):
        return tensor if axis is None else tensor.mT

    def factor(tensor, axis):
        return read(tensor, axis).reshape(4, 8, -1)

    ways = [factor] * len(pairs) + [read] * (len(matrices) + len(tables))
    every = [*pairs, *matrices, *tables]
    copies = [way(p.detach(), axis).clone() for way, (p, axis) in zip(ways, every, strict=True)]
    factors = [tuple(copies[i : i + 2]) for i in range(0, len(pairs), 2)]
    first = len(pairs) + len(matrices)
    inner, outer = copies[len(pairs) : first], copies[first:]
    oracle = PlainQuotientAdam(factors, inner, **SETTINGS, embeddings=outer, **options)
    losses = []
    for tokens in batches(25):
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        losses.append(loss.item())
        for way, mine, (p, axis) in zip(ways, oracle.params, every, strict=True):
            mine.grad = way(p.grad, axis)
        oracle.step()
        with torch.no_grad():
            for mine, (p, axis) in zip(oracle.params, every, strict=True):
                read(p, axis).copy_(mine.reshape(read(p, axis).shape))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_twins(transposed):
    """From x and from g x, O(d) included, losses are the same; those of AdamW are not."""
    model = with_experts(transposed)
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin, example())
    element = symmetries.random_element(cond=1e3, generator=torch.Generator().manual_seed(2))
    assert "residual" in element
    symmetries.act_(element)
    for ours in (True, False):
        losses = []
        for start in (model, twin):
            own = copy.deepcopy(start)
            optimizer = adam(own) if ours else torch.optim.AdamW(own.parameters(), lr=1e-3)
            losses.append(train(own, optimizer, 30))
        deviation = (losses[0] - losses[1]).abs().max()
        assert deviation < 1e-10 if ours else deviation > 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_state_moves_with_a_rotation(transposed):
    """A twin made in the middle of training, state included; the control keeps the old state."""
    model = with_experts(transposed)
    optimizer = adam(model)
    train(model, optimizer, 15)
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin, example())
    element = symmetries.random_element(cond=10.0, generator=torch.Generator().manual_seed(2))
    symmetries.act_(element)
    losses = []
    for moved in (True, False):
        own = copy.deepcopy(twin)
        other = adam(own)
        other.load_state_dict(optimizer.state_dict())
        if moved:
            other.move_state_(element)
        losses.append(train(own, other, 12, seed=3))
    expected = train(model, optimizer, 12, seed=3)
    assert (losses[0] - expected).abs().max() < 1e-10
    assert (losses[1] - expected).abs().max() > 1e-4


def test_each_expert_has_its_polar_step_and_its_size():
    """Singular values of one expert are nearly equal; sizes of Adam's directions differ."""
    model = with_experts()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight[0] += 4  # Much of the tokens' weight goes to one.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes = {}
    for polar in (True, False):
        own = copy.deepcopy(model)
        train(own, adam(own, polar=polar, weight_decay=0.0), 1)
        change = dict(own.named_parameters())["blocks.0.mlp.up"] - before["blocks.0.mlp.up"]
        sigma = torch.linalg.svdvals(change.detach())
        spread = sigma.amin(-1) / sigma.amax(-1)
        assert bool((spread > 0.8).all()) == polar
        sizes[polar] = torch.linalg.matrix_norm(change.detach())
    assert (sizes[True] / sizes[False] - 1).abs().max() < 1e-10


class Patches(nn.Module):
    """A transformer on images, or lines, whose patches a convolution embeds."""

    def __init__(self, convolution=nn.Conv2d):
        super().__init__()
        self.stem = convolution(3, 32, 4, stride=4)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, 32))
        self.blocks = small_model("gpt").blocks
        self.head = nn.Linear(32, 4, bias=False)

    def forward(self, images):
        x = self.stem(images).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x)
        x = functional.rms_norm(x, (32,))
        return self.head(x.mean(1))


def on_patches(memory_format=torch.contiguous_format):
    torch.manual_seed(4)
    model = Patches().double()
    model.stem.to(memory_format=memory_format)
    return model


def images(steps):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        classes = torch.randint(4, (8,), generator=generator)
        noise = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
        yield noise + classes[:, None, None, None] * torch.linspace(-1, 1, 16), classes


def train_on_images(model, optimizer, steps):
    losses = []
    for pixels, classes in images(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(pixels), classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def adam_on_patches(model, **options):
    found = qo.find_symmetries(model, next(images(1))[0])
    return qo.QuotientAdam(model, **SETTINGS | options, symmetries=found)


@pytest.mark.parametrize(
    ("shape", "axis", "name", "expected", "stacked"),
    [
        ((4, 96, 64), 2, "layers.0.experts.gate_up_proj", (4, 96, 64), True),
        ((4, 64, 96), 1, "layers.0.experts.gate_up_proj", (4, 96, 64), True),
        ((1, 17, 64), 2, "embeddings.position_embeddings", (1, 17, 64), True),
        ((64, 3, 4, 4), 0, "stem.weight", (3, 16, 64), False),
        ((64, 1, 4, 4), 0, "stem.weight", (1, 16, 64), False),
        ((96, 64, 3), 1, "layers.0.conv.weight", (96, 3, 64), False),
        ((64, 96, 3), 0, "layers.0.conv.weight", (96, 3, 64), False),
        ((1, 4, 5, 64), 3, "positions", (1, 20, 64), False),
        ((96, 64), 1, "layers.0.up.weight", (1, 96, 64), False),
        ((64, 1, 31), 0, "layers.0.conv.depthwise.weight", None, False),
        ((64, 4, 31), 0, "encoder.convolution.parametrizations.weight.original1", None, False),
        ((64,), 0, "layers.0.up.bias", None, False),
    ],
)
def test_which_axes_are_rows(shape, axis, name, expected, stacked):
    """What takes every coordinate of the stream for itself is no matrix."""
    parameter = torch.empty(shape)
    view = slices.matrices_on(parameter, axis, name)
    assert (None if view is None else tuple(view.shape)) == expected
    assert slices._is_stack(parameter, axis) == stacked


def test_what_is_no_matrix_is_adamws():
    """A convolution along time of every channel for itself, in a numbered layer."""
    model = on_patches()
    for block in model.blocks:
        block.mix = nn.Conv1d(32, 32, 3, padding=1, groups=32, bias=False).double()
        forward = block.forward
        block.forward = lambda x, b=block, f=forward: f(x) + b.mix(x.mT).mT
    optimizer = adam_on_patches(model)
    names = {id(p): n for n, p in model.named_parameters()}
    plain = {names[id(p)] for own in optimizer._slices.plain for p in own if p.ndim > 1}
    assert plain == {"blocks.0.mix.weight", "blocks.1.mix.weight"}
    losses = train_on_images(model, optimizer, 12)
    assert losses.isfinite().all()


def test_a_convolution_is_one_matrix_in_any_memory_format():
    losses = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = on_patches(memory_format)
        optimizer = adam_on_patches(model, hidden_frame="per_matrix")
        [stem] = slices_of(optimizer, "stem.weight")
        assert stem.shape == (1, 3, 16, 32)
        assert not stem.stacked
        assert not stem.embedding
        [positions] = slices_of(optimizer, "positions")
        assert positions.shape == (1, 1, 16, 32)
        assert positions.embedding
        losses.append(train_on_images(model, optimizer, 25))
        state = optimizer.state[model.stem.weight]
        assert state["hidden_frame"].shape == (48, 48)
    assert (losses[0] - losses[1]).abs().max() < 1e-11


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d])
def test_its_update_is_that_of_the_matrix(convolution):
    """Of a convolution along a line as well, which has as many axes as a stack of experts."""
    torch.manual_seed(4)
    model = Patches(convolution).double()
    before = model.stem.weight.detach().clone()
    pixels, classes = next(images(1))
    pixels = pixels if convolution is nn.Conv2d else pixels.flatten(2)[..., ::4]
    found = qo.find_symmetries(model, pixels)
    optimizer = qo.QuotientAdam(model, lr=1e-3, weight_decay=0.0, symmetries=found)
    functional.cross_entropy(model(pixels), classes).backward()
    optimizer.step()
    assert not slices_of(optimizer, "stem.weight")[0].stacked
    sigma = torch.linalg.svdvals((model.stem.weight.detach() - before).flatten(1))
    assert sigma.amin() / sigma.amax() > 0.8


def test_a_convolution_shares_no_stack_with_experts_of_its_shape():
    """Three channels of 4 × 4 and three experts of 16 rows: one matrix, and three."""
    torch.manual_seed(4)
    model = Patches()
    model.blocks[0].mlp = Experts(32, 16)
    model.double()
    optimizer = adam_on_patches(model)
    buckets = [[s.name for s in b.slices] for b in optimizer._current_engine().buckets]
    [stem] = [names for names in buckets if "stem.weight" in names]
    assert stem == ["stem.weight"]
    shapes = [slices_of(optimizer, name)[0].shape for name in ("stem.weight", "blocks.0.mlp.up")]
    assert shapes[0] == shapes[1]


def test_a_state_goes_over_to_another_memory_format():
    model = on_patches()
    optimizer = adam_on_patches(model)
    train_on_images(model, optimizer, 12)
    other = on_patches(torch.channels_last)
    other.load_state_dict(model.state_dict())
    assert not other.stem.weight.is_contiguous()
    again = adam_on_patches(other)
    again.load_state_dict(optimizer.state_dict())
    losses = [train_on_images(m, o, 12) for m, o in ((model, optimizer), (other, again))]
    assert (losses[0] - losses[1]).abs().max() < 1e-11


def test_a_state_of_adamw_goes_on_in_the_frame_it_was_in():
    """As of version 0.2.0: the same moments, in a frame that turns from the next one on."""
    model = on_patches()
    found = qo.find_symmetries(model, next(images(1))[0])
    older = qo.QuotientAdam(model, **SETTINGS, symmetries=in_two_axes_alone(found))
    train_on_images(model, older, 12)
    assert set(older.state[model.stem.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    saved = older.state_dict()
    other = copy.deepcopy(model)
    again = adam_on_patches(other)
    again.load_state_dict(copy.deepcopy(saved))
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    stem, inner = places["stem.weight"], places["blocks.0.mlp.up.weight"]
    own, moment = again.state[other.stem.weight], saved["state"][stem]["exp_avg"]
    assert torch.equal(own["residual_frame"], torch.eye(32, dtype=torch.float64))
    assert torch.equal(own["exp_avg"], moment.movedim(0, -1).reshape(1, 1, 48, 32))
    positions = again.state[other.positions]
    assert "residual_covariance" not in positions
    losses = train_on_images(other, again, 30)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    assert (own["residual_frame"] - torch.eye(32)).norm() > 1
    assert torch.equal(positions["residual_frame"], torch.eye(32, dtype=torch.float64))
    # Controls: frames that cannot be made of it, another shape, matrices that had frames then.
    hidden = {"hidden_frame": "per_matrix"}
    framed = qo.QuotientAdam(model, **SETTINGS, **hidden, symmetries=in_two_axes_alone(found))
    train_on_images(model, framed, 1)
    with pytest.raises(ValueError, match=r"'hidden_frame' of 'stem.weight' is missing"):
        adam_on_patches(on_patches(), **hidden).load_state_dict(framed.state_dict())
    damaged = copy.deepcopy(saved)
    damaged["state"][stem]["exp_avg"] = torch.zeros(32, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'exp_avg' of 'stem.weight' has shape"):
        adam_on_patches(on_patches()).load_state_dict(damaged)
    damaged = copy.deepcopy(saved)
    del damaged["state"][inner]["residual_frame"]
    with pytest.raises(ValueError, match=r"'residual_frame' of 'blocks.0.mlp.up.weight'"):
        adam_on_patches(on_patches()).load_state_dict(damaged)


def test_a_state_of_adamw_for_experts_and_masters():
    """Of both kinds of experts, with wide copies."""
    for transposed in (False, True):
        model = with_experts(transposed)
        found = qo.find_symmetries(model, example())
        model.bfloat16()
        options = SETTINGS | {"master_weights": True}
        older = qo.QuotientAdam(model, **options, symmetries=in_two_axes_alone(found))
        train(model, older, 3)
        again = qo.QuotientAdam(model, **options, symmetries=found)
        again.load_state_dict(older.state_dict())
        up = model.blocks[0].mlp.up
        master = again.state[up]["master"][0]
        assert torch.equal(master.to(up.dtype), up.mT if transposed else up)
        assert (master != master.to(up.dtype)).any()
        assert train(model, again, 3).isfinite().all()


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_models_of_transformers(name):
    """Their experts learn in frames; biases of experts alone are AdamW's."""
    import transformers

    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    optimizer = qo.QuotientAdam(model, lr=1e-3, example_inputs={"input_ids": example()})
    names = {id(p): n for n, p in model.named_parameters()}
    plain = {names[id(p)] for own in optimizer._slices.plain for p in own if p.ndim > 1}
    assert all(n.endswith("bias") for n in plain)
    for part in ("gate_up_proj", "down_proj"):
        [slice_] = slices_of(optimizer, f"model.layers.0.mlp.experts.{part}")
        assert slice_.stacked
        assert slice_.shape[-1] == 32
    losses = []
    for tokens in batches(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

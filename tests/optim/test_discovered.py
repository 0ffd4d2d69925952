"""Optimizers on models that no class tells: found from a batch, never AdamW in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, rms_norm, scaled_dot_product_attention

import quotientopt as qo
from quotientopt.models import GPT
from quotientopt.symmetries.verification import KeepFloat64
from tests.optim.training import batches, small_model, train
from tests.symmetries import families
from tests.symmetries.strangers import TOKENS, Plan, Stranger
from tests.symmetries.strangers import VOCABULARY as STRANGE
from tests.symmetries.strangers import tokens as strange_tokens

STEPS, COND = 30, 1000.0


class Tiny(nn.Module):
    """The reference GPT as a stranger writes it: one matrix for q, k and v, other names."""

    def __init__(self, reference: GPT) -> None:
        super().__init__()
        self.tok, self.pos = copy.deepcopy(reference.embedding), copy.deepcopy(reference.positions)
        self.n = reference.blocks[0].attention.heads
        self.h = nn.ModuleList(Part(block) for block in reference.blocks)
        self.lm = copy.deepcopy(reference.head)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1]))
        for part in self.h:
            x = part(x, self.n)
        return self.lm(norm(x))


class Part(nn.Module):
    """A layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        attention = block.attention
        parts = [attention.query.weight, attention.key.weight, attention.value.weight]
        self.c = nn.Parameter(torch.cat([p.detach() for p in parts]).T.clone())
        self.p, self.f, self.g = (
            nn.Parameter(p.weight.detach().clone())
            for p in (attention.output, block.mlp.up, block.mlp.down)
        )

    def forward(self, x: Tensor, n: int) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (n, -1)).transpose(1, 2) for y in (norm(x) @ self.c).chunk(3, -1)
        )
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ self.p.T
        return x + gelu(norm(x) @ self.f.T) @ self.g.T


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], eps=1e-6)


def batch() -> Tensor:
    return next(iter(batches(1)))[:, :-1]


def quotient_adam(model: nn.Module, **options: object) -> qo.QuotientAdam:
    return qo.QuotientAdam(model, lr=8e-3, betas=(0.9, 0.95), weight_decay=0.1, **options)


def test_a_rewritten_gpt_trains_as_the_reference_does():
    reference = small_model("gpt", layers=2)
    stranger = Tiny(reference).to(torch.float64)
    with torch.no_grad():
        assert torch.allclose(stranger(batch()), reference(batch()), atol=1e-12)
    blind = copy.deepcopy(stranger)
    with pytest.warns(UserWarning, match="h.0, h.1 in Tiny are not understood: pass example_inp"):
        adamw = quotient_adam(blind)
    losses = train(reference, quotient_adam(reference), 60)
    found = train(stranger, quotient_adam(stranger, example_inputs=batch()), 60)
    without = train(blind, adamw, 60)
    # Rounding, amplified by training; the bar is 0.005.
    assert (found - losses).abs().max() < 1e-6
    assert (without - losses)[-10:].mean() > 0.05


@pytest.mark.parametrize(
    "plan",
    [
        Plan(layout="fused", bias=True, mlp="relu"),
        Plan(layout="per head", heads=4, shared=2, positions="half", rotated=4, mlp="swiglu"),
        Plan(layout="einsum", positions="interleaved", rotated=2, norm="unit"),
    ],
    ids=lambda plan: plan.layout,
)
def test_twins_of_strangers(plan):
    model = Stranger(plan).double()
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin, strange_tokens())
    element = symmetries.random_element(cond=COND, generator=torch.Generator().manual_seed(2))
    names = {symmetry.name for symmetry in symmetries.heads}
    symmetries.act_({name: g for name, g in element.items() if name in names})

    def losses(start: nn.Module, adamw: bool) -> Tensor:
        model = copy.deepcopy(start)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if not adamw:
            optimizer = qo.QuotientAdam(
                model, lr=3e-3, residual_frame=None, example_inputs=strange_tokens()
            )
        generator = torch.Generator().manual_seed(3)
        found = []
        for _ in range(STEPS):
            tokens = torch.randint(STRANGE, (4, TOKENS), generator=generator)
            optimizer.zero_grad()
            loss = cross_entropy(model(tokens).flatten(0, 1), (tokens * 7 % STRANGE).flatten())
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    assert (losses(model, False) - losses(twin, False)).abs().max() < 1e-10
    assert (losses(model, True) - losses(twin, True)).abs().max() > 1e-4


def test_an_optimizer_says_once_what_it_does_not_understand():
    model = Stranger(Plan())
    with pytest.warns(UserWarning, match="not understood") as caught:
        qo.QuotientAdam(model)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("QuotientAdam steps as torch.optim.AdamW where it must:")
    assert "steps.0.mixer, steps.1.mixer in Stranger" in message
    assert "example_inputs=batch" in message
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="QuotientSGD steps as torch.optim.SGD where it must"):
        qo.QuotientSGD(model, lr=0.1)
    with pytest.warns(UserWarning, match="Linear has no attention and no low-rank pair"):
        qo.QuotientAdam(nn.Linear(3, 3))
    model(strange_tokens()).sum().backward()
    with pytest.warns(UserWarning, match="invariant_grad_norm is Euclidean, and sees the gauge"):
        qo.invariant_grad_norm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qo.QuotientAdam(model, symmetries=qo.find_symmetries(model))
        qo.QuotientAdam(model, symmetries=())
        qo.QuotientAdam(model, example_inputs=strange_tokens())
        qo.QuotientSGD(model, lr=0.1, example_inputs=(strange_tokens(),))
        qo.QuotientAdam(small_model("gpt"))


def test_batches_as_data_loaders_give_them():
    family = families.FAMILIES["gpt2"]
    model = family.model()
    mapping = family.inputs()
    for inputs in (mapping, mapping["input_ids"], (mapping["input_ids"],)):
        optimizer = qo.QuotientAdam(model, example_inputs=inputs)
        assert len(optimizer.symmetries.heads) == 4
    with pytest.raises(TypeError, match="a tensor, a tuple of arguments or a mapping"):
        qo.QuotientAdam(model, example_inputs=3)
    with pytest.raises(TypeError, match="finds symmetries from example_inputs in a model"):
        qo.QuotientAdam(model.parameters(), example_inputs=mapping)


def test_found_symmetries_survive_a_checkpoint_and_a_copy():
    model = Stranger(Plan(layout="fused", bias=True)).double()
    optimizer = qo.QuotientAdam(model, lr=3e-3, example_inputs=strange_tokens())
    for _ in range(3):
        optimizer.zero_grad()
        model(strange_tokens()).square().mean().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = qo.QuotientAdam(other, lr=3e-3, example_inputs=strange_tokens())
    resumed.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other, resumed)):
        o.zero_grad()
        m(strange_tokens()).square().mean().backward()
        o.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "name",
    [
        *("falcon", "mixtral", "gemma3", "mpt", "gpt-j", "xlm-roberta"),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("starcoder2", "granite", "smollm3", "olmo2", "electra")
        ),
    ],
)
def test_twins_of_library_models_found_without_their_adapters(name):
    family = families.FAMILIES.get(name)
    if family is None:
        pytest.skip(f"no family called {name} among {', '.join(families.FAMILIES)}")
    from quotientopt.symmetries import SymmetryMap
    from quotientopt.symmetries.discovery import discover

    model = family.model().double()
    with KeepFloat64():
        twin = copy.deepcopy(model)
        maps = [SymmetryMap(discover(m, (), family.inputs()).heads) for m in (model, twin)]
        generator = torch.Generator().manual_seed(2)
        element = maps[1].random_element(cond=COND, generator=generator)
        names = {symmetry.name for symmetry in maps[1].heads}
        maps[1].act_({n: g for n, g in element.items() if n in names})

        def curve(m, optimizer):
            losses = []
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = m(**family.inputs())[0].square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return torch.tensor(losses, dtype=torch.float64)

        blind = [
            curve(own, torch.optim.AdamW(own.parameters(), lr=3e-3))
            for own in copy.deepcopy((model, twin))
        ]
        curves = [
            curve(m, qo.QuotientAdam(m, lr=3e-3, symmetries=symmetries, residual_frame=None))
            for m, symmetries in zip((model, twin), maps, strict=True)
        ]
    assert maps[0].heads
    assert curves[0][-1] < curves[0][0]
    assert (curves[0] - curves[1]).abs().max() < 1e-10
    assert (blind[0] - blind[1]).abs().max() > 1e-4


def biased() -> list[nn.Module]:
    plan = Plan(layout="fused", heads=4, shared=2, bias=True, positions="relative")
    return [Stranger(plan).double(), families.FAMILIES["gpt2"].model().double()]


@pytest.mark.parametrize("index", [0, 1], ids=["stranger", "gpt2"])
@pytest.mark.parametrize("polar", [False, "step", True])
def test_twins_under_translations_of_biases(index, polar):
    model = biased()[index]
    twin = copy.deepcopy(model)
    tokens = strange_tokens()
    symmetries = qo.find_symmetries(twin, tokens)
    generator = torch.Generator().manual_seed(2)
    element = symmetries.random_element(cond=COND, generator=generator)
    names = {symmetry.name for symmetry in symmetries.heads}
    translations = {n: t for n, t in element.items() if n.endswith(".translation")}
    assert len(translations) == 4
    symmetries.act_({n: g for n, g in element.items() if n in names} | translations)

    def losses(start: nn.Module, adamw: bool) -> Tensor:
        model = copy.deepcopy(start)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.03},
        ]
        if adamw:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=3e-3)
        else:
            optimizer = qo.QuotientAdam(
                groups,
                lr=3e-3,
                polar=polar,
                residual_frame=None,
                symmetries=qo.find_symmetries(model, tokens),
            )
        found = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            output = model(tokens)
            logits = output if isinstance(output, Tensor) else output.logits
            loss = cross_entropy(logits.flatten(0, 1), (tokens * 7 % STRANGE).flatten())
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            # The gradients that the user sees are their own.
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                assert torch.equal(parameter.grad, gradient)
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    assert (losses(model, False) - losses(twin, False)).abs().max() < 1e-10
    assert (losses(model, True) - losses(twin, True)).abs().max() > 1e-4


@pytest.mark.parametrize("mlp", ["swiglu", "relu"])
def test_twins_under_scales_of_hidden_units(mlp):
    model = Stranger(Plan(mlp=mlp, bias=True)).double()
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin, strange_tokens())
    element = symmetries.random_element(cond=COND, generator=torch.Generator().manual_seed(2))
    units = {s.name for s in symmetries.hidden_units}
    assert len(units) == 2
    symmetries.act_({n: g for n, g in element.items() if n in units})

    def losses(start: nn.Module, hidden_units: bool) -> Tensor:
        model = copy.deepcopy(start)
        optimizer = qo.QuotientAdam(
            model,
            lr=3e-3,
            polar=True,
            hidden_units=hidden_units,
            example_inputs=strange_tokens(),
        )
        found = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(strange_tokens()).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    assert (losses(model, True) - losses(twin, True)).abs().max() < 1e-10
    assert (losses(model, False) - losses(twin, False)).abs().max() > 1e-4

"""Rotary planes that share a frequency, stand still, or lie at the end of a head: GL(m, C)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import quotientopt as qo
from quotientopt import sections
from quotientopt.groups import GL, PlaneCommutant, RotaryCommutant, RotaryPhases
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.discovery import discover
from tests.symmetries.double import KeepFloat64
from tests.symmetries.strangers import VOCABULARY, Plan, Stranger, tokens

PLANS = {
    "two and two": Plan(periods="repeated", positions="half", layout="fused", rank=8, rotated=8),
    "opposite": Plan(periods="opposite", positions="interleaved", rank=8, rotated=8),
    "standing": Plan(periods="stopped", positions="half", rank=8, rotated=8, bias=True),
    "one": Plan(periods="one", positions="half", heads=4, shared=2, rank=6, rotated=6),
    "tail": Plan(tail=True, positions="half", rank=8, rotated=4, bias=True),
    "tail, by head": Plan(tail=True, positions="interleaved", layout="per head", rank=8, rotated=6),
    "tail, repeated": Plan(
        tail=True, periods="repeated", positions="half", layout="transposed", rank=10, rotated=8
    ),
    "repeated, normalised": Plan(
        periods="repeated", positions="half", norm="rms", rank=8, rotated=8
    ),
    "tail, normalised": Plan(tail=True, positions="half", norm="rms", rank=8, rotated=4),
}
PAIRS = {name: plan for name, plan in PLANS.items() if plan.norm == "none"}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_found_and_proved(plan: Plan):
    model = Stranger(plan, layers=1).double()
    found = discover(model, (tokens(),), {})
    group = plan.scores_group()
    assert isinstance(group, PlaneCommutant | RotaryPhases)
    (scores,) = (s for s in found.heads if s.name.endswith("qk"))
    assert scores.group == group
    assert scores.heads == plan.shared
    symmetries = SymmetryMap([scores])
    assert symmetries.verify(model, tokens(), cond=1000.0)[scores.name] < 1e-12
    # Control: a larger group moves the outputs.
    larger = HeadSymmetry(scores.left_blocks, scores.right_blocks, GL(plan.rank), scores.name)
    assert SymmetryMap([larger]).verify(model, tokens())[scores.name] > 1e-3


def test_a_frequency_too_many_is_caught():
    """Two distinct frequencies taken for one, and opposite ones taken for equal."""
    for periods, wrong in [
        ("repeated", [[(0, 4), (1, 5), (2, 6), (3, 7)]]),
        ("opposite", [[(0, 4), (1, 5)], [(2, 6), (3, 7)]]),
        ("distinct", [[(0, 4), (1, 5)], [(2, 6)], [(3, 7)]]),
    ]:
        model = Stranger(Plan(periods=periods, positions="half", rank=8, rotated=8), layers=1)
        (scores,) = (s for s in discover(model, (tokens(),), {}).heads if s.name.endswith("qk"))
        claim = HeadSymmetry(
            scores.left_blocks, scores.right_blocks, PlaneCommutant(8, wrong), scores.name
        )
        assert SymmetryMap([claim]).verify(model.double(), tokens())[scores.name] > 1e-3


def proportional(share: float = 0.5, **options) -> LlamaForCausalLM:
    """A Llama some of whose planes have frequency zero, as their kind of embedding says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": 100.0,
            "partial_rotary_factor": share,
        },
        **options,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    ("share", "group"),
    [
        (0.5, PlaneCommutant(8, [[(0, 4)], [(1, 5)]])),
        (0.3, PlaneCommutant(8, [[(0, 4)]])),
        (1.0, RotaryCommutant(8)),
    ],
)
def test_planes_that_stand_still_are_read_from_the_configuration(share, group):
    model = proportional(share)
    by_class = [s for s in qo.find_symmetries(model).heads if s.name.endswith("qk")]
    found = [s for s in discover(model, (tokens(),), {}).heads if s.name.endswith("qk")]
    assert [s.group for s in by_class] == [s.group for s in found] == 2 * [group]
    deviations = qo.find_symmetries(model).verify(model, tokens(), cond=1000.0)
    assert max(deviations.values()) < 1e-9
    if share < 1:
        assert by_class[0].group.dim > RotaryCommutant(8).dim


@pytest.mark.parametrize("kind", ["svd", "balanced", "orthonormal", "triangular"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_sections(kind, batch):
    group = PlaneCommutant(9, [[(5, 1)], [(0, 2), (8, 6)]])
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(*batch, 9, n, generator=generator, dtype=torch.float64) for n in (11, 12))
    g = group.random(batch, cond=100.0, generator=generator, dtype=torch.float64)
    (a, b), h = sections.rotary_section(kind, group, A, B)
    group.check_element(h)
    (c, d), _ = sections.rotary_section(kind, group, *group.act(g, (A, B)))

    def grams(X: Tensor) -> Tensor:
        return group.row_products(X @ X.mT)

    scale = max(X.abs().max() for X in (a, b))
    if kind == "svd":
        assert max((x - y).abs().max() for x, y in ((a, c), (b, d))) < 1e-9 * scale
        assert (grams(a) - grams(b)).abs().max() < 1e-10
        parts, block = group.parts(grams(b))
        for part in (*parts, block):
            assert (part - part.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().max() < 1e-10
    elif kind == "balanced":
        assert (grams(a) - grams(b)).abs().max() < 1e-10
        assert (h - h.mT).abs().max() < 1e-10
    else:
        eye = torch.eye(9, dtype=torch.float64)
        assert (grams(b) - eye).abs().max() < 1e-10
    # What is left after the section is orthogonal.
    left_over = d @ torch.linalg.pinv(b)
    assert (group.unitary_factor(left_over) - left_over).abs().max() < 1e-8
    # Control: without a section representatives differ.
    assert (group.act(g, (A, B))[1] - B).abs().max() > 1e-2
    vanishing = B.clone()
    vanishing[..., 8, :], vanishing[..., 6, :] = B[..., 0, :], B[..., 2, :]
    with pytest.raises(ValueError, match="rank-deficient or not finite on the rotary planes"):
        sections.rotary_section(kind, group, A, vanishing)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_canonical_forms_follow(plan: Plan):
    model, x = Stranger(plan, layers=1, width=22).double(), tokens()
    twin = copy.deepcopy(model)
    maps = [qo.find_symmetries(m, x) for m in (model, twin)]
    maps[1].act_(maps[1].random_element(cond=100.0, generator=torch.Generator().manual_seed(3)))
    (name,) = (s.name for s in maps[0].heads if s.name.endswith("qk"))
    assert max(qo.distance(model, twin, symmetries=tuple(maps)).values()) < 1e-9
    one, other = (
        qo.invariants(m, symmetries=s)[name] for m, s in zip((model, twin), maps, strict=True)
    )
    assert (one.dense() - other.dense()).abs().max() < 1e-10
    assert (one.singular_values - other.singular_values).abs().max() < 1e-10
    for m in (model, twin):
        qo.dress_(m, section="svd", example_inputs=x)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert max((p - q).abs().max() for p, q in pairs) < 1e-8
    # Control: a change that the model sees.
    with torch.no_grad():
        maps[1].heads[-1].right_blocks[0].view().mul_(1.01)
    assert max(qo.distance(model, twin, symmetries=tuple(maps)).values()) > 1e-3


def losses(start: nn.Module, make, steps: int = 30) -> Tensor:
    model, x = copy.deepcopy(start), tokens()
    optimizer, found = make(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        with KeepFloat64():
            output = model(x)
        logits = output if isinstance(output, Tensor) else output.logits
        loss = cross_entropy(logits.flatten(0, 1), (x * 7 % VOCABULARY).flatten())
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


OPTIMIZERS = {
    "balanced": lambda m: qo.QuotientAdam(m, lr=3e-3, residual_frame=None),
    "orthonormal": lambda m: qo.QuotientAdam(m, lr=3e-3, head_frame="orthonormal"),
    "svd": lambda m: qo.QuotientAdam(m, lr=3e-3, head_frame="svd", polar=True),
    "per matrix": lambda m: qo.QuotientAdam(m, lr=3e-3, row_frame="per_matrix"),
    "preconditioned": lambda m: qo.QuotientSGD(m, lr=3e-2, momentum=0.9, nesterov=True),
    "right-invariant": lambda m: qo.QuotientSGD(m, lr=1e-3, momentum=0.9, metric="right-invariant"),
}


def moved(model: nn.Module, *inputs: Tensor) -> nn.Module:
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin, *inputs)
    element = symmetries.random_element(cond=1000.0, generator=torch.Generator().manual_seed(2))
    symmetries.act_({s.name: element[s.name] for s in symmetries.heads})
    return twin


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_twins(make):
    model = proportional()
    twin = moved(model)
    own, other = losses(model, make), losses(twin, make)
    assert ((own - other) / own).abs().max() < 1e-10
    assert own[-1] < own[0]


def test_the_controls_of_the_twins_part():
    """AdamW and SGD, and QuotientAdam that knows one plane to every frequency."""
    model = proportional()
    twin = moved(model)

    def smaller(m):
        pairs = [
            HeadSymmetry(s.left_blocks, s.right_blocks, RotaryCommutant(8), s.name)
            if isinstance(s.group, PlaneCommutant)
            else s
            for s in qo.find_symmetries(m).heads
        ]
        return qo.QuotientAdam(m, lr=3e-3, symmetries=pairs)

    for make in (smaller, lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3)):
        own, other = losses(model, make), losses(twin, make)
        assert ((own - other) / own).abs().max() > 1e-4


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("optimizer", ["balanced", "preconditioned"])
def test_twins_of_found_pairs(name, optimizer):
    model, x = Stranger(PAIRS[name], layers=1, width=22).double(), tokens()
    twin = moved(model, x)
    options = {"balanced": (qo.QuotientAdam, 3e-3, {"residual_frame": None})}
    kind, lr, rest = options.get(optimizer, (qo.QuotientSGD, 0.03, {"momentum": 0.9}))

    def make(m):
        return kind(m, lr=lr, example_inputs=x, **rest)

    own, other = losses(model, make), losses(twin, make)
    assert ((own - other) / own).abs().max() < 1e-10
    assert own[-1] < own[0]


@pytest.mark.parametrize("kind", [qo.QuotientAdam, qo.QuotientSGD])
def test_state_moves_along(kind):
    model = proportional()
    optimizer = kind(model, lr=3e-3)
    step = torch.Generator().manual_seed(3)
    for _ in range(13):
        optimizer.zero_grad()
        x = tokens()
        model(x, labels=x).loss.backward()
        optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    drawn = other.symmetries.random_element(cond=1000.0, generator=step)
    element = {s.name: drawn[s.name] for s in other.symmetries.heads}
    other.symmetries.act_(element)
    other.move_state_(element)
    found = []
    for own, stepper in ((model, optimizer), (twin, other)):
        values = []
        for _ in range(20):
            stepper.zero_grad()
            with KeepFloat64():
                loss = own(x, labels=x).loss
            loss.backward()
            stepper.step()
            values.append(loss.item())
        found.append(torch.tensor(values, dtype=torch.float64))
    assert ((found[0] - found[1]) / found[0]).abs().max() < 1e-10


def test_norms_and_counts():
    model = proportional()
    twin, x = moved(model), tokens()
    norms = []
    for own in (model, twin):
        with KeepFloat64():
            own(x, labels=x).loss.backward()
        norms.append([qo.invariant_grad_norm(own, metric=m) for m in ("preconditioned", "svd")])
        norms[-1].append(torch.nn.utils.get_total_norm([p.grad for p in own.parameters()]))
    (one, svd, plain), (two, other, elsewhere) = norms
    assert abs(one / two - 1) < 1e-10
    assert abs(svd / other - 1) < 1e-10
    assert abs(plain / elsewhere - 1) > 1e-3
    # Two planes that turn and four rows that pass, in two heads of two layers.
    scores = [s for s in qo.find_symmetries(model).heads if s.name.endswith("qk")]
    counts = qo.find_symmetries(model).redundancy()
    assert [counts[s.name] for s in scores] == 2 * [2 * (2 * 2 + 4 * 4)]


def test_a_factor_of_zeros_leans_on_its_partner():
    """Queries that start at zero train, from twins alike."""
    model = proportional()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    twin = moved(model)
    own, other = (losses(m, OPTIMIZERS["balanced"]) for m in (model, twin))
    assert ((own - other) / own).abs().max() < 1e-9
    assert own[-1] < own[0]

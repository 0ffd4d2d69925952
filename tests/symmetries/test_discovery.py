"""Symmetries found from gradients: every layout, what adapters know, controls, nothing touched."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

import quotientopt as qo
from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.symmetries.discovery import discover
from quotientopt.symmetries.discovery.discover import COPIES
from tests.symmetries import architectures, families
from tests.symmetries.places import places
from tests.symmetries.strangers import TOKENS, VOCABULARY, Mixer, Plan, Stranger, tokens


@st.composite
def plans(draw: Any) -> Plan:
    """Architectures whose groups are known."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    shared = draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0]))
    rank = draw(st.sampled_from([2, 4, 6, 8]))
    layouts = ["separate", "fused", "per head", "transposed", "einsum", "key value"]
    layout = draw(st.sampled_from(layouts))
    extras = ["none", "gate", "tanh", "sink", "temperature", "head gate", "soft cap"]
    norm = draw(st.sampled_from(["none", "none", "rms", "unit", "gain"]))
    # Behind norms two standing rows, or a plane, are rotations of two rows alike.
    periods = ["distinct", "repeated", "opposite", "stopped", "one"] if norm == "none" else []
    return Plan(
        layout=layout,
        heads=heads,
        shared=shared,
        rank=rank,
        strided=draw(st.booleans()) and layout != "per head",
        rows_first=draw(st.booleans()) and layout not in ("einsum", "per head"),
        bias=draw(st.booleans()),
        positions=draw(st.sampled_from(["none", "half", "interleaved", "relative"])),
        rotated=draw(st.sampled_from(range(2, rank + 1, 2))),
        tail=draw(st.booleans()) and norm == "none",
        periods=draw(st.sampled_from(periods or ["distinct"])),
        norm=norm,
        # One matrix for queries and keys, where every query head has a key head of its own.
        extra=draw(st.sampled_from([*extras, *(["same"] if heads == shared else [])])),
        mlp=draw(st.sampled_from(["gelu", "relu", "swiglu", "linear"])),
        layer_norm=draw(st.booleans()),
    )


def name_of(group: StructureGroup) -> str:
    """One name for planes of two rows, which have one layout."""
    name = str(group)
    return name.replace("interleaved", "half") if "rotary_dim=2," in name else name


def expected(plan: Plan) -> tuple[Counter[Any], Counter[Any]]:
    """Head pairs and hidden units per layer."""
    heads: Counter[Any] = Counter()
    if plan.values_group() is not None:
        heads[name_of(GL(plan.rank)), plan.shared, plan.value_bias_is_free()] += 1
    scores = plan.scores_group()
    if plan.rank == 2 and plan.norm == "unit" and scores is not None:
        # Unit vectors see no length either: rotations and scales of two rows are a plane's group.
        scores = RotaryCommutant(2)
    if scores is not None:
        heads[name_of(scores), plan.shared, plan.key_bias_is_free()] += 1
    if plan.mlp == "linear":
        heads["GL(14)", 1, plan.bias] += 1
    units: Counter[Any] = Counter()
    if plan.units_group() is not None:
        units[str(plan.units_group())] += 22
    if plan.extra == "gate":
        # Behind a gate entry by entry every row of the values may still be rescaled.
        units["GL(1)"] += plan.shared * plan.rank
    return heads, units


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(plans())
@pytest.mark.long
def test_any_layout_no_claim_is_wrong_and_none_is_missed(plan: Plan):
    found = discover(Stranger(plan, layers=1), (tokens(),), {})
    heads = Counter((name_of(s.group), s.heads, s.translation is not None) for s in found.heads)
    units: Counter[Any] = Counter()
    for symmetry in found.hidden_units:
        units[str(symmetry.group)] += symmetry.heads
    assert (heads, units) == expected(plan)
    assert not found.not_exercised


FAMILIES = {
    **{name: make for name, (make, _) in architectures.EXAMPLES.items()},
    **{
        name: (lambda family=family: (family.model(), (), family.inputs()))
        for name, family in families.FAMILIES.items()
    },
}
# An extra key and value behind the projections are rows of no matrix that discovery looks at.
APPENDED = {"attention-bias-kv", "attention-bias-kv-no-bias"}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - APPENDED))
def test_what_adapters_know_is_found_without_them(name):
    model, inputs, kwargs = FAMILIES[name]()
    known = qo.find_symmetries(model).heads
    assert known
    found = discover(model, inputs, kwargs)
    assert places(found.heads) == places(known)
    assert all(s.source.startswith("found, proved to ") for s in found.heads)


@pytest.mark.parametrize("name", sorted(APPENDED))
def test_appended_keys_are_missed_not_misread(name):
    model, inputs, kwargs = FAMILIES[name]()
    assert not discover(model, inputs, kwargs).heads
    assert len(qo.find_symmetries(model, *inputs, **kwargs).heads) == 2


def test_a_stranger_is_not_understood_without_inputs_and_is_with_them():
    model = Stranger(Plan(layout="fused", bias=True, mlp="relu"))
    blind = qo.find_symmetries(model)
    assert not blind.heads
    assert blind.unrecognized == ("steps.0.mixer", "steps.1.mixer")
    symmetries = qo.find_symmetries(model, tokens())
    assert [s.name for s in symmetries.heads] == [
        f"steps.{i}.mixer.{kind}" for kind in ("vo", "qk") for i in (0, 1)
    ]
    assert not symmetries.unrecognized
    assert len(symmetries.hidden_units) == 2
    assert symmetries.residual is not None
    assert symmetries.residual.dimension == 20
    assert set(symmetries.residual.axes) >= {"table.weight", "places", "out.weight"}
    table = str(symmetries)
    assert "found, proved to" in table
    assert "GL(4) ⋉ R^4" in table
    deviations = symmetries.verify(model, tokens())
    assert len(deviations) == 4 + 4 + 2
    assert max(deviations.values()) < 1e-12
    # Queries and keys are told apart by the bias without effect.
    qk = symmetries.heads[2]
    assert qk.left_blocks[0].offset == 0
    assert qk.right_blocks[0].offset == 16 * 20


class Latent(nn.Module):
    """Keys and values from one latent projection without a norm; factors of two matrices."""

    def __init__(self, latent: int = 10) -> None:
        super().__init__()
        self.embed, self.widen = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 16, bias=False)
        self.q, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, latent, bias=False)
        self.up_k, self.up_v = (nn.Linear(latent, 16, bias=False) for _ in "kv")
        self.one, self.two = nn.Linear(16, 5, bias=False), nn.Linear(5, 16, bias=False)
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.widen(self.embed(tokens))
        u = rms_norm(x, (16,))
        c = self.down(u)
        parts = (self.q(u), self.up_k(c), self.up_v(c))
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in parts)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.two(self.one(y.transpose(1, 2).flatten(2)))
        return self.head(gelu(rms_norm(x, (16,))))


def test_linear_chains_and_latent_projections():
    model = Latent()
    found = {s.rank: s for s in discover(model, (tokens(),), {}).heads if s.heads == 1}
    # The middle of a factorised embedding, of a low-rank matrix, and of two readers.
    assert sorted(found) == [5, 6, 10]
    assert {b.name for b in found[10].left_blocks} == {"up_k.weight", "up_v.weight"}
    assert [b.name for b in found[10].right_blocks] == ["down.weight"]
    # The optimizer gives every weight one frame: that of its heads.
    symmetries = qo.find_symmetries(model, tokens())
    assert sorted((s.rank, s.heads) for s in symmetries.heads) == [(4, 4), (4, 4), (6, 1)]
    groups = [name.partition(" ")[2] for name in symmetries.overlapping]
    assert sorted(groups) == ["(GL(10))", "(GL(5))"]
    assert "exact too, on the same weights: chain (GL(10))" in str(symmetries)
    assert max(symmetries.verify(model, tokens()).values()) < 1e-12


class Gated(nn.Module):
    """No attention: a low-rank map of the inner width makes the gates, as in state-space models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.into, self.out = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.down, self.up = nn.Linear(24, 3, bias=False), nn.Linear(3, 24)
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        inner = gelu(self.into(x)).cumsum(1)
        x = x + self.out(inner * torch.nn.functional.softplus(self.up(self.down(inner))))
        return self.head(rms_norm(x, (16,)))


def test_a_chain_tells_no_residual_stream():
    model = Gated()
    symmetries = qo.find_symmetries(model, tokens())
    assert [(s.rank, s.heads) for s in symmetries.heads] == [(3, 1)]
    assert symmetries.residual is None
    with pytest.warns(UserWarning, match="example inputs show no residual stream of Gated"):
        optimizer = qo.QuotientAdam(model, example_inputs=tokens())
    model(tokens()).logsumexp(-1).sum().backward()
    optimizer.step()
    assert "residual_frame" not in optimizer.state[model.out.weight]
    assert "head_frame" in optimizer.state[model.down.weight]


def test_factors_that_cannot_have_full_rank_are_no_pairs():
    found = discover(Latent(latent=3), (tokens(),), {}).heads
    assert sorted(s.rank for s in found) == [3, 5, 6]


def test_nothing_is_touched():
    model = Stranger(Plan(bias=True, norm="gain"))
    model.train()
    model.steps[1].eval()
    model.register_buffer("counter", torch.zeros(2))
    calls = []
    hook = model.steps[0].register_forward_hook(lambda *_: calls.append(1))
    model(tokens()).sum().backward()
    calls.clear()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.no_grad():
        qo.find_symmetries(model, tokens())
    assert calls  # it did run
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
        assert parameter.data_ptr() == pointers[name]
    hook.remove()


def test_zero_biases_gains_of_one_and_zero_outputs_hide_nothing():
    model = Stranger(Plan(bias=True, norm="gain", rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gain" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias") or "back" in name:
                parameter.zero_()
    symmetries = qo.find_symmetries(model, tokens())
    # O(4) holds at gains of one, and nowhere near; values and outputs everywhere.
    assert [str(s.group) for s in symmetries.heads] == ["GL(4)", "GL(4)"]
    assert all(len(s.right_blocks) == 2 and s.translation is not None for s in symmetries.heads)


def test_hooks_on_projections_are_seen():
    model = Stranger(Plan())
    assert len(discover(model, (tokens(),), {}).heads) == 4
    model.steps[0].mixer.c.register_forward_hook(lambda _, __, y: y.tanh())
    model.steps[1].mixer.b.register_forward_pre_hook(lambda _, x: (x[0].sin(),))
    model.steps[1].mixer.a.register_forward_hook(lambda _, __, y: y * y)
    names = {s.name for s in discover(model, (tokens(),), {}).heads}
    assert names == {"steps.0.mixer.qk", "steps.1.mixer.vo"}


def rounded(x: Tensor) -> Tensor:
    """To the 24 bits of float32, in a way that no cast shows."""
    mantissa, exponent = torch.frexp(x.detach())
    return x + torch.ldexp((mantissa * 2**24).round() / 2**24, exponent) - x.detach()


def test_rounding_inside_the_forward_is_measured(monkeypatch):
    plan = Plan(positions="half", rotated=4, shared=2)
    project = Mixer.project

    def in_float32(self: Mixer, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(rounded, project(self, x)))

    exact = discover(Stranger(plan), (tokens(),), {})
    monkeypatch.setattr(Mixer, "project", in_float32)
    found = discover(Stranger(plan), (tokens(),), {})
    assert places(found.heads) == places(exact.heads)
    assert len(found.heads) == 4
    # What is reported is what was measured: rounding of float32, not of float64.
    for symmetry in found.heads:
        assert 1e-10 < float(symmetry.source.removeprefix("found, proved to ")) < 1e-5


def test_module_by_module_finds_the_same_in_less_memory():
    model = Stranger(Plan(positions="interleaved", shared=2, bias=True, mlp="swiglu"), layers=3)
    whole = discover(model, (tokens(),), {})
    layer = sum(p.numel() for p in model.steps[0].parameters())
    parts = discover(model, (tokens(),), {}, budget=COPIES * 8 * layer)
    for kind in ("heads", "hidden_units"):
        one, two = getattr(whole, kind), getattr(parts, kind)
        assert places(one) == places(two)
        translated = [{s.name: s.translation is not None for s in found} for found in (one, two)]
        assert translated[0] == translated[1]
    assert len(parts.heads) == 6
    assert parts.stream is not None
    assert parts.stream.width == 20
    assert set(parts.stream.axes) == {n for n in whole.stream.axes if "bias" not in n}
    assert parts.not_examined == ["places"]
    with pytest.raises(ValueError, match="needs 4 float64 copies of its largest part"):
        discover(model, (tokens(),), {}, budget=100)


def test_the_stream_of_a_model_without_gains_is_exact():
    model = architectures.small_gpt()
    found = discover(model, (architectures.tokens(),), {})
    assert found.stream is not None
    assert found.stream.broken_by == ()
    assert set(found.stream.axes) == set(qo.find_symmetries(model).residual.axes)
    assert found.stream.axes == dict(qo.find_symmetries(model).residual.axes)
    broken = discover(Stranger(Plan()), (tokens(),), {}).stream
    assert broken.broken_by != ()


class TwoTowers(nn.Module):
    """A second tower that only some inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Stranger(Plan(), layers=1), Stranger(Plan(), layers=1)

    def forward(self, tokens: Tensor, both: bool = False) -> Tensor:
        y = self.one(tokens)
        return y + self.two(tokens) if both else y


def test_what_does_not_run_is_listed_and_not_claimed():
    model = TwoTowers()
    symmetries = qo.find_symmetries(model, tokens())
    assert symmetries.not_exercised == ("two",)
    assert "not exercised by the example inputs: two" in str(symmetries)
    assert all(s.name.startswith("one.") for s in symmetries.heads)
    assert "two.steps.0.mixer" in symmetries.unrecognized
    assert len(qo.find_symmetries(model, tokens(), both=True).heads) == 4


class Noisy(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.calls = kind, nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        self.calls += 1
        return {
            "random": y * self.calls,
            "detached": y.detach(),
            "nan": y * math.nan,
            "text": "no tensor",
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random", "output of Noisy differs between two runs in evaluation mode"),
        ("detached", "no output of Noisy has a gradient"),
        ("nan", "output of Noisy is not finite on these inputs"),
        ("text", "Noisy returned no floating-point tensor to learn from"),
    ],
)
def test_models_that_cannot_be_examined_say_why(kind, message):
    with pytest.raises(ValueError, match=message):
        qo.find_symmetries(Noisy(kind), torch.ones(2, 4))


def test_inputs_that_the_model_refuses():
    model = Stranger(Plan())
    with pytest.raises(
        ValueError, match="Stranger does not run on these example inputs: TypeError"
    ):
        qo.find_symmetries(model, wrong=tokens())
    with pytest.raises(ValueError, match="Stranger does not run on these example inputs"):
        qo.find_symmetries(model, torch.full((1, TOKENS), VOCABULARY))
    with pytest.raises(ValueError, match="meta device"):
        qo.find_symmetries(copy.deepcopy(model).to("meta"), tokens())


def test_one_token_attends_to_itself_and_shows_no_head():
    symmetries = qo.find_symmetries(Stranger(Plan()), tokens()[:, :1])
    assert not symmetries.heads
    assert {"steps.0.mixer.a", "steps.1.mixer.b"} <= set(symmetries.not_exercised)
    assert symmetries.unrecognized == ("steps.0.mixer", "steps.1.mixer")


def test_float32_and_half_models_are_examined_in_float64():
    for dtype in (torch.float32, torch.bfloat16):
        model = Stranger(Plan(bias=True)).to(dtype)
        heads = qo.find_symmetries(model, tokens()).heads
        assert len(heads) == 4
        assert all(block.parameter.dtype == dtype for s in heads for block in s.blocks)
        assert all(float(s.source.rpartition(" ")[2]) < 1e-13 for s in heads)


def test_a_few_units_in_the_linear_part_of_their_activation_are_no_symmetry():
    """Large biases take them there for every token of the batch, and for no other."""
    found = {}
    for kind in ("gelu", "relu"):
        model = Stranger(Plan(mlp=kind, bias=True), layers=1)
        with torch.no_grad():
            for unit in (3, 17):
                model.steps[0].stuff.one.bias[unit] = 30.0
        found[kind] = sum(s.heads for s in discover(model, (tokens(),), {}).hidden_units)
    assert found == {"gelu": 0, "relu": 22}


class InPlace(nn.Module):
    """Overwrites what its derivative needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).exp()
        z = self.b(y)
        y.mul_(2)
        return z + y


def test_a_forward_without_derivative_says_so():
    with pytest.raises(ValueError, match=r"InPlace cannot be differentiated on these .*: one of"):
        discover(InPlace(), (torch.randn(2, 4),), {})


def test_empty_matrices_are_passed_over():
    """As register tokens of which there are none."""
    model = Stranger(Plan(), layers=1)
    model.registers = nn.Parameter(torch.zeros(1, 0, 20))
    whole = model.forward
    model.forward = lambda ids: whole(ids) + model.registers.sum()
    assert len(discover(model, (tokens(),), {}).heads) == 2

"""The affine chart: coordinates of orbits, there and back."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quotientopt.groups import GL, RotaryCommutant
from quotientopt.manifolds import FactorQuotient
from quotientopt.models import Attention
from quotientopt.nn import InvariantAttention
from quotientopt.nn.invariant_chart import (
    ChartLinear,
    assemble,
    complete_columns,
    condition,
    pivot_columns,
    to_chart,
    to_rotary_chart,
)

BATCHES = ((), (3,), (2, 3))


def pair(batch, rank, n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, rank, columns, generator=generator, dtype=torch.float64)
        for columns in (n, m)
    )


def invariant(A, B):
    return A.mT @ B


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from(BATCHES),
    rank=st.integers(1, 6),
    more=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    scale=st.sampled_from([None, 1.0, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_there_and_back(batch, rank, more, scale, seed):
    n, m = (rank + extra for extra in more)
    A, B = pair(batch, rank, n, m, seed)
    chart = to_chart(A, B, scale=scale)
    back = assemble(chart.free, chart.columns, chart.scale)
    size = invariant(A, B).abs().max()
    assert torch.allclose(invariant(chart.left, back), invariant(A, B), atol=1e-10 * size)
    numbers = chart.left.numel() + chart.free.numel()
    assert numbers == torch.ones(batch).numel() * rank * (n + m - rank)
    # The coordinates are those of the orbit, and coordinates are their own coordinates.
    g = GL(rank).random(batch, cond=10, generator=torch.Generator().manual_seed(seed))
    for other in (GL(rank).act(g.double(), (A, B)), (chart.left, back)):
        again = to_chart(*other, scale=scale)
        assert torch.equal(again.columns, chart.columns)
        for ours, theirs in zip(again[:2], chart[:2], strict=True):
            assert (ours - theirs).norm() <= 1e-10 * (1 + theirs.norm())
    # Another orbit has other ones.
    other = to_chart(A, 1.001 * B, chart.columns[..., :rank], scale=scale)
    assert (other.left - chart.left).norm() >= 1e-4 * chart.left.norm()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from(BATCHES),
    planes=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([None, 1.0, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_there_and_back_for_rotary_planes(batch, planes, sizes, scale, seed):
    (n, m), rank = sizes, 2 * planes
    group = RotaryCommutant(rank)
    manifold = FactorQuotient(rank, n, m, group=group, batch_shape=batch)
    A, B = pair(batch, rank, n, m, seed)
    chart = to_rotary_chart(A, B, scale=scale)
    back = assemble(chart.free, chart.columns, chart.scale)
    expected = manifold.canonical_projection((A, B))
    found = manifold.canonical_projection((chart.left, back))
    assert torch.allclose(found, expected, atol=1e-10 * expected.abs().max())
    numbers = chart.left.numel() + chart.free.numel()
    assert numbers == torch.ones(batch).numel() * manifold.dim
    fixed = group.complex_rows(back).gather(-1, chart.columns[..., :1])
    assert torch.equal(fixed.squeeze(-1).real, chart.scale.unsqueeze(-1).expand(*batch, planes))
    assert not fixed.imag.any()
    generator = torch.Generator().manual_seed(seed)
    g = group.random(batch, cond=10, generator=generator, dtype=torch.float64)
    for other in (group.act(g, (A, B)), (chart.left, back)):
        again = to_rotary_chart(*other, scale=scale)
        assert torch.equal(again.columns, chart.columns)
        for ours, theirs in zip(again[:2], chart[:2], strict=True):
            assert (ours - theirs).norm() <= 1e-10 * (1 + theirs.norm())
    # An element of GL that is none of the group leads to another point.
    swapped = A.roll(1, dims=-2), B.roll(1, dims=-2)
    if planes > 1:
        assert (to_rotary_chart(*swapped).left - chart.left).norm() > 1e-3 * chart.left.norm()


@pytest.mark.parametrize("batch", BATCHES)
def test_the_chosen_block_is_a_multiple_of_the_identity(batch):
    A, B = pair(batch, 3, 5, 8)
    chart = to_chart(A, B)
    back = assemble(chart.free, chart.columns, chart.scale)
    pivots = chart.columns[..., None, :3].expand(*batch, 3, 3)
    block = back.gather(-1, pivots)
    assert torch.equal(block, chart.scale[..., None, None] * torch.eye(3).double())
    assert torch.equal(chart.scale.log2().round(), chart.scale.log2())
    assert torch.equal(to_chart(A, B, scale=1.0).scale, torch.ones(batch).double())
    sizes = [x.square().mean(dim=(-2, -1)).sqrt() for x in (chart.left, back)]
    assert bool(((sizes[0] / sizes[1]).log2().abs() <= 1 + 1e-6).all())
    ordered = chart.columns.sort(dim=-1).values
    assert torch.equal(ordered, torch.arange(8).expand(*batch, 8))


def test_batch_is_a_loop():
    A, B = pair((2, 3), 4, 6, 9)
    chart = to_chart(A, B)
    for i in range(2):
        for j in range(3):
            own = to_chart(A[i, j], B[i, j])
            assert torch.equal(own.columns, chart.columns[i, j])
            assert torch.allclose(own.left, chart.left[i, j], atol=1e-12)
            assert torch.allclose(own.free, chart.free[i, j], atol=1e-12)


def test_pivots_are_far_from_dependent():
    B = torch.randn(40, 8, 24).double()
    orthonormal = torch.linalg.qr(B.mT).Q.mT
    chart = to_chart(B, B)
    chosen = condition(*chart[1:])
    smallest = torch.linalg.svdvals(
        orthonormal.gather(-1, chart.columns[:, None, :8].expand(-1, 8, -1))
    )[..., -1]
    assert torch.allclose(chosen, 1 / smallest, rtol=1e-10)
    first = to_chart(B, B, torch.arange(8).expand(40, 8))
    assert chosen.max() < 20
    assert condition(*first[1:]).max() > 5 * chosen.max()
    assert torch.equal(pivot_columns(torch.eye(3, 5)), torch.tensor([0, 1, 2]))
    # Exact copies of a column that was taken are not taken.
    assert pivot_columns(torch.eye(3).repeat_interleave(2, dim=1)).tolist() == [0, 2, 4]
    assert complete_columns(torch.tensor([1, 3]), 5).tolist() == [1, 3, 0, 2, 4]


def test_condition_is_one_in_the_middle_and_grows_towards_the_boundary():
    columns = torch.arange(7).expand(2, 7)
    assert condition(torch.zeros(2, 3, 4), columns, torch.ones(2)).tolist() == [1, 1]
    assert condition(torch.zeros(2, 3, 0), columns[:, :3], torch.ones(2)).tolist() == [1, 1]
    free = torch.full((1, 1, 4), 3.0)
    assert condition(free, torch.arange(5)[None], torch.tensor([0.5])).item() == pytest.approx(
        145**0.5
    )


# ---- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_chart_linear_is_linear(bias):
    layer = ChartLinear(10, heads=2, rank=3, bias=bias, dtype=torch.float64)
    nn.init.normal_(layer.free)
    matrix = layer.factor().detach().flatten(0, 1)
    x = torch.randn(4, 10).double()
    expected = x @ matrix[:, :10].mT + (matrix[:, 10] if bias else 0)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert layer.free.numel() == 2 * 3 * (10 + bias - 3)
    assert torch.autograd.gradcheck(
        lambda free: torch.func.functional_call(layer, {"free": free}, (x,)), layer.free
    )


def test_columns_are_the_users_choice():
    module = Attention(24, 4, 2).double()
    columns = {"qk": torch.arange(6).expand(2, 6), "vo": torch.arange(12, 18).expand(2, 6)}
    chart = InvariantAttention.from_attention(module, parametrization="chart", columns=columns)
    x = torch.randn(3, 5, 24).double()
    assert torch.allclose(chart(x), module(x), atol=1e-10)
    for layer, chosen in ((chart.key, columns["qk"]), (chart.value, columns["vo"])):
        assert torch.equal(layer.columns[:, :6], chosen)
    before = chart.chart_condition()
    chart.rechart_()
    after = chart.chart_condition()
    assert torch.allclose(chart(x), module(x), atol=1e-10)
    assert all(bool((after[name] < before[name]).all()) for name in ("qk", "vo"))
    chart.rechart_({"vo": columns["vo"]})
    assert torch.equal(chart.value.columns[:, :6], columns["vo"])
    with pytest.raises(ValueError, match="needs parametrization='chart'"):
        InvariantAttention.from_attention(module).chart_condition()


def test_rotary_columns():
    module = Attention(24, 4, 2, rotary=True).double()
    x = torch.randn(3, 5, 24).double()
    best = InvariantAttention.from_attention(module, parametrization="chart")
    columns = {"qk": torch.tensor([[0, 0, 1], [5, 23, 0]])}
    chart = InvariantAttention.from_attention(module, parametrization="chart", columns=columns)
    assert torch.allclose(chart(x), module(x), atol=1e-10)
    assert torch.equal(chart.key.columns[..., 0], columns["qk"])
    rows = RotaryCommutant(6).complex_rows(module.key.weight.detach().unflatten(0, (2, 6)))
    ratios = rows.norm(dim=-1) / rows.abs().amax(dim=-1)
    assert torch.allclose(best.chart_condition()["qk"], ratios.amax(dim=-1), atol=1e-10)
    assert (chart.chart_condition()["qk"] > best.chart_condition()["qk"]).all()
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\)"):
        chart.rechart_({"qk": torch.arange(6).expand(2, 6)})
    with torch.no_grad():
        module.key.weight[[1, 4], 7] = 0
    columns["qk"] = torch.full((2, 3), 7)
    with pytest.raises(ValueError, match=r"'qk' are linearly dependent .*index \(0,\)"):
        InvariantAttention.from_attention(module, parametrization="chart", columns=columns)
    with torch.no_grad():
        module.key.weight[[1, 4]] = 0
    for parametrization in ("chart", "fixed-rank"):
        with pytest.raises(ValueError, match="vanishing or non-finite rotary plane"):
            InvariantAttention.from_attention(module, parametrization=parametrization)


def nearly_dependent(size):
    """An attention whose first key columns depend on each other up to `size`."""
    module = Attention(24, 4, 4).double()
    with torch.no_grad():
        rows = module.key.weight.view(4, 6, 24)
        rows[1, :, 5] = rows[1, :, 4] + size * rows[1, :, 5]
    return module


def test_badly_conditioned_charts_warn_or_are_refused():
    columns = {"qk": torch.arange(6).expand(4, 6)}

    def convert(size, dtype=torch.float64, **options):
        return InvariantAttention.from_attention(
            nearly_dependent(size).to(dtype), parametrization="chart", **options
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(0.0)  # the best columns are good
        convert(1e-3, columns=columns)
    with pytest.warns(UserWarning, match="chart of 'qk' is badly conditioned"):
        convert(1e-9, columns=columns)
    with pytest.warns(UserWarning, match="chart of 'qk' is badly conditioned"):
        convert(1e-4, torch.float32, columns=columns)
    with pytest.raises(ValueError, match=r"columns of 'qk' are linearly dependent .*index \(1,\)"):
        convert(0.0, columns=columns)


def test_bad_columns_are_refused():
    module = Attention(24, 4, 2).double()

    def convert(parametrization="chart", **columns):
        return InvariantAttention.from_attention(
            module, parametrization=parametrization, columns=columns
        )

    good = torch.arange(6).expand(2, 6)
    with pytest.raises(ValueError, match=r"must have shape \(2, 6\)"):
        convert(qk=torch.arange(6))
    with pytest.raises(ValueError, match="must be 6 different ones"):
        convert(vo=good.clamp(max=4))
    with pytest.raises(ValueError, match="must be from 0 to 23"):
        convert(vo=good + 20)
    with pytest.raises(TypeError, match="tensor of integers"):
        convert(qk=good.float())
    with pytest.raises(ValueError, match="'qk' and 'vo'"):
        convert(key=good)
    with pytest.raises(ValueError, match="parametrization='chart'"):
        convert("fixed-rank", qk=good)
    chart = convert()
    before = chart.key.free.detach().clone()
    with pytest.raises(ValueError, match="from 0 to 23"):
        chart.rechart_({"vo": good + 20})
    with pytest.raises(ValueError, match="no point called 'key'"):
        chart.rechart_({"key": good})
    assert torch.equal(chart.key.free, before)

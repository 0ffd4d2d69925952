"""What discovery keeps of gradients: thin factors, charges by axis; and the point is put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quotientopt.symmetries.discovery import discover, gradients
from quotientopt.symmetries.discovery.gradients import Charges, Gradient, Store
from quotientopt.symmetries.discovery.point import STEP, Call, GenericPoint
from tests.symmetries.places import places
from tests.symmetries.strangers import Plan, Stranger, tokens


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 16, 100])
def test_gradients_of_few_tokens_are_thin(rank):
    """Rows of very different lengths, and rows of zeros as in an embedding."""
    rows = normal(700, rank) * torch.logspace(-4, 0, 700, dtype=torch.float64).unsqueeze(-1)
    rows[100:300] = 0
    whole = torch.stack([rows @ normal(rank, 600, seed=s) for s in (1, 2)])
    kept = Gradient(2, Store())
    for index, gradient in enumerate(whole):
        kept.put(index, gradient, torch.Generator().manual_seed(3))
    assert kept.complete
    assert all(isinstance(part, tuple) for part in kept._parts)
    assert sum(t.numel() for part in kept._parts for t in part) <= 2 * 1300 * (rank + 2)
    index = torch.tensor([[0, 599], [150, 333]])
    for axis, own in ((1, whole), (0, whole.mT)):
        found, right = kept.rows(axis, index), own[:, index]
        off = torch.linalg.vector_norm(found - right, dim=-1)
        assert found.shape == right.shape
        assert (off <= 1e-12 * torch.linalg.vector_norm(right, dim=-1) + 1e-13).all()
    assert (kept.whole() - whole).abs().max() < 1e-12 * whole.abs().max()


def test_other_gradients_are_kept_whole():
    for gradient in (normal(300, 400), normal(8, 100, 120), normal(5)):
        kept = Gradient(1, Store())
        kept.put(0, gradient, torch.Generator())
        assert torch.equal(kept.whole()[0], gradient)
        if gradient.ndim > 1:
            right = gradient.movedim(0, -1).flatten(0, -2)[None, [2]]
            assert torch.equal(kept.rows(0, torch.tensor([2])), right)
        assert torch.equal(kept.rows(None, torch.tensor([3]))[0, 0], gradient.flatten()[3:4])
    assert not Gradient(2, Store()).complete


@pytest.mark.parametrize("shape", [(300, 400), (3, 150, 200), (400, 1)])
def test_charges_by_axis(shape, monkeypatch):
    values, first, second = (normal(*shape, seed=s) for s in range(3))
    found = []
    for small in (0, 10**9):
        monkeypatch.setattr(gradients, "SMALL", small)
        charges = Charges(2, values, Store())
        charges.put(0, values, first)
        charges.put(1, values, second)
        # A second difference of something linear vanishes.
        for factor, times in ((-2.0, 1), (1.0, 2)):
            charges.put_moved(factor, values, first * (1 + times * 1e-3))
        found.append(charges)
    for axis in (a for a, n in enumerate(shape) if n > 1 or len(shape) == 2):
        terms = values * torch.stack([first, second])
        right = terms.sum(axis + 1).flatten(1)
        for charges in found:
            sums = charges.sums(axis)
            assert (sums.charge - right).abs().max() < 1e-11
            assert (sums.size - terms.abs().sum(axis + 1).flatten(1).amax(0)).abs().max() < 1e-11
            slopes = torch.stack([first, second]).square().sum(axis + 1).sqrt().flatten(1)
            assert (sums.slope - slopes.amax(0)).abs().max() < 1e-12
            assert (sums.noise <= 1e-12 * sums.size).all()
            assert charges.any


def test_noise_is_what_does_not_cancel(monkeypatch):
    """Entry by entry and by sums it has the same size."""
    values, gradient = normal(300, 400), normal(300, 400, seed=1)
    typical = []
    for small in (0, 10**9):
        monkeypatch.setattr(gradients, "SMALL", small)
        charges = Charges(1, values, Store())
        charges.put(0, values, gradient + 1e-7 * normal(300, 400, seed=2))
        for factor, seed in ((-2.0, 3), (1.0, 4)):
            charges.put_moved(factor, values, gradient + 1e-7 * normal(300, 400, seed=seed))
        sums = charges.sums(1)
        typical.append((sums.noise / sums.size).median().item())
    assert 1e-8 < typical[0] < 1e-6
    assert 0.3 < typical[0] / typical[1] < 3


def test_the_point_is_put_back_to_the_bit():
    model = Stranger(Plan(bias=True), layers=1)
    model.out.weight.requires_grad_(False)
    point = GenericPoint(model, Call((tokens(),), {}), torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in point.parameters.items()}
    assert torch.equal(before["out.weight"], model.out.weight.double())
    point.restore(point.parameters, 1)
    for name, value in point.parameters.items():
        moved = ((value - before[name]) / before[name]).abs()
        assert 0 < moved.max() < 2 * STEP
    point.restore(point.parameters)
    kept = point.gradients()
    assert kept.of
    for name, value in point.parameters.items():
        assert torch.equal(value, before[name])
        assert value.grad is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "plan",
    [
        Plan(heads=8, shared=8, rank=20, bias=True, layout="fused", mlp="relu"),
        Plan(heads=8, shared=4, rank=20, rotated=20, positions="half", mlp="swiglu"),
    ],
)
def test_thin_gradients_show_the_same_pairs(plan: Plan, monkeypatch):
    model = Stranger(plan, layers=1, width=160)
    batch = tokens(1)
    whole = discover(model, (batch,), {})
    monkeypatch.setattr(gradients, "SMALL", 1000)
    point = GenericPoint(model, Call((batch,), {}), torch.Generator().manual_seed(0))
    parts = point.gradients().of["steps.0.mixer.back.weight"]._parts
    assert all(isinstance(part, tuple) for part in parts)
    thin = discover(model, (batch,), {})
    assert places(whole.heads) == places(thin.heads)
    assert places(whole.hidden_units) == places(thin.hidden_units)
    groups = [
        {s.name: (str(s.group), s.translation is None) for s in f.heads} for f in (whole, thin)
    ]
    assert groups[0] == groups[1]
    assert len(groups[0]) == 2

"""Structure groups of rotations, as normalised queries and keys leave them."""

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.groups import O, RotaryPhases, StabilizerOfOnes

HEADS, RANK, WIDTH, STEPS = 3, 8, 20, 30

GROUPS = {
    "O": O(RANK),
    "phases": RotaryPhases(RANK),
    "partial phases": RotaryPhases(RANK, 4),
    "stabiliser of ones": StabilizerOfOnes(RANK),
}


def factors(group, *, moved):
    """A pair of factors as parameters, moved by a random rotation or not, and its symmetry."""
    A, B = torch.randn(2, HEADS, RANK, WIDTH).double()
    g = group.random((HEADS,), dtype=torch.float64)
    if moved:
        A, B = group.act(g, (A, B))
    A, B = nn.Parameter(A), nn.Parameter(B)
    return A, B, qo.HeadSymmetry([A], [B], group, "pair")


def losses(A, B, optimizer):
    """Of a function that rotations leave alone and other elements of GL(r) do not."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(STEPS):
        target = torch.randn(HEADS, WIDTH, WIDTH, generator=generator).double()
        loss = (A.mT @ B / RANK - target).square().mean() + (A @ A.mT / WIDTH).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


def deviation(group, make):
    curves = []
    for moved in (False, True):
        torch.manual_seed(3)
        A, B, symmetry = factors(group, moved=moved)
        curves.append(losses(A, B, make(A, B, symmetry)))
    return (curves[0] - curves[1]).abs().max().item()


@pytest.mark.parametrize("head_frame", ["balanced", "orthonormal", "svd"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_twins(group, head_frame):
    def quotient_adam(A, B, symmetry):
        return qo.QuotientAdam([A, B], lr=1e-2, symmetries=[symmetry], head_frame=head_frame)

    assert deviation(group, quotient_adam) < 1e-10


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_adam_sees_rotations(group):
    def adamw(A, B, symmetry):
        return torch.optim.AdamW([A, B], lr=1e-2)

    def frameless(A, B, symmetry):
        return qo.QuotientAdam([A, B], lr=1e-2, symmetries=[symmetry], head_frame=None)

    assert deviation(group, adamw) > 1e-5
    assert deviation(group, frameless) > 1e-5


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_state_moves_along(group):
    curves = []
    for moved in (False, True):
        torch.manual_seed(3)
        A, B, symmetry = factors(group, moved=False)
        optimizer = qo.QuotientAdam([A, B], lr=1e-2, symmetries=[symmetry])
        losses(A, B, optimizer)
        if moved:
            g = group.random((HEADS,), dtype=torch.float64)
            optimizer.symmetries.act_({"pair": g})
            optimizer.move_state_({"pair": g})
        curves.append(losses(A, B, optimizer))
    assert (curves[0] - curves[1]).abs().max() < 1e-10

"""Positive multiples of the identity, and the factors of single rows."""

import pytest
import torch

from quotientopt.groups import GL, Scale
from tests.geometry.cases import BATCH_SHAPES, generator

batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


@batches
@pytest.mark.parametrize("r", [1, 3])
def test_elements_are_positive_multiples_and_a_group(batch_shape, r):
    group, source = Scale(r), generator(0)
    g, h = (
        group.random(batch_shape, cond=100.0, generator=source, dtype=torch.float64) for _ in "gh"
    )
    assert g.shape == (*batch_shape, r, r)
    for element in (g, h, group.compose(g, h), group.inverse(g), group.identity(batch_shape)):
        group.check_element(element)
    eye = torch.eye(r, dtype=torch.float64).expand_as(g)
    assert (group.compose(g, group.inverse(g)) - eye).abs().max() < 1e-14
    factors = g[..., 0, 0]
    assert (factors >= 0.1 - 1e-12).all()
    assert (factors <= 10 + 1e-12).all()
    pair = tuple(torch.randn(*batch_shape, r, n, dtype=torch.float64) for n in (5, 4))
    A, B = group.act(g, pair)
    assert (A.mT @ B - pair[0].mT @ pair[1]).abs().max() < 1e-13
    assert (A - pair[0]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="no positive multiple of the identity"):
        group.check_element(-g)


def test_what_is_no_multiple_of_the_identity_is_refused():
    with pytest.raises(ValueError, match="no positive multiple of the identity"):
        Scale(2).check_element(torch.diag(torch.tensor([1.0, 2.0])))
    assert Scale(3).dim == 1


@batches
def test_the_algebra_is_the_trace(batch_shape):
    group = Scale(3)
    M, N = (torch.randn(*batch_shape, 3, 3, dtype=torch.float64) for _ in "MN")
    P, Q = group.algebra_projection(M), group.algebra_projection(N)
    assert (group.algebra_projection(P) - P).abs().max() < 1e-15
    # Self-adjoint, and onto multiples of the identity with the trace that was there.
    assert ((P * N).sum((-2, -1)) - (M * Q).sum((-2, -1))).abs().max() < 1e-13
    traces = [X.diagonal(dim1=-2, dim2=-1).sum(-1) for X in (P, M)]
    assert (traces[0] - traces[1]).abs().max() < 1e-14
    assert (P - M).abs().max() > 0.1


def test_factors_of_single_rows_differ():
    """Hidden units that all had one factor would hide behind a norm."""
    g = GL(1).random((50,), cond=100.0, generator=generator(1), dtype=torch.float64).flatten()
    assert g.abs().unique().numel() == 50
    assert (g < 0).any()
    assert (g > 0).any()
    assert g.abs().max() / g.abs().min() > 10

"""Polar factors of updates: what they are, and what they commute with."""

import pytest
import torch

from quotientopt.optim.polar import (
    CENTRED,
    COMPOSITION,
    orthogonalise,
    polar_direction,
    polar_factor_of_gram,
    polar_factor_of_square,
    row_polar_factor,
)

ZERO = torch.zeros(2, 3, 5)


def orthogonal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


@pytest.fixture(params=[(3, 20, 8), (2, 8, 8), (2, 5, 12)])
def matrix(request):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(request.param, generator=generator, dtype=torch.float64)


def test_singular_values_are_made_equal_and_vectors_kept(matrix):
    stretched = matrix @ torch.logspace(-0.7, 0, matrix.size(-1), dtype=torch.float64).diag()
    result = orthogonalise(stretched, None)
    U, sigma, Vt = torch.linalg.svd(stretched, full_matrices=False)
    core = U.mT @ result @ Vt.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - values.diag_embed()).abs().max() < 1e-10
    assert (values > 0).all()
    spread, before = values.amax(-1) / values.amin(-1), sigma.amax(-1) / sigma.amin(-1)
    # Down to a tenth of the Schatten norm all values come near one; smaller ones grow alike.
    assert (spread < torch.where(before < 8, 2.7, before / 1.5)).all()
    assert (before > 3).all()
    norms = torch.linalg.matrix_norm(result), torch.linalg.matrix_norm(stretched)
    assert torch.allclose(*norms, rtol=1e-12)


def test_commutes_with_rotations_and_with_nothing_else(matrix):
    left, right = orthogonal(matrix.size(1), 1), orthogonal(matrix.size(2), 2)
    result = orthogonalise(matrix, None)
    assert (orthogonalise(left @ matrix @ right, None) - left @ result @ right).abs().max() < 1e-10
    shear = torch.eye(matrix.size(2), dtype=torch.float64)
    shear[0, 1] = 1.0
    assert (orthogonalise(matrix @ shear, None) - result @ shear).abs().max() > 1e-2


def test_the_rotation_is_folded_in(matrix):
    right = orthogonal(matrix.size(2), 3).expand(matrix.size(0), -1, -1)
    assert (orthogonalise(matrix, right) - orthogonalise(matrix, None) @ right).abs().max() < 1e-12


def test_a_factor_on_the_rows_does_the_same():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 3, 5, 12, generator=generator, dtype=torch.float64)
    factor = row_polar_factor(matrix)
    assert factor.shape == (2, 3, 5, 5)
    expected = orthogonalise(matrix.flatten(0, 1), None).view(matrix.shape)
    assert (factor @ matrix - expected).abs().max() < 1e-12
    together = orthogonalise(matrix.flatten(1, 2), None).view(matrix.shape)
    assert (factor @ matrix - together).abs().max() > 1e-2


def test_zero_stays_zero():
    assert torch.equal(row_polar_factor(torch.zeros(2, 3, 5)) @ ZERO, ZERO)
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 3), None), torch.zeros(2, 4, 3))


def schatten(sigma):
    """The bound that the composition takes singular values over."""
    return sigma.pow(8).sum(-1, keepdim=True).pow(1 / 8)


@pytest.mark.parametrize("shape", [(2, 7, 7), (2, 5, 12), (2, 12, 5), (1, 1, 6)])
def test_the_composition_reaches_the_polar_factor(shape):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(shape, generator=generator, dtype=torch.float64)
    U, sigma, Vt = torch.linalg.svd(X, full_matrices=False)
    # Nearly down to a fiftieth of the largest.
    sigma = torch.logspace(0, -1.5, sigma.size(-1), dtype=torch.float64).expand_as(sigma)
    X = U @ sigma.diag_embed() @ Vt
    assert (sigma / schatten(sigma)).min() > 0.02
    P = polar_factor_of_gram(X @ X.mT if shape[1] <= shape[2] else X.mT @ X)
    scale = (sigma.pow(2).sum(-1).sqrt() / (sigma / schatten(sigma)).pow(2).sum(-1).sqrt())[0]
    values = U.mT @ (P @ X if shape[1] <= shape[2] else X @ P) @ Vt.mT
    errors = (values.diagonal(dim1=-2, dim2=-1) / scale - 1).abs()
    assert errors.max() < 0.0744
    result = polar_direction(X, None)
    assert torch.allclose(torch.linalg.matrix_norm(result), torch.linalg.matrix_norm(X))
    # Control: one step of the first version leaves them further apart.
    if min(shape[1:]) > 1:
        step = torch.linalg.svdvals(orthogonalise(X, None))
        assert step.amax() / step.amin() > 1.5 * 1.0744 / 0.9256


def test_the_composition_commutes_with_rotations_and_ignores_scales(matrix):
    left, right = orthogonal(matrix.size(1), 1), orthogonal(matrix.size(2), 2)
    result = polar_direction(matrix, None)
    turned = polar_direction(left @ matrix @ right, None)
    assert (turned - left @ result @ right).abs().max() < 1e-10
    assert (
        polar_direction(matrix, right.expand(len(matrix), -1, -1)) - result @ right
    ).abs().max() < 1e-12
    for scale in (1e-30, 1e30):
        assert torch.allclose(polar_direction(scale * matrix, None), scale * result, rtol=1e-9)
    shear = torch.eye(matrix.size(2), dtype=torch.float64)
    shear[0, 1] = 1.0
    assert (polar_direction(matrix @ shear, None) - result @ shear).abs().max() > 1e-2


def test_the_composition_of_tiny_float32_matrices(matrix):
    """Their Gram would underflow; a power of two changes no digit."""
    expected = polar_direction(matrix.float(), None)
    assert torch.equal(polar_direction(2.0**-100 * matrix.float(), None), 2.0**-100 * expected)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 4), (2, 5, 2)])
def test_the_composition_of_nothing_is_nothing(shape):
    assert torch.equal(polar_direction(torch.zeros(shape), None), torch.zeros(shape))


def test_both_ways_to_the_polar_factor_are_one():
    """A Gram matrix that is carried along, and one that is made anew."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 9, 11, generator=generator, dtype=torch.float64)
    carried = polar_factor_of_gram(X @ X.mT) @ X
    factor, shrunk = polar_factor_of_square(X, X @ X.mT)
    ratio = factor @ shrunk / carried
    assert (ratio / ratio[:, :1, :1] - 1).abs().max() < 1e-10
    # Control: one of them alone is far from it.
    assert (shrunk / carried / (shrunk / carried)[:, :1, :1] - 1).abs().max() > 0.05


@pytest.mark.parametrize(("shape", "bar"), [((4, 64, 64), 2e-5), ((4, 64, 256), 1e-5)])
def test_float32_loses_little_in_the_composition(shape, bar):
    """With coefficients of G, thousands of both signs, it lost ten times as much."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(shape, generator=generator)
    exact = polar_direction(X.double(), None)
    error = (polar_direction(X, None).double() - exact).norm() / exact.norm()
    assert error < bar
    # The control: the same polynomial of one matrix with eigenvalues everywhere up to one.
    Q = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    gram = (Q * torch.linspace(0, 1, 64, dtype=torch.float64) @ Q.mT).float()
    wide = gram.double()
    naive, reference = (
        sum(c * torch.linalg.matrix_power(G, k) for k, c in enumerate(COMPOSITION[0]))
        for G in (gram, wide)
    )
    centred = sum(
        c * torch.linalg.matrix_power(2 * gram - torch.eye(64), k) for k, c in enumerate(CENTRED)
    )
    errors = [(found.double() - reference).norm() for found in (centred, naive)]
    assert errors[0] < errors[1] / 5

"""Derivatives through sections: exact away from equal singular values, finite at them."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from quotientopt import sections
from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.sections.derivatives import gap_reciprocals, svd
from tests.geometry.cases import BATCH_SHAPES, generator

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
FACTOR_KINDS = ("svd", "balanced", "orthonormal", "triangular")
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def separated(batch_shape=(), r=3, n=5, m=4, seed=0):
    """A pair whose invariant has singular values 1, 2, 4, ….: moved along its orbit."""
    values = torch.diag_embed(2.0 ** torch.arange(r, dtype=torch.float64).flip(0))
    left, _ = torch.linalg.qr(randn(*batch_shape, n, r, seed=seed))
    right, _ = torch.linalg.qr(randn(*batch_shape, m, r, seed=seed + 1))
    g = GL(r).random(batch_shape, cond=5, generator=generator(seed + 2), dtype=torch.float64)
    A, B = GL(r).act(g, (values @ left.mT, right.mT))
    return A.requires_grad_(), B.requires_grad_()


def leaves_of(section):
    """A section's results as one flat tuple of tensors."""
    representative, g = section
    return (*representative, g) if isinstance(representative, tuple) else (representative, g)


@batches
@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_factor_sections(kind, batch_shape):
    x = separated(batch_shape)

    def dressed(A, B):
        return leaves_of(sections.section(kind, A, B))

    assert gradcheck(dressed, x)
    if batch_shape == ():
        assert gradgradcheck(dressed, x, fast_mode=True)


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_elements_from_gram_matrices(kind):
    A, B = (factor.detach() for factor in separated())
    SA, SB = ((X @ X.mT).requires_grad_() for X in (A, B))

    def element(SA, SB):
        return sections.element(kind, (SA + SA.mT) / 2, (SB + SB.mT) / 2)

    assert gradcheck(element, (SA, SB), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [2, 4])
def test_rotary_sections(kind, layout, rotary_dim):
    group = RotaryCommutant(4, rotary_dim, layout)
    x = separated((2,), r=4, n=5, m=4, seed=3)

    def dressed(A, B):
        return leaves_of(sections.rotary_section(kind, group, A, B))

    assert gradcheck(dressed, x)
    assert gradgradcheck(dressed, x, fast_mode=True)


@pytest.mark.parametrize("group", [O(3), StabilizerOfOnes(3)], ids=str)
@pytest.mark.parametrize("kind", ["svd", "polar"])
@batches
def test_gram_sections(kind, group, batch_shape):
    X = randn(*batch_shape, 5, 3, seed=1) @ torch.diag(torch.tensor([4.0, 2.0, 1.0]).double())
    X.requires_grad_()

    def dressed(X):
        return sections.gram_section(kind, X, stabilizer=group)

    assert gradcheck(dressed, (X,))
    if batch_shape == ():
        assert gradgradcheck(dressed, (X,), fast_mode=True)


@pytest.mark.parametrize("kind", ["svd", "polar"])
def test_orthogonal_sections(kind):
    def dressed(A, B):
        return leaves_of(sections.orthogonal_section(kind, A, B))

    assert gradcheck(dressed, separated((2,)))


# ---- equal and nearly equal singular values ------------------------------------------------------


def with_gap(gap, r=3, n=5, m=4):
    """A pair whose invariant has the singular values 2, 1 + gap, 1."""
    values = torch.diag_embed(torch.tensor([2.0, 1.0 + gap, 1.0], dtype=torch.float64))
    left, right = (torch.linalg.qr(randn(k, r, seed=k)).Q for k in (n, m))
    g = GL(r).random(cond=5, generator=generator(2), dtype=torch.float64)
    return GL(r).act(g, (values @ left.mT, right.mT))


def of_the_orbit(representative):
    """A function of (A, B) that does not see a rotation of the rows, but every other element."""
    A, B = representative
    inner, outer = A.mT @ A, B.mT @ B
    return (
        (inner.square() @ randn(5, 1, seed=7)).sum()
        + (outer @ outer).square().sum()
        + (A.mT @ B).sin().sum()
    )


GAPS = (0.0, 1e-14, 1e-10, 1e-8, 3e-8, 1e-6)


def slope_along(function, x, direction, step=1e-5):
    """Derivative of fourth order in the step."""

    def at(t):
        moved = (X + t * step * D for X, D in zip(x, direction, strict=True))
        return function(*moved)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("kind", ["svd", "balanced", "orthonormal"])
def test_functions_of_the_orbit_of_rotations(kind, gap):
    """Dressed by "svd" they are smooth in (A, B) whatever the gaps, and so is the derivative."""
    x = tuple(X.requires_grad_() for X in with_gap(gap))
    direction = randn(3, 5, seed=11), randn(3, 4, seed=12)

    def function(A, B):
        return of_the_orbit(sections.section(kind, A, B)[0])

    gradients = torch.autograd.grad(function(*x), x)
    found = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    with torch.no_grad():
        expected = slope_along(function, x, direction)
    assert expected.abs() > 1
    # Just above the tolerance rounding is multiplied by one over the gap: 1e-16 / 3e-8.
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def naive(A, B):
    """The section "svd" with the derivative of torch.linalg.svd."""
    LA, LB = (torch.linalg.cholesky(X @ X.mT) for X in (A, B))
    U, values, Vt = torch.linalg.svd(LA.mT @ LB)
    root = values.sqrt().unsqueeze(-1)
    return (
        root * U.mT @ torch.linalg.solve_triangular(LA, A, upper=False),
        root * Vt @ torch.linalg.solve_triangular(LB, B, upper=False),
    )


@pytest.mark.parametrize("gap", [0.0, 1e-15])
def test_the_derivative_of_torch_fails_there(gap):
    """The control: without a tolerance the same gradient is infinite, or far off."""
    x = tuple(X.requires_grad_() for X in with_gap(gap))
    direction = randn(3, 5, seed=11), randn(3, 4, seed=12)
    ours, theirs = (
        sum(
            (g * d).sum()
            for g, d in zip(torch.autograd.grad(of_the_orbit(f(*x)), x), direction, strict=True)
        )
        for f in (lambda A, B: sections.section("svd", A, B)[0], naive)
    )
    assert torch.isfinite(ours)
    assert not (theirs - ours).abs() < 1e-3 * ours.abs()


@pytest.mark.parametrize("gap", GAPS)
def test_gradients_are_finite_for_functions_that_see_the_axes(gap):
    x = tuple(X.requires_grad_() for X in with_gap(gap))
    (A, B), _ = sections.section("svd", *x)
    loss = (A * randn(3, 5, seed=5)).sum() + (B * randn(3, 4, seed=6)).sum()
    gradients = torch.autograd.grad(loss, x, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), x)
    assert all(torch.isfinite(t).all() for t in (*gradients, *second))


def test_smooth_sections_at_equal_singular_values():
    x = tuple(X.requires_grad_() for X in with_gap(0.0))
    for kind in ("balanced", "orthonormal", "triangular"):

        def dressed(A, B, kind=kind):
            return leaves_of(sections.section(kind, A, B))

        assert gradcheck(dressed, x)
        assert gradgradcheck(dressed, x, fast_mode=True)


def test_the_tolerance_changes_nothing_above_it():
    values = torch.tensor([2.0, 1.5, 1.0, 1.0 - 1e-4], dtype=torch.float64)
    found = gap_reciprocals(values, 1e-5)
    difference = values - values[:, None]
    off = ~torch.eye(4, dtype=torch.bool)
    assert torch.equal(found[off], 1 / difference[off])
    assert torch.equal(found.diagonal(), torch.zeros(4, dtype=torch.float64))
    # Below it, linear in the gap and continuous.
    coarse = gap_reciprocals(values, 1e-3)
    assert coarse[2, 3].item() == pytest.approx(-1e-4 / (2e-3) ** 2, rel=1e-9)
    assert torch.isfinite(gap_reciprocals(torch.zeros(3), 1e-3)).all()


def test_svd_with_its_own_derivatives():
    W = separated()[0].detach()[:, :3].contiguous().requires_grad_()

    def decomposed(W):
        # U and V up to a common sign of their columns.
        U, values, V = svd(W)
        return U[..., None, :] * V, values

    assert gradcheck(decomposed, (W,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(decomposed, (W,))
    U, values, V = svd(W)
    assert (U * values @ V.mT - W).abs().max() < 1e-12


def test_values_do_not_depend_on_the_graph():
    """The values are those of the plain decomposition, to rounding."""
    x = tuple(X.detach() for X in separated((2, 3)))
    for kind in FACTOR_KINDS:
        with torch.no_grad():
            plain = sections.section(kind, *x)
        graph = sections.section(kind, *x)
        for one, two in zip(leaves_of(plain), leaves_of(graph), strict=True):
            assert (one - two).abs().max() < 1e-12


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_forward_mode_is_finite_where_no_graph_is_kept(kind):
    """`torch.no_grad` leaves forward mode alone, which met the gaps of torch's own SVD here."""
    rows = [torch.linalg.qr(randn(n, 3, seed=n))[0].mT for n in (5, 4)]  # equal singular values
    direction = randn(3, 5, seed=2)

    def representative(A):
        return sections.section(kind, A, rows[1], check=False)[0]

    with torch.no_grad():
        _, derivative = torch.func.jvp(representative, (rows[0],), (direction,))
    _, expected = torch.func.jvp(representative, (rows[0],), (direction,))
    for one, two in zip(derivative, expected, strict=True):
        assert torch.isfinite(one).all()
        assert (one - two).abs().max() < 1e-12

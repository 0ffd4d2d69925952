"""Derivatives by autograd: of distances, of spectral solutions, and of the manifolds' methods."""

import pytest
import torch

from quotientopt._linalg import orthogonal_polar_factor, solve_lyapunov, solve_paired_lyapunov
from quotientopt.groups import GL, O, RotaryCommutant
from quotientopt.manifolds import FactorQuotient
from tests.geometry.cases import KINDS, Case, combine, deviation, generator, leaves

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
kinds = pytest.mark.parametrize("kind", KINDS)


def matrices(count, size=3, batch_shape=(2,)):
    return torch.randn(
        count, *batch_shape, size, size, generator=generator(), dtype=torch.float64
    ).unbind(0)


def require_gradients(*points):
    return tuple(combine(lambda t: t.detach().clone().requires_grad_(), p) for p in points)


def all_leaves(*points):
    return tuple(leaf for point in points for leaf in leaves(point))


def on_leaves(function, *points):
    """A function of points as a function of their tensors."""
    sizes = [len(leaves(p)) for p in points]

    def of_leaves(*tensors):
        parts, rest = [], list(tensors)
        for size, point in zip(sizes, points, strict=True):
            taken, rest = rest[:size], rest[size:]
            parts.append(tuple(taken) if isinstance(point, tuple) else taken[0])
        return function(*parts)

    return of_leaves


def test_lyapunov_solution_and_its_derivatives():
    F, C = (M.requires_grad_() for M in matrices(2))
    P = F @ F.mT + torch.eye(3, dtype=F.dtype)
    Y = solve_lyapunov(P, C)
    assert deviation(P @ Y + Y @ P, C) < 1e-13

    def solve(F, C):
        return solve_lyapunov(F @ F.mT + torch.eye(3, dtype=F.dtype), C)

    assert torch.autograd.gradcheck(solve, (F, C), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (F, C))
    # Coinciding eigenvalues, through which an eigendecomposition has no derivative.
    eye = torch.eye(3, dtype=F.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (eye, C[0]))
    assert torch.autograd.gradgradcheck(solve, (eye, C[0]))
    # Control: the eigendecomposition differentiated by itself.
    values, basis = torch.linalg.eigh(eye @ eye.mT)
    rotated = basis.mT @ C[0].detach() @ basis / (values[:, None] + values)
    (naive,) = torch.autograd.grad((basis @ rotated @ basis.mT).sum(), eye)
    assert not torch.isfinite(naive).all()


def test_paired_lyapunov_solutions():
    W, C, D = (M.requires_grad_() for M in matrices(3))
    Y, Z = solve_paired_lyapunov(W, C, D)
    assert deviation(W.mT @ W @ Y + Y @ W.mT @ W, C) < 1e-11
    assert deviation(W @ W.mT @ Z + Z @ W @ W.mT, D) < 1e-11
    assert torch.autograd.gradcheck(solve_paired_lyapunov, (W, C, D))
    assert deviation(W @ W.mT @ Y + Y @ W @ W.mT, C) > 1e-3


def test_polar_factor_and_its_derivatives():
    (M,) = (M.requires_grad_() for M in matrices(1))
    Q = orthogonal_polar_factor(M)
    assert deviation(Q.mT @ Q, torch.eye(3, dtype=M.dtype).expand(2, 3, 3)) < 1e-13
    assert deviation(Q.mT @ M, M.mT @ Q) < 1e-12
    assert torch.autograd.gradcheck(orthogonal_polar_factor, (M,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(orthogonal_polar_factor, (M,))
    eye = torch.eye(3, dtype=M.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(orthogonal_polar_factor, (eye,))
    assert torch.autograd.gradgradcheck(orthogonal_polar_factor, (eye,))


def test_functional_transforms():
    F, C = matrices(2)
    P = F @ F.mT + torch.eye(3, dtype=F.dtype)
    assert deviation(torch.func.vmap(solve_lyapunov)(P, C), solve_lyapunov(P, C)) < 1e-14
    jacobians = [
        jac(orthogonal_polar_factor)(F[0]) for jac in (torch.func.jacrev, torch.func.jacfwd)
    ]
    assert deviation(*jacobians) < 1e-12


@kinds
def test_distance_is_differentiable(kind):
    case = Case(kind, (2,), small=True)
    M = case.manifold
    x, y = require_gradients(case.point(), case.point())
    inputs = all_leaves(x, y)
    distance = on_leaves(M.distance, x, y)
    assert torch.autograd.gradcheck(distance, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(distance, inputs, fast_mode=True)
    # The squared distance is a function on the quotient: its gradient is horizontal.
    partials = torch.autograd.grad(M.distance(x, y).square().sum(), leaves(x))
    gradient = M.gradient(x, partials if isinstance(x, tuple) else partials[0])
    M.check_tangent(x, gradient, tolerance=1e-9)
    assert (M.norm(x, gradient) > 1e-3).all()


@kinds
def test_distance_of_one_orbit_has_the_gradient_zero(kind):
    case = Case(kind, (2,))
    M, start = case.manifold, case.point()
    for y in (start, M.act(case.element(cond=5.0), start)):
        (x,) = require_gradients(start)
        gradients = torch.autograd.grad(M.distance(x, y).sum(), leaves(x))
        assert all((g == 0).all() for g in gradients)
    # Control: nearby, the gradient is that of a norm, and of the size of one.
    nearby = combine(lambda t: t * 1.001, start)
    (x,) = require_gradients(start)
    gradients = torch.autograd.grad(M.distance(x, nearby).sum(), leaves(x))
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_derivatives_of_close_points_are_accurate():
    M = FactorQuotient(3, 7, 5)
    start = M.random_point(generator=generator(), dtype=torch.float64)
    step = M.random_tangent(start, generator=generator(1))
    y = M.act(GL(3).random(generator=generator(2), dtype=torch.float64), start)
    dense = torch.linalg.matrix_norm(M.differential(start, step))
    for size in (1e-2, 1e-5, 1e-8):
        x = tuple(t.requires_grad_() for t in M.retract(start, tuple(size * t for t in step)))
        distance = M.distance(x, y)
        assert (distance / (size * dense) - 1).abs() < 10 * size + 1e-7
        gradients = torch.autograd.grad(distance, x)
        along = sum((g * t).sum() for g, t in zip(gradients, step, strict=True))
        assert (along / dense - 1).abs() < 10 * size + 1e-6


@kinds
def test_projections_are_differentiable_where_singular_values_coincide(kind):
    case = Case(kind)
    M, u = case.manifold, case.vector()
    if case.is_gram:
        moving = M.group.moving_part(case.point())
        broad = moving.shape[-2] < moving.shape[-1]
        equal = torch.linalg.qr(moving.mT).Q.mT if broad else torch.linalg.qr(moving).Q
        x = M.group.from_moving_part(equal)
    else:
        x = tuple(torch.linalg.qr(X.mT).Q.mT for X in case.point())
    (x,) = require_gradients(x)
    (v,) = require_gradients(u)
    outcome = M.horizontal_component(x, v)
    total = sum((w * c).sum() for w, c in zip(leaves(outcome), leaves(u), strict=True))
    gradients = torch.autograd.grad(total, all_leaves(x, v))
    assert all(torch.isfinite(g).all() for g in gradients)
    step = 1e-6

    def value(sign):
        moved = combine(lambda t, d: t.detach() + sign * step * d, x, case_direction)
        outcome = M.horizontal_component(moved, u)
        return sum((w * c).sum() for w, c in zip(leaves(outcome), leaves(u), strict=True))

    case_direction = case.vector()
    expected = (value(1) - value(-1)) / (2 * step)
    found = sum(
        (g * d).sum()
        for g, d in zip(gradients[: len(leaves(x))], leaves(case_direction), strict=True)
    )
    assert (found - expected).abs() < 1e-6 * (1 + expected.abs())


@pytest.mark.parametrize(
    ("group", "metric"),
    [(GL(2), "right-invariant"), (RotaryCommutant(3, 2), "preconditioned"), (O(2), "euclidean")],
    ids=str,
)
def test_hessian_vector_products_through_the_quotient(group, metric):
    """The Hessian of a cost, from autograd applied to autograd, agrees with ``hessian``."""
    M = FactorQuotient(group.r, 4, 5, group=group, metric=metric)
    source = generator(3)
    x, y, u = (M.random_point(generator=source, dtype=torch.float64) for _ in range(3))
    u = M.horizontal_component(x, u)

    def cost(*point):
        return M.distance(point, y).square()

    inputs = tuple(t.requires_grad_() for t in x)
    partials = torch.autograd.grad(cost(*inputs), inputs, create_graph=True)
    along = sum((p * d).sum() for p, d in zip(partials, u, strict=True))
    second = torch.autograd.grad(along, inputs)
    curvature = M.inner(x, M.hessian(x, partials, second, u), u)
    steps = (-2e-4, 0.0, 2e-4)
    values = [
        M.distance(M.retract_second_order(x, tuple(t * d for d in u)), y).square() for t in steps
    ]
    expected = (values[0] - 2 * values[1] + values[2]) / steps[2] ** 2
    assert (curvature - expected).abs() < 1e-5 * expected.abs()

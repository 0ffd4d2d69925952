"""Ill-conditioned representatives, float32, and rank deficiency."""

import pytest
import torch

from quotientopt import sections
from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient
from tests.geometry.cases import (
    FACTOR_KINDS,
    FACTORS,
    GRAM_KINDS,
    Case,
    add,
    combine,
    deviation,
    euclidean_gradient,
    euclidean_hessian,
    generator,
    leaves,
)

UNBOUNDED = [kind for kind in FACTOR_KINDS if not isinstance(FACTORS[kind][0], O)]


def naive_horizontal_component(metric, x, u):
    """The projection under GL(r) from Gram matrices, without changing the representative."""
    (A, B), (u_A, u_B) = x, u
    SA, SB = A @ A.mT, B @ B.mT
    if metric == "preconditioned":
        from_A = torch.linalg.solve(SA, A @ u_A.mT).mT
        M = (torch.linalg.solve(SB, B @ u_B.mT) - from_A) / 2
    else:
        C = torch.linalg.cholesky(SA)
        w, U = torch.linalg.eigh(C.mT @ SB @ C)
        P = C @ U
        R = SA @ B @ u_B.mT - u_A @ A.mT @ SB
        solved = torch.linalg.solve(P, R @ P) / (w.unsqueeze(-1) + w.unsqueeze(-2))
        M = torch.linalg.solve(P, P @ solved, left=False)
    return u_A + M @ A, u_B - M.mT @ B


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("kind", UNBOUNDED)
def test_projection_follows_the_representative_however_ill_conditioned(kind, cond):
    case = Case(kind, (4,))
    M, x, u = case.manifold, case.point(), case.vector()
    horizontal = M.horizontal_component(x, u)
    g = case.element(cond=cond)
    y, v = M.act(g, x), M.act(g, u)
    # What rounding the moved point alone brings about is of this size.
    bound = max(1e-12, 1e-15 * cond)

    def deviation_at_x(w):
        back = M.act(M.group.inverse(g), w)
        return (M.norm(x, add(back, horizontal, -1)) / M.norm(x, horizontal)).max()

    moved = M.horizontal_component(y, v)
    assert deviation_at_x(moved) < bound
    assert (M.norm(y, M.vertical_component(y, moved)) / M.norm(y, moved)).max() < bound
    lifted = M.horizontal_lift(y, M.differential(x, horizontal))
    assert deviation_at_x(lifted) < 10 * bound
    # Control: the same formula from Gram matrices, whose condition numbers are squared.
    if cond >= 1e4 and isinstance(case.group, GL):
        assert deviation_at_x(naive_horizontal_component(M.metric, y, v)) > 10 * bound


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("kind", UNBOUNDED)
def test_second_order_follows_the_representative(kind, cond):
    case = Case(kind, (4,))
    M, x, cost = case.manifold, case.point(), case.cost()
    u, g = case.tangent(x), case.element(cond=cond)
    bound = max(1e-11, 1e-14 * cond)

    def at(z, w):
        partials = euclidean_gradient(cost, z)
        hessian = M.hessian(z, partials, euclidean_hessian(cost, z, w), w)
        step = combine(lambda t: 3 * t, w)
        return M.gradient(z, partials), hessian, add(M.retract_second_order(z, step), z, -1)

    here = at(x, u)
    there = [M.act(M.group.inverse(g), w) for w in at(M.act(g, x), M.act(g, u))]
    for found, expected in zip(there, here, strict=True):
        assert (M.norm(x, add(found, expected, -1)) / M.norm(x, expected)).max() < bound
    # Control: the partial derivatives do not follow as tangent vectors do.
    partials = [euclidean_gradient(cost, z) for z in (x, M.act(g, x))]
    assert deviation(M.act(M.group.inverse(g), partials[1]), partials[0]) > 1e-2


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("kind", [kind for kind in UNBOUNDED if "right" not in kind])
def test_sections_and_alignment_of_ill_conditioned_representatives(kind, cond):
    case = Case(kind, (4,))
    M, x = case.manifold, case.point()
    y = M.act(case.element(cond=cond), x)
    bound = max(1e-11, 1e-14 * cond)
    expected, _ = M.section(x, "svd")
    dressed, g = M.section(y, "svd")
    assert deviation(dressed, expected) < bound
    assert deviation(M.act(g, y), dressed) < 10 * bound
    for section in M.section_kinds:
        assert deviation(case.invariant(M.section(y, section)[0]), case.invariant(x)) < bound
    assert deviation(M.align(y, x)[0], x) < bound
    # Control: the section from the Gram matrices of the pair alone.
    if cond >= 1e4 and isinstance(case.group, GL):
        A, B = y
        h, contragredient = sections.svd_element(A @ A.mT, B @ B.mT)
        once = contragredient @ A, h @ B
        signs = [torch.where(X[..., :1] < 0, -1.0, 1.0) for X in (once[1], expected[1])]
        once = combine(lambda X: signs[0] * signs[1] * X, once)
        assert deviation(once, expected) > 10 * bound


def ill_conditioned_pair(case, dtype):
    """A pair whose Gram matrix B Bᵀ has condition number 1e6."""
    A, B = case.point()
    U, _, Vt = torch.linalg.svd(B, full_matrices=False)
    values = torch.logspace(-3, 0, B.shape[-2], dtype=B.dtype)
    return A.to(dtype), (U @ (values.unsqueeze(-1) * Vt)).to(dtype)


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_float32_with_a_gram_condition_number_of_a_million(kind):
    case = Case(kind, (3,))
    M, x = case.manifold, ill_conditioned_pair(case, torch.float32)
    u = combine(torch.Tensor.float, case.vector())
    condition = torch.linalg.cond(x[1].double() @ x[1].double().mT)
    assert (condition / 1e6 - 1).abs().max() < 0.01
    horizontal = M.horizontal_component(x, u)
    M.check_tangent(x, horizontal, tolerance=1e-3)
    partials = combine(torch.Tensor.float, euclidean_gradient(case.cost(), combine(_double, x)))
    gradient = M.gradient(x, partials)
    M.check_tangent(x, gradient, tolerance=1e-3)
    small = combine(lambda t: 1e-4 * t, horizontal)
    results = [horizontal, gradient, M.retract(x, small), M.retract_second_order(x, small)]
    results += [M.hessian(x, partials, u, small), M.section(x)[0], M.align(x, u)[0]]
    for result in results:
        assert all(leaf.dtype == torch.float32 for leaf in leaves(result))
        assert all(torch.isfinite(leaf).all() for leaf in leaves(result))
    with pytest.raises(ValueError, match="not horizontal"):
        M.check_tangent(x, u, tolerance=1e-3)


def _double(tensor):
    return tensor.double()


def test_float32_arithmetic_would_not_be_enough():
    case = Case("gl right-invariant", (3,))
    M, x = case.manifold, ill_conditioned_pair(case, torch.float32)
    u = combine(torch.Tensor.float, case.vector())
    with pytest.raises(ValueError, match="not horizontal"):
        M.check_tangent(x, naive_horizontal_component(M.metric, x, u), tolerance=1e-3)


@pytest.mark.parametrize("kind", GRAM_KINDS)
def test_gram_float32_with_a_condition_number_of_a_million(kind):
    case = Case(kind, (3,))
    M = case.manifold
    U, _, Vt = torch.linalg.svd(case.point(), full_matrices=False)
    x = (U * torch.logspace(-3, 0, U.shape[-1], dtype=U.dtype) @ Vt).float()
    horizontal = M.horizontal_component(x, case.vector().float())
    M.check_tangent(x, horizontal, tolerance=1e-5)
    with pytest.raises(ValueError, match="not horizontal"):
        M.check_tangent(x, case.vector().float(), tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_rows_that_depend_on_each_other_up_to_rounding_are_refused(kind, dtype):
    case = Case(kind, (4,))
    group, M = case.group, case.manifold
    A, B = case.point()
    if isinstance(group, RotaryCommutant):
        rows, what = list(group.pass_rows), "left factor A is rank-deficient"
        if not rows:
            rows, what = list(group.planes[1]), "left factor A is rank-deficient"
            A[2, rows] = 0
    else:
        rows, what = list(range(group.r)), r"(left factor A|\[A B\]) is rank-deficient"
    if len(rows) > 1 and A[2, rows].any():
        A[2, rows[-1]] = A[2, rows[:-1]].sum(dim=0)
        if M.metric == "euclidean":
            B[2, rows[-1]] = B[2, rows[:-1]].sum(dim=0)
    x = A.to(dtype), B.to(dtype)
    for refused in (
        lambda: M.check_point(x),
        lambda: M.horizontal_component(x, x),
        lambda: M.gradient(x, x),
        lambda: M.retract_second_order(x, x),
    ):
        with pytest.raises(ValueError, match=rf"{what} \(batch index \(2,\)\)"):
            refused()
    # Control: the points are fine without the dependence.
    M.check_point(combine(lambda t: t.to(dtype), case.point()))


def test_points_that_only_some_groups_allow():
    zero, B = torch.zeros(3, 5), torch.randn(3, 5, generator=generator())
    with pytest.raises(ValueError, match="left factor A is rank-deficient"):
        FactorQuotient(3, 5, 5, group=O(3)).check_point((zero, B))
    FactorQuotient(3, 5, 5, group=O(3), metric="euclidean").check_point((zero, B))
    # Planes need not be independent of each other, and may outnumber the columns.
    M = FactorQuotient(5, 2, 1, group=RotaryCommutant(5, 4))
    x = M.random_point(generator=generator(), dtype=torch.float64)
    u = M.random_tangent(x, generator=generator(1))
    M.check_tangent(x, u, tolerance=1e-12)
    assert M.dim == 5 * 3 - 5
    with pytest.raises(ValueError, match="r <= n"):
        FactorQuotient(5, 2, 1)


def test_what_the_stabilizer_moves_needs_rank():
    M = GramQuotient(6, 4, stabilizer=StabilizerOfOnes(4))
    x = M.random_point(generator=generator(), dtype=torch.float64)
    constant = x - x @ x.new_tensor([[1, 0, 0, -1], [0, 0, 0, 0], [0, 0, 0, 0], [-1, 0, 0, 1]]) / 2
    assert torch.linalg.matrix_rank(constant) == 3
    with pytest.raises(ValueError, match="part of x orthogonal to 1 is rank-deficient"):
        M.check_point(constant)
    # The all-ones direction itself may be missing: centred tokens are points.
    M.check_point(x - x.mean(dim=-1, keepdim=True))
    with pytest.raises(ValueError, match="token matrix x is rank-deficient"):
        GramQuotient(6, 4).check_point(x - x.mean(dim=-1, keepdim=True))


@pytest.mark.parametrize(("N", "d"), [(5, 9), (12, 6), (6, 6)])
@pytest.mark.parametrize("stabilizer", [False, True])
def test_projections_of_badly_conditioned_tokens(N, d, stabilizer, monkeypatch):
    """Condition number 10⁶, its square 10¹²: idempotent and equivariant to 1e-9 all the same."""
    M = GramQuotient(N, d, stabilizer=StabilizerOfOnes(d) if stabilizer else None)
    group, source = M.group, generator(0)
    x = torch.randn(N, d, generator=source, dtype=torch.float64)
    U, values, Vt = torch.linalg.svd(group.moving_part(x), full_matrices=False)
    values = torch.where(values > 1e-8, torch.logspace(0, -6, len(values), dtype=torch.float64), 0)
    x = group.from_moving_part((U * values) @ Vt)
    u = torch.randn(N, d, generator=source, dtype=torch.float64)
    g = group.random(generator=source, dtype=torch.float64)

    def errors():
        horizontal = M.horizontal_component(x, u)
        again = M.horizontal_component(x, horizontal)
        moved = M.horizontal_component(M.act(g, x), M.act(g, u))
        return deviation(again, horizontal), deviation(moved, M.act(g, horizontal))

    assert max(errors()) < 1e-9

    # Control: once is not enough.
    def once(self, X, U, stored):
        moving, S = self._moving_gram(X, stored, check=False)
        part = self.group.moving_part(U)
        return self.group.from_moving_part(self._vertical_once(moving, S, part))

    monkeypatch.setattr(GramQuotient, "_vertical", once)
    assert max(errors()) > 1e-9

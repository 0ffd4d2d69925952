"""Descent with momentum: the same path of orbits from every representative."""

import pytest

from tests.geometry.cases import (
    BATCH_SHAPES,
    KINDS,
    Case,
    add,
    deviation,
    euclidean_gradient,
    scale,
)

pytestmark = pytest.mark.parametrize("kind", KINDS)
STEPS, MOMENTUM = 12, 0.8


def descend(M, cost, x, momentum=None, steps=STEPS, rate=0.02, retraction="retract"):
    """Steepest descent with transported momentum; every step has the same relative length."""
    for _ in range(steps):
        gradient = M.gradient(x, euclidean_gradient(cost, x))
        size = M.norm(x, gradient)[..., None, None]
        step = scale(rate, _divide(gradient, size))
        momentum = step if momentum is None else add(step, momentum, MOMENTUM)
        y = getattr(M, retraction)(x, scale(-1.0, momentum))
        momentum = M.transport(x, y, momentum)
        x = y
    return x, momentum


def _divide(u, size):
    return tuple(part / size for part in u) if isinstance(u, tuple) else u / size


@pytest.mark.parametrize("retraction", ["retract", "retract_second_order"])
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
def test_twins_stay_twins(kind, batch_shape, retraction):
    case = Case(kind, batch_shape)
    M, x, cost = case.manifold, case.point(), case.cost()
    g = case.element(cond=1e3)
    end, _ = descend(M, cost, x, retraction=retraction)
    assert (cost(end) < cost(x)).all()
    twin, _ = descend(M, cost, M.act(g, x), retraction=retraction)
    assert deviation(M.canonical_projection(twin), M.canonical_projection(end)) < 1e-9
    assert deviation(twin, M.act(g, end)) < 1e-9
    # Control: a start that is no twin.
    other, _ = descend(M, cost, case.wrong_act(case.element(cond=2.0), x), retraction=retraction)
    assert deviation(M.canonical_projection(other), M.canonical_projection(end)) > 1e-3


def test_redressing_on_the_way_changes_nothing(kind):
    case = Case(kind, (3,))
    M, x, cost = case.manifold, case.point(), case.cost()
    end, _ = descend(M, cost, x)
    half, momentum = descend(M, cost, x, steps=STEPS // 2)
    for section in M.section_kinds:
        dressed, g = M.section(half, section)
        finish, _ = descend(M, cost, dressed, M.act(g, momentum), steps=STEPS - STEPS // 2)
        assert deviation(M.canonical_projection(finish), M.canonical_projection(end)) < 1e-9
        # Control: the momentum left behind in the old representative.
        astray, _ = descend(
            M, cost, dressed, M.horizontal_component(dressed, momentum), steps=STEPS - STEPS // 2
        )
        assert deviation(M.canonical_projection(astray), M.canonical_projection(end)) > 1e-4


def test_euclidean_descent_depends_on_the_representative(kind):
    case = Case(kind)
    M, x, cost = case.manifold, case.point(), case.cost()
    y = M.act(case.element(cond=30), x)

    def plain(x):
        for _ in range(STEPS):
            x = add(x, euclidean_gradient(cost, x), -1e-3)
        return M.canonical_projection(x)

    gap = deviation(plain(y), plain(x))
    if case.is_flat or kind.startswith("o "):
        assert gap < 1e-12  # the orthogonal group is all that it is equivariant under
    else:
        assert gap > 1e-3

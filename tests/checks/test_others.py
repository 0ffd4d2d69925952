"""The checks on an object of somebody else's, and what they refuse."""

import pytest
import torch

from quotientopt import checks
from quotientopt.manifolds import GramQuotient
from tests.checks.cases import fails

ONE_LINE = r"\A.+\Z"


class Sphere:
    """A manifold of somebody else's, with no more methods than a check needs."""

    dim = 3

    def random_point(self):
        x = torch.randn(4, dtype=torch.float64)
        return x / x.norm()

    def random_tangent(self, x):
        return self.horizontal_component(x, torch.randn(4, dtype=torch.float64))

    def inner(self, x, u, v):
        return (u * v).sum()

    def horizontal_component(self, x, u):
        return u - (x @ u) * x

    def gradient(self, x, partials):
        return self.horizontal_component(x, partials)

    def retract(self, x, u):
        return (x + u) / (x + u).norm()

    def act(self, g, x):
        return g @ x


def test_any_object_with_the_needed_methods():
    torch.manual_seed(0)
    manifold = Sphere()
    weights = torch.randn(4, 4, dtype=torch.float64)

    def cost(x):
        return x @ weights @ x

    results = checks.check_manifold(manifold, cost)
    assert [result.name for result in results] == [
        "gradient",
        "retraction",
        "projection",
        "dimension",
    ]
    assert all(results), results
    rotation = torch.linalg.qr(weights).Q
    checks.check_invariance(manifold, element=rotation).require()
    fails(checks.check_invariance(manifold, element=weights), "metric off by")
    fails(checks.check_invariance(manifold, cost, element=rotation), "cost off by")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.check_transport(Sphere()), "needs transport of the manifold"),
        (lambda: checks.check_hessian(Sphere(), lambda x: x.sum()), "needs hessian"),
        (lambda: checks.check_gradient(Sphere()), "needs canonical_projection"),
        (lambda: checks.check_invariance(Sphere()), "has no group: pass the group element"),
        (lambda: checks.check_dimension(object(), torch.ones(3)), "has no dim: pass expected="),
        (lambda: checks.check_gradient(Sphere(), lambda x: 1.0), "a torch function of the point"),
        (lambda: checks.check_projection(object(), "text"), "must be an array or made of arrays"),
    ],
)
def test_missing_methods_are_named(call, message):
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: checks.check_retraction(GramQuotient(4, 2), order=3),
        lambda: checks.check_section(GramQuotient(4, 2), "svd", residual="finite"),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError, match=ONE_LINE):
        call()

"""What a user's type checker sees: ``mypy tests/docs/types_of_a_user.py`` is a step of CI.

Every line is checked for its type and runs; a wrong option is an error for the checker.
"""

from typing import assert_type

import torch
from torch import Tensor

import quotientopt as qo
from quotientopt.models import reference_model

model = reference_model("gpt", layers=1, width=16)
optimizer = qo.QuotientAdam(model, lr=1e-3, head_frame="balanced", polar=True)
assert_type(optimizer.symmetries, qo.SymmetryMap)
assert_type(qo.find_symmetries(model), qo.SymmetryMap)
assert_type(qo.invariant_grad_norm(optimizer), Tensor)

manifold = qo.manifolds.FactorQuotient(2, 4, 4)
x = manifold.random_point()
assert_type(x, tuple[Tensor, Tensor])
assert_type(manifold.retract(x, manifold.random_tangent(x)), tuple[Tensor, Tensor])
assert_type(manifold.distance(x, x), Tensor)
assert_type(manifold.section(x, "balanced"), tuple[tuple[Tensor, Tensor], Tensor])
assert_type(
    manifold.section(x, "svd", return_gap=True), tuple[tuple[Tensor, Tensor], Tensor, Tensor]
)
tokens = qo.manifolds.GramQuotient(5, 3)
assert_type(tokens.section(tokens.random_point(), "polar"), tuple[Tensor, Tensor])

assert_type(qo.dress_tokens(torch.eye(3)), Tensor)
dressed, gap = qo.dress_tokens(torch.eye(3), return_gap=True)
assert_type(gap, Tensor)


def wrong() -> None:
    """Refused when it runs, and before."""
    qo.QuotientAdam(model, lr=1e-3, head_frame="foo")  # type: ignore[arg-type]
    qo.dress_(model, "foo")  # type: ignore[arg-type]

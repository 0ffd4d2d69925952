"""Which axes of a parameter a forward sums over, whatever way it is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import embedding, linear

from quotientopt.symmetries.discovery.gradients import ContractionTrace

WIDTH = 12
X = torch.randn(2, 5, WIDTH)
HEADS = torch.randn(2, 3, 5, 4)
# The shape of a parameter, what is done with it, and the axes that are summed over.
USES = {
    "linear": ((8, WIDTH), lambda w: linear(X, w), {1}),
    "transposed": ((WIDTH, 8), lambda w: X @ w, {0}),
    "with a bias": ((8, WIDTH), lambda w: linear(X, w, torch.zeros(8)), {1}),
    "square": ((WIDTH, WIDTH), lambda w: X @ w.T, {1}),
    "square, not transposed": ((WIDTH, WIDTH), lambda w: X @ w, {0}),
    "into heads": ((3, WIDTH, 4), lambda w: torch.einsum("btd,hdr->bhtr", X, w), {1}),
    "out of heads": ((3, 4, WIDTH), lambda w: torch.einsum("bhtr,hrd->btd", HEADS, w), {0, 1}),
    "a part": ((3 * WIDTH, WIDTH), lambda w: linear(X, w.chunk(3)[1]), {1}),
    "a scaled copy": ((8, WIDTH), lambda w: linear(X, w * 2.0), {1}),
    "a copy": ((WIDTH, 8), lambda w: X @ w.clone(memory_format=torch.contiguous_format), {0}),
    "table": ((20, WIDTH), lambda w: embedding(torch.arange(3), w), {0}),
    "tied": ((20, WIDTH), lambda w: embedding(torch.arange(3), w) @ w.T, {0, 1}),
    "not in a product": ((5, WIDTH), lambda w: X + w, None),
}


@pytest.mark.parametrize("name", USES)
def test_axes_that_are_summed_over(name):
    shape, use, expected = USES[name]
    weight = torch.randn(shape, requires_grad=True)
    with ContractionTrace({"weight": weight}) as trace:
        use(weight)
    assert trace.contracted.get("weight") == expected
    assert trace.looked_up.get("weight") == ({0} if name in ("table", "tied") else None)


def test_what_is_no_parameter_is_not_taken_for_one():
    weight, other = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    with ContractionTrace({"weight": weight}) as trace:
        linear(X, other)
        torch.randn(8, WIDTH) @ X.mT
    assert not trace.contracted

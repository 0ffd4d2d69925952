"""redundancy: parameters, gauge directions and the dimension of the quotient."""

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import redundancy
from tests.canonical.models import ARCHITECTURES, example
from tests.symmetries.architectures import small_gpt, small_gpt2, small_llama


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums(name):
    model, _ = example(name)
    counts, found = redundancy(model), qo.find_symmetries(model).redundancy()
    assert counts.total.parameters == sum(p.numel() for p in model.parameters())
    assert counts.total.redundant == found["total"]
    assert counts.residual == found.get("residual", 0)
    assert sum(counts.kinds.values()) == found["total"]
    layers = counts.layers.values()
    assert sum(layer.parameters for layer in layers) == counts.total.parameters
    assert sum(layer.redundant for layer in layers) + counts.residual == counts.total.redundant
    assert sum(c.dimension for c in layers) - counts.residual == counts.total.dimension


def test_layers():
    counts = redundancy(small_gpt())
    assert list(counts.layers) == ["blocks.0", "blocks.1", "outside the layers"]
    block = counts.layers["blocks.0"]
    # 12 d² parameters, 2 · 3 heads · 8² gauge directions.
    assert (block.parameters, block.redundant) == (12 * 24**2, 2 * 3 * 8**2)
    assert counts.layers["outside the layers"].parameters == 2 * 50 * 24 + 8 * 24
    # A vector that all tokens get and all positions lose.
    assert counts.layers["outside the layers"].redundant == 24
    assert counts.residual == 24 * 23 // 2
    text = str(counts)
    assert f"{block.dimension:,}" in text
    assert text.splitlines()[-1] == "6.51% of the parameters are gauge"
    llama = redundancy(small_llama())
    # Hidden units, and gains of two norms, which the matrices behind them take up: O(d) is exact.
    assert llama.layers["blocks.1"].redundant == 2 * (8 + 64) + 96 + 2 * 32
    assert llama.residual == 32 * 31 // 2
    tied = redundancy(small_gpt2())
    assert tied.layers["outside the layers"].parameters == (50 + 16) * 24 + 2 * 24


def test_the_dimension_is_the_rank_of_the_invariants():
    """One GL(2) head, small enough to count: the rank of the derivative of x ↦ AᵀB."""
    model = torch.nn.MultiheadAttention(4, 2, bias=False).double()
    qk = qo.find_symmetries(model).heads[0]
    A, B = qk.left[0][0].clone(), qk.right[0][0].clone()
    jacobian = torch.autograd.functional.jacobian(lambda a, b: a.mT @ b, (A, B))
    flat = torch.cat([part.reshape(16, -1) for part in jacobian], dim=1)
    rank = int(torch.linalg.matrix_rank(flat))
    assert rank == A.numel() + B.numel() - redundancy(model).total.redundant // 4

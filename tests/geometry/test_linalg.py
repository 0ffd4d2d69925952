"""Whether rows depend on each other, from the Cholesky factor of their Gram matrix."""

import pytest
import torch

from quotientopt._linalg import rows_depend

ROWS, COLUMNS = 5, 9


def depend(X, precision):
    S = X @ X.mT
    return rows_depend(torch.linalg.cholesky_ex(S).L, S, precision)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_angle_decides_and_not_the_size(batch, scale):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(*batch, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    assert not depend(scale * X, 1e-4).any()
    assert depend(scale * X, 1e-4).shape == batch
    # A row that leaves the span of the first two by a sine of 1e-5.
    inside = X[..., 0, :] + X[..., 1, :]
    outside = torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
    sizes = [torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (inside, outside)]
    X[..., 3, :] = inside / sizes[0] + 1e-5 * outside / sizes[1]
    assert depend(scale * X, 1e-4).all()
    assert not depend(scale * X, 1e-7).any()
    # Rows of other sizes change nothing.
    sizes = 10.0 ** torch.arange(-ROWS, ROWS, 2, dtype=torch.float64)[:, None]
    assert depend(sizes * X, 1e-4).all()
    assert not depend(sizes * X, 1e-7).any()


def test_rounding_counts_as_dependence():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(ROWS, COLUMNS, generator=generator)
    X[4] = X[0] - X[2]
    wide = X.double()
    assert depend(wide, 2 * torch.finfo(torch.float32).eps)
    wide[4] += 1e-3 * torch.randn(COLUMNS, generator=generator)
    assert not depend(wide, 2 * torch.finfo(torch.float32).eps)

"""Orbits under O(r): the Gram matrix [A B]ᵀ[A B] of all columns names them."""

from typing import Any

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import Pair, gram, safe_root
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.groups import O
from quotientopt.manifolds.orbits.base import rounding, stack_columns
from quotientopt.manifolds.orbits.products import solve_rows


class JointGramOrbits:
    """Orbits of pairs under O(r), which turns both factors alike."""

    sections = ("svd", "polar")

    def __init__(self, group: O) -> None:
        self.group = group

    def check_columns(self, n: int, m: int, metric: str) -> None:
        """[A B] needs full row rank; both factors, unless the metric is Euclidean."""
        r = self.group.r
        if metric == "euclidean" and r > n + m:
            raise ValueError(f"full row rank of [A B] needs r <= n + m, got {r = }, {n = }, {m = }")
        if metric != "euclidean" and (r > n or r > m):
            raise ValueError(f"full row rank needs r <= n and r <= m, got {r = }, {n = }, {m = }")

    def invariant_shape(self, n: int, m: int) -> tuple[int, ...]:
        """(n + m, n + m)."""
        return n + m, n + m

    def invariants(self, x: Pair) -> Tensor:
        """``[A B]ᵀ [A B]``: AᵀB, AᵀA and BᵀB."""
        return gram(stack_columns(x).mT)

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """``[u_A u_B]ᵀ [A B] + [A B]ᵀ [u_A u_B]``."""
        product = stack_columns(u).mT @ stack_columns(x)
        return product + product.mT

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """With ``X = [A B]`` and ``Y = (X Xᵀ)^{-1} X``: ``Y Ḣ (I − ½ Yᵀ X)``."""
        X = stack_columns(x)
        image, rows = solve_rows(X, base)
        lifted = image - (image @ rows.mT) @ rows / 2
        columns = x[0].shape[-1]
        return lifted[..., :columns], lifted[..., columns:]

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """``min_Q (‖Q A₁ − A₂‖² + ‖Q B₁ − B₂‖²)^{1/2}``: Bures–Wasserstein between the Grams."""
        Q, _ = self.aligning_element(x, y, check=False)
        X, Y = stack_columns(x), stack_columns(y)
        size = torch.linalg.matrix_norm(X.detach()) + torch.linalg.matrix_norm(Y.detach())
        return safe_root((Q @ X - Y).square().sum(dim=(-2, -1)), rounding(self.group.r, size))

    def aligning_element(self, x: Pair, y: Pair, *, check: bool) -> Pair:
        """Orthogonal Procrustes: the polar factor of ``A₂ A₁ᵀ + B₂ B₁ᵀ``."""
        Q = orthogonal_polar_factor(y[0] @ x[0].mT + y[1] @ x[1].mT)
        return Q, Q

    def section(self, kind: str, x: Pair, *, check: bool, **options: Any) -> Any:
        """See :func:`quotientopt.sections.orthogonal_section`."""
        return sections.orthogonal_section(kind, *x, check=check, **options)

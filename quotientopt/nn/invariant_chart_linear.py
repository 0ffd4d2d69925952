"""An affine map whose matrix is held in the affine chart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.nn.invariant_chart import assemble


class ChartLinear(nn.Module):
    """An affine map onto the rows of all heads whose matrix is held in the affine chart.

    The matrix of a head, its bias as the last column where there is one, is c [I, F] with the
    columns permuted; for rotary heads that holds plane by plane. It is put together in
    :meth:`factor` at every call, a copy of the size of the weights; activations are not gathered.

    Parameters
    ----------
    in_features, heads, rank : int
    bias, rotary : bool
    device, dtype
        As for ``nn.Linear``.

    Attributes
    ----------
    free : Parameter
        c F, shape ``(heads, rank, in_features + bias − rank)``, rotary − 1 in place of − rank.
    columns : Tensor
        Buffer of int64, ``(heads, in_features + bias)``, rotary ``(heads, rank / 2, …)``; see
        :class:`~quotientopt.nn.invariant_chart.Chart`.
    scale : Tensor
        Buffer, c, shape ``(heads,)``.
    """

    free: Tensor
    columns: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        heads: int,
        rank: int,
        bias: bool,
        *,
        rotary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = heads * rank
        width = in_features + bias
        fixed = 1 if rotary else rank
        free = torch.zeros(heads, rank, width - fixed, device=device, dtype=dtype)
        self.free = nn.Parameter(free)
        batch = (heads, rank // 2) if rotary else (heads,)
        columns = torch.arange(width, device=device).expand(*batch, width).clone()
        self.register_buffer("columns", columns)
        self.register_buffer("scale", torch.ones(heads, device=device, dtype=dtype))

    def factor(self) -> Tensor:
        """The matrices of all heads, ``(heads, rank, in_features + bias)``."""
        return assemble(self.free, self.columns, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b`` on the last axis."""
        matrix = self.factor().flatten(0, 1)
        if matrix.shape[-1] == self.in_features:
            return functional.linear(x, matrix)
        return functional.linear(x, matrix[:, :-1], matrix[:, -1])

    def extra_repr(self) -> str:
        heads, rank, _ = self.free.shape
        bias = self.columns.shape[-1] > self.in_features
        return f"in_features={self.in_features}, heads={heads}, rank={rank}, bias={bias}"

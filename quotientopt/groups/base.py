"""The interface of a structure group acting on factor pairs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import (
    Pair,
    check_batches,
    check_finite,
    check_floating,
    check_square,
    locate_first,
    random_device,
    wide,
)


class StructureGroup(ABC):
    """A closed subgroup G of GL(r) acting on factor pairs by ``g·(A, B) = (g^{-T} A, g B)``.

    The action leaves ``Aᵀ B`` unchanged: it is what a Transformer's attention head cannot see
    (François & Ravera, arXiv 2602.18948; da Silva, Dangel & Oore, arXiv 2505.05409). Elements are
    real matrices of shape ``(*batch, r, r)``, one per head; products and inverses are computed in
    float64 where the device has it and returned in the dtype of the input.

    Parameters
    ----------
    r : int
        Number of rows of both factors.

    Raises
    ------
    ValueError
        If `r` is not a positive integer.
    """

    def __init__(self, r: int) -> None:
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"r must be a positive integer, got {r!r}")
        self.r = r

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension of the group, hence of the orbits of full-rank pairs."""

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random elements ``(*batch_shape, r, r)``, head by head; the class says how distributed.

        Parameters
        ----------
        batch_shape : sequence of int
        cond : float
            Condition number of every element. Groups of orthogonal matrices check it, and it has no
            other effect there.
        generator, dtype, device
            As for :func:`torch.randn`.

        Raises
        ------
        ValueError
            If `cond` is below 1 or not finite.
        """
        if not 1.0 <= cond < float("inf"):
            raise ValueError(f"cond must be finite and at least 1, got {cond!r}")
        g = self._random(batch_shape, cond, generator, random_device(generator, device))
        return g.to(dtype or torch.get_default_dtype())

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        """Random elements in the widest dtype."""
        raise NotImplementedError(f"{type(self).__name__} draws no random elements: define _random")

    @abstractmethod
    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """Orthogonal (Frobenius) projection of r×r matrices to the Lie algebra."""

    @abstractmethod
    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` (``TypeError`` for a wrong dtype) unless `g` lies in the group."""

    def row_products(self, matrix: Tensor) -> Tensor:
        """Products of the rows over the numbers the group multiplies them by.

        For stacks of rows X and Y the r×r `matrix` is ``X Yᵀ``. Where the group treats pairs of
        rows as one complex row the real products are completed to complex ones
        (:meth:`RotaryCommutant.row_products`); elsewhere they stay as they are.
        """
        check_square("matrix", matrix, self.r)
        return matrix

    def _parameters(self) -> tuple[object, ...]:
        """What tells two groups of one class apart."""
        return (self.r,)

    def identity(
        self,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The neutral element, repeated to shape ``(*batch_shape, r, r)``."""
        eye = torch.eye(self.r, dtype=dtype, device=device)
        return eye.expand(*batch_shape, self.r, self.r).clone()

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """The product ``g h``: act with `h` first, then with `g`."""
        check_square("g", g, self.r)
        check_square("h", h, self.r)
        check_batches(g=g, h=h)
        return (wide(g) @ wide(h)).to(torch.promote_types(g.dtype, h.dtype))

    def inverse(self, g: Tensor) -> Tensor:
        """The inverse element, in the dtype of `g`.

        Raises
        ------
        ValueError
            If a matrix is singular.
        """
        check_square("g", g, self.r)
        return self._wide_inverse(wide(g)).to(g.dtype)

    def act(self, g: Tensor, pair: Pair) -> Pair:
        """Act on a point: ``(g^{-T} A, g B)``.

        Parameters
        ----------
        g : Tensor, shape (*batch, r, r)
            Group element.
        pair : tuple of Tensor, shapes (*batch, r, n) and (*batch, r, m)
            Factor pair; the result has its dtypes.
        """
        A, B = self._check_pair(g, pair)
        return self._contragredient(g, A), self._linear(g, B)

    def act_tangent(self, g: Tensor, pair: Pair) -> Pair:
        """Push a tangent vector forward: the action is linear, so ``(g^{-T} ξ_A, g ξ_B)``."""
        return self.act(g, pair)

    def act_gradient(self, g: Tensor, pair: Pair) -> Pair:
        """Carry a Euclidean gradient along: contragrediently, ``(g ∂_A, g^{-T} ∂_B)``.

        So ``⟨∂_A, ξ_A⟩ + ⟨∂_B, ξ_B⟩`` is the same before and after.
        """
        A, B = self._check_pair(g, pair)
        return self._linear(g, A), self._contragredient(g, B)

    def _linear(self, g: Tensor, X: Tensor) -> Tensor:
        return (wide(g) @ wide(X)).to(X.dtype)

    def _contragredient(self, g: Tensor, X: Tensor) -> Tensor:
        return (self._wide_inverse(wide(g)).mT @ wide(X)).to(X.dtype)

    def _wide_inverse(self, g: Tensor) -> Tensor:
        inverse, info = torch.linalg.inv_ex(g)
        if bool((info > 0).any()):
            raise ValueError(f"group element g is singular{locate_first(info > 0)}")
        return inverse

    def _check_pair(self, g: Tensor, pair: Pair) -> Pair:
        check_square("g", g, self.r)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"expected a pair (A, B) of tensors, got {type(pair).__name__}")
        for name, X in zip("AB", pair, strict=True):
            check_floating(name, X)
            if X.ndim < 2 or X.shape[-2] != self.r:
                raise ValueError(
                    f"{name} must have shape (*batch, {self.r}, columns), got {tuple(X.shape)}"
                )
        check_batches(g=g, A=pair[0], B=pair[1])
        return pair[0], pair[1]

    def _check_invertible(self, g: Tensor) -> None:
        check_square("g", g, self.r)
        check_finite("g", g)
        self._wide_inverse(wide(g))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StructureGroup):
            return NotImplemented
        return type(self) is type(other) and self._parameters() == other._parameters()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._parameters()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.r})"

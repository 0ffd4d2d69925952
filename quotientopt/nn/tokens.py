"""Dressed tokens: token matrices in axes of their own, ``X ↦ X V``, the same for X and X Q."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_finite,
    check_floating,
    compute_dtype,
    locate_first,
    wide,
)
from quotientopt.groups import O
from quotientopt.sections.causal import CausalAxes, causal_lq
from quotientopt.sections.derivatives import default_tolerance
from quotientopt.sections.gram import dependence, dress_matrix

SECTIONS = ("svd", "polar", "triangular")
CAUSAL_SECTIONS = ("triangular",)


class DressedTokens(NamedTuple):
    """Dressed tokens and how well they are determined.

    Attributes
    ----------
    tokens : Tensor, shape (*batch, N, d)
        The dressed tokens.
    gap : Tensor, shape (*batch)
        ``"svd"``: the smallest difference of neighbouring singular values, of those that do not
        vanish, over the largest one. Infinite where there are not two of them.
        ``"polar"``: smallest over largest singular value of the leading block. ``"triangular"``:
        smallest distance of a token from the span of those before it, over its length, zero where
        it lies there. In at least float32, no part of the graph.
    """

    tokens: Tensor
    gap: Tensor


@overload
def dress_tokens(
    X: Tensor,
    section: str = ...,
    *,
    stabilizer: O | None = ...,
    tolerance: float | None = ...,
    strict: bool = ...,
    causal: bool = ...,
    return_gap: Literal[False] = ...,
    check: bool = ...,
) -> Tensor: ...


@overload
def dress_tokens(
    X: Tensor,
    section: str = ...,
    *,
    stabilizer: O | None = ...,
    tolerance: float | None = ...,
    strict: bool = ...,
    causal: bool = ...,
    return_gap: Literal[True],
    check: bool = ...,
) -> DressedTokens: ...


def dress_tokens(
    X: Tensor,
    section: str = "svd",
    *,
    stabilizer: O | None = None,
    tolerance: float | None = None,
    strict: bool = False,
    causal: bool = False,
    return_gap: bool = False,
    check: bool = True,
) -> Tensor | DressedTokens:
    """Tokens in axes that they define themselves: equal for X and X Q, Q ∈ O(d), differentiable.

    A dressing field of token matrices (François & Ravera, arXiv 2602.18948): a function of the
    Gram matrix ``X Xᵀ`` that has its shape and its inner products.

    - ``"svd"``: ``X V = U Σ`` with the right singular vectors V of X. Columns are orthogonal, in
      decreasing length; in each the entry of largest modulus is positive (of several equal ones
      the first); columns of equal length are turned by the same rule. Any rank: columns past the
      rank are zero, N < d included.
    - ``"polar"``: the leading k×k block, ``k = min(N, d)``, is symmetric positive definite; with
      N ≤ d tokens the result is ``[(X Xᵀ)^{1/2}, 0]``. The leading k tokens must be linearly
      independent.
    - ``"triangular"``: L of ``X = L Q``, rows of Q orthonormal, L lower triangular with positive
      diagonal. **The causal one**: row i depends on the tokens up to i alone, to the last bit. Any
      rank: a token in the span of those before it has no column of its own, and where d tokens
      span everything the others are given in their axes.

    ``"svd"`` and ``"polar"`` read all tokens to dress any one of them: under a causal mask later
    tokens would leak into earlier ones through them. Ask with ``causal=True`` in such a model.

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)
        Tokens as rows. Computed in float64 where the device has it, returned in the dtype of X.
    section : {"svd", "polar", "triangular"}
    stabilizer : StabilizerOfOnes or O, optional
        The group divided by, O(d) by default. Under the stabiliser of the all-ones vector, for
        streams that LayerNorm centres, only the part of the rows orthogonal to 1 is dressed, as
        coordinates in that hyperplane; the rest stays.
    tolerance : float, optional
        Relative gap τ below which the derivative of ``"svd"`` is regularised: √ε by default, 1.5e-8
        for float64 and 3.5e-4 for every other dtype.
    strict : bool
        Raise where the gap is not above the tolerance. For ``"svd"`` it waits for the device.
    causal : bool
        Refuse sections by which a token would depend on later ones.
    return_gap : bool
        Return :class:`DressedTokens`, tokens and gap.
    check : bool
        Whether to look for non-finite entries, for equal singular values (``"svd"``) and for
        dependent tokens (``"polar"``), which waits for the device.

    Returns
    -------
    Tensor, shape (*batch, N, d), or DressedTokens

    Raises
    ------
    ValueError
        On an unknown section, one that is not causal with `causal`, a wrong shape or `stabilizer`,
        the meta device, a tolerance that is not in (0, 1), non-finite entries, dependent leading
        tokens (``"polar"``), or, with `strict`, a gap below the tolerance.
    TypeError
        If the dtype is not real floating-point.

    Notes
    -----
    With ``P = Vᵀ d(XᵀX) V`` the axes turn by ``dV = V K``, ``K_ij = P_ij / (σ_j² − σ_i²)``: the
    gaps enter here and nowhere else. Where ``|σ_j − σ_i| ≤ τ σ_1``, ``1/(σ_j − σ_i)`` is replaced
    by ``(σ_j − σ_i)/(τ σ_1)²``, which is continuous at the tolerance and zero at equality. The
    derivative is then finite always, never NaN, and for a function of the dressed tokens that does
    not depend on the choice of axes among equal singular values it is exact at every gap. Of other
    functions it leaves out the turning of these axes, which has no limit. ``"polar"`` has no gaps.

    Columns past the rank (singular values of at most ``max(N, d) ε σ_1``, ε that of float64 for
    float64, else that of float32) are constants: like the length of a vector at zero they have no
    derivative, and it is taken to be zero. Differentiable by autograd twice and more; inside the
    tolerance only the first derivative means anything.

    ``"triangular"`` is smooth wherever the leading tokens are independent, and not continuous where
    one comes to lie in the span of those before it; there the part outside that span is a constant.
    It takes one step after the other, min(N, d) of them.

    Examples
    --------
    >>> X = torch.randn(4, 16, 8, dtype=torch.float64)
    >>> Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    >>> torch.allclose(dress_tokens(X), dress_tokens(X @ Q))
    True
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {SECTIONS}, got {section!r}")
    if causal and section not in CAUSAL_SECTIONS:
        raise ValueError(
            f"section {section!r} lets tokens depend on later ones, which a causal layer must not: "
            "use section='triangular'"
        )
    group = _check_tokens(X, stabilizer)
    if tolerance is None:
        tolerance = default_tolerance(X.dtype)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance!r}")
    if check:
        check_finite("token matrix X", X)
    tokens = wide(X)
    moving = group.moving_part(tokens)
    dressed, _, gap = dress_matrix(section, moving, X.dtype, tolerance=tolerance, check=check)
    if strict and bool((gap <= tolerance).any()):
        other = "polar" if section == "svd" else "svd"
        raise ValueError(
            f"the relative gap of X is {gap.min().item():.1e}{locate_first(gap <= tolerance)}, not "
            f"above the tolerance {tolerance:.1e}: use section={other!r} or strict=False"
        )
    if moving.shape[-1] < tokens.shape[-1]:
        fixed = tokens - group.from_moving_part(moving)
        dressed = fixed + group.from_moving_part(dressed)
    dressed = dressed.to(X.dtype)
    return DressedTokens(dressed, gap.to(compute_dtype(X.dtype))) if return_gap else dressed


class CausalDressing:
    """``dress_tokens(X, "triangular")`` token by token, as a key-value cache needs it.

    Appended rows come out bit for bit as if all tokens had been dressed together. What is kept are
    the axes found so far, at most d×d numbers per batch item; earlier rows never change. No
    gradients are taken.

    Parameters
    ----------
    stabilizer : StabilizerOfOnes or O, optional
        As for :func:`dress_tokens`; under ``StabilizerOfOnes`` equal to rounding only.
    check : bool
        Whether to look for non-finite entries, and for the moment when all of R^d is spanned, which
        waits for the device.

    Examples
    --------
    >>> X = torch.randn(2, 16, 8, dtype=torch.float64)
    >>> dressing = CausalDressing()
    >>> rows = [dressing.append(part) for part in X.split([10, 1, 1, 4], dim=1)]
    >>> torch.equal(torch.cat(rows, dim=1), dress_tokens(X, "triangular"))
    True
    """

    def __init__(self, *, stabilizer: O | None = None, check: bool = True) -> None:
        self.stabilizer, self.check = stabilizer, check
        self.axes: CausalAxes | None = None
        self._like: tuple[torch.Size, int, torch.dtype] | None = None

    @torch.no_grad()
    def append(self, X: Tensor) -> Tensor:
        """Dress the tokens that come next, (*batch, M, d) -> (*batch, M, d).

        Raises
        ------
        ValueError, TypeError
            For the reasons of :func:`dress_tokens`, or if batch shape, width or dtype are not those
            of the tokens before. The axes are left as they were then.
        """
        group = _check_tokens(X, self.stabilizer)
        like = (X.shape[:-2], X.shape[-1], X.dtype)
        if self._like is not None and like != self._like:
            batch, width, dtype = self._like
            raise ValueError(
                f"the tokens before these have shape {(*batch, 'M', width)} and dtype {dtype}, "
                f"got {tuple(X.shape)} and {X.dtype}"
            )
        if self.check:
            check_finite("token matrix X", X)
        moving = group.moving_part(wide(X))
        floor = dependence(moving.shape[-1], X.dtype)
        found = causal_lq(moving, self.axes, floor=floor, stop_early=self.check)
        self.axes, self._like = found.axes, like
        if moving.shape[-1] == X.shape[-1]:
            return found.tokens.to(X.dtype)
        fixed = wide(X) - group.from_moving_part(moving)
        return (fixed + group.from_moving_part(found.tokens)).to(X.dtype)

    def select(self, index: Tensor) -> None:
        """Keep the batch items `index` of the first batch axis, in this order (beam search)."""
        if self.axes is None or self._like is None or not self._like[0]:
            raise ValueError("there are no tokens with a batch axis to select from")
        self.axes = CausalAxes(*(tensor[index] for tensor in self.axes))
        batch = (len(self.axes.signs), *self._like[0][1:])
        self._like = (torch.Size(batch), *self._like[1:])


def _check_tokens(X: Tensor, stabilizer: O | None) -> O:
    check_floating("token matrix X", X)
    if X.ndim < 2 or X.shape[-1] == 0 or X.shape[-2] == 0:
        raise ValueError(
            f"X must have shape (*batch, N, d) with N and d at least 1, got {tuple(X.shape)}"
        )
    if X.device.type == "meta":
        raise ValueError("X is on the meta device and has no values; move it to a real device")
    group = O(X.shape[-1]) if stabilizer is None else stabilizer
    if not isinstance(group, O) or group.r != X.shape[-1]:
        raise ValueError(f"stabilizer {group!r} does not act on X of shape {tuple(X.shape)}")
    return group

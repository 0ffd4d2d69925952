"""Masks of attention: which token may attend to which, checked and put together.

In reading order: `merge_masks`, those of ``torch.nn.MultiheadAttention`` for the fused kernel;
`AttentionMask`, mask, causality and padding of the relational layers.
"""

from __future__ import annotations

from functools import reduce
from operator import and_

import torch
from torch import Tensor


def merge_masks(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor | None, bool]:
    """One mask for ``scaled_dot_product_attention``, and whether its causal path is enough.

    Parameters
    ----------
    query, key : Tensor
        ``(batch, heads, L, r)`` and ``(batch, key_value_heads, S, r)``.
    attn_mask : Tensor, optional
        ``(L, S)``, ``(batch · heads, L, S)`` or four axes that broadcast to
        ``(batch, heads, L, S)``. Boolean: True may not be attended to; floating-point: added to
        the scores.
    key_padding_mask : Tensor, optional
        ``(batch, S)``, boolean or floating-point likewise.
    causal : bool
        Query i of L sees the keys up to S − L + i, so that the last query sees all.

    Raises
    ------
    TypeError
        If a mask is neither boolean nor floating-point.
    ValueError
        If a shape does not fit.
    """
    batch, heads, length = query.shape[:3]
    keys = key.shape[2]
    if causal and keys < length:
        raise ValueError(f"causal attention of {length} queries needs as many keys, got {keys}")
    if attn_mask is None and key_padding_mask is None:
        if not causal or length == 1:
            return None, False
        if keys == length:
            return None, True
    masks = []
    if attn_mask is not None:
        masks.append(_four_axes(attn_mask, batch, heads, length, keys))
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise ValueError(
                f"key_padding_mask must have shape {(batch, keys)}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        masks.append(key_padding_mask[:, None, None, :])
    if causal:
        future = torch.ones(length, keys, dtype=torch.bool, device=query.device)
        masks.append(future.triu(keys - length + 1)[None, None])
    return _merge(masks, query.dtype), False


def _merge(masks: list[Tensor], dtype: torch.dtype) -> Tensor:
    hidden: Tensor | None = None
    added: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            hidden = mask if hidden is None else hidden | mask
        elif mask.is_floating_point():
            added = mask.to(dtype) if added is None else added + mask.to(dtype)
        else:
            raise TypeError(f"masks must be boolean or floating-point, got {mask.dtype}")
    if hidden is None:
        assert added is not None
        return added
    if added is None:
        return ~hidden
    return torch.where(hidden, torch.full_like(added, float("-inf")), added)


def _four_axes(mask: Tensor, batch: int, heads: int, length: int, keys: int) -> Tensor:
    shape = tuple(mask.shape)
    if shape == (length, keys):
        return mask[None, None]
    if shape == (batch * heads, length, keys):
        return mask.unflatten(0, (batch, heads))
    full = (batch, heads, length, keys)
    fits = (size in (1, wanted) for size, wanted in zip(shape, full, strict=False))
    if len(shape) == 4 and all(fits):
        return mask
    raise ValueError(
        f"attn_mask must have shape {(length, keys)}, {(batch * heads, length, keys)} or one that "
        f"broadcasts to {full}, got {shape}"
    )


class AttentionMask:
    """What is added to the scores, by row ranges, and which keys get no weight at all.

    Parameters
    ----------
    gram : Tensor, shape (*batch, N, N)
        Gives batch shape, N and device.
    mask : Tensor, optional, broadcastable to (*batch, N, N)
        As in ``scaled_dot_product_attention``: boolean, true where i may attend to j, or real and
        added to the scores.
    key_padding_mask : Tensor of bool, optional, broadcastable to (*batch, N)
        As in ``nn.MultiheadAttention``: true for tokens that are padding.
    causal : bool
        Whether i attends to j ≤ i only.

    Raises
    ------
    TypeError
        If a mask has neither a boolean nor (`mask` only) a real floating-point dtype.
    ValueError
        If its shape does not fit.
    """

    def __init__(
        self,
        gram: Tensor,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> None:
        batch, size = gram.shape[:-2], gram.shape[-1]
        _check_mask("mask", mask, batch, (size, size), boolean_only=False)
        _check_mask("key_padding_mask", key_padding_mask, batch, (size,), boolean_only=True)
        self._mask, self._padding, self._causal = mask, key_padding_mask, causal
        self._size, self._device = size, gram.device

    def allowed(self, rows: slice) -> Tensor | None:
        """True where i in `rows` may attend to j, broadcastable to (*batch, n, N); None: always."""
        parts = []
        if self._mask is not None:
            part = self._mask[..., rows, :]
            parts.append(part if part.dtype == torch.bool else part != -torch.inf)
        if self._padding is not None:
            parts.append(~self._padding.unsqueeze(-2))
        if self._causal:
            positions = torch.arange(self._size, device=self._device)
            parts.append(positions <= positions[rows, None])
        return reduce(and_, parts) if parts else None

    def weights(self, scores: Tensor, rows: slice) -> Tensor:
        """Softmax of `scores` (*batch, heads, n, N) over the allowed keys.

        A query without any allowed key gets weights zero, not NaN.
        """
        allowed = self.allowed(rows)
        if allowed is None:
            return scores.softmax(dim=-1)
        if self._mask is not None and self._mask.dtype != torch.bool:
            scores = scores + self._mask[..., rows, :].unsqueeze(-3).to(scores.dtype)
        forbidden = ~allowed.unsqueeze(-3)
        least = torch.finfo(scores.dtype).min
        return scores.masked_fill(forbidden, least).softmax(dim=-1).masked_fill(forbidden, 0)


def _check_mask(
    name: str,
    mask: Tensor | None,
    batch: torch.Size,
    sizes: tuple[int, ...],
    *,
    boolean_only: bool,
) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and (boolean_only or not mask.is_floating_point()):
        wanted = "bool" if boolean_only else "bool or a floating-point dtype"
        raise TypeError(f"{name} must have dtype {wanted}, got {mask.dtype}")
    axes = len(sizes)
    fits = mask.ndim >= axes and tuple(mask.shape[-axes:]) == sizes
    leading = mask.shape[:-axes]
    fits = fits and len(leading) <= len(batch)
    aligned = zip(reversed(leading), reversed(batch), strict=False)
    if not fits or any(own not in (1, wanted) for own, wanted in aligned):
        raise ValueError(
            f"{name} must broadcast to {(*batch, *sizes)} and end in {sizes}, "
            f"got {tuple(mask.shape)}"
        )

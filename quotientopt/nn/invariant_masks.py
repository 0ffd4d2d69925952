"""Masks of attention: those of ``torch.nn.MultiheadAttention``, merged for the fused kernel."""

from __future__ import annotations

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

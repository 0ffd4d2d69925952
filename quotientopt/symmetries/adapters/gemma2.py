"""Gemma 2 of the transformers package: soft-capped scores, RMS norms around every branch.

Scale, soft cap and sliding window act on scores, which the group does not change.
"""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.layers import add_norm
from quotientopt.symmetries.adapters.rotary_decoder import gated_layer, register_decoder
from quotientopt.symmetries.registry import Contribution, qualified

GEMMA2 = "transformers.models.gemma2.modeling_gemma2.Gemma2"


def gemma2_layer(module: Any, name: str, *, prefix: str) -> Contribution:
    """Residual axes of one layer; the norms behind attention and MLP write to the stream."""
    norms = ("input_layernorm", "pre_feedforward_layernorm")
    contribution = gated_layer(module, name, prefix=prefix, norms=norms)
    for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
        add_norm(contribution, getattr(module, norm), qualified(name, norm))
    return contribution


# Its norms multiply by 1 + weight; its embedding is scaled by a constant.
register_decoder(
    GEMMA2, layer=gemma2_layer, embedding=f"{GEMMA2}TextScaledWordEmbedding", neutral=0.0
)

"""Qwen2 of the transformers package: Llama with biases on queries, keys and values.

The biases are turned by the rotary embedding like the rest, and are columns of their factors.
"""

from quotientopt.symmetries.adapters.rotary_decoder import register_decoder

register_decoder("transformers.models.qwen2.modeling_qwen2.Qwen2")

"""Llama of the transformers package: rotary positions, grouped queries, RMS norms with gains."""

from quotientopt.symmetries.adapters.rotary_decoder import register_decoder

register_decoder("transformers.models.llama.modeling_llama.Llama")

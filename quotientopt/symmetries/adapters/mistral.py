"""Mistral of the transformers package: Llama with a sliding window.

Which keys a query sees does not depend on coordinates, so the window changes nothing.
"""

from quotientopt.symmetries.adapters.rotary_decoder import register_decoder

register_decoder("transformers.models.mistral.modeling_mistral.Mistral")

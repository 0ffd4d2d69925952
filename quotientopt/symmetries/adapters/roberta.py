"""RoBERTa of the transformers package: BERT with other positions and another head."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.bert import register_encoder
from quotientopt.symmetries.adapters.layers import add_consumer, require, understands
from quotientopt.symmetries.registry import Contribution

ROBERTA = "transformers.models.roberta.modeling_roberta.Roberta"

register_encoder(ROBERTA)


@understands(f"{ROBERTA}ForMaskedLM", f"{ROBERTA}ForCausalLM")
def roberta_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head's first layer; what follows it is another space."""
    contribution = Contribution()
    require(module.roberta, f"{ROBERTA}Model")
    require(module.lm_head, f"{ROBERTA}LMHead")
    add_consumer(contribution, module, name, "roberta", "lm_head.dense")
    return contribution

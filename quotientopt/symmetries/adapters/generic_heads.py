"""Task heads that the transformers package shares between families."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.layers import add_consumer, understands
from quotientopt.symmetries.registry import Contribution

HEADS = "transformers.modeling_layers.Generic"


@understands(f"{HEADS}ForSequenceClassification", f"{HEADS}ForTokenClassification")
def classifier(module: Any, name: str) -> Contribution:
    """Residual axis of the scores, which read all the model returns."""
    contribution = Contribution()
    add_consumer(contribution, module, name, module.base_model_prefix, "score")
    return contribution


@understands(f"{HEADS}ForQuestionAnswering")
def question_answering(module: Any, name: str) -> Contribution:
    """Residual axis of the span scores, which read all the model returns."""
    contribution = Contribution()
    add_consumer(contribution, module, name, module.base_model_prefix, "qa_outputs")
    return contribution

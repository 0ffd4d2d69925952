"""An optimizer for the LoRA adapters of the peft package: ``qo.peft``.

Works on the layers of peft by their names and never imports it.
"""

from quotientopt.peft.optimizer import create_quotient_optimizer
from quotientopt.peft.pairs import find_trained_pairs

__all__ = ["create_quotient_optimizer", "find_trained_pairs"]

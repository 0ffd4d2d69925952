"""Optimizers on quotients of a model's symmetries."""

from quotientopt.optim.errors import GradientError, RankError, StepRefusedError
from quotientopt.optim.quotient_adam import QuotientAdam

__all__ = ["GradientError", "QuotientAdam", "RankError", "StepRefusedError"]

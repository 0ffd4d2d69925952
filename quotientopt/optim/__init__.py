"""Optimizers on quotients of a model's symmetries."""

from quotientopt.optim.bookkeeping.checks import GradientError, RankError, StepRefusedError
from quotientopt.optim.invariant_norm import invariant_grad_norm
from quotientopt.optim.quotient_adam import QuotientAdam
from quotientopt.optim.sgd.quotient_sgd import QuotientSGD

__all__ = [
    "GradientError",
    "QuotientAdam",
    "QuotientSGD",
    "RankError",
    "StepRefusedError",
    "invariant_grad_norm",
]

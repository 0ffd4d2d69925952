"""Optimizers on quotients of a model's symmetries."""

from quotientopt.optim.quotient_adam import QuotientAdam

__all__ = ["QuotientAdam"]

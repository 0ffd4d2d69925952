"""Tune optimizers on a reference model under one protocol, and report what was measured."""

from quotientopt.compare.comparison import Comparison, Request
from quotientopt.compare.protocol import Protocol, UsageError

__all__ = ["Comparison", "Protocol", "Request", "UsageError"]

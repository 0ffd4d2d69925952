"""Riemannian metrics on factor pairs, as pure functions of a factorised point."""

from quotientopt.manifolds.metrics.base import Factor, FactorPoint, Metric, factorize
from quotientopt.manifolds.metrics.euclidean import Euclidean, JointPoint
from quotientopt.manifolds.metrics.preconditioned import Preconditioned
from quotientopt.manifolds.metrics.right_invariant import RightInvariant

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (Preconditioned(), RightInvariant(), Euclidean())
}

__all__ = [
    "METRICS",
    "Euclidean",
    "Factor",
    "FactorPoint",
    "JointPoint",
    "Metric",
    "Preconditioned",
    "RightInvariant",
    "factorize",
]

"""Quotient manifolds: points are representatives, tangent vectors horizontal lifts."""

from quotientopt.manifolds.base import QuotientManifold
from quotientopt.manifolds.factor import FactorQuotient
from quotientopt.manifolds.gram import GramQuotient
from quotientopt.manifolds.product import ProductManifold

__all__ = ["FactorQuotient", "GramQuotient", "ProductManifold", "QuotientManifold"]

"""Dressing fields: canonical representatives and the group elements that lead to them."""

from quotientopt.sections.factor import (
    balanced_element,
    element,
    orthonormal_element,
    section,
    svd_element,
    triangular_element,
)
from quotientopt.sections.gram import gram_polar, gram_section, gram_svd
from quotientopt.sections.rotary import rotary_balanced_element

__all__ = [
    "balanced_element",
    "element",
    "gram_polar",
    "gram_section",
    "gram_svd",
    "orthonormal_element",
    "rotary_balanced_element",
    "section",
    "svd_element",
    "triangular_element",
]

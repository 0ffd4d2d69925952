"""Dressing fields: canonical representatives and the group elements that lead to them."""

from quotientopt.sections.factor import (
    balanced_element,
    element,
    orthonormal_element,
    section,
    svd_element,
    triangular_element,
)
from quotientopt.sections.gram import (
    gram_polar,
    gram_section,
    gram_svd,
    gram_triangular,
    orthogonal_section,
)
from quotientopt.sections.rotary import rotary_balanced_element, rotary_element, rotary_section

__all__ = [
    "balanced_element",
    "element",
    "gram_polar",
    "gram_section",
    "gram_svd",
    "gram_triangular",
    "orthogonal_section",
    "orthonormal_element",
    "rotary_balanced_element",
    "rotary_element",
    "rotary_section",
    "section",
    "svd_element",
    "triangular_element",
]

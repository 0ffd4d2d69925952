"""Symmetries of models that no adapter knows, found from gradients and proved."""

from quotientopt.symmetries.discovery.discover import Discovery, discover
from quotientopt.symmetries.discovery.stream import FoundStream

__all__ = ["Discovery", "FoundStream", "discover"]

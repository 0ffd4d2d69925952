"""Symmetries of models that no adapter knows, found from gradients and proved."""

from quotientopt.symmetries.discovery.claims import FoundStream
from quotientopt.symmetries.discovery.discover import Discovery, discover

__all__ = ["Discovery", "FoundStream", "discover"]

"""Adapters that come with the package; importing a module registers its adapters."""

from quotientopt.symmetries.adapters import gpt2, reference, torch_attention

__all__ = ["gpt2", "reference", "torch_attention"]

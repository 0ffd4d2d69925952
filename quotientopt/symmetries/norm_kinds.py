"""Norm classes that adapters recognise, by qualified name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quotientopt.symmetries.registry import class_names, follows


@dataclass(frozen=True)
class NormKind:
    """What a norm class computes: the attributes of :class:`Norm` of the same names."""

    centres: bool
    neutral: float


_kinds: dict[str, NormKind] = {}


def register_norm(class_name: str, *, centres: bool = False, neutral: float = 1.0) -> None:
    """Make a norm class known, so that adapters can find its gain, bias and centring.

    Its gain is its parameter ``weight``, its bias its parameter ``bias``; either may be missing.

    Parameters
    ----------
    class_name : str
        Qualified name, ``"transformers.models.llama.modeling_llama.LlamaRMSNorm"``; nothing is
        imported.
    centres : bool
        Whether it subtracts the mean.
    neutral : float
        Value of ``weight`` that multiplies by one; zero where the norm multiplies by 1 + weight.

    Raises
    ------
    TypeError
        If the name is not qualified.
    """
    if not isinstance(class_name, str) or "." not in class_name:
        raise TypeError(
            f'register_norm needs a qualified class name such as "package.module.Norm", '
            f"got {class_name!r}"
        )
    _kinds[class_name] = NormKind(centres, neutral)


def norm_kind(norm: nn.Module) -> NormKind | None:
    """The kind of a module that computes what a registered norm class computes, else None."""
    for name in class_names(norm):
        if name in _kinds:
            return _kinds[name] if follows(norm, name) else None
    return None


register_norm("torch.nn.modules.normalization.LayerNorm", centres=True)
register_norm("torch.nn.modules.normalization.RMSNorm")
register_norm("quotientopt.symmetries.uncentred.UncentredLayerNorm")

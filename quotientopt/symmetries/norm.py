"""Norms on the residual stream: what they do to it, what reads their output, known classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quotientopt.symmetries.registry import ByClass
from quotientopt.symmetries.uncentred import UncentredLayerNorm as UncentredLayerNorm


@dataclass(frozen=True)
class Reader:
    """A matrix that reads vectors of the stream, ``W x`` or ``W x + c``.

    Attributes
    ----------
    weight : str
        Qualified name of the matrix.
    axis : int
        Its axis that is the residual stream.
    bias : str, optional
        Qualified name of ``c``, which is not in the stream.
    """

    weight: str
    axis: int
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """One norm of a model, ``x ↦ γ ∘ (x − mean) / scale + β``, without the mean for RMS norms.

    Attributes
    ----------
    name : str
        Qualified name of the module.
    centres : bool
        Whether the mean over the stream's axis is subtracted (LayerNorm). That fixes the all-ones
        vector and leaves only its stabiliser in O(d).
    gain, bias : str, optional
        Qualified names of the parameters of γ and β.
    neutral : float
        Value of the gain's parameter for which γ = 1; zero where γ = 1 + weight.
    readers : tuple of Reader, optional
        *All* that reads the norm's output. None where it is read otherwise too: by a skip
        connection (post-norm), or by something unknown.
    """

    name: str
    centres: bool
    gain: str | None = None
    bias: str | None = None
    neutral: float = 1.0
    readers: tuple[Reader, ...] | None = None


@dataclass(frozen=True)
class NormKind:
    """What a norm class computes: the attributes of :class:`Norm` of the same names."""

    centres: bool
    neutral: float


_kinds: ByClass[NormKind] = ByClass()


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
    return _kinds.find(norm)


register_norm("torch.nn.modules.normalization.LayerNorm", centres=True)
register_norm("torch.nn.modules.normalization.RMSNorm")
register_norm("quotientopt.symmetries.uncentred.UncentredLayerNorm")

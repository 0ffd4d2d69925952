"""Norms on the residual stream: what they do to it, and what reads their output."""

from __future__ import annotations

from dataclasses import dataclass


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

"""What flows through a relational transformer: a Gram matrix, or the tokens themselves."""

from typing import Protocol

from torch import Tensor

from quotientopt.nn.relational_invariants import congruence, gram_of_tokens
from quotientopt.nn.relational_norms import scaled


class Stream(Protocol):
    """Something with a Gram matrix that moves when its tokens are mixed or scaled."""

    @property
    def gram(self) -> Tensor: ...

    def mix(self, M: Tensor) -> None:
        """``X ↦ M X``."""

    def scale(self, scales: Tensor) -> None:
        """``x_i ↦ s_i x_i``."""


class GramStream:
    """G and inner products R with reference vectors: ``G ↦ M G Mᵀ``, ``R ↦ M R``."""

    def __init__(self, gram: Tensor, references: Tensor | None) -> None:
        self.gram, self.references = gram, references

    def mix(self, M: Tensor) -> None:
        """``X ↦ M X``."""
        self.gram = congruence(M, self.gram)
        if self.references is not None:
            self.references = M @ self.references

    def scale(self, scales: Tensor) -> None:
        """``x_i ↦ s_i x_i``."""
        self.gram = scaled(self.gram, scales)
        if self.references is not None:
            self.references = scales.unsqueeze(-1) * self.references


class TokenStream:
    """X, whose Gram matrix is made anew after every move."""

    def __init__(self, X: Tensor) -> None:
        self.X = X

    @property
    def gram(self) -> Tensor:
        """``X Xᵀ``."""
        return gram_of_tokens(self.X)

    def mix(self, M: Tensor) -> None:
        """``X ↦ M X``."""
        self.X = M @ self.X

    def scale(self, scales: Tensor) -> None:
        """``x_i ↦ s_i x_i``."""
        self.X = scales.unsqueeze(-1) * self.X

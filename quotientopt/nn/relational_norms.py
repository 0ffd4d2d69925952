"""Normalisation of tokens through their Gram matrix."""

import torch
from torch import Tensor, nn

from quotientopt._linalg import check_finite, check_floating
from quotientopt.nn.relational_arithmetic import check_size, full_precision, raised
from quotientopt.nn.relational_attention import check_tokens
from quotientopt.nn.relational_invariants import check_gram, squared_norms, symmetric

MISSING_ONES = (
    "LayerNorm on Grams needs ones = X @ 1, shape (*batch, N): its centring is not a function of "
    "X @ X.mT. Pass ones=X.sum(-1), or use RMSNorm"
)


def rms_scales(gram: Tensor, width: int, eps: float) -> Tensor:
    """``1 / √(|x_i|²/d + ε)``, (*batch, N, N) -> (*batch, N)."""
    return (squared_norms(gram) / width + eps).rsqrt()


def scaled(gram: Tensor, scales: Tensor) -> Tensor:
    """``D G D`` with D = diag(scales): the Gram matrix of D X."""
    return scales.unsqueeze(-1) * gram * scales.unsqueeze(-2)


def centred(gram: Tensor, ones: Tensor, width: int) -> Tensor:
    """``G − c cᵀ/d`` with c = X 1: the Gram matrix of ``X (I − 11ᵀ/d)``."""
    return symmetric(gram - ones.unsqueeze(-1) * ones.unsqueeze(-2) / width)


def check_ones(ones: Tensor | None, gram: Tensor, width: int, *, values: bool = True) -> Tensor:
    """Raise ``ValueError`` unless `ones` can be ``X 1`` of tokens of width d with Gram `gram`.

    Besides its shape, and that it is there, ``⟨x_i, 1⟩² ≤ d |x_i|²`` is looked at, up to rounding,
    if `values` is set.
    """
    if ones is None:
        raise ValueError(MISSING_ONES)
    check_floating("ones", ones)
    if ones.shape != gram.shape[:-1]:
        raise ValueError(f"ones must have shape {tuple(gram.shape[:-1])}, got {tuple(ones.shape)}")
    if values and ones.numel():
        bound = width * squared_norms(gram.detach())
        slack = 1e4 * max(torch.finfo(gram.dtype).eps, torch.finfo(ones.dtype).eps)
        excess = ones.detach().square() > bound * (1 + slack) + slack * bound.amax()
        check_finite("ones", ones)
        if bool(excess.any()):
            raise ValueError(f"no tokens of width {width} have these ones: ⟨x, 1⟩² exceeds d |x|²")
    return ones


class RelationalRMSNorm(nn.Module):
    """``G_ij ↦ γ² G_ij / √((G_ii/d + ε)(G_jj/d + ε))``: RMS normalisation of the tokens.

    It reads the diagonal only, and is invariant under O(d). The gain γ is one number: gains of
    channels would break O(d) to signed permutations.

    Parameters
    ----------
    width : int
        d, the width of the tokens.
    eps : float
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, check: bool = True) -> None:
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.width, self.eps, self.check = check_size("width", width), eps, check
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, gram: Tensor) -> Tensor:
        """Gram matrix of the normalised tokens, (*batch, N, N) -> (*batch, N, N)."""
        check_gram(gram, values=self.check)
        with full_precision(gram):
            G = raised(gram)
            return scaled(G, self.scales(G)).to(gram.dtype)

    def lifted(self, X: Tensor) -> Tensor:
        """The same on tokens, ``γ x / √(|x|²/d + ε)``, for X (*batch, N, width)."""
        _check_width(X, self.width)
        x = raised(X)
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return (self.gain.to(x.dtype) * x * (mean_square + self.eps).rsqrt()).to(X.dtype)

    def scales(self, gram: Tensor) -> Tensor:
        """``γ / √(G_ii/d + ε)``, (*batch, N, N) -> (*batch, N)."""
        return self.gain.to(gram.dtype) * rms_scales(gram, self.width, self.eps)


class RelationalLayerNorm(nn.Module):
    """Layer normalisation of the tokens: centring, then :class:`RelationalRMSNorm`.

    Centring ``X ↦ X (I − 11ᵀ/d)`` singles out the vector 1 and is no function of G = XXᵀ. It needs
    the explicit row c = X 1 of inner products with 1, ``G ↦ G − c cᵀ/d``: this is the breaking of
    O(d) to the stabiliser O(d−1) of 1, under which c is invariant. The result is centred: its own
    row c is zero.

    Parameters
    ----------
    width : int
        d, the width of the tokens.
    eps : float
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, check: bool = True) -> None:
        super().__init__()
        self.rms = RelationalRMSNorm(width, eps, check=check)

    def forward(self, gram: Tensor, ones: Tensor | None = None) -> Tensor:
        """Gram matrix of the normalised tokens.

        Parameters
        ----------
        gram : Tensor, shape (*batch, N, N)
        ones : Tensor, shape (*batch, N)
            ``⟨x_i, 1⟩``. Required.

        Raises
        ------
        ValueError
            Without `ones`, or if ``⟨x_i, 1⟩² > d |x_i|²`` beyond rounding.
        """
        width = self.rms.width
        check_gram(gram, values=self.rms.check)
        ones = check_ones(ones, gram, width, values=self.rms.check)
        with full_precision(gram):
            K = centred(raised(gram), raised(ones), width)
            return scaled(K, self.rms.scales(K)).to(gram.dtype)

    def lifted(self, X: Tensor) -> Tensor:
        """The same on tokens X (*batch, N, width)."""
        _check_width(X, self.rms.width)
        x = raised(X)
        return self.rms.lifted(x - x.mean(dim=-1, keepdim=True)).to(X.dtype)


def _check_width(X: Tensor, width: int) -> None:
    check_tokens(X)
    if X.shape[-1] != width:
        raise ValueError(f"X must have shape (*batch, N, {width}), got {tuple(X.shape)}")

"""Batched linear algebra shared by the groups, the sections and the manifolds.

Everything acts on the last two dimensions and is batched over the others. Small symmetric matrices
are formed and factorised in float64, because a Gram matrix squares the condition number; on devices
without float64 (``mps``) in float32.

In reading order: checks of shapes and dtypes; precision; products and norms; Cholesky factors with
a readable refusal; signs and roots; Lyapunov equations and polar factors; random matrices.

Lyapunov equations and polar factors are computed from spectral decompositions but are smooth where
eigenvalues coincide, so their derivatives are written down here instead of being taken through the
decompositions, which divide by the gaps.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A factor pair, a tangent vector at one, or a Euclidean gradient there: ``(A, B)``."""

_DEVICES_WITHOUT_FLOAT64 = frozenset({"mps"})


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless `tensor` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {tensor.dtype}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if `tensor` has a NaN or an infinity. Synchronises with the device."""
    # The sum is finite if all entries are and does not overflow, and needs no temporary.
    if math.isfinite(tensor.detach().sum().item()):
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} has non-finite entries")


def check_square(name: str, matrix: Tensor, size: int | None = None) -> None:
    """Raise unless `matrix` is floating-point of shape ``(*batch, size, size)``."""
    check_floating(name, matrix)
    wanted = "r" if size is None else str(size)
    square = matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]
    if not square or (size is not None and matrix.shape[-1] != size):
        raise ValueError(
            f"{name} must have shape (*batch, {wanted}, {wanted}), got {tuple(matrix.shape)}"
        )


def check_batches(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless the batch shapes (all but two axes) broadcast to each other."""
    try:
        torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"batch shapes do not match: {shapes}") from None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision in which small matrices of an input of `dtype` are returned: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """Widest floating-point dtype of `device`: float64, or float32 where there is none."""
    return torch.float32 if device.type in _DEVICES_WITHOUT_FLOAT64 else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the widest precision of its device."""
    return tensor.to(wide_dtype(tensor.device))


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Within it, and in functions it decorates, autocast is off on every device."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def gram(X: Tensor) -> Tensor:
    """Row Gram matrix ``X Xᵀ`` in the widest precision, ``(*batch, r, n) -> (*batch, r, r)``."""
    X = wide(X)
    return X @ X.mT


def skew_part(matrix: Tensor) -> Tensor:
    """``(M - Mᵀ) / 2``."""
    return (matrix - matrix.mT) / 2


def subtract_product(Y: Tensor, M: Tensor, X: Tensor) -> Tensor:
    """``Y − M X`` without a temporary of the size of Y, for equal batch shapes."""
    if Y.ndim == 2:
        return torch.addmm(Y, M, X, alpha=-1)
    flat = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (Y, M, X))
    return torch.baddbmm(*flat, alpha=-1).reshape(Y.shape)


def frobenius_inner(X: Tensor, Y: Tensor) -> Tensor:
    """``tr(Xᵀ Y)`` over the last two dimensions."""
    return (X * Y).sum(dim=(-2, -1))


def locate_first(failed: Tensor) -> str:
    """Where the first true entry of a batch mask is, as words for an error message."""
    if failed.ndim == 0:
        return ""
    index = tuple(failed.nonzero()[0].tolist())
    return f" (batch index {index})"


def rows_depend(factor: Tensor, S: Tensor, precision: float) -> Tensor:
    """Whether rows depend on each other, from the Cholesky factor L of their Gram matrix S.

    ``L_ii² / S_ii`` is the squared sine of the angle of a row to those before it. Rounding makes it
    as large as r ε, and that of the stored rows, of relative `precision` ε', about ε'².

    Parameters
    ----------
    factor, S : Tensor, shape (*batch, r, r)
    precision : float

    Returns
    -------
    Tensor, shape (*batch)
        ``L_ii² ≤ max(r ε, ε'²) S_ii`` for any i; false where these are not numbers.
    """
    least = max(precision**2, S.size(-1) * torch.finfo(S.dtype).eps)
    squares = factor.diagonal(dim1=-2, dim2=-1).square()
    return (squares <= least * S.diagonal(dim1=-2, dim2=-1)).any(-1)


def cholesky(S: Tensor, name: str, *, check: bool = True, precision: float = 0.0) -> Tensor:
    """Lower Cholesky factor ``L Lᵀ = S`` of a Gram matrix, with a readable refusal.

    Parameters
    ----------
    S : Tensor, shape (*batch, r, r)
        Symmetric positive definite.
    name : str
        What `S` is the Gram matrix of, for the message.
    check : bool
        Whether to raise on non-finite or rank-deficient input, at the price of waiting for the
        device. Without it the factor of such an input is meaningless.
    precision : float
        Relative precision ε' of the rows that `S` is made of, if that is lower than its own: rows
        that depend on each other up to their rounding count as dependent.

    Raises
    ------
    ValueError
        If `S` is not finite, or singular to working precision: a row of the factor lies in the span
        of the rows before it, ``L_ii² ≤ max(r ε, ε'²) S_ii``.
    """
    if check and not bool(torch.isfinite(S).all()):
        failed = ~torch.isfinite(S).all(dim=-1).all(dim=-1)
        raise ValueError(f"{name} has non-finite entries{locate_first(failed)}")
    factor, info = torch.linalg.cholesky_ex(S, check_errors=False)
    if check:
        failed = (info > 0) | rows_depend(factor, S, precision)
        if bool(failed.any()):
            raise ValueError(
                f"{name} is rank-deficient{locate_first(failed)}: it needs full rank "
                f"{S.shape[-1]}, so perturb it or use a smaller rank"
            )
    return factor


def first_largest(rows: Tensor) -> Tensor:
    """Entry of largest modulus of each real or complex row, ``(*batch, r, n) -> (*batch, r, 1)``.

    Of entries whose moduli agree with the largest one to the square root of the precision it is the
    first, so that rounding cannot move the choice between exact ties.
    """
    modulus = rows.abs()
    slack = 1 - torch.finfo(modulus.dtype).eps ** 0.5
    candidates = modulus >= slack * modulus.amax(dim=-1, keepdim=True)
    return rows.gather(-1, candidates.to(torch.uint8).argmax(dim=-1, keepdim=True))


def row_signs(rows: Tensor) -> Tensor:
    """Sign of the entry of largest modulus of each row, ``(*batch, r, n) -> (*batch, r, 1)``."""
    return torch.where(first_largest(rows) < 0, -1.0, 1.0).to(rows.dtype)


def safe_root(squared: Tensor, floor: Tensor) -> Tensor:
    """``√squared``, a constant for autograd where it is at most `floor`.

    The root has no derivative at zero; there the derivative is taken to be zero.
    """
    differentiable = squared > floor.detach().square()
    constant = squared.detach().clamp_min(0).sqrt()
    return torch.where(differentiable, torch.where(differentiable, squared, 1).sqrt(), constant)


def solve_lyapunov(P: Tensor, C: Tensor) -> Tensor:
    """The solution Y of ``P Y + Y P = C``, by an eigendecomposition of P.

    What :func:`scipy.linalg.solve_continuous_lyapunov` computes for symmetric P, batched, and
    differentiable to any order wherever P is positive definite.

    Parameters
    ----------
    P : Tensor, shape (*batch, r, r)
        Symmetric positive definite.
    C : Tensor, shape (*batch, r, r)
    """
    values, basis = torch.linalg.eigh(P.detach())
    return _Lyapunov.apply(P, C, values, basis)


def solve_paired_lyapunov(W: Tensor, C_right: Tensor, C_left: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions of ``WᵀW Y + Y WᵀW = C_right`` and ``WWᵀ Z + Z WWᵀ = C_left`` by one SVD of W.

    The SVD does not square the condition number of W.

    Parameters
    ----------
    W, C_right, C_left : Tensor, shape (*batch, r, r)
        W is invertible.
    """
    U, values, Vt = torch.linalg.svd(W.detach())
    squares = values.square()
    right = _Lyapunov.apply(W.mT @ W, C_right, squares, Vt.mT)
    return right, _Lyapunov.apply(W @ W.mT, C_left, squares, U)


def orthogonal_polar_factor(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a square one: ``U Vᵀ`` of its SVD ``U Σ Vᵀ``.

    Differentiable to any order where the matrix is invertible, equal singular values included.
    """
    U, values, Vt = torch.linalg.svd(matrix.detach())
    return _PolarFactor.apply(matrix, U, values, Vt)


# From a condition of 1e12, beyond which no frame is made, eleven are enough in float64.
INVERSES = 12


def polar_factor_by_inverses(matrix: Tensor) -> Tensor:
    """Orthogonal Q of the polar decomposition of invertible ``(…, r, r)`` matrices.

    Newton's iteration X ← (γX + X⁻ᵀ/γ)/2 with Higham's γ = (‖X⁻¹‖_F / ‖X‖_F)^{1/2}.
    """
    X = matrix
    for _ in range(INVERSES):
        Y = torch.linalg.inv_ex(X).inverse.mT
        norms = [torch.linalg.matrix_norm(Z, keepdim=True) for Z in (X, Y)]
        scale = (norms[1] / norms[0]).sqrt()
        X = (scale * X + Y / scale) / 2
    return X


class _Lyapunov(torch.autograd.Function):
    """Y with ``P Y + Y P = C``, given the eigenvalues and eigenvectors of P."""

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor, C: Tensor, values: Tensor, basis: Tensor) -> Tensor:
        rotated = basis.mT @ C @ basis
        return basis @ (rotated / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ basis.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        P, _, values, basis = inputs
        ctx.save_for_backward(P, output, values, basis)
        ctx.save_for_forward(P, output, values, basis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The operator is self-adjoint; differentiating the equation gives the part of P.
        P, Y, values, basis = ctx.saved_tensors
        Z = _Lyapunov.apply(P, gradients[0], values, basis)
        return -(Z @ Y.mT + Y.mT @ Z), Z, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        P, Y, values, basis = ctx.saved_tensors
        dP, dC = tangents[0], tangents[1]
        change = torch.zeros_like(Y) if dC is None else dC
        if dP is not None:
            change = change - dP @ Y - Y @ dP
        return _Lyapunov.apply(P, change, values, basis)


class _PolarFactor(torch.autograd.Function):
    """``Q = U Vᵀ`` of a square matrix M, given the SVD ``M = U Σ Vᵀ``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, U: Tensor, values: Tensor, Vt: Tensor) -> Tensor:
        return U @ Vt

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        M, _, values, Vt = inputs
        ctx.save_for_backward(M, output, values, Vt)
        ctx.save_for_forward(M, output, values, Vt)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # dQ = Q Y with P Y + Y P = Qᵀ dM − dMᵀ Q and P = Qᵀ M = V Σ Vᵀ.
        M, Q, values, Vt = ctx.saved_tensors
        Z = _Lyapunov.apply(Q.mT @ M, Q.mT @ gradients[0], values, Vt.mT)
        return Q @ (Z - Z.mT), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        M, Q, values, Vt = ctx.saved_tensors
        change = Q.mT @ tangents[0]
        return Q @ _Lyapunov.apply(Q.mT @ M, change - change.mT, values, Vt.mT)


def random_device(
    generator: torch.Generator | None, device: torch.device | str | None
) -> torch.device:
    """Device of random tensors: the one asked for, else the generator's, else torch's default."""
    if device is not None:
        return torch.device(device)
    return generator.device if generator is not None else torch.get_default_device()


def standard_normal(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent standard normal entries in the widest precision of `device`.

    They are drawn where the generator lives and moved, so that any generator serves any device.
    """
    target = random_device(generator, device)
    source = generator.device if generator is not None else target
    sample = torch.randn(tuple(shape), generator=generator, dtype=wide_dtype(source), device=source)
    return sample.to(dtype=wide_dtype(target), device=target)


def random_orthogonal(
    shape: Sequence[int],
    size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Haar-distributed orthogonal matrices ``(*shape, size, size)`` in the widest precision.

    The Q of a QR decomposition of a Gaussian matrix, its columns multiplied by the signs of the
    diagonal of R: without them the law would depend on the QR routine.
    """
    Q, R = torch.linalg.qr(
        standard_normal((*shape, size, size), generator=generator, device=device)
    )
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return Q * signs.unsqueeze(-2)

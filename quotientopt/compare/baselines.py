"""Contenders written plainly from their definitions: Muon and its kin, SOAP-Muon.

They train the matrices inside the blocks of a model; embeddings, head, biases and gains are left to
AdamW. Matrices of equal shape are stacked and updated at once, in their own dtype. Nothing else
is done for speed, and each update is one function to read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quotientopt.optim.update import interval_of, sampling

# Five minimax quintics for singular values in [1e-3, 1] (Polar Express, arXiv 2505.16932).
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# The Frobenius norm is enlarged a little, so that rounding takes no singular value above one.
MARGIN = 1.01

Group = Mapping[str, Any]
State = dict[str, Any]


def polar(matrix: Tensor) -> Tensor:
    """Polar factor U Vᵀ of X = U Σ Vᵀ, nearly: singular values go through five odd quintics.

    Those above 1e-3 ‖X‖_F end within an eighth of one. The map commutes with rotations of both
    sides.

    Parameters
    ----------
    matrix : Tensor
        Shape ``(…, rows, columns)``; zero stays zero.

    Returns
    -------
    Tensor
        Of the same shape and dtype.
    """
    tall = matrix.size(-2) > matrix.size(-1)
    X = matrix.mT if tall else matrix
    tiny = torch.finfo(X.dtype).tiny
    X = X / (MARGIN * torch.linalg.matrix_norm(X, keepdim=True)).clamp_min(tiny)
    for a, b, c in QUINTICS:
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.mT if tall else X


def muon_size(matrix: Tensor) -> float:
    """√max(1, rows/columns), by which Muon multiplies a polar factor (Jordan 2024)."""
    return float(max(1.0, matrix.size(-2) / matrix.size(-1)) ** 0.5)


class StackedOptimizer(torch.optim.Optimizer):
    """Base: decoupled weight decay and one update of all matrices of a shape, stacked.

    The state of a stack ``(L, rows, columns)`` is kept under the first of its parameters.

    Parameters
    ----------
    params : iterable
        Matrices, all of which have a gradient in every step.
    lr, weight_decay : float
    **options
        Those of `OPTIONS`, with their defaults there.

    Raises
    ------
    TypeError
        For an option that the class does not have.
    """

    OPTIONS: ClassVar[Group] = {}

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, **options: Any
    ) -> None:
        if unknown := sorted(options.keys() - self.OPTIONS.keys()):
            raise TypeError(f"{type(self).__name__} has no option {unknown[0]!r}")
        rates = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, {**rates, **self.OPTIONS, **options})

    def update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """What is subtracted, over the learning rate, ``(L, rows, columns)``.

        Parameters
        ----------
        gradient : Tensor
            Shape ``(L, rows, columns)``.
        state : dict
            Of the stack; ``step`` counts from 1, the rest is empty at step 1.
        group : mapping
            Options of the param group.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Raises
        ------
        ValueError
            If a parameter has no gradient; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_missing_gradients(self.param_groups, type(self).__name__)
        for group in self.param_groups:
            stacks: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                stacks[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for members in stacks.values():
                state = self.state[members[0]]
                state["step"] = state.get("step", 0) + 1
                update = self.update(torch.stack([gradient_of(p) for p in members]), state, group)
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(members, list(update.unbind()), alpha=-group["lr"])
        return loss


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def refuse_missing_gradients(groups: Sequence[Group], name: str) -> None:
    """Refuse a step in which a parameter has no gradient: a stack is updated whole.

    Raises
    ------
    ValueError
        Naming the parameter's shape.
    """
    for parameter in (p for group in groups for p in group["params"]):
        if parameter.grad is None:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(parameter.shape)} has no gradient; leave "
                "parameters that are not trained out"
            )


class Muon(StackedOptimizer):
    """Polar factors of Nesterov momentum (Jordan 2024), in the parameters' own dtype.

    torch's Muon computes in bfloat16, matrix by matrix, with Jordan's quintic, whose singular
    values end between 0.7 and 1.2; here they end within an eighth of one.

    Options: ``momentum`` μ.
    """

    OPTIONS: ClassVar[Group] = {"momentum": 0.95}

    def update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """√max(1, n/m) · polar of (1 − μ) ∂ + μ m, where m ← μ m + (1 − μ) ∂."""
        return muon_size(gradient) * polar(nesterov_momentum(gradient, state, group["momentum"]))


class Muon2(StackedOptimizer):
    """Muon² (arXiv 2604.09967): the polar factor of momentum over the root of its second moment.

    Options: ``momentum`` μ, ``beta2``, ``eps``.
    """

    OPTIONS: ClassVar[Group] = {"momentum": 0.95, "beta2": 0.95, "eps": 1e-8}

    def update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """√max(1, n/m) · polar of ((1 − μ) ∂ + μ m) / (√v + ε), where v ← β₂ v + (1 − β₂) ∂²."""
        momentum = nesterov_momentum(gradient, state, group["momentum"])
        square = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
        square.lerp_(gradient.square(), 1 - group["beta2"])
        return muon_size(gradient) * polar(momentum / (square.sqrt() + group["eps"]))


class AdaMuon(StackedOptimizer):
    """AdaMuon (arXiv 2507.11005): polar factor of the momentum's *signs*, over its second moment.

    pytorch_optimizer's AdaMuon leaves the signs out, as ``signs=False`` does; where gradients are
    noisy that may be the better form.

    Options: ``momentum`` μ, ``beta2``, ``eps``, ``signs``.
    """

    OPTIONS: ClassVar[Group] = {"momentum": 0.95, "beta2": 0.95, "eps": 1e-8, "signs": True}

    def update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """D ∝ O / (√v + ε) of root mean square 0.2; O = polar(sign m), v ← β₂ v + (1 − β₂) O²."""
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        orthogonal = polar(buffer.sign() if group["signs"] else buffer)
        square = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
        square.lerp_(orthogonal.square(), 1 - group["beta2"])
        update = orthogonal / (square.sqrt() + group["eps"])
        return with_norm_of(update, torch.full_like(update, 0.2))


def nesterov_momentum(gradient: Tensor, state: State, momentum: float) -> Tensor:
    """(1 − μ) ∂ + μ m with the buffer m ← μ m + (1 − μ) ∂, which is updated."""
    buffer: Tensor = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
    buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp(buffer, momentum)


class SOAPMuon(StackedOptimizer):
    """SOAP (arXiv 2409.11321) with Nesterov momentum, then a polar step (Vyas et al., SOAP-Muon).

    Adam runs in the eigenbases Q_L, Q_R of the moving averages of ∂∂ᵀ and ∂ᵀ∂; its direction is
    orthogonalised, keeps its Frobenius norm and is turned back. As in SOAP the first gradient
    serves for bases alone: in its own it is diagonal, and Adam would even out rounding. Bases are
    made anew by one orthogonal iteration every ``every`` steps; covariances take every
    ``covariance_every``-th gradient. With ``young`` both are as often as QuotientAdam's, whose
    intervals grow from one step to ``every`` with the number of steps.

    Options: ``betas``, ``eps``, ``covariance_beta`` (per gradient taken), ``covariance_every``,
    ``every``, ``young``.
    """

    OPTIONS: ClassVar[Group] = {
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "covariance_beta": 0.9,
        "covariance_every": 2,
        "every": 10,
        "young": False,
    }

    def update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """Q_L · polar(D) ‖D‖_F/‖polar(D)‖_F · Q_Rᵀ with Adam's direction D in the bases."""
        (beta1, beta2), step = group["betas"], state["step"] - 1
        self._bases(gradient, state, group)
        if step == 0:
            return torch.zeros_like(gradient)
        left, right = state["left_basis"], state["right_basis"]
        z = left.mT @ gradient @ right
        mean = state["exp_avg"].lerp_(z, 1 - beta1)
        square = state["exp_avg_sq"].lerp_(z.square(), 1 - beta2)
        ahead = beta1 / (1 - beta1 ** (step + 1)) * mean + (1 - beta1) / (1 - beta1**step) * z
        direction = ahead / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        return left @ with_norm_of(polar(direction), direction) @ right.mT

    def _bases(self, gradient: Tensor, state: State, group: Group) -> None:
        """Covariances of this step, bases if they are due, and the moments in fresh bases."""
        step = state["step"] - 1
        taken, beta = step % group["covariance_every"] == 0, group["covariance_beta"]
        every = group["every"]
        if group["young"]:
            own = sampling(step - 1, {"refresh_every": every, "capturable": False})
            taken, beta = own.takes(step - 1), own.beta
            every = interval_of(step, every)
        samples = {}
        if taken:  # Also in the first step, which is number 0.
            samples = {"left": gradient @ gradient.mT, "right": gradient.mT @ gradient}
        if step == 0:
            for side, sample in samples.items():
                state[f"{side}_covariance"] = sample
                state[f"{side}_basis"] = torch.linalg.eigh(sample).eigenvectors.flip(-1)
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
            return
        for side, sample in samples.items():
            state[f"{side}_covariance"].lerp_(sample, 1 - beta)
        if step % every == 0:
            turns, orders = {}, {}
            for side in ("left", "right"):
                old = state[f"{side}_basis"]
                fresh, orders[side] = iterated_basis(state[f"{side}_covariance"], old)
                turns[side] = fresh.mT @ old
                state[f"{side}_basis"] = fresh
            # The mean is linear and moves exactly; squares only follow the order of the axes.
            state["exp_avg"] = turns["left"] @ state["exp_avg"] @ turns["right"].mT
            square = state["exp_avg_sq"]
            rows = orders["left"][:, :, None].expand_as(square)
            columns = orders["right"][:, None, :].expand_as(square)
            state["exp_avg_sq"] = square.gather(-2, rows).gather(-1, columns)


def iterated_basis(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One orthogonal iteration: QR of C Q, axes in falling order of qᵀCq; and that order."""
    image = covariance @ basis
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True)
    image = image.gather(-1, order[:, None, :].expand_as(image))
    fresh, triangle = torch.linalg.qr(image)
    # An axis keeps its direction, so that moments keep their signs.
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(fresh.dtype)
    return fresh * signs[:, None, :], order


def with_norm_of(matrix: Tensor, other: Tensor) -> Tensor:
    """`matrix` with the Frobenius norm of `other`."""
    norms = [torch.linalg.matrix_norm(X, keepdim=True) for X in (other, matrix)]
    return matrix * (norms[0] / norms[1].clamp_min(torch.finfo(matrix.dtype).tiny))

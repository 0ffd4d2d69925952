"""What the optimizers refuse before a step: options, then gradients.

Every refusal is one line that names the thing and the way out. Those of saved states are in
:mod:`quotientopt.optim.saved`, those of group elements in :mod:`quotientopt.optim.slices`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, wide_dtype
from quotientopt.optim.slices import TRANSPORTED
from quotientopt.optim.update import PRECISIONS


class StepRefusedError(ValueError):
    """A step cannot be taken; parameters and state are as they were before it."""


class GradientError(StepRefusedError):
    """A gradient is NaN, infinite, or too large to be squared."""


class RankError(StepRefusedError):
    """A factor is not finite; of a low-rank pair also: both are zero."""


# Of QuotientAdam's param groups, in the order of its arguments.
OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "head_frame", "row_frame"),
    *(
        "hidden_frame",
        "residual_frame",
        "embedding_frame",
        "refresh_every",
        "max_grad_norm",
        "nesterov",
        "polar",
        "second_moment",
        "update_scale",
        "embedding_scale",
        "precision",
    ),
    *("lora_frame", "lora_polar", "master_weights", "stochastic_rounding", "maximize"),
    *("foreach", "capturable"),
)
HEAD_FRAMES = ("balanced", "orthonormal", "svd")
ROW_FRAMES = ("per_head", "per_matrix")
HIDDEN_FRAMES = ("per_matrix",)
RESIDUAL_FRAMES = ("per_matrix", "shared")
SECOND_MOMENTS = ("full", "factored")
EMBEDDING_FRAMES = ("fixed", "per_matrix")
LORA_FRAMES = (TRANSPORTED, *HEAD_FRAMES)
# Of QuotientSGD.
PAIR_METRICS = ("preconditioned", "right-invariant")


def refuse_bad_hyperparameters(options: Mapping[str, Any]) -> None:
    """Check the options of a param group.

    Raises
    ------
    ValueError
        Naming the option and what it may be.
    """
    lr, betas, foreach = options["lr"], options["betas"], options["foreach"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got {tuple(lr.shape)}")
    if isinstance(lr, Tensor) and foreach:
        raise ValueError("a tensor lr needs foreach=False or foreach=None")
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        if not isinstance(value, int | float | Tensor) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
    if (
        not isinstance(betas, tuple | list)
        or len(betas) != 2
        or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    ):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for name, known in (
        ("head_frame", HEAD_FRAMES),
        ("hidden_frame", HIDDEN_FRAMES),
        ("residual_frame", RESIDUAL_FRAMES),
        ("lora_frame", LORA_FRAMES),
    ):
        if options[name] is not None and options[name] not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{name} must be {choices} or None, got {options[name]!r}")
    for name, known in (
        ("row_frame", ROW_FRAMES),
        ("embedding_frame", EMBEDDING_FRAMES),
        ("second_moment", SECOND_MOMENTS),
    ):
        if options[name] not in known:
            choices = " or ".join(map(repr, known))
            raise ValueError(f"{name} must be {choices}, got {options[name]!r}")
    if options["hidden_frame"] is not None and options["residual_frame"] is None:
        raise ValueError("hidden_frame frames matrices on both sides and needs a residual_frame")
    if options["polar"] != "step" and not isinstance(options["polar"], bool):
        raise ValueError(f"polar must be True, 'step' or False, got {options['polar']!r}")
    if options["precision"] not in PRECISIONS:
        choices = " or ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be {choices}, got {options['precision']!r}")
    for name in ("update_scale", "embedding_scale"):
        scale = options[name]
        if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {scale!r}")
    every = options["refresh_every"]
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"refresh_every must be a positive integer, got {every!r}")
    limit = options["max_grad_norm"]
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise ValueError(f"max_grad_norm must be a positive number or None, got {limit!r}")
    for name in (
        "nesterov",
        "lora_polar",
        "master_weights",
        "stochastic_rounding",
        "maximize",
        "capturable",
    ):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    if options["master_weights"] and options["stochastic_rounding"]:
        raise ValueError("choose master_weights or stochastic_rounding, not both")
    if options["lora_polar"] and options["lora_frame"] != TRANSPORTED:
        raise ValueError(
            f"lora_polar needs lora_frame={TRANSPORTED!r}, got {options['lora_frame']!r}; in other "
            "frames LoRA pairs follow polar"
        )
    if foreach is not None and not isinstance(foreach, bool):
        raise ValueError(f"foreach must be True, False or None, got {foreach!r}")
    refuse_options_of_torch(options, "QuotientAdam")
    if not options.get("decoupled_weight_decay", True):
        raise ValueError("weight decay is always decoupled in QuotientAdam")


def refuse_bad_options(options: Mapping[str, Any]) -> None:
    """Check the options of a param group.

    Raises
    ------
    ValueError
        Naming the option and what it may be.
    """
    lr, foreach = options["lr"], options["foreach"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got {tuple(lr.shape)}")
    for name, number in (("lr", int | float | Tensor), ("weight_decay", int | float)):
        value = options[name]
        if not isinstance(value, number) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
    momentum = options["momentum"]
    if not isinstance(momentum, int | float) or not 0 <= momentum < float("inf"):
        raise ValueError(f"momentum must be a finite number that is not negative, got {momentum!r}")
    if options["metric"] not in PAIR_METRICS:
        choices = " or ".join(map(repr, PAIR_METRICS))
        raise ValueError(f"metric must be {choices}, got {options['metric']!r}")
    for name in ("nesterov", "maximize"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    if foreach is not None and not isinstance(foreach, bool):
        raise ValueError(f"foreach must be True, False or None, got {foreach!r}")
    if options["nesterov"] and momentum == 0:
        raise ValueError("nesterov=True needs a momentum above zero")
    if options.get("dampening", 0) != 0:
        raise ValueError(f"dampening is not available, got {options['dampening']!r}; use 0")
    refuse_options_of_torch(options, "QuotientSGD")


def refuse_options_of_torch(options: Mapping[str, Any], optimizer: str) -> None:
    """Refuse options of torch's optimizers that a param group asks for in vain."""
    for name in ("amsgrad", "fused", "differentiable"):
        if options.get(name):
            raise ValueError(f"{optimizer} has no {name}; leave it out")


def refuse_options_of_whole_models(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that need all of a model in one process.

    Raises
    ------
    ValueError
        Naming the option.
    """
    for group in param_groups:
        if group["residual_frame"] == "shared":
            raise ValueError(
                "residual_frame='shared' pools all matrices and is not there for sharded "
                "parameters; use residual_frame='per_matrix'"
            )
        if group["capturable"]:
            raise ValueError(
                "capturable=True is not there for sharded parameters, whose steps wait for other "
                "processes; leave it out"
            )


# Options of the whole optimizer, in every param group.
WHOLE = ("max_grad_norm", "refresh_every", "capturable")


def refuse_mixed_groups(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that differ between groups but belong to the whole optimizer."""
    for name in WHOLE:
        values = {group[name] for group in param_groups}
        if len(values) > 1:
            raise ValueError(f"{name} is one for all param groups, got {sorted(values, key=str)}")


def refuse_changed_options(
    param_groups: Sequence[Mapping[str, Any]], checked: list[list[Any]]
) -> list[list[Any]]:
    """Refuse what options may not be, if those of the whole optimizer are not as ``checked``.

    Returns
    -------
    list of list
        The options that are checked now.
    """
    options = [[group[name] for name in WHOLE] for group in param_groups]
    if options != checked:
        for group in param_groups:
            refuse_bad_hyperparameters(group)
        refuse_mixed_groups(param_groups)
    return options


def refuse_sparse(gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Refuse sparse gradients, as torch's AdamW does."""
    for parameter, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name_of(parameter)!r} is sparse; QuotientAdam needs dense "
                "gradients (for an embedding: sparse=False)"
            )


def refuse_sparse_of_pairs(gradients: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse sparse gradients of parameters that belong to a symmetry."""
    for name, gradient in gradients:
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name!r} is sparse, and the parameter belongs to a symmetry; "
                "use dense gradients (for an embedding: sparse=False)"
            )


def refuse_nonfinite(
    norms: Sequence[Tensor],
    gradients: Mapping[Tensor, Tensor],
    name_of: Callable[[Tensor], str],
) -> None:
    """Refuse gradients that Adam cannot square, before anything has changed.

    Parameters
    ----------
    norms : sequence of Tensor
        2-norms of the gradients, dressed or not; a finite one says that all entries are finite.
    gradients : mapping
        Parameter to gradient, to find the one at fault.
    name_of : callable
        Name of a parameter.

    Raises
    ------
    GradientError
        Naming the first parameter whose gradient is NaN, infinite, or so large that the sum of its
        squares overflows.
    """
    if not norms or bool(torch.stack(list(norms)).isfinite().all()):
        return
    own = zip(gradients, norms_of(gradients.values(), clipped=True), strict=True)
    bad = [name_of(p) for p, norm in own if not norm.isfinite()]
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    subject = f"the gradient of {bad[0]!r}{others}" if bad else "a dressed gradient"
    raise GradientError(
        f"{subject} has NaN or infinite entries, or overflows when squared; nothing was updated. "
        "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
    )


def largest_entries(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Largest modulus of each gradient, which is finite where all its entries are."""
    values = [g._values() if g.is_sparse else g for g in gradients]
    values = [value for value in values if value.numel()]
    return list(torch._foreach_norm(values, float("inf"))) if values else []


def refuse_nonfinite_entries(
    gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]
) -> None:
    """Refuse gradients with NaN or infinite entries.

    Raises
    ------
    GradientError
        Naming the first parameter.
    """
    bad = [
        name_of(parameter)
        for parameter, gradient in gradients.items()
        if not all(bool(largest.isfinite()) for largest in largest_entries([gradient]))
    ]
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise GradientError(
            f"the gradient of {bad[0]!r}{others} has NaN or infinite entries; nothing was updated. "
            "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
        )


# Of all gradients together where states are float32: beyond it squares and their sums overflow.
LARGEST_NORM = 1e18


def kept_from_overflow(
    norms: list[Tensor], tensors: Sequence[Tensor], limit: float | None
) -> tuple[list[Tensor], float | None]:
    """Norms and a limit to clip by, with which squares stay finite where entries are.

    Parameters
    ----------
    norms : list of Tensor
        From :func:`norms_of`.
    tensors : sequence of Tensor
        What they are the norms of.
    limit : float, optional
        What gradients are clipped by anyway.

    Returns
    -------
    norms : list of Tensor
        The same; in the widest precision beyond `LARGEST_NORM`.
    limit : float or None
        At most `LARGEST_NORM` then.
    """
    if not norms:
        return norms, None
    narrow = any(compute_dtype(tensor.dtype) != torch.float64 for tensor in tensors)
    if limit is not None:
        return norms, min(limit, LARGEST_NORM) if narrow else limit
    if not narrow or bool(torch.linalg.vector_norm(torch.stack(norms)) <= LARGEST_NORM):
        return norms, None
    return norms_of(tensors, clipped=True), LARGEST_NORM


def norms_of(tensors: Iterable[Tensor], *, clipped: bool = False) -> list[Tensor]:
    """2-norms in one dtype and on one device.

    Parameters
    ----------
    tensors : iterable of Tensor
    clipped : bool
        Whether they serve to clip: then in the widest precision, whose squares do not overflow for
        any entry of float32. Else in at least float32, and infinite where Adam's square would be.
    """
    tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    if not tensors:
        return []
    least = wide_dtype(tensors[0].device) if clipped else torch.float32
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), least)
    norms = torch._foreach_norm(tensors, 2, dtype)
    return [norm.to(tensors[0].device) for norm in norms]


class NonfiniteGate:
    """Finds gradients that are not finite on the device, and tells of them later.

    The host does not wait for the device in every step: such a step changes nothing, and is
    counted there until frames, which wait anyway, are made afresh.
    """

    def __init__(self) -> None:
        self._skipped: Tensor | None = None

    @staticmethod
    def is_needed(norms: Sequence[Tensor]) -> bool:
        """Whether reading a flag would make the host wait for the device."""
        return bool(norms) and norms[0].device.type != "cpu"

    def close_on_nonfinite(self, norms: Sequence[Tensor], dressed: Sequence[Tensor]) -> Tensor:
        """One, or zero if a gradient is not finite; dressed gradients are then set to zero.

        Parameters
        ----------
        norms : sequence of Tensor
            Of all gradients; a finite one says that all entries are finite.
        dressed : sequence of Tensor
            Dressed gradients, changed in place.
        """
        finite = torch.stack(list(norms)).isfinite().all()
        for stack in dressed:
            stack.masked_fill_(~finite, 0)
        gate = finite.to(norms[0].dtype)
        if self._skipped is None:
            self._skipped = torch.zeros_like(gate)
        self._skipped.add_(1 - gate)
        return gate

    def refuse_earlier(self) -> None:
        """Tell of steps that changed nothing; the host waits for the device.

        Raises
        ------
        GradientError
            If there were any since the last call.
        """
        if self._skipped is None:
            return
        count = int(self._skipped)
        self._skipped.zero_()
        if count:
            raise GradientError(
                f"gradients had NaN or infinite entries, or overflowed when squared, in {count} of "
                "the steps since frames were last made; those steps changed nothing, nor does this "
                "one. Lower the learning rate, or scale the loss with a GradScaler"
            )

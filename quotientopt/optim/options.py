"""Options of param groups: what there is, what each may be, what belongs to the whole optimizer.

Every refusal is one line that names the option and the way out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from quotientopt.optim.polar import PRECISIONS

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
# Coordinates of LoRA pairs that follow the factors.
TRANSPORTED = "transported"
HEAD_FRAMES = ("balanced", "orthonormal", "svd")
ROW_FRAMES = ("per_head", "per_matrix")
HIDDEN_FRAMES = ("leading", "per_matrix")
RESIDUAL_FRAMES = ("per_matrix", "shared")
SECOND_MOMENTS = ("full", "factored")
EMBEDDING_FRAMES = ("fixed", "fixed_but_head", "per_matrix")
LORA_FRAMES = (TRANSPORTED, *HEAD_FRAMES)
# Options on which slices, buckets and the tensors of the state depend.
PLANNED = (
    "head_frame",
    "row_frame",
    "hidden_frame",
    "residual_frame",
    "embedding_frame",
    "second_moment",
    "lora_frame",
    "foreach",
    "master_weights",
    "capturable",
)
# Those that no schedule changes, which are looked at when they differ from those of the last step.
UNSCHEDULED = tuple(option for option in OPTIONS if option not in ("lr", "betas", "weight_decay"))
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

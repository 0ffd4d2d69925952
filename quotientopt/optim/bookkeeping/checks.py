"""What every step looks at before it computes, and what it refuses.

In the order of a step: the switches it is free of (`full_precision`) and its closure; whether the
plan still holds (`signature_of`), the options (`refuse_changed_options`), the gradients
(`refuse_sparse`), the state (`refuse_replaced`) and the factors (`WatchedFactors`); then the norms
of gradients, which on an accelerator nothing waits for (`NonfiniteGate`). Every refusal is one line
that names the thing and the way out. Those of options are in :mod:`quotientopt.optim.options`, of
saved states in `saved` beside this, of group elements in :mod:`quotientopt.optim.gauge`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import wide_dtype
from quotientopt.optim.bookkeeping.saved import refuse_unfit
from quotientopt.optim.options import (
    PLANNED,
    UNSCHEDULED,
    refuse_bad_hyperparameters,
    refuse_mixed_groups,
)
from quotientopt.symmetries import Block


class StepRefusedError(ValueError):
    """A step cannot be taken; parameters and state are as they were before it."""


class GradientError(StepRefusedError):
    """A gradient is NaN, infinite, or too large to be squared."""


class RankError(StepRefusedError):
    """A factor is not finite; of a low-rank pair also: both are zero."""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Arithmetic as the tensors' dtypes say, whatever the user's global switches are.

    Under autocast, with TF32 or bfloat16 products of float32 matrices, or with a narrow default
    dtype, frames of badly conditioned factors would be rounding noise. The switches are put back.
    """
    precision, default = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.callback(torch.set_default_dtype, default)
        torch.set_float32_matmul_precision("highest")
        if default.itemsize < 4:
            torch.set_default_dtype(torch.float32)
        yield


def loss_of(closure: Any) -> Any:
    """What the closure of a step returns, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def gradients_of(param_groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
    """Gradients of the parameters that have one."""
    parameters = (p for group in param_groups for p in group["params"])
    return {p: p.grad for p in parameters if p.grad is not None}


def signature_of(
    param_groups: Sequence[Mapping[str, Any]], options: Sequence[str] = PLANNED
) -> tuple[Any, ...]:
    """What an optimizer's plan depends on, which is made anew when this changes."""
    return tuple(
        (
            *(group[option] for option in options),
            *map(layout_of, group["params"]),
        )
        for group in param_groups
    )


def layout_of(parameter: Tensor) -> tuple[Any, ...]:
    """Which parameter it is, whether it is trained, and how it lies in memory."""
    return (
        id(parameter),
        takes_part(parameter),
        parameter.dtype,
        parameter.device,
        parameter.shape,
        parameter.stride(),
    )


def takes_part(parameter: Tensor) -> bool:
    """Whether a parameter is trained; a frozen one only serves as geometry."""
    return parameter.requires_grad or parameter.grad is not None


def refuse_changed_options(
    param_groups: Sequence[Mapping[str, Any]], checked: list[list[Any]]
) -> list[list[Any]]:
    """Refuse what options may not be, if those that no schedule changes are not as ``checked``.

    Returns
    -------
    list of list
        The options that are checked now.
    """
    options = [[group[name] for name in UNSCHEDULED] for group in param_groups]
    if options != checked:
        for group in param_groups:
            refuse_bad_hyperparameters(group)
        refuse_mixed_groups(param_groups)
    return options


def refuse_replaced(
    parameters: Iterable[Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    wanted: Sequence[str],
    name_of: Callable[[Tensor], str],
) -> None:
    """The same before a step, of what others have put into the state; values are not looked at.

    A count that is a number becomes a tensor, as torch's optimizers need it.
    """
    moments = [key for key in wanted if key != "step"]
    for parameter in parameters:
        own = state.get(parameter)
        if not own:
            continue
        step = own.get("step")
        shapes = [getattr(own.get(key), "shape", None) for key in moments]
        if isinstance(step, Tensor) and all(shape == parameter.shape for shape in shapes):
            continue
        refuse_unfit([parameter], state, wanted, name_of, kind="state's ")
        own["step"] = torch.as_tensor(step, dtype=torch.float32)


class WatchedFactors:
    """Factors that frames were made from: did anyone but the optimizer write to them?

    Torch counts most writes. Those through ``p.data`` in place and by NumPy are seen in a sample of
    the values, where these are on the host; for others there is :meth:`ask`.

    Parameters
    ----------
    blocks : iterable of Block
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        blocks = list(blocks)
        self._factors = list({id(b.parameter): b.parameter for b in blocks}.values())
        self._on_host = [b for b in blocks if b.parameter.device.type == "cpu"]
        self._marks: list[tuple[int, int]] | None = None
        self._asked = False
        self._sample: Tensor | None = None
        self._columns: list[Tensor] = []
        self._pointers: list[int] = []

    def ask(self) -> None:
        """Take them for written to, until the next mark."""
        self._asked = True

    def mark(self, look: bool) -> None:
        """Note that the factors are now as the optimizer knows them; with ``look``, a sample."""
        self._marks, self._asked = marks_of(self._factors), False
        self._sample = self._sampled(self._marks) if look and self._on_host else None

    def were_written(self, look: bool) -> bool:
        """Whether others wrote to a factor since the last mark, as far as can be told."""
        if self._marks is None or self._asked:
            return self._asked
        marks = marks_of(self._factors)
        if marks != self._marks:
            return True
        if not look or self._sample is None:
            return False
        return not torch.equal(self._sampled(marks), self._sample)

    def _sampled(self, marks: list[tuple[int, int]]) -> Tensor:
        """The first column of every factor: an entry of each channel."""
        pointers = [pointer for pointer, _ in marks]
        if pointers != self._pointers:
            self._columns = [block.view().select(-1, 0) for block in self._on_host]
            self._pointers = pointers
        return torch.cat([column.reshape(-1) for column in self._columns])


def marks_of(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Where parameters lie and how often torch has seen them written to; nothing waits for it.

    Writes to ``p.data`` in place and by NumPy are not counted there.
    """
    return [(parameter.data_ptr(), parameter._version) for parameter in parameters]


def is_recorded(capturable: bool, is_new: Callable[[], bool]) -> bool:
    """Whether this step is recorded as a CUDA graph, which cannot hold eigen-decompositions.

    Parameters
    ----------
    capturable : bool
        The option.
    is_new : callable
        Tells whether anything has no frame yet.

    Raises
    ------
    RuntimeError
        If it cannot be recorded.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return False
    if not capturable:
        raise RuntimeError("make QuotientAdam capturable=True to record a CUDA graph of steps")
    if is_new():
        raise RuntimeError(
            "take a step before recording a CUDA graph: the first one makes the frames"
        )
    return True


def refuse_sparse(gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Refuse sparse gradients, as torch's AdamW does."""
    for parameter, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name_of(parameter)!r} is sparse; QuotientAdam needs dense "
                "gradients (for an embedding: sparse=False)"
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
    narrow = any(torch.finfo(tensor.dtype).bits < 64 for tensor in tensors)
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


def clip_scale(norms: Sequence[Tensor], limit: float | None) -> Tensor | None:
    """Factor that brings gradients down to a norm of ``limit``; None where there is no limit.

    Parameters
    ----------
    norms : sequence of Tensor
        Of the dressed gradients, one each.
    limit : float, optional
    """
    if limit is None:
        return None
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    # Not a number only where the step is refused, or gated with gradients of zero.
    return (limit / (total + 1e-6)).clamp(max=1.0).nan_to_num(0.0)


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
            stack.masked_fill_(~finite.to(stack.device), 0)
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

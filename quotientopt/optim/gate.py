"""Steps on an accelerator that change nothing where a gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt.optim.errors import GradientError


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

"""LayerNorm without its centring, which folding makes superfluous, and how it is saved."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import wide

# Means of rounded entries are this many times smaller than what counts as a mean.
ROUNDINGS = 8


class StreamWriters:
    """Everything that writes to a folded model's stream: does it still write mean zero?

    Shared by the norms of the model, copied and pickled with them.

    Parameters
    ----------
    model : Module
    writers : iterable of (Module, str, int)
        Module, name of its parameter, residual axis.
    """

    def __init__(self, model: nn.Module, writers: Iterable[tuple[nn.Module, str, int]]) -> None:
        self._model = model
        self._writers = list(writers)
        self._answer: tuple[weakref.ref[Any], bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_writers": self._writers, "_answer": None}

    def are_centred(self, occasion: object = None) -> bool:
        """Whether all vectors written have mean zero, up to the rounding of their entries.

        Not where a writer was replaced: of another module nothing is known.

        Parameters
        ----------
        occasion : object, optional
            The values are looked at once as long as this object lives.
        """
        if self._answer is not None and self._answer[0]() is occasion is not None:
            return self._answer[1]
        present = set(self._model.modules())
        answer = all(
            module in present and _is_centred(getattr(module, name), axis)
            for module, name, axis in self._writers
        )
        try:
            self._answer = weakref.ref(occasion), answer
        except TypeError:
            self._answer = None
        return answer


@torch.no_grad()
def _is_centred(parameter: Tensor, axis: int) -> bool:
    vectors = wide(parameter.detach()).movedim(axis, -1)
    # Float32 may have been made float64 since.
    eps = max(torch.finfo(parameter.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = ROUNDINGS * eps * vectors.square().mean(-1).sqrt() / vectors.shape[-1] ** 0.5
    return bool((vectors.mean(-1).abs() <= allowed).all())


class UncentredLayerNorm(nn.LayerNorm):
    """A LayerNorm that does not subtract the mean: ``γ ∘ x / √(mean(x²) + ε) + β``.

    :func:`quotientopt.fold_norms_` puts it in the place of a LayerNorm once everything that writes
    to the stream writes vectors of mean zero. On such vectors both compute the same, and this one
    commutes with all of O(d) (γ = 1). Parameters and ``state_dict`` keys are those of LayerNorm.

    Training, or a rotation of the stream, leaves mean zero, and a LayerNorm that subtracts the mean
    then computes something else. No LayerNorm computes the same, so entries of the ``state_dict``
    are then marked by an axis of length one in front, ``(1, d)``: a model of LayerNorms refuses
    their shape, a folded one takes them.

    Attributes
    ----------
    writers : StreamWriters, optional
        What writes to the stream. Without it entries are never marked.
    """

    writers: StreamWriters | None = None
    # Whether the entries that were loaded last were marked; None before.
    loaded_marked: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axes of `x`."""
        x = functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return x if self.bias is None else x + self.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or self.writers is None or self.writers.are_centred(destination):
            return
        if self.weight is None:
            raise ValueError(
                f"{prefix}: the stream has left mean zero, and a norm without parameters cannot "
                "be saved so that only folded models load it; save the whole module with "
                "torch.save(model)"
            )
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = destination[prefix + name].unsqueeze(0)
        warnings.warn(
            "the residual stream of this folded model has left mean zero, which no LayerNorm "
            "reproduces: the gains of its norms are saved in shape (1, d), which only a folded "
            "model loads. Build the model anew, fold_norms_(model), and load_state_dict there; "
            "from_pretrained refuses the shape",
            UserWarning,
            stacklevel=2,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter is None or not isinstance(value, Tensor):
                continue
            marked = value.shape == (1, *parameter.shape)
            if marked:
                state_dict[prefix + name] = value.squeeze(0)
            self.loaded_marked = marked
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)


def warn_of_centring_weights(model: nn.Module, incompatible: Any) -> None:
    """Warn of weights of a model with LayerNorms that were loaded into a folded one.

    A hook after ``load_state_dict``. Such weights are not marked, and what writes to the stream
    does not write mean zero. So it is where the values of a folded model's ``named_parameters`` are
    loaded, which is right.
    """
    norms = [module for module in model.modules() if isinstance(module, UncentredLayerNorm)]
    plain = [norm for norm in norms if norm.loaded_marked is False and norm.writers is not None]
    for norm in norms:
        norm.loaded_marked = None
    if plain and plain[0].writers is not None and not plain[0].writers.are_centred():
        warnings.warn(
            f"this {type(model).__name__} was folded and its norms do not subtract the mean, and "
            "the weights just loaded need it, unless a folded model was trained to them: load "
            "weights of LayerNorms into a model built anew, then fold_norms_ it",
            UserWarning,
            stacklevel=2,
        )

"""What a checkpoint's model computes from random inputs, and whether its symmetries hold there.

In reading order: `example_inputs`, made from the configuration; `outputs_of`, without the hidden
states; `symmetries_of_checkpoint` and `verify_checkpoint`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.checkpoints.files import CheckpointError, first_line
from quotientopt.symmetries import SymmetryMap, find_symmetries, gaps
from quotientopt.symmetries.verification import floating_tensors

TOKENS, DECODER_TOKENS = 16, 8
MOST_VALUES = 50_000_000


def example_inputs(model: nn.Module, *, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a call: random tokens, pixels, patches or sounds, as the model takes.

    Encoder-decoders get tokens for their decoder as well.

    Parameters
    ----------
    model : Module
        Of transformers.
    seed : int

    Returns
    -------
    dict
        A batch of one, on the device of the model, without special tokens but the last (the end
        of a text, whose state some models read).

    Raises
    ------
    CheckpointError
        If the model takes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    inputs: dict[str, Any] = {}
    wanted = {str(getattr(model, "main_input_name", "input_ids"))}
    if _has(config, "vision_config") and "pixel_values" in accepted:
        wanted.add("pixel_values")
    if "input_ids" in wanted:
        inputs["input_ids"] = _tokens(config.get_text_config(), TOKENS, generator)
    if "pixel_values" in wanted and "image_grid_thw" in accepted:
        inputs |= _illustrated(config, inputs["input_ids"], accepted, generator)
    elif "pixel_values" in wanted:
        inputs["pixel_values"] = _pixels(getattr(config, "vision_config", config), generator)
        if "input_ids" in accepted and _has(config, "text_config"):
            inputs["input_ids"] = _tokens(config.text_config, TOKENS, generator)
    if "input_features" in wanted:
        if not (_has(config, "num_mel_bins") and _has(config, "max_source_positions")):
            raise _unknown(model, wanted)
        frames = 2 * config.max_source_positions
        inputs["input_features"] = _values((1, config.num_mel_bins, frames), generator)
    if "input_values" in wanted and _has(config, "conv_kernel") and _has(config, "conv_stride"):
        inputs["input_values"] = _values((1, _samples(config)), generator)
    if not wanted <= inputs.keys():
        raise _unknown(model, wanted)
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(config, DECODER_TOKENS, generator)
    dtype, device = next(
        (p.dtype, p.device) for p in model.parameters() if p.dtype.is_floating_point
    )
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _unknown(model: nn.Module, wanted: set[str]) -> CheckpointError:
    return CheckpointError(
        f"no inputs can be made for {type(model).__name__}, which takes {', '.join(sorted(wanted))}"
    )


def _tokens(config: Any, length: int, generator: torch.Generator) -> Tensor:
    """Random tokens, no special ones, then the end of a text if there is one."""
    positions = getattr(config, "max_position_embeddings", None) or 2 * length
    length = max(2, min(length, positions // 2))
    special = {
        value
        for name, value in vars(config).items()
        if name.endswith("_token_id") and isinstance(value, int)
    }
    ordinary = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    ids = ordinary[torch.randint(len(ordinary), (1, length), generator=generator)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        ids[:, -1] = end
    return ids


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return _values((1, config.num_channels, height, width), generator)


def _illustrated(
    config: Any, ids: Tensor, accepted: Container[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """A text with one image, given by its patches: ``2s × 2s``, of which s × s are a token."""
    vision, side = config.vision_config, 2 * config.vision_config.spatial_merge_size
    channels = vision.in_channels if _has(vision, "in_channels") else vision.in_chans
    size = channels * vision.temporal_patch_size * vision.patch_size**2
    special = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    # Their configuration of texts does not know these.
    words = ids[~torch.isin(ids, torch.tensor(special))]
    image = [config.vision_start_token_id] + 4 * [config.image_token_id]
    ids = torch.cat((torch.tensor(image, dtype=ids.dtype), words))[None]
    inputs = {
        "input_ids": ids,
        "pixel_values": _values((side * side, size), generator),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return inputs


def _samples(config: Any) -> int:
    """Samples of a wave of which the convolutions make as many vectors as a text has tokens."""
    length = TOKENS
    for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
        length = (length - 1) * stride + kernel
    return length


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal values, not more than a model would be given."""
    if math.prod(shape) > MOST_VALUES:
        raise CheckpointError(f"inputs of shape {shape} are too large to be made")
    return torch.randn(shape, generator=generator)


class LogitsOnly(nn.Module):
    """A model without the hidden states it returns, which turn with the residual stream.

    Returns the logits, or everything where there are none.

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        output = self.model(**inputs)
        if not isinstance(output, Mapping):
            return output
        return {k: v for k, v in output.items() if k.startswith("logits")} or output


@torch.no_grad()
def outputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point outputs from random inputs, in the model's own dtype.

    Raises
    ------
    CheckpointError
        If the model does not run on inputs made from its configuration, or is not finite there.
    """
    try:
        inputs = example_inputs(model)
        output = LogitsOnly(model)(**inputs)
    except CheckpointError:
        raise
    except Exception as error:  # a model may fail in any way on inputs that do not suit it
        raise CheckpointError(
            f"{type(model).__name__} does not run on random inputs: {first_line(error)}"
        ) from error
    found = dict(floating_tensors(output, "output"))
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{name!r} of {type(model).__name__} is not finite")
    return found


def symmetries_of_checkpoint(model: nn.Module) -> SymmetryMap:
    """The symmetries by class; where something is not understood, from random inputs as well.

    Parameters
    ----------
    model : Module
        Of transformers. Where no inputs can be made for it, what the classes tell is all.
    """
    symmetries = find_symmetries(model)
    if not gaps(model, symmetries):
        return symmetries
    try:
        outputs_of(model)
        return find_symmetries(model, **example_inputs(model))
    except (CheckpointError, ValueError):
        return symmetries


def verify_checkpoint(model: nn.Module, symmetries: SymmetryMap) -> dict[str, float]:
    """Largest relative deviations on random inputs, see :meth:`SymmetryMap.verify`.

    Raises
    ------
    CheckpointError
        If the model does not run on inputs made from its configuration.
    """
    outputs_of(model)
    return symmetries.verify(LogitsOnly(model), **example_inputs(model))

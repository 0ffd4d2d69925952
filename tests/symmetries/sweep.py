"""Every model of the transformers package that can be made tiny from its configuration.

``python -m tests.symmetries.sweep`` builds and verifies all, holds them against what is found from
inputs without any class, and writes what is claimed of each to docs/transformers.md.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.symmetries import SymmetryMap, find_symmetries
from quotientopt.symmetries.discovery import discover
from quotientopt.symmetries.registry import inside
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import VOCABULARY, randomize_, tokens, transformers, values
from tests.symmetries.places import places

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
WIDTH, LAYERS, HEADS, HIDDEN = 32, 2, 4, 48
TINY = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"), HIDDEN),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), HIDDEN),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), 0),
    "eos_token_id": 1,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "sliding_window": 3,
    "embedding_size": WIDTH,
    "projection_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "word_embed_proj_dim": WIDTH,
}
PATIENCE, LARGEST = 30, 8_000_000


@dataclass
class Verdict:
    """What is claimed of one model, and whether it is exact.

    Attributes
    ----------
    kind : str
        Model type of the configuration.
    class_name : str
    pairs : int
        Claimed pairs of heads.
    worst : float
        Largest deviation of an output, relative.
    unrecognized : tuple of str
        Classes of attentions that are not understood.
    left_alone : tuple of str
        What stands in the way of pairs.
    problem : str
        Why there is nothing to say.
    found : int
        Pairs of heads that are found from inputs, without any class.
    found_worst : float
        Their largest deviation.
    missed : int
        Heads that a class claims and inputs do not show, in modules that they reach.
    smaller : int
        Heads of which inputs show a larger group than a class claims.
    not_examined : str
        Why nothing can be found from inputs.
    """

    kind: str
    class_name: str = ""
    pairs: int = 0
    worst: float = 0.0
    unrecognized: tuple[str, ...] = ()
    left_alone: tuple[str, ...] = ()
    problem: str = ""
    groups: tuple[str, ...] = field(default_factory=tuple)
    found: int = 0
    found_worst: float = 0.0
    missed: int = 0
    smaller: int = 0
    not_examined: str = "not examined"


def model_kinds() -> list[str]:
    """All model types of the installed transformers that have a model of their own."""
    kinds = sorted(_mapping("configuration_auto", "CONFIG_MAPPING_NAMES"))
    return [kind for kind in kinds if model_name(kind) is not None]


def model_name(kind: str) -> str | None:
    """The class that is built of a model type: with a head for texts or images if there is one."""
    for mapping in MAPPINGS:
        name = _mapping("modeling_auto", mapping).get(kind)
        if name is not None:
            return str(name if isinstance(name, str) else name[0])
    return None


def judge(kind: str, *, examined: bool = False) -> Verdict:
    """Build the model of a type, find its symmetries and verify them.

    Parameters
    ----------
    kind : str
    examined : bool
        Whether to find its symmetries from inputs as well, and compare.
    """
    verdict = Verdict(kind)
    try:
        with _quiet(), _within(PATIENCE):
            model = _model(kind)
            verdict.class_name = type(model).__name__
            inputs = _inputs(model)
            with torch.no_grad():
                model(**inputs)
            _judge(verdict, model, inputs)
        if examined and not verdict.problem:
            with _quiet(), _within(10 * PATIENCE):
                _examine(verdict, model, inputs)
    except Exception as error:
        verdict.problem = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return verdict


def _judge(verdict: Verdict, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    symmetries = find_symmetries(model)
    verdict.pairs = len(symmetries.heads)
    verdict.groups = tuple(sorted({type(pair.group).__name__ for pair in symmetries.heads}))
    kinds = (type(model.get_submodule(name)).__name__ for name in symmetries.unrecognized if name)
    verdict.unrecognized = tuple(sorted(set(kinds)))
    verdict.left_alone = tuple(dict.fromkeys(symmetries.left_alone.values()))
    with KeepFloat64():
        result = symmetries.verify(model, cond=30.0, **inputs)
    # NaN: the outputs do not depend on what it acts on, as on a vision tower without an image.
    felt = [value for value in result.values() if not math.isnan(value)]
    if result and not felt:
        verdict.problem = "the outputs depend on nothing that the symmetries act on"
    verdict.worst = max(felt, default=0.0)


def _examine(verdict: Verdict, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Compare what classes tell with what gradients show."""
    try:
        found = discover(model, (), inputs)
    except ValueError as error:
        verdict.not_examined = str(error).splitlines()[0][:100]
        return
    verdict.not_examined = ""
    verdict.found = len(found.heads)
    with KeepFloat64():
        result = SymmetryMap(found.heads).verify(model, cond=30.0, **inputs)
    verdict.found_worst = max(result.values(), default=0.0)
    reached = [
        symmetry
        for symmetry in find_symmetries(model).heads
        if not any(inside(b.name, path) for b in symmetry.blocks for path in found.not_exercised)
    ]
    claimed, shown = ({where: group for group, where in places(s)} for s in (reached, found.heads))
    verdict.missed = len(claimed.keys() - shown.keys())
    verdict.smaller = sum(
        group != shown[where] for where, group in claimed.items() if where in shown
    )


def _model(kind: str) -> nn.Module:
    config_name = _mapping("configuration_auto", "CONFIG_MAPPING_NAMES")[kind]
    config_class = getattr(transformers(), config_name)
    name = model_name(kind)
    assert name is not None
    config = _eagerly(config_class(**_tiny(config_class)))
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers(), name)(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters when made as small as it goes")
    config = _eagerly(config_class(**_tiny(config_class)))
    return randomize_(getattr(transformers(), name)(config)).eval()


def _tiny(config_class: Any) -> dict[str, Any]:
    """Settings that make a configuration small, of the types that it has by default."""
    default = config_class()
    settings: dict[str, Any] = {}
    for name, value in TINY.items():
        # Some have a value per layer and refuse to be asked for one.
        with contextlib.suppress(Exception):
            present = getattr(default, name)
            if type(present) is type(value) or {type(present), type(value)} == {list, tuple}:
                settings[name] = value
    for name in config_class.sub_configs:
        if getattr(default, name, None) is not None:
            settings[name] = _tiny(type(getattr(default, name)))
    if isinstance(getattr(default, "layer_types", None), list):
        settings["layer_types"] = default.layer_types[-LAYERS:]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(TINY["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        settings["rope_parameters"] = {**rope, "mrope_section": [1, 1, half - 2]}
    return settings


def _eagerly(config: Any) -> Any:
    """The same configuration with experts one after the other, which know float64."""
    config._experts_implementation = "eager"
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _eagerly(getattr(config, name))
    return config


def _inputs(model: Any) -> dict[str, Tensor]:
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        inputs = {"input_ids": tokens()}
    elif name == "pixel_values":
        inputs = {"pixel_values": values(2, 3, 16, 16)}
    elif name == "input_values":
        inputs = {"input_values": values(2, 400)}
    elif name == "input_features":
        inputs = {"input_features": values(2, getattr(config, "num_mel_bins", 8), 32)}
    else:
        raise ValueError(f"an input called {name}")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens(5)
    return inputs


def _mapping(module: str, name: str) -> dict[str, Any]:
    found = importlib.import_module(f"transformers.models.auto.{module}")
    return dict(getattr(found, name, {}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    transformers().logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


HEADER = """# Models of transformers, one by one

What `qo.find_symmetries` claims of every model type of transformers {version} that can be made tiny
from its configuration, by class alone, verified in float64 with random biases and gains. Written by
`python -m tests.symmetries.sweep`. The column *with inputs* counts the pairs that are found from
one batch, without any class ([discovery](discovery.md)); all of them are verified like the others.
`qo.find_symmetries(model, *inputs)` takes both together.

{summary}

| model | class | pairs of heads | largest deviation | with inputs | not understood, or left alone |
|---|---|---|---|---|---|
"""


def table(verdicts: list[Verdict]) -> str:
    """The document of all verdicts."""
    built = [verdict for verdict in verdicts if not verdict.problem]
    claimed = [verdict for verdict in built if verdict.pairs]
    summary = (
        f"{len(built)} of {len(verdicts)} model types can be built and run so; pairs are claimed "
        f"in {len(claimed)} of them, every attention is understood in "
        f"{sum(not verdict.unrecognized for verdict in built)}. {_compared(built)}"
    )
    rows = []
    for v in built:
        groups = f"{v.pairs}: {', '.join(v.groups)}" if v.pairs else "none"
        worst = f"{v.worst:.0e}" if v.pairs else ""
        rest = [f"`{name}`" for name in v.unrecognized] + list(v.left_alone)
        seen = f"{v.found}" if not v.not_examined else "–"
        seen += f", {v.missed} heads not seen" if v.missed else ""
        seen += f", {v.smaller} heads larger" if v.smaller else ""
        rows.append(
            f"| {v.kind} | `{v.class_name}` | {groups} | {worst} | {seen} | {'; '.join(rest)} |"
        )
    missing = [v for v in verdicts if v.problem]
    lines = [f"- {v.kind}: {_escaped(v.problem)}" for v in missing]
    version = transformers().__version__
    refused = [v for v in built if v.not_examined]
    refusals = [f"- {v.kind}: {_escaped(v.not_examined)}" for v in refused]
    return (
        HEADER.format(version=version, summary=summary)
        + "\n".join(rows)
        + "\n\n## Not examined with inputs\n\n"
        + "\n".join(refusals)
        + "\n\n## Not built\n\nConfigurations that this sweep does not make small enough, or whose "
        "models need other inputs:\n\n" + "\n".join(lines) + "\n"
    )


def _compared(built: list[Verdict]) -> str:
    """In words, how far claims by class and what inputs show agree."""
    examined = [v for v in built if not v.not_examined]
    claimed = [v for v in examined if v.pairs]
    whole = sum(not v.missed for v in claimed)
    more = sum(v.found > 0 for v in examined if not v.pairs)
    none = sum(not v.found for v in examined if not v.pairs)
    return (
        f"From inputs, without any class, {len(examined)} can be examined: in {whole} of "
        f"{len(claimed)} with claims every claimed head that the batch reaches is found; of those "
        f"without claims {more} have pairs that inputs show, and {none} have none."
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    verdicts = []
    for kind in sys.argv[1:] or model_kinds():
        verdicts.append(judge(kind, examined=True))
        print(verdicts[-1], flush=True)
    if not sys.argv[1:]:
        DOCUMENT.write_text(table(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Attentions of decoders of the transformers package, one class of each text.

Classes of other families with the same text are copies and need no line here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.symmetries.adapters.attention import (
    add_score_gains,
    grouped_attention,
    normalised_group,
    plain_attention,
    projected_attention,
    require_known_attention,
    rotary_group,
    stacked_attention,
    with_output,
)
from quotientopt.symmetries.adapters.branches import Sublayer, register_sublayer
from quotientopt.symmetries.adapters.layers import (
    CONV1D,
    FALCON_LINEAR,
    HeadView,
    add_attention,
    add_pair,
    blocks_of,
    consecutive,
    input_heads,
    known,
    output_heads,
    present_parameter,
)
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified

SEPARATE = Sublayer(("q_proj", "k_proj", "v_proj"), ("o_proj",))


def rotary_attention(
    module: Any,
    name: str,
    *,
    layout: str = "half",
    partial: bool = False,
    query_key_norms: tuple[str, ...] = (),
    whole: bool = False,
    output: str = "o_proj",
    between: str = "",
) -> Contribution:
    """(C*)^{r/2} on the query-key pair and GL(r) on the value-output pair of key-value heads.

    The query heads (and output blocks) of one key-value head are blocks of one factor; biases of
    queries, keys and values are columns. Layers without positions have GL(r) on both pairs. For
    ``query_key_norms``, paths of norms, and ``whole`` see :func:`normalised_group`.
    """
    require_known_attention(module)
    if getattr(module.config, "clip_qkv", None) is not None:
        raise NotUnderstoodError("queries, keys and values are clipped")
    rank = module.head_dim
    # A sink takes a part of every query's weights.
    sinks = getattr(module, "sinks", None) is not None
    group: StructureGroup = GL(rank)
    if _is_rotated(module):
        layer_type = getattr(module, "layer_type", getattr(module, "attention_type", None))
        group = rotary_group(
            module.config, rank, partial=partial, layout=layout, layer_type=layer_type
        )
    used = [module.get_submodule(path) for path in query_key_norms]
    contribution = projected_attention(
        module,
        name,
        rank=rank,
        layers=("q_proj", "k_proj", "v_proj", output),
        qk_group=normalised_group(used, group, whole=whole),
        between=between,
        keys_move=not sinks,
        values_move=not sinks,
    )
    if query_key_norms:
        add_score_gains(contribution, module, name, query_key_norms, group)
    return contribution


def _is_rotated(module: Any) -> bool:
    """Whether an attention uses positions; in some families every fourth layer does not."""
    if hasattr(module, "use_rope"):
        return bool(module.use_rope)
    return True


PLAIN_ROTARY = (
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "gemma2.Gemma2Attention",
    "gpt_oss.GptOssAttention",
    "smollm3.SmolLM3Attention",
    "olmo.OlmoAttention",
    "starcoder2.Starcoder2Attention",
    "seed_oss.SeedOssAttention",
)
NORMALISED_ROTARY = ("qwen3.Qwen3Attention", "gemma3.Gemma3Attention")
INTERLEAVED_ROTARY = ("helium.HeliumAttention", "ernie4_5.Ernie4_5Attention")
register_sublayer(SEPARATE, *PLAIN_ROTARY, *NORMALISED_ROTARY, *INTERLEAVED_ROTARY)
known(*PLAIN_ROTARY)(rotary_attention)
known(*NORMALISED_ROTARY)(functools.partial(rotary_attention, query_key_norms=("q_norm", "k_norm")))
known(*INTERLEAVED_ROTARY)(functools.partial(rotary_attention, layout="interleaved"))


@known("cohere.CohereAttention")
def cohere_attention(module: Any, name: str) -> Contribution:
    """Neighbouring rows make a plane; queries and keys of Command R+ are normalised, with gains."""
    norms = ("q_norm", "k_norm") if module.use_qk_norm else ()
    return rotary_attention(module, name, layout="interleaved", query_key_norms=norms)


@known("cohere2.Cohere2Attention")
def cohere2_attention(module: Any, name: str) -> Contribution:
    """Only layers with a sliding window have positions."""
    if module.sliding_window is not None:
        return rotary_attention(module, name, layout="interleaved")
    require_known_attention(module)
    rank, layers = module.head_dim, (*SEPARATE.readers, *SEPARATE.writers)
    return projected_attention(module, name, rank=rank, layers=layers, qk_group=GL(rank))


@known("llama4.Llama4TextAttention")
def llama4_attention(module: Any, name: str) -> Contribution:
    """Queries and keys are normalised without gains, after they are turned."""
    norms = ("qk_norm",) if hasattr(module, "qk_norm") else ()
    return rotary_attention(module, name, layout="interleaved", query_key_norms=norms)


@known("stablelm.StableLmAttention")
def stablelm_attention(module: Any, name: str) -> Contribution:
    """Partly rotated heads; norms of queries and keys have one gain per head."""
    norms = ("q_layernorm.norms.0", "k_layernorm.norms.0") if module.qk_layernorm else ()
    return rotary_attention(module, name, partial=True, query_key_norms=norms)


@known("phi.PhiAttention")
def phi_attention(module: Any, name: str) -> Contribution:
    """Partly rotated heads, queries and keys normalised or not."""
    norms = ("q_layernorm", "k_layernorm") if module.qk_layernorm else ()
    return rotary_attention(module, name, partial=True, query_key_norms=norms, output="dense")


known("olmo2.Olmo2Attention", "olmo3.Olmo3Attention")(
    functools.partial(rotary_attention, query_key_norms=("q_norm", "k_norm"), whole=True)
)
known("glm.GlmAttention")(functools.partial(rotary_attention, layout="interleaved", partial=True))
known("bitnet.BitNetAttention")(
    functools.partial(rotary_attention, between="attn_sub_norm normalises all heads together")
)


@known("qwen3_next.Qwen3NextAttention")
def gated_attention(module: Any, name: str) -> Contribution:
    """Nothing: queries and keys are normalised with gains, and every entry of a head is gated."""
    return Contribution(
        left_alone={
            qualified(name, "qk"): "queries and keys are normalised, with gains",
            qualified(name, "vo"): "a gate multiplies every entry of the heads",
        }
    )


known("qwen2_5_vl.Qwen2_5_VLAttention")(rotary_attention)
known("qwen3_vl.Qwen3VLTextAttention")(
    functools.partial(rotary_attention, query_key_norms=("q_norm", "k_norm"))
)
register_sublayer(
    SEPARATE,
    "qwen3_next.Qwen3NextAttention",
    "cohere.CohereAttention",
    "cohere2.Cohere2Attention",
    "llama4.Llama4TextAttention",
    "stablelm.StableLmAttention",
    "olmo2.Olmo2Attention",
    "olmo3.Olmo3Attention",
    "glm.GlmAttention",
    "qwen2_5_vl.Qwen2_5_VLAttention",
    "qwen3_vl.Qwen3VLTextAttention",
    "bitnet.BitNetAttention",
)
register_sublayer(Sublayer(SEPARATE.readers, ("dense",)), "phi.PhiAttention")


@known("phi3.Phi3Attention")
def phi3_attention(module: Any, name: str) -> Contribution:
    """GL(r − rotated) × (C*)^{rotated/2} on QK; queries, keys and values are rows of one matrix."""
    require_known_attention(module)
    rank, shared = module.head_dim, module.num_key_value_heads
    return stacked_attention(
        module,
        name,
        rank=rank,
        heads=shared * module.num_key_value_groups,
        shared=shared,
        layers=("qkv_proj", "o_proj"),
        qk_group=rotary_group(module.config, rank, partial=True),
    )


register_sublayer(Sublayer(("qkv_proj",), ("o_proj",)), "phi3.Phi3Attention")


@known("mpt.MptAttention")
def mpt_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs: ALiBi adds a constant to the scores."""
    if module.clip_qkv:
        raise NotUnderstoodError("queries, keys and values are clipped")
    rank, layers = module.head_dim, ("Wqkv", "out_proj")
    return stacked_attention(
        module, name, rank=rank, heads=module.n_heads, layers=layers, qk_group=GL(rank)
    )


register_sublayer(Sublayer(("Wqkv",), ("out_proj",)), "mpt.MptAttention")


@known("gpt2.GPT2Attention")
def gpt2_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs; Conv1D stores (in, out), the transpose of a Linear."""
    require_known_attention(module)
    rank, heads = module.head_dim, module.num_heads
    if not module.is_cross_attention:
        layers = ("c_attn", "c_proj")
        return stacked_attention(
            module, name, rank=rank, heads=heads, layers=layers, qk_group=GL(rank), kind=CONV1D
        )
    width, pick = heads * rank, consecutive(heads)
    views = [output_heads(module.q_attn, qualified(name, "q_attn"), width, pick, CONV1D)]
    views += [
        output_heads(
            module.c_attn, qualified(name, "c_attn"), 2 * width, consecutive(heads, part, 2), CONV1D
        )
        for part in range(2)
    ]
    return with_output(module, name, "c_proj", (heads, rank), views, GL(rank), CONV1D)


def _gpt2_projections(module: Any) -> Sublayer:
    readers = ("q_attn",) if module.is_cross_attention else ("c_attn",)
    return Sublayer(readers, ("c_proj",), kind=CONV1D)


register_sublayer(_gpt2_projections, "gpt2.GPT2Attention")


_fused_by_head = functools.partial(grouped_attention, layers=("query_key_value", "dense"))


@known("bloom.BloomAttention")
def bloom_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head: ALiBi adds a constant to the scores."""
    rank = module.head_dim
    # Computed as on several devices, the output layer has no bias.
    sliced = module.pretraining_tp > 1 and module.slow_but_exact
    heads, moves = module.num_heads, not sliced
    return _fused_by_head(
        module, name, rank=rank, shared=heads, qk_group=GL(rank), values_move=moves
    )


@known("gpt_neox.GPTNeoXAttention")
def gpt_neox_attention(module: Any, name: str) -> Contribution:
    """GL(r − rotated) × (C*)^{rotated/2} on QK and GL(r) on VO."""
    require_known_attention(module)
    rank = module.head_size
    heads = present_parameter(module.dense, "weight").shape[1] // rank
    group = _partly_rotated(module, rank)
    return _fused_by_head(module, name, rank=rank, shared=heads, qk_group=group)


@known("persimmon.PersimmonAttention")
def persimmon_attention(module: Any, name: str) -> Contribution:
    """Queries and keys are normalised, with gains, which leaves nothing on QK."""
    require_known_attention(module)
    rotary = _partly_rotated(module, module.head_dim)
    group: StructureGroup | None = rotary
    if module.qk_layernorm:
        group = normalised_group((module.q_layernorm, module.k_layernorm), rotary)
    rank, heads = module.head_dim, module.num_heads
    contribution = _fused_by_head(module, name, rank=rank, shared=heads, qk_group=group)
    if module.qk_layernorm:
        add_score_gains(contribution, module, name, ("q_layernorm", "k_layernorm"), rotary)
    return contribution


def _partly_rotated(module: Any, rank: int) -> StructureGroup:
    group = rotary_group(module.config, rank, partial=True)
    if getattr(group, "rotary_dim", 0) != module.rotary_ndims:
        raise NotUnderstoodError(f"{module.rotary_ndims} rotated rows, but {group} by config")
    return group


@known("falcon.FalconAttention")
def falcon_attention(module: Any, name: str) -> Contribution:
    """Group by group some queries, a key and a value; rotary positions or ALiBi."""
    rank, heads, config = module.head_dim, module.num_heads, module.config
    shared = module.num_kv_heads
    if not (module.new_decoder_architecture or module.multi_query):
        shared = heads
    return grouped_attention(
        module,
        name,
        rank=rank,
        shared=shared,
        groups=heads // shared,
        layers=("query_key_value", "dense"),
        qk_group=GL(rank) if config.alibi else rotary_group(config, rank),
        kind=FALCON_LINEAR,
    )


FUSED_BY_HEAD = Sublayer(("query_key_value",), ("dense",))
register_sublayer(
    FUSED_BY_HEAD,
    "bloom.BloomAttention",
    "gpt_neox.GPTNeoXAttention",
    "persimmon.PersimmonAttention",
)
register_sublayer(
    Sublayer(("query_key_value",), ("dense",), kind=FALCON_LINEAR), "falcon.FalconAttention"
)


def _neighbouring_planes(module: Any) -> StructureGroup:
    """The group of GPT-J's rotary embedding, which turns the first rows."""
    if module.rotary_dim is None:
        raise NotUnderstoodError("the number of rotated rows is not given")
    return RotaryCommutant(module.head_dim, module.rotary_dim, "interleaved")


@known("gptj.GPTJAttention")
def gptj_attention(module: Any, name: str) -> Contribution:
    """GL(r − rotated) × (C*)^{rotated/2} on QK, neighbouring rows in a plane."""
    rank, group = module.head_dim, _neighbouring_planes(module)
    layers = (*SEPARATE.readers, "out_proj")
    return projected_attention(module, name, rank=rank, layers=layers, qk_group=group)


@known("codegen.CodeGenAttention")
def codegen_attention(module: Any, name: str) -> Contribution:
    """GPT-J's pairs in a fused matrix: in four parts, each with queries, values and keys.

    The heads of a part lie next to each other; heads at the same place of every part are one
    symmetry, which a single stride can describe.
    """
    rank, heads, parts = module.head_dim, module.num_attention_heads, 4
    if heads % parts:
        raise NotUnderstoodError(f"{heads} heads in {parts} parts")
    group = _neighbouring_planes(module)
    contribution = Contribution()
    for place in range(heads // parts):

        def fused(part: int, place: int = place) -> list[HeadView]:
            def pick(rows: Tensor) -> Tensor:
                return rows.unflatten(0, (parts, 3, heads // parts, rank))[:, part, place]

            rows = 3 * heads * rank
            return output_heads(module.qkv_proj, qualified(name, "qkv_proj"), rows, pick)

        def pick(rows: Tensor, place: int = place) -> Tensor:
            return rows.unflatten(0, (parts, heads // parts, rank))[:, place]

        width = heads * rank
        output = input_heads(module.out_proj, qualified(name, "out_proj"), width, pick)
        add_attention(
            contribution,
            name if heads == parts else qualified(name, str(place)),
            query=fused(0),
            value=fused(1),
            key=fused(2),
            output=output,
            qk_group=group,
        )
    return contribution


register_sublayer(Sublayer(SEPARATE.readers, ("out_proj",)), "gptj.GPTJAttention")
register_sublayer(Sublayer(("qkv_proj",), ("out_proj",)), "codegen.CodeGenAttention")


def latent_attention(module: Any, name: str, *, interleaved: bool) -> Contribution:
    """Multi-head latent attention: keys and values come from a normalised latent vector.

    Every head has GL on the rows of its queries and keys that are not rotated, and on its values.
    The rotated key is one for all heads; the rotated rows of all queries share its group.
    """
    require_known_attention(module)
    plain, turned = module.qk_nope_head_dim, module.qk_rope_head_dim
    heads, values = module.num_heads, module.v_head_dim
    path = "q_proj" if module.q_lora_rank is None else "q_b_proj"
    query = _rows_of(module, name, path, (heads, plain + turned))
    shared = _rows_of(module, name, "kv_b_proj", (heads, plain + values))
    rows = module.kv_lora_rank + turned
    key = _rows_of(module, name, "kv_a_proj_with_mqa", (1, rows))
    layout = "interleaved" if interleaved else "half"
    group = rotary_group(module.config, turned, layout=layout)
    views = [query(0, plain), shared(0, plain), shared(plain, values)]
    contribution = with_output(module, name, "o_proj", (heads, values), views, GL(plain))
    left, right = blocks_of(query(plain, turned), 1), blocks_of(key(module.kv_lora_rank, turned))
    add_pair(contribution, qualified(name, "qk_rotary"), group, left, right)
    return contribution


def _rows_of(
    module: Any, name: str, path: str, shape: tuple[int, int]
) -> Callable[[int, int], list[HeadView]]:
    """Stretches of the rows of every head of a layer."""

    def stretch(start: int, length: int) -> list[HeadView]:
        def pick(rows: Tensor) -> Tensor:
            return rows.unflatten(0, shape).narrow(1, start, length)

        layer = module.get_submodule(path)
        return output_heads(layer, qualified(name, path), shape[0] * shape[1], pick)

    return stretch


known("deepseek_v2.DeepseekV2Attention")(functools.partial(latent_attention, interleaved=True))


@known("deepseek_v3.DeepseekV3Attention")
def deepseek_v3_attention(module: Any, name: str) -> Contribution:
    """Latent attention; the configuration says which rows make a plane."""
    return latent_attention(module, name, interleaved=module.config.rope_interleave)


def _latent_projections(module: Any) -> Sublayer:
    query = "q_proj" if module.q_lora_rank is None else "q_a_proj"
    return Sublayer((query, "kv_a_proj_with_mqa"), ("o_proj",))


register_sublayer(
    _latent_projections, "deepseek_v2.DeepseekV2Attention", "deepseek_v3.DeepseekV3Attention"
)


plain_attention((*SEPARATE.readers, "out_proj"), "opt.OPTAttention")

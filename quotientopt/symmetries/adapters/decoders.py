"""Decoders of the transformers package: where their families differ, and what they share.

An attention, a feed-forward layer, a norm, a layer or a model is known by one class of each text;
classes of other families with the same text are its copies and need no line here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.symmetries.adapters.attention import (
    grouped_attention,
    normalised_group,
    projected_attention,
    require_known_attention,
    rotary_group,
    stacked_attention,
)
from quotientopt.symmetries.adapters.layers import (
    CONV1D,
    FALCON_LINEAR,
    Branch,
    HeadView,
    Sublayer,
    Units,
    add_attention,
    add_consumer,
    add_embeddings,
    add_norm,
    add_pair,
    add_reader,
    add_writer,
    bias_of,
    blocks_of,
    consecutive,
    dense,
    head_adapter,
    input_heads,
    layer_adapter,
    output_heads,
    present_parameter,
    register_embedding,
    register_sublayer,
    require,
    stack_adapter,
    transformers_classes,
    understands,
)
from quotientopt.symmetries.norm import register_norm
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified

SEPARATE = Sublayer(("q_proj", "k_proj", "v_proj"), ("o_proj",))
GATED = Sublayer(("gate_proj", "up_proj"), ("down_proj",), units=Units("up_proj", "down_proj"))
FUSED_GATED = Sublayer(
    ("gate_up_proj",), ("down_proj",), units=Units("gate_up_proj", "down_proj", 1, 2)
)


def known(*names: str) -> Callable[[Any], Any]:
    """Register an adapter for classes of transformers, ``"llama.LlamaAttention"`` and the like."""
    return understands(*transformers_classes(*names))


def norms(*names: str, centres: bool = False, neutral: float = 1.0) -> None:
    """Register norms of transformers."""
    for name in transformers_classes(*names):
        register_norm(name, centres=centres, neutral=neutral)


norms("llama.LlamaRMSNorm", "gpt_oss.GptOssRMSNorm", "helium.HeliumRMSNorm")
norms("llama4.Llama4TextRMSNorm", "llama4.Llama4TextL2Norm")
norms("gemma2.Gemma2RMSNorm", neutral=0.0)
norms("cohere.CohereLayerNorm", "olmo.OlmoLayerNorm", centres=True)

register_embedding("gemma2.Gemma2TextScaledWordEmbedding", "gemma3.Gemma3TextScaledWordEmbedding")

# Feed-forward layers. Routers and experts read what the block reads.
register_sublayer(
    GATED,
    "llama.LlamaMLP",
    "qwen2_5_vl.Qwen2_5_VLMLP",
    "seed_oss.SeedOssMLP",
    "llama4.Llama4TextMLP",
)
register_sublayer(FUSED_GATED, "phi3.Phi3MLP")
# With a norm behind its hidden units.
register_sublayer(Sublayer(GATED.readers, GATED.writers), "bitnet.BitNetMLP")
register_sublayer(dense("c_fc", "c_proj", "act"), "starcoder2.Starcoder2MLP")
register_sublayer(dense("c_fc", "c_proj", "act", kind=CONV1D), "gpt2.GPT2MLP")
register_sublayer(dense("fc1", "fc2", "activation_fn"), "phi.PhiMLP")
register_sublayer(dense("fc_in", "fc_out", "act"), "gptj.GPTJMLP")
register_sublayer(dense("up_proj", "down_proj", "act"), "mpt.MptMLP")
DENSE_4H = ("dense_h_to_4h", "dense_4h_to_h")
register_sublayer(dense(*DENSE_4H, "act"), "gpt_neox.GPTNeoXMLP")
register_sublayer(dense(*DENSE_4H, "gelu_impl"), "bloom.BloomMLP")
register_sublayer(dense(*DENSE_4H, "act", kind=FALCON_LINEAR), "falcon.FalconMLP")
EXPERTS = Sublayer(reading={"gate_up_proj": 2}, writing={"down_proj": 1})
register_sublayer(EXPERTS, "mixtral.MixtralExperts")
register_sublayer(
    Sublayer(
        reading={"gate_up_proj": 1},
        writing={"down_proj": 2, "down_proj_bias": 1},
        biases={"gate_up_proj": "gate_up_proj_bias"},
    ),
    "gpt_oss.GptOssExperts",
)
register_sublayer(
    Sublayer(reading={"gate_up_proj": 1}, writing={"down_proj": 2}), "llama4.Llama4TextExperts"
)
register_sublayer(
    Sublayer(reading={"weight": 1}),
    "mixtral.MixtralTopKRouter",
    "qwen3_moe.Qwen3MoeTopKRouter",
    "llama4.Llama4Router",
    "deepseek_v2.DeepseekV2TopkRouter",
    "deepseek_v3.DeepseekV3TopkRouter",
)
register_sublayer(
    Sublayer(reading={"weight": 1}, biases={"weight": "bias"}), "gpt_oss.GptOssTopKRouter"
)
register_sublayer(
    Sublayer(parts=("gate", "experts")),
    "mixtral.MixtralSparseMoeBlock",
    "qwen3_moe.Qwen3MoeSparseMoeBlock",
)
register_sublayer(
    Sublayer(parts=("gate", "experts", "shared_expert", "shared_expert_gate")),
    "qwen2_moe.Qwen2MoeSparseMoeBlock",
)
register_sublayer(
    Sublayer(parts=("gate", "experts", "shared_experts")),
    "deepseek_v2.DeepseekV2Moe",
    "deepseek_v3.DeepseekV3MoE",
)
register_sublayer(Sublayer(parts=("router", "experts")), "gpt_oss.GptOssMLP")
register_sublayer(Sublayer(parts=("router", "experts", "shared_expert")), "llama4.Llama4TextMoe")


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
        layer_type = getattr(module, "layer_type", None)
        group = rotary_group(
            module.config, rank, partial=partial, layout=layout, layer_type=layer_type
        )
    used = [module.get_submodule(path) for path in query_key_norms]
    return projected_attention(
        module,
        name,
        rank=rank,
        layers=("q_proj", "k_proj", "v_proj", output),
        qk_group=normalised_group(used, group, whole=whole),
        between=between,
        keys_move=not sinks,
        values_move=not sinks,
    )


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
    return projected_attention(
        module,
        name,
        rank=module.head_dim,
        layers=(*SEPARATE.readers, *SEPARATE.writers),
        qk_group=GL(module.head_dim),
    )


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
)
register_sublayer(SEPARATE, "bitnet.BitNetAttention")
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
    return stacked_attention(
        module,
        name,
        rank=module.head_dim,
        heads=module.n_heads,
        layers=("Wqkv", "out_proj"),
        qk_group=GL(module.head_dim),
    )


register_sublayer(Sublayer(("Wqkv",), ("out_proj",)), "mpt.MptAttention")


@known("gpt2.GPT2Attention")
def gpt2_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs; Conv1D stores (in, out), the transpose of a Linear."""
    require_known_attention(module)
    rank, heads = module.head_dim, module.num_heads
    if not module.is_cross_attention:
        return stacked_attention(
            module,
            name,
            rank=rank,
            heads=heads,
            layers=("c_attn", "c_proj"),
            qk_group=GL(rank),
            kind=CONV1D,
        )
    width = heads * rank
    key, value = (
        output_heads(
            module.c_attn, qualified(name, "c_attn"), 2 * width, consecutive(heads, part, 2), CONV1D
        )
        for part in range(2)
    )
    pick = consecutive(heads)
    query = output_heads(module.q_attn, qualified(name, "q_attn"), width, pick, CONV1D)
    output = input_heads(module.c_proj, qualified(name, "c_proj"), width, pick, CONV1D)
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=query,
        key=key,
        value=value,
        output=output,
        qk_group=GL(rank),
        output_bias=bias_of(module.c_proj, qualified(name, "c_proj")),
    )
    return contribution


def _gpt2_projections(module: Any) -> Sublayer:
    readers = ("q_attn",) if module.is_cross_attention else ("c_attn",)
    return Sublayer(readers, ("c_proj",), kind=CONV1D)


register_sublayer(_gpt2_projections, "gpt2.GPT2Attention")


@known("bloom.BloomAttention")
def bloom_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head: ALiBi adds a constant to the scores."""
    rank = module.head_dim
    # Computed as on several devices, the output layer has no bias.
    sliced = module.pretraining_tp > 1 and module.slow_but_exact
    return _fused_by_head(module, name, module.num_heads, rank, GL(rank), values_move=not sliced)


@known("gpt_neox.GPTNeoXAttention")
def gpt_neox_attention(module: Any, name: str) -> Contribution:
    """GL(r − rotated) × (C*)^{rotated/2} on QK and GL(r) on VO."""
    require_known_attention(module)
    rank = module.head_size
    heads = present_parameter(module.dense, "weight").shape[1] // rank
    return _fused_by_head(module, name, heads, rank, _partly_rotated(module, rank))


@known("persimmon.PersimmonAttention")
def persimmon_attention(module: Any, name: str) -> Contribution:
    """Queries and keys are normalised, with gains, which leaves nothing on QK."""
    require_known_attention(module)
    group: StructureGroup | None = _partly_rotated(module, module.head_dim)
    if module.qk_layernorm and group is not None:
        group = normalised_group((module.q_layernorm, module.k_layernorm), group)
    return _fused_by_head(module, name, module.num_heads, module.head_dim, group)


def _partly_rotated(module: Any, rank: int) -> StructureGroup:
    group = rotary_group(module.config, rank, partial=True)
    if getattr(group, "rotary_dim", 0) != module.rotary_ndims:
        raise NotUnderstoodError(f"{module.rotary_ndims} rotated rows, but {group} by config")
    return group


def _fused_by_head(
    module: Any,
    name: str,
    heads: int,
    rank: int,
    group: StructureGroup | None,
    *,
    values_move: bool = True,
) -> Contribution:
    return grouped_attention(
        module,
        name,
        rank=rank,
        shared=heads,
        layers=("query_key_value", "dense"),
        qk_group=group,
        values_move=values_move,
    )


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
    return projected_attention(
        module,
        name,
        rank=module.head_dim,
        layers=("q_proj", "k_proj", "v_proj", "out_proj"),
        qk_group=_neighbouring_planes(module),
    )


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
    width = heads * values
    output = input_heads(module.o_proj, qualified(name, "o_proj"), width, consecutive(heads))
    layout = "interleaved" if interleaved else "half"
    group = rotary_group(module.config, turned, layout=layout)
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=query(0, plain),
        key=shared(0, plain),
        value=shared(plain, values),
        output=output,
        qk_group=GL(plain),
    )
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


# Layers.
ATTENTION_FIRST = Branch("self_attn", before="input_layernorm")
known(
    "llama.LlamaDecoderLayer",
    "mixtral.MixtralDecoderLayer",
    "granite.GraniteDecoderLayer",
    "gpt_oss.GptOssDecoderLayer",
    "phi3.Phi3DecoderLayer",
    "persimmon.PersimmonDecoderLayer",
    "qwen2_5_vl.Qwen2_5_VLDecoderLayer",
    "qwen3_vl.Qwen3VLTextDecoderLayer",
)(layer_adapter(ATTENTION_FIRST, Branch("mlp", before="post_attention_layernorm")))
known("llama4.Llama4TextDecoderLayer")(
    layer_adapter(ATTENTION_FIRST, Branch("feed_forward", before="post_attention_layernorm"))
)
# Norms in front of the branches and behind them; what is behind writes to the stream.
known("gemma2.Gemma2DecoderLayer", "gemma3.Gemma3DecoderLayer")(
    layer_adapter(
        Branch("self_attn", before="input_layernorm", after="post_attention_layernorm"),
        Branch("mlp", before="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
    )
)
known("glm4.Glm4DecoderLayer")(
    layer_adapter(
        Branch("self_attn", before="input_layernorm", after="post_self_attn_layernorm"),
        Branch("mlp", before="post_attention_layernorm", after="post_mlp_layernorm"),
    )
)
known("olmo2.Olmo2DecoderLayer")(
    layer_adapter(
        Branch("self_attn", after="post_attention_layernorm"),
        Branch("mlp", after="post_feedforward_layernorm"),
    )
)
PARALLEL = layer_adapter(ATTENTION_FIRST, Branch("mlp", before="input_layernorm"))
known("cohere.CohereDecoderLayer", "cohere2.Cohere2DecoderLayer", "phi.PhiDecoderLayer")(PARALLEL)
known("gptj.GPTJBlock", "codegen.CodeGenBlock")(
    layer_adapter(Branch("attn", before="ln_1"), Branch("mlp", before="ln_1"))
)
known("mpt.MptBlock")(
    layer_adapter(Branch("attn", before="norm_1"), Branch("ffn", before="norm_2"))
)
known("gpt_neox.GPTNeoXLayer")(
    layer_adapter(
        Branch("attention", before="input_layernorm"),
        Branch("mlp", before="post_attention_layernorm"),
    )
)


@known("stablelm.StableLmDecoderLayer")
def stablelm_layer(module: Any, name: str) -> Contribution:
    """Branches parallel, or one after the other."""
    norm = "input_layernorm" if module.use_parallel_residual else "post_attention_layernorm"
    return layer_adapter(ATTENTION_FIRST, Branch("mlp", before=norm))(module, name)


@known("falcon.FalconDecoderLayer")
def falcon_layer(module: Any, name: str) -> Contribution:
    """Branches parallel behind one norm or two, or one after the other."""
    config = module.config
    attention = mlp = "input_layernorm"
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        attention, mlp = "ln_attn", "ln_mlp"
    elif not config.new_decoder_architecture and not config.parallel_attn:
        mlp = "post_attention_layernorm"
    elif not config.parallel_attn:
        raise NotUnderstoodError("branches one after the other in the new architecture")
    return layer_adapter(Branch("self_attention", before=attention), Branch("mlp", before=mlp))(
        module, name
    )


@known("bloom.BloomBlock")
def bloom_block(module: Any, name: str) -> Contribution:
    """The skip connection may start behind the norms."""
    first = not module.apply_residual_connection_post_layernorm
    return layer_adapter(
        Branch.beside("input_layernorm", "self_attention", first=first),
        Branch.beside("post_attention_layernorm", "mlp", first=first),
    )(module, name)


@known("gpt2.GPT2Block")
def gpt2_block(module: Any, name: str) -> Contribution:
    """Self-attention, cross-attention where there is one, feed-forward layer."""
    branches = [Branch("attn", before="ln_1"), Branch("mlp", before="ln_2")]
    if hasattr(module, "crossattention"):
        branches.append(Branch("crossattention", before="ln_cross_attn"))
    return layer_adapter(*branches)(module, name)


@known("opt.OPTAttention")
def opt_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return projected_attention(
        module,
        name,
        rank=module.head_dim,
        layers=("q_proj", "k_proj", "v_proj", "out_proj"),
        qk_group=GL(module.head_dim),
    )


register_sublayer(Sublayer(SEPARATE.readers, ("out_proj",)), "opt.OPTAttention")
register_embedding("opt.OPTLearnedPositionalEmbedding")


@known("opt.OPTDecoderLayer")
def opt_layer(module: Any, name: str) -> Contribution:
    """Norms in front of the branches, or behind them (OPT-350m)."""
    first = module.do_layer_norm_before
    return layer_adapter(
        Branch.beside("self_attn_layer_norm", "self_attn", first=first),
        Branch.beside("final_layer_norm", dense("fc1", "fc2", "activation_fn"), first=first),
    )(module, name)


@known("opt.OPTDecoder")
def opt_decoder(module: Any, name: str) -> Contribution:
    """Residual axes of embeddings and projections; the final norm, where there is one."""
    contribution = Contribution()
    add_embeddings(contribution, module, name, "embed_positions")
    if module.project_in is None:
        add_embeddings(contribution, module, name, "embed_tokens")
    else:
        add_writer(contribution, module.project_in, qualified(name, "project_in"))
    norm = None if module.final_layer_norm is None else qualified(name, "final_layer_norm")
    contribution.outputs[name] = norm
    if module.project_out is not None:
        reader = add_reader(contribution, module.project_out, qualified(name, "project_out"))
        contribution.consumers[name] = (reader,)
    if norm is not None:
        add_norm(contribution, module.final_layer_norm, norm, [])
    return contribution


@known("opt.OPTForCausalLM")
def opt_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, unless the stream is projected to another width before it."""
    contribution = Contribution()
    require(module.model, *transformers_classes("opt.OPTModel"))
    decoder = require(module.model.decoder, *transformers_classes("opt.OPTDecoder"))
    heads = ("lm_head",) if decoder.project_out is None else ()
    add_consumer(contribution, module, name, "model.decoder", *heads)
    return contribution


# Models that return hidden states, and what reads them.
known(
    "llama.LlamaModel",
    "mistral.MistralModel",
    "mixtral.MixtralModel",
    "qwen2.Qwen2Model",
    "qwen3.Qwen3Model",
    "qwen3_moe.Qwen3MoeModel",
    "gpt_oss.GptOssModel",
    "gemma.GemmaModel",
    "gemma2.Gemma2Model",
    "gemma3.Gemma3TextModel",
    "granite.GraniteModel",
    "smollm3.SmolLM3Model",
    "olmo.OlmoModel",
    "olmo2.Olmo2Model",
    "olmo3.Olmo3Model",
    "ernie4_5.Ernie4_5Model",
    "cwm.CwmModel",
    "starcoder2.Starcoder2Model",
    "cohere.CohereModel",
    "cohere2.Cohere2Model",
    "ministral.MinistralModel",
    "llama4.Llama4TextModel",
    "phi3.Phi3Model",
    "stablelm.StableLmModel",
    "eurobert.EuroBertModel",
    "deepseek_v2.DeepseekV2Model",
    "deepseek_v3.DeepseekV3Model",
    "qwen2_5_vl.Qwen2_5_VLTextModel",
    "qwen3_vl.Qwen3VLTextModel",
)(stack_adapter("embed_tokens", norm="norm"))
known("phi.PhiModel", "persimmon.PersimmonModel")(
    stack_adapter("embed_tokens", norm="final_layernorm")
)
known("gptj.GPTJModel", "codegen.CodeGenModel")(stack_adapter("wte", norm="ln_f"))
known("gpt2.GPT2Model")(stack_adapter("wte", "wpe", norm="ln_f"))
known("mpt.MptModel")(stack_adapter("wte", norm="norm_f"))
known("falcon.FalconModel")(stack_adapter("word_embeddings", norm="ln_f"))
known("gpt_neox.GPTNeoXModel")(stack_adapter("embed_in", norm="final_layer_norm"))


@known("bloom.BloomModel")
def bloom_model(module: Any, name: str) -> Contribution:
    """The norm behind the embedding writes to the stream."""
    contribution = stack_adapter("word_embeddings", norm="ln_f")(module, name)
    norm = qualified(name, "word_embeddings_layernorm")
    add_norm(contribution, module.word_embeddings_layernorm, norm)
    return contribution


known(
    "llama.LlamaForCausalLM",
    "mixtral.MixtralForCausalLM",
    "qwen3_moe.Qwen3MoeForCausalLM",
    "gpt_oss.GptOssForCausalLM",
    "gemma2.Gemma2ForCausalLM",
    "granite.GraniteForCausalLM",
    "cohere.CohereForCausalLM",
    "llama4.Llama4ForCausalLM",
    "phi.PhiForCausalLM",
    "phi3.Phi3ForCausalLM",
    "stablelm.StableLmForCausalLM",
    "persimmon.PersimmonForCausalLM",
    "deepseek_v3.DeepseekV3ForCausalLM",
)(head_adapter("model", "lm_head"))
known(
    "gpt2.GPT2LMHeadModel",
    "bloom.BloomForCausalLM",
    "gptj.GPTJForCausalLM",
    "codegen.CodeGenForCausalLM",
    "falcon.FalconForCausalLM",
    "mpt.MptForCausalLM",
)(head_adapter("transformer", "lm_head"))
known("gpt_neox.GPTNeoXForCausalLM")(head_adapter("gpt_neox", "lm_head"))


@known("qwen2_5_vl.Qwen2_5_VLForConditionalGeneration", "qwen3_vl.Qwen3VLForConditionalGeneration")
def vision_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head; what images write to the text's stream is not followed."""
    contribution = head_adapter("model.language_model", "lm_head")(module, name)
    contribution.residual_breakers.append(f"images, which {qualified(name, 'model.visual')} writes")
    return contribution


def vision_attention(module: Any, name: str) -> Contribution:
    """(C*)^{r/2} on QK: rows and columns of an image turn different planes."""
    rank = module.head_dim
    return stacked_attention(
        module,
        name,
        rank=rank,
        heads=module.num_heads,
        layers=("qkv", "proj"),
        qk_group=RotaryCommutant(rank),
    )


known("qwen2_5_vl.Qwen2_5_VLVisionAttention", "qwen3_vl.Qwen3VLVisionAttention")(vision_attention)


# Task heads that families share.
@understands(
    "transformers.modeling_layers.GenericForSequenceClassification",
    "transformers.modeling_layers.GenericForTokenClassification",
)
def classifier(module: Any, name: str) -> Contribution:
    """Residual axis of the scores, which read all the model returns."""
    contribution = Contribution()
    add_consumer(contribution, module, name, module.base_model_prefix, "score")
    return contribution


@understands("transformers.modeling_layers.GenericForQuestionAnswering")
def question_answering(module: Any, name: str) -> Contribution:
    """Residual axis of the span scores, which read all the model returns."""
    contribution = Contribution()
    add_consumer(contribution, module, name, module.base_model_prefix, "qa_outputs")
    return contribution

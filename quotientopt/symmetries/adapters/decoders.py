"""Decoders of the transformers package: norms, feed-forward layers, layers and models.

A layer or a model is known by one class of each text; classes of other families with the same text
are its copies and need no line here. Their attentions are in ``decoder_attentions``.
"""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.branches import (
    Branch,
    Sublayer,
    Units,
    add_embeddings,
    dense,
    head_adapter,
    layer_adapter,
    register_sublayer,
    stack_adapter,
)
from quotientopt.symmetries.adapters.layers import (
    CONV1D,
    FALCON_LINEAR,
    add_consumer,
    add_norm,
    add_reader,
    add_writer,
    known,
    register_embedding,
    require,
    transformers_classes,
    understands,
)
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified
from quotientopt.symmetries.residual import register_norm

GATED = Sublayer(("gate_proj", "up_proj"), ("down_proj",), units=Units("up_proj", "down_proj"))
FUSED_GATED = Sublayer(
    ("gate_up_proj",), ("down_proj",), units=Units("gate_up_proj", "down_proj", 1, 2)
)


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
PARALLEL = layer_adapter(ATTENTION_FIRST, Branch("mlp", before="input_layernorm"), parallel=True)
known("cohere.CohereDecoderLayer", "cohere2.Cohere2DecoderLayer", "phi.PhiDecoderLayer")(PARALLEL)
known("gptj.GPTJBlock", "codegen.CodeGenBlock")(
    layer_adapter(Branch("attn", before="ln_1"), Branch("mlp", before="ln_1"), parallel=True)
)
known("mpt.MptBlock")(
    layer_adapter(Branch("attn", before="norm_1"), Branch("ffn", before="norm_2"))
)


@known("gpt_neox.GPTNeoXLayer")
def gpt_neox_layer(module: Any, name: str) -> Contribution:
    """Branches parallel, or one after the other."""
    return layer_adapter(
        Branch("attention", before="input_layernorm"),
        Branch("mlp", before="post_attention_layernorm"),
        parallel=module.use_parallel_residual,
    )(module, name)


@known("stablelm.StableLmDecoderLayer")
def stablelm_layer(module: Any, name: str) -> Contribution:
    """Branches parallel, or one after the other."""
    norm = "input_layernorm" if module.use_parallel_residual else "post_attention_layernorm"
    parallel = module.use_parallel_residual
    return layer_adapter(ATTENTION_FIRST, Branch("mlp", before=norm), parallel=parallel)(
        module, name
    )


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
    return layer_adapter(
        Branch("self_attention", before=attention),
        Branch("mlp", before=mlp),
        parallel=mlp != "post_attention_layernorm",
    )(module, name)


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
known("bloom.BloomModel")(
    stack_adapter("word_embeddings", norm="ln_f", first="word_embeddings_layernorm")
)
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

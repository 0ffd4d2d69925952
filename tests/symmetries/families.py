"""Tiny models of every family of the transformers package, all values random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH, HEADS, RANK, VOCABULARY = 32, 4, 8, 40
END = VOCABULARY - 1


def transformers() -> Any:
    return pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )


def randomize_(model: nn.Module) -> nn.Module:
    """Gaussian weights and biases, gains around one: nothing is zero or one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model


def build(class_name: str, **settings: Any) -> nn.Module:
    """A model of transformers with random values, from the settings of its configuration."""
    package = transformers()
    package.logging.set_verbosity_error()
    model_class = getattr(package, class_name)
    # Configurations keep, and change, the dictionaries they are given.
    configuration = model_class.config_class(**copy.deepcopy(settings))
    return randomize_(model_class(configuration)).eval()


def tokens(length: int = 7) -> Tensor:
    # The first few stay free for special tokens.
    generator = torch.Generator().manual_seed(6)
    return torch.randint(5, VOCABULARY, (2, length), generator=generator)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def images() -> dict[str, Tensor]:
    return {"pixel_values": values(2, 3, 16, 16)}


def pairs() -> dict[str, Tensor]:
    """Texts with an end, whose state CLIP reads, and images."""
    ids = tokens()
    ids[ids == END] -= 1
    ids[:, -1] = END
    return {"input_ids": ids, **images()}


@dataclass(frozen=True)
class Family:
    """A family of transformers, and what is expected of it.

    Attributes
    ----------
    title : str
        Name in the documentation's table.
    class_name : str
    configuration : dict
        Settings of the configuration; ``settings`` is a copy, since configurations of transformers
        change the dictionaries they are given.
    inputs : callable
        Makes the keyword arguments of a call.
    attentions : int
        Number of attention modules; shared ones count once.
    groups : tuple of str
        Expected groups of the pairs of one attention, query-key first, or of all attentions of the
        model; None where left alone.
    heads : int or tuple of int
        Heads of every pair: key-value heads where queries are grouped.
    members : int or tuple of int
        Query heads per key-value head.
    folds : bool
        Whether ``fold_norms_`` makes O(d) exact, the head untied.
    tied : bool
        Whether the head can be tied to the embedding.
    width : int
        Of the residual stream.
    """

    title: str
    class_name: str
    configuration: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = text
    attentions: int = 2
    groups: tuple[str | None, ...] = ("GL(8)", "GL(8)")
    heads: int | tuple[int, ...] = HEADS
    members: int | tuple[int, ...] = 1
    folds: bool = False
    tied: bool = True
    width: int = WIDTH

    @property
    def settings(self) -> dict[str, Any]:
        return copy.deepcopy(self.configuration)

    @property
    def claimed(self) -> list[str]:
        """Groups of all pairs of the model, in order."""
        groups = [group for group in self.groups if group is not None]
        return groups if len(self.groups) > 3 else groups * self.attentions

    def model(self, **settings: Any) -> nn.Module:
        return build(self.class_name, **{**self.settings, **settings})


ROTARY = ("RotaryCommutant(8, rotary_dim=8, layout='half')", "GL(8)")
PARTLY_ROTARY = ("RotaryCommutant(8, rotary_dim=4, layout='half')", "GL(8)")
ROPE = {"rope_type": "default", "rope_theta": 100.0}
PARTIAL_ROPE = {**ROPE, "partial_rotary_factor": 0.5}
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": RANK, "rope_parameters": ROPE}
TOWER = {key: ENCODER[key] for key in list(ENCODER)[:4]}
SEQ2SEQ = {"decoder_start_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}


INTERLEAVED = ("RotaryCommutant(8, rotary_dim=8, layout='interleaved')", "GL(8)")
PARTLY_INTERLEAVED = ("RotaryCommutant(8, rotary_dim=4, layout='interleaved')", "GL(8)")
LATENT_GROUPS = (
    "GL(6)",
    "GL(5)",
    "RotaryCommutant(4, rotary_dim=4, layout='interleaved')",
)
UNROTATED = ("GL(8)", "GL(8)")
NORMALISED = (None, "GL(8)")
WINDOW = {"sliding_window": 3}
LAYERED = {key: value for key, value in DECODER.items() if key != "rope_parameters"}
# grouped_mm, the fast implementation of experts, knows no float64.
EXPERTS = {
    "experts_implementation": "eager",
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LATENT = {
    **ENCODER,
    **EXPERTS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": ROPE,
}
GPT_J = {
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": 2,
    "vocab_size": VOCABULARY,
    "rotary_dim": 4,
    "n_positions": 32,
    "n_ctx": 32,
}
BART = {
    **SEQ2SEQ,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "scale_embedding": True,
}
PATCHES = {**TOWER, "image_size": 16, "patch_size": 8}
AUDIO = {
    **TOWER,
    "vocab_size": VOCABULARY,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


IMAGE_TOKEN = 3
IMAGES_AND_TEXT = {
    "text_config": {**DECODER, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 4,
    "vision_start_token_id": 2,
}


def illustrated() -> dict[str, Tensor]:
    """Texts with an image of 4 × 4 patches each, of which 2 × 2 become one token."""
    ids = tokens(9)
    ids[:, 1], ids[:, 2:6] = 2, IMAGE_TOKEN
    return {
        "input_ids": ids,
        "pixel_values": values(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


def translation() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": tokens(5)}


def waves() -> dict[str, Tensor]:
    return {"input_values": values(2, 60)}


def decoder(title: str, class_name: str, **settings: Any) -> Family:
    own = {name: settings.pop(name) for name in ("groups", "folds") if name in settings}
    own = {"groups": ROTARY, "folds": True, **own}
    return Family(title, class_name, {**DECODER, **settings}, heads=2, members=2, **own)


FAMILIES = {
    "gpt2": Family(
        "GPT-2",
        "GPT2LMHeadModel",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY},
        folds=True,
    ),
    "opt": Family(
        "OPT",
        "OPTForCausalLM",
        {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
        folds=True,
    ),
    "opt-350m": Family(
        "OPT with norms behind the branches (OPT-350m)",
        "OPTForCausalLM",
        {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": Family(
        "BLOOM (ALiBi, fused head by head)",
        "BloomForCausalLM",
        {"hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY},
    ),
    "gpt-neox": Family(
        "GPT-NeoX (fused head by head, m rows rotated)",
        "GPTNeoXForCausalLM",
        {**ENCODER, "rope_parameters": PARTIAL_ROPE},
        groups=PARTLY_ROTARY,
        folds=True,
    ),
    "llama": decoder("Llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "mistral": decoder("Mistral (sliding window)", "MistralForCausalLM", sliding_window=3),
    "qwen2": decoder("Qwen2 (biases on queries, keys, values)", "Qwen2ForCausalLM"),
    "qwen3": decoder(
        "Qwen3 (queries and keys normalised, with gains)",
        "Qwen3ForCausalLM",
        groups=(None, "GL(8)"),
    ),
    "gemma2": decoder(
        "Gemma 2 (soft cap, norms around branches)",
        "Gemma2ForCausalLM",
        folds=False,
        sliding_window=3,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
    ),
    "phi3": decoder(
        "Phi-3 (fused, m rows rotated)",
        "Phi3ForCausalLM",
        groups=PARTLY_ROTARY,
        rope_parameters=PARTIAL_ROPE,
    ),
    "bert": Family("BERT, MiniLM", "BertForMaskedLM", ENCODER),
    "roberta": Family("RoBERTa", "RobertaForMaskedLM", ENCODER),
    "distilbert": Family(
        "DistilBERT",
        "DistilBertForMaskedLM",
        {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48, "vocab_size": VOCABULARY},
    ),
    "albert": Family(
        "ALBERT (layers shared)",
        "AlbertForMaskedLM",
        {**ENCODER, "embedding_size": 16, "num_hidden_layers": 3},
        attentions=1,
    ),
    "vit": Family(
        "ViT",
        "ViTForImageClassification",
        {**TOWER, "image_size": 16, "patch_size": 8},
        inputs=images,
        folds=True,
        tied=False,
    ),
    "clip": Family(
        "CLIP",
        "CLIPModel",
        {
            "text_config": {**ENCODER, "eos_token_id": END},
            "vision_config": {**TOWER, "image_size": 16, "patch_size": 8},
            "projection_dim": 16,
        },
        inputs=pairs,
        attentions=4,
        tied=False,
    ),
    "t5": Family(
        "T5 (relative bias, cross-attention)",
        "T5ForConditionalGeneration",
        {
            **SEQ2SEQ,
            "d_model": WIDTH,
            "d_kv": RANK,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "feed_forward_proj": "gated-gelu",
        },
        inputs=translation,
        attentions=6,
        folds=True,
    ),
    "whisper": Family(
        "Whisper (cross-attention, keys without bias)",
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 6,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        inputs=lambda: {"input_features": values(2, 6, 16), "decoder_input_ids": tokens(5)},
        attentions=6,
    ),
    "mixtral": decoder("Mixtral", "MixtralForCausalLM", **EXPERTS),
    "qwen3-moe": decoder("Qwen3-MoE", "Qwen3MoeForCausalLM", groups=NORMALISED, **EXPERTS),
    "gpt-oss": decoder(
        "gpt-oss (attention sinks, sliding window)", "GptOssForCausalLM", **EXPERTS, **WINDOW
    ),
    "gemma": decoder("Gemma", "GemmaForCausalLM"),
    "gemma3": Family(
        "Gemma 3 (queries and keys normalised, with gains)",
        "Gemma3ForCausalLM",
        {**LAYERED, **WINDOW, "query_pre_attn_scalar": 16},
        groups=NORMALISED,
        heads=2,
        members=2,
    ),
    "granite": decoder(
        "Granite",
        "GraniteForCausalLM",
        attention_bias=True,
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
        logits_scaling=3.0,
    ),
    "smollm3": decoder(
        "SmolLM3 (some layers without positions)",
        "SmolLM3ForCausalLM",
        groups=(*ROTARY, *UNROTATED),
        no_rope_layers=[1, 0],
    ),
    "olmo": decoder("OLMo (norms without gains)", "OlmoForCausalLM", folds=False),
    "olmo2": decoder(
        "OLMo 2 (queries and keys normalised, with gains)",
        "Olmo2ForCausalLM",
        groups=NORMALISED,
        folds=False,
    ),
    "olmo3": decoder("OLMo 3", "Olmo3ForCausalLM", groups=NORMALISED, folds=False, **WINDOW),
    "starcoder2": decoder("StarCoder2", "Starcoder2ForCausalLM", use_bias=True),
    "cohere": decoder(
        "Cohere (neighbouring rows rotated)",
        "CohereForCausalLM",
        groups=INTERLEAVED,
        folds=False,
        use_qk_norm=False,
    ),
    "cohere2": decoder(
        "Cohere 2 (some layers without positions)",
        "Cohere2ForCausalLM",
        groups=(*INTERLEAVED, *UNROTATED),
        folds=False,
        layer_types=["sliding_attention", "full_attention"],
        **WINDOW,
    ),
    "seed-oss": decoder("SeedOss", "SeedOssForCausalLM", attention_bias=True),
    "ministral": decoder("Ministral", "MinistralForCausalLM", **WINDOW),
    "llama4": decoder(
        "Llama 4, text (some layers without positions; `use_qk_norm=False`)",
        "Llama4ForCausalLM",
        groups=(*INTERLEAVED, *UNROTATED),
        no_rope_layers=[1, 0],
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
        attention_chunk_size=4,
        use_qk_norm=False,
        **EXPERTS,
    ),
    "phi": decoder(
        "Phi (m rows rotated)",
        "PhiForCausalLM",
        groups=PARTLY_ROTARY,
        rope_parameters=PARTIAL_ROPE,
    ),
    "falcon": Family(
        "Falcon (fused by groups)",
        "FalconForCausalLM",
        {
            **ENCODER,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "alibi": False,
            "bias": True,
            "rope_parameters": ROPE,
        },
        groups=ROTARY,
        heads=2,
        members=2,
        folds=True,
    ),
    "mpt": Family(
        "MPT (ALiBi, fused)",
        "MptForCausalLM",
        {
            "d_model": WIDTH,
            "n_heads": HEADS,
            "n_layers": 2,
            "vocab_size": VOCABULARY,
            "max_seq_len": 32,
        },
        folds=True,
    ),
    "gpt-j": Family(
        "GPT-J (m neighbouring rows rotated)",
        "GPTJForCausalLM",
        GPT_J,
        groups=PARTLY_INTERLEAVED,
        folds=True,
    ),
    "codegen": Family(
        "CodeGen (fused in four parts)",
        "CodeGenForCausalLM",
        {**GPT_J, "n_embd": 2 * WIDTH, "n_head": 2 * HEADS},
        groups=4 * PARTLY_INTERLEAVED,
        folds=True,
        width=2 * WIDTH,
    ),
    "stablelm": decoder(
        "StableLM (m rows rotated)",
        "StableLmForCausalLM",
        groups=PARTLY_ROTARY,
        rope_parameters=PARTIAL_ROPE,
        use_qkv_bias=True,
    ),
    "persimmon": Family(
        "Persimmon (fused head by head, queries and keys normalised)",
        "PersimmonForCausalLM",
        {**ENCODER, "rope_parameters": PARTIAL_ROPE},
        groups=NORMALISED,
        folds=True,
    ),
    "helium": decoder(
        "Helium (neighbouring rows rotated)",
        "HeliumForCausalLM",
        groups=INTERLEAVED,
        attention_bias=True,
    ),
    "ernie4.5": decoder(
        "ERNIE 4.5 (neighbouring rows rotated)",
        "Ernie4_5ForCausalLM",
        groups=INTERLEAVED,
        use_bias=True,
    ),
    "glm": decoder(
        "GLM (m neighbouring rows rotated)",
        "GlmForCausalLM",
        groups=PARTLY_INTERLEAVED,
        attention_bias=True,
        rope_parameters=PARTIAL_ROPE,
    ),
    "glm4": decoder(
        "GLM-4 (norms around branches)",
        "Glm4ForCausalLM",
        groups=PARTLY_INTERLEAVED,
        folds=False,
        attention_bias=True,
        rope_parameters=PARTIAL_ROPE,
    ),
    "deepseek2": Family(
        "DeepSeek V2 (latent attention)",
        "DeepseekV2ForCausalLM",
        LATENT,
        groups=LATENT_GROUPS,
        heads=(4, 1),
        folds=True,
    ),
    "deepseek3": Family(
        "DeepSeek V3 (latent attention)",
        "DeepseekV3ForCausalLM",
        LATENT,
        groups=LATENT_GROUPS,
        heads=(4, 1),
        folds=True,
    ),
    "qwen2.5-vl": Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        IMAGES_AND_TEXT,
        inputs=illustrated,
        groups=(*ROTARY, *ROTARY, *ROTARY, *ROTARY),
        attentions=4,
        heads=2,
        members=(1, 2),
        tied=False,
    ),
    "qwen3-vl": Family(
        "Qwen3-VL (queries and keys of the text normalised)",
        "Qwen3VLForConditionalGeneration",
        IMAGES_AND_TEXT,
        inputs=illustrated,
        groups=(*ROTARY, *ROTARY, *NORMALISED, *NORMALISED),
        attentions=4,
        heads=2,
        members=(1, 2),
        tied=False,
    ),
    "xlm-roberta": Family("XLM-R", "XLMRobertaForMaskedLM", ENCODER),
    "camembert": Family("CamemBERT", "CamembertForMaskedLM", ENCODER),
    "electra": Family("ELECTRA", "ElectraForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "mpnet": Family("MPNet (relative bias)", "MPNetForMaskedLM", ENCODER),
    "modernbert": Family(
        "ModernBERT (fused, rotary)",
        "ModernBertForMaskedLM",
        {**ENCODER, "attention_bias": True, "norm_bias": True, "local_attention": 4},
        groups=ROTARY,
    ),
    "eurobert": Family(
        "EuroBERT (rotary)",
        "EuroBertForMaskedLM",
        DECODER,
        groups=ROTARY,
        heads=2,
        members=2,
        folds=True,
    ),
    "deberta-v2": Family(
        "DeBERTa v2 (disentangled positions)",
        "DebertaV2ForMaskedLM",
        {
            **ENCODER,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "type_vocab_size": 0,
        },
    ),
    "bart": Family("BART", "BartForConditionalGeneration", BART, inputs=translation, attentions=6),
    "mbart": Family(
        "mBART", "MBartForConditionalGeneration", BART, inputs=translation, attentions=6
    ),
    "pegasus": Family(
        "Pegasus",
        "PegasusForConditionalGeneration",
        BART,
        inputs=translation,
        attentions=6,
        folds=True,
    ),
    "siglip": Family(
        "SigLIP",
        "SiglipModel",
        {"text_config": {**ENCODER, "projection_size": WIDTH}, "vision_config": PATCHES},
        inputs=pairs,
        attentions=5,
        tied=False,
    ),
    "dinov2": Family("DINOv2 (layer scale)", "Dinov2Model", PATCHES, inputs=images, tied=False),
    "dinov3": Family(
        "DINOv3 (rotary, layer scale)",
        "DINOv3ViTModel",
        {**PATCHES, "num_register_tokens": 2},
        inputs=images,
        groups=ROTARY,
        tied=False,
    ),
    "wav2vec2": Family("wav2vec 2.0", "Wav2Vec2ForCTC", AUDIO, inputs=waves, tied=False),
    "hubert": Family("HuBERT", "HubertForCTC", AUDIO, inputs=waves, tied=False),
}


class OutputsOnly(nn.Module):
    """A model without the hidden states it returns, which turn with the residual stream."""

    def __init__(self, model: nn.Module, output: str = "logits") -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, **inputs: Tensor) -> Any:
        outputs = self.model(**inputs)
        names = (self.output, "logits_per_text", "last_hidden_state")
        return outputs[next(name for name in names if name in outputs)]


def gains(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Gains of all norms over the residual stream, and the value that multiplies by one."""
    return [
        (module.weight, 0.0 if "Gemma" in type(module).__name__ else 1.0)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        and hasattr(module, "weight")
        and not name.rpartition(".")[2].startswith(("q_", "k_", "kv_"))
        and not name.endswith("feature_projection.layer_norm")
        and ".feature_extractor." not in name
    ]


def make_neutral_(model: nn.Module) -> nn.Module:
    """Set all gains to one and freeze them: only centring is left of a norm."""
    with torch.no_grad():
        for gain, neutral in gains(model):
            gain.fill_(neutral)
            gain.requires_grad_(False)
    return model

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
        "transformers", reason="needs transformers: pip install 'quotientopt[transformers]'"
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
    settings : dict
        Of the configuration.
    inputs : callable
        Makes the keyword arguments of a call.
    attentions : int
        Number of attention modules; shared ones count once.
    groups : tuple of str
        Expected groups of the query-key and the value-output pairs; None where left alone.
    heads : int
        Heads of every pair: key-value heads where queries are grouped.
    members : int
        Query heads per key-value head.
    folds : bool
        Whether ``fold_norms_`` makes O(d) exact, the head untied.
    tied : bool
        Whether the head can be tied to the embedding.
    """

    title: str
    class_name: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = text
    attentions: int = 2
    groups: tuple[str | None, str | None] = ("GL(8)", "GL(8)")
    heads: int = HEADS
    members: int = 1
    folds: bool = False
    tied: bool = True

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
        inputs=lambda: {**text(), "decoder_input_ids": tokens(5)},
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
}


class OutputsOnly(nn.Module):
    """A model without the hidden states it returns, which turn with the residual stream."""

    def __init__(self, model: nn.Module, output: str = "logits") -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, **inputs: Tensor) -> Any:
        outputs = self.model(**inputs)
        return outputs[self.output if self.output in outputs else "logits_per_text"]


def gains(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Gains of all norms over the residual stream, and the value that multiplies by one."""
    return [
        (module.weight, 0.0 if "Gemma" in type(module).__name__ else 1.0)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and not name.endswith(("q_norm", "k_norm"))
    ]


def make_neutral_(model: nn.Module) -> nn.Module:
    """Set all gains to one and freeze them: only centring is left of a norm."""
    with torch.no_grad():
        for gain, neutral in gains(model):
            gain.fill_(neutral)
            gain.requires_grad_(False)
    return model

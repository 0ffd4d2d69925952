"""Ordinary modules read as rows of the residual stream and a plan: what is read, what is written.

Every class has a reader of its own here, which refuses what it does not cover by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import check_floating
from quotientopt.models.gpt import NORM_EPS as GPT_EPS
from quotientopt.models.llama import NORM_EPS as LLAMA_EPS
from quotientopt.symmetries.registry import follows

TOKENS, POSITIONS, ONES, READOUT = "tokens", "positions", "ones", "readout"

TORCH = "torch.nn.modules"
HUGGING_FACE = "transformers.models.llama.modeling_llama"
MODELS = "quotientopt.models"


@dataclass(frozen=True)
class PlannedNorm:
    """``gain · (x − mean) / √(variance + ε) + shift``.

    Attributes
    ----------
    centres : bool
        Whether the mean is subtracted (LayerNorm).
    eps : float
    gain : float
        Of a norm on the stream itself; a norm in front of a layer has its gains in the rows.
    shift : str, optional
        Name of the row that is added.
    """

    centres: bool
    eps: float
    gain: float = 1.0
    shift: str | None = None


@dataclass(frozen=True)
class Attend:
    """Softmax attention; names of stacks of rows, ``heads · rank`` or ``shared · rank`` long."""

    query: str
    key: str
    value: str
    output: str
    heads: int
    shared: int
    rank: int
    causal: bool
    scale: float
    rotary: str | None = None


@dataclass(frozen=True)
class Perceive:
    """``activation(⟨x, up⟩)``, or ``activation(⟨x, gate⟩) · ⟨x, up⟩``, times the output rows."""

    up: str
    gate: str | None
    output: str
    activation: Callable[[Tensor], Tensor]
    rotary: None = None
    rank: int = 0


@dataclass(frozen=True)
class PlannedStep:
    """A body behind a norm; what it writes is added to the stream, or replaces it."""

    norm: PlannedNorm | None
    body: Attend | Perceive
    keeps: bool = True

    @property
    def attends(self) -> bool:
        """Whether the body is an attention."""
        return isinstance(self.body, Attend)


@dataclass
class Plan:
    """What a module does, and its rows and offsets as functions of its parameters.

    Attributes
    ----------
    width : int
    rows : dict of str to Tensor
        Vectors of the stream, ``(m, width)``.
    offsets : dict of str to Tensor
        Biases of the hidden axes that stacks of rows are read into.
    steps : list of PlannedStep or PlannedNorm
    embedded, positions : bool
        Whether tokens, and positions, have rows.
    context : int, optional
        Longest input.
    head : str, optional
        The rows of the output head; `head_norm` comes before them.
    rotary : Module, optional
        Of transformers: cosines and sines of positions.
    """

    width: int
    rows: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    steps: list[PlannedStep | PlannedNorm] = field(default_factory=list)
    embedded: bool = False
    positions: bool = False
    context: int | None = None
    head: str | None = None
    head_norm: PlannedNorm | None = None
    rotary: Any = None

    def reads(self, name: str, weight: Tensor, bias: Tensor | None, norm: Any = None) -> None:
        """Rows of a linear map that reads the stream, the gain and bias of a norm folded in."""
        gain, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        self.rows[name] = weight if gain is None else weight * gain
        if bias is not None:
            self.offsets[name] = bias

    def writes(self, name: str, linear: Any) -> None:
        """Rows of a linear map that writes to the stream: its columns, and its bias."""
        self.rows[name] = linear.weight.mT
        if linear.bias is not None:
            self.rows[f"{name} bias"] = linear.bias.unsqueeze(0)

    def norm(self, module: Any, *, on_stream: str | None = None) -> PlannedNorm:
        """Read a norm; one that acts on the stream itself is named, and must have equal gains."""
        gain = 1.0
        shift: str | None = None
        if on_stream is not None:
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is not None:
                gain = weight.detach()[0].item()
                if not bool((weight == weight[0]).all()):
                    raise ValueError(
                        f"the gains of {on_stream} differ from each other and act on the stream "
                        "itself: they single out a basis, and no inner product is left to name it"
                    )
            if bias is not None and bool((bias != 0).any()):
                shift = f"{on_stream} bias"
                self.rows[shift] = bias.unsqueeze(0)
        if follows(module, f"{TORCH}.normalization.LayerNorm"):
            if tuple(module.normalized_shape) != (self.width,):
                raise ValueError(f"a LayerNorm over {module.normalized_shape} is not understood")
            first = next(iter(self.rows.values()))
            self.rows[ONES] = torch.ones(1, self.width, dtype=first.dtype, device=first.device)
            return PlannedNorm(True, module.eps, gain, shift)
        if follows(module, f"{TORCH}.normalization.RMSNorm"):
            eps = module.eps
            if eps is None:
                eps = torch.finfo(next(iter(self.rows.values())).dtype).eps
            return PlannedNorm(False, eps, gain, shift)
        if follows(module, f"{HUGGING_FACE}.LlamaRMSNorm"):
            return PlannedNorm(False, module.variance_epsilon, gain, shift)
        if follows(module, f"{MODELS}.llama.RMSNorm"):
            return PlannedNorm(False, LLAMA_EPS, gain, shift)
        raise TypeError(f"the norm {type(module).__name__} is not understood")


def read_module(model: nn.Module, readout: Tensor | None) -> Plan:
    """The plan of a module.

    Raises
    ------
    TypeError
        If its class is not understood.
    ValueError
        If it does what a plan has no place for, or `readout` does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, reader in _READERS.items():
        if follows(model, name):
            plan = reader(model)
            break
    else:
        known = ", ".join(name.rsplit(".", 1)[1] for name in _READERS)
        raise TypeError(
            f"{type(model).__module__}.{type(model).__qualname__} has no relational form here; "
            f"known: {known}, and subclasses that do not change their methods"
        )
    if readout is not None:
        check_floating("readout", readout)
        if plan.head is not None:
            raise ValueError("readout is for models without an output head, and this one has one")
        if readout.ndim != 2 or readout.shape[1] != plan.width:
            raise ValueError(
                f"readout must have shape (k, {plan.width}), got {tuple(readout.shape)}"
            )
        plan.rows[READOUT] = readout.to(next(iter(plan.rows.values())))
    if any(rows.device.type == "meta" for rows in plan.rows.values()):
        raise ValueError("the model is on the meta device and has no values")
    return plan


# ---- reference models ----------------------------------------------------------------------------


def _gpt(model: Any) -> Plan:
    plan = Plan(model.embedding.embedding_dim, embedded=True, positions=True, context=model.context)
    plan.rows[TOKENS], plan.rows[POSITIONS] = model.embedding.weight, model.positions.weight
    norm = PlannedNorm(False, GPT_EPS)
    for index, block in enumerate(model.blocks):
        body = _reference_body(plan, f"blocks.{index}.attention", block.attention, None)
        plan.steps.append(PlannedStep(norm, body))
        name = f"blocks.{index}.mlp"
        plan.reads(f"{name}.up", block.mlp.up.weight, block.mlp.up.bias)
        plan.writes(f"{name}.down", block.mlp.down)
        mlp = Perceive(f"{name}.up", None, f"{name}.down", functional.gelu)
        plan.steps.append(PlannedStep(norm, mlp))
    plan.reads("head", model.head.weight, model.head.bias)
    plan.head, plan.head_norm = "head", norm
    return plan


def _llama(model: Any) -> Plan:
    plan = Plan(model.embedding.embedding_dim, embedded=True, context=model.context)
    plan.rows[TOKENS] = model.embedding.weight
    for index, block in enumerate(model.blocks):
        body = _reference_body(
            plan, f"blocks.{index}.attention", block.attention, block.attention_norm
        )
        plan.steps.append(PlannedStep(plan.norm(block.attention_norm), body))
        mlp = _gated(
            plan,
            f"blocks.{index}.mlp",
            (block.mlp.gate, block.mlp.up, block.mlp.down),
            block.mlp_norm,
            functional.silu,
        )
        plan.steps.append(PlannedStep(plan.norm(block.mlp_norm), mlp))
    plan.reads("head", model.head.weight, model.head.bias, model.norm)
    plan.head, plan.head_norm = "head", plan.norm(model.norm)
    return plan


def _reference_attention(module: Any) -> Plan:
    plan = Plan(module.query.in_features)
    body = _reference_body(plan, "attention", module, None)
    plan.steps.append(PlannedStep(None, body, keeps=False))
    return plan


def _reference_body(plan: Plan, name: str, module: Any, norm: Any) -> Attend:
    for part in ("query", "key", "value"):
        linear = getattr(module, part)
        plan.reads(f"{name}.{part}", linear.weight, linear.bias, norm)
    plan.writes(f"{name}.output", module.output)
    return Attend(
        f"{name}.query",
        f"{name}.key",
        f"{name}.value",
        f"{name}.output",
        module.heads,
        module.key_value_heads,
        module.head_width,
        module.causal,
        module.head_width**-0.5,
        "reference" if module.rotary else None,
    )


def _gated(
    plan: Plan,
    name: str,
    maps: tuple[Any, Any, Any],
    norm: Any,
    activation: Callable[[Tensor], Tensor],
) -> Perceive:
    gate, up, down = maps
    plan.reads(f"{name}.gate", gate.weight, gate.bias, norm)
    plan.reads(f"{name}.up", up.weight, up.bias, norm)
    plan.writes(f"{name}.down", down)
    return Perceive(f"{name}.up", f"{name}.gate", f"{name}.down", activation)


# ---- torch.nn ------------------------------------------------------------------------------------


def _multihead_attention(module: Any) -> Plan:
    plan = Plan(module.embed_dim)
    body = _torch_body(plan, "attention", module, None)
    plan.steps.append(PlannedStep(None, body, keeps=False))
    return plan


def _torch_body(plan: Plan, name: str, module: Any, norm: Any) -> Attend:
    if not module._qkv_same_embed_dim:
        raise ValueError(f"{name} has keys or values of another width: not a self-attention")
    for part in ("bias_k", "bias_v"):
        if getattr(module, part) is not None:
            raise ValueError(f"{name} has {part}, an extra key, which a relational form has not")
    if module.add_zero_attn:
        raise ValueError(f"{name} has add_zero_attn=True, which a relational form has not")
    weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        plan.reads(f"{name}.{part}", weight, bias, norm)
    plan.writes(f"{name}.output", module.out_proj)
    return Attend(
        f"{name}.query",
        f"{name}.key",
        f"{name}.value",
        f"{name}.output",
        module.num_heads,
        module.num_heads,
        module.head_dim,
        False,
        module.head_dim**-0.5,
    )


def _encoder(module: Any) -> Plan:
    plan = Plan(module.layers[0].self_attn.embed_dim)
    for index, layer in enumerate(module.layers):
        if not follows(layer, f"{TORCH}.transformer.TransformerEncoderLayer"):
            raise TypeError(f"layer {index}, a {type(layer).__name__}, is not understood")
        _encoder_steps(plan, f"layers.{index}", layer)
    if module.norm is not None:
        plan.steps.append(plan.norm(module.norm, on_stream="norm"))
    return plan


def _encoder_layer(module: Any) -> Plan:
    plan = Plan(module.self_attn.embed_dim)
    _encoder_steps(plan, "layer", module)
    return plan


def _encoder_steps(plan: Plan, name: str, layer: Any) -> None:
    first = layer.norm_first
    attention = _torch_body(
        plan, f"{name}.self_attn", layer.self_attn, layer.norm1 if first else None
    )
    up, down = f"{name}.linear1", f"{name}.linear2"
    plan.reads(up, layer.linear1.weight, layer.linear1.bias, layer.norm2 if first else None)
    plan.writes(down, layer.linear2)
    mlp = Perceive(up, None, down, layer.activation)
    for body, part in ((attention, "norm1"), (mlp, "norm2")):
        norm = getattr(layer, part)
        if first:
            plan.steps.append(PlannedStep(plan.norm(norm), body))
        else:
            plan.steps.append(PlannedStep(None, body))
            plan.steps.append(plan.norm(norm, on_stream=f"{name}.{part}"))


# ---- transformers --------------------------------------------------------------------------------


def _hugging_face(model: Any) -> Plan:
    decoder = model.model
    plan = Plan(decoder.embed_tokens.embedding_dim, embedded=True)
    plan.rows[TOKENS] = decoder.embed_tokens.weight
    for index, layer in enumerate(decoder.layers):
        _decoder_steps(plan, f"layers.{index}", layer)
    plan.reads("head", model.lm_head.weight, model.lm_head.bias, decoder.norm)
    plan.head, plan.head_norm = "head", plan.norm(decoder.norm)
    plan.rotary = decoder.rotary_emb
    return plan


def _decoder_layer(module: Any) -> Plan:
    plan = Plan(module.self_attn.q_proj.in_features)
    _decoder_steps(plan, "layer", module)
    return plan


def _decoder_attention(module: Any) -> Plan:
    plan = Plan(module.q_proj.in_features)
    body = _decoder_body(plan, "attention", module, None)
    plan.steps.append(PlannedStep(None, body, keeps=False))
    return plan


def _decoder_steps(plan: Plan, name: str, layer: Any) -> None:
    if not follows(layer, f"{HUGGING_FACE}.LlamaDecoderLayer"):
        raise TypeError(f"{name}, a {type(layer).__name__}, is not understood")
    body = _decoder_body(plan, f"{name}.self_attn", layer.self_attn, layer.input_layernorm)
    plan.steps.append(PlannedStep(plan.norm(layer.input_layernorm), body))
    maps = (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    after = layer.post_attention_layernorm
    mlp = _gated(plan, f"{name}.mlp", maps, after, layer.mlp.act_fn)
    plan.steps.append(PlannedStep(plan.norm(after), mlp))


def _decoder_body(plan: Plan, name: str, module: Any, norm: Any) -> Attend:
    for part in "qkv":
        linear = getattr(module, f"{part}_proj")
        plan.reads(f"{name}.{part}_proj", linear.weight, linear.bias, norm)
    plan.writes(f"{name}.o_proj", module.o_proj)
    heads, shared = (
        getattr(module, f"{part}_proj").out_features // module.head_dim for part in "qk"
    )
    return Attend(
        f"{name}.q_proj",
        f"{name}.k_proj",
        f"{name}.v_proj",
        f"{name}.o_proj",
        heads,
        shared,
        module.head_dim,
        True,
        module.scaling,
        "given",
    )


_READERS: dict[str, Callable[[Any], Plan]] = {
    f"{MODELS}.gpt.GPT": _gpt,
    f"{MODELS}.llama.Llama": _llama,
    f"{MODELS}.attention.Attention": _reference_attention,
    f"{TORCH}.activation.MultiheadAttention": _multihead_attention,
    f"{TORCH}.transformer.TransformerEncoder": _encoder,
    f"{TORCH}.transformer.TransformerEncoderLayer": _encoder_layer,
    f"{HUGGING_FACE}.LlamaForCausalLM": _hugging_face,
    f"{HUGGING_FACE}.LlamaDecoderLayer": _decoder_layer,
    f"{HUGGING_FACE}.LlamaAttention": _decoder_attention,
}

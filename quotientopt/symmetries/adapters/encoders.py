"""Text encoders and encoder-decoders of the transformers package.

BERT and what follows it, with norms behind the branches; then BART's kind, Whisper and T5. As for
decoders, classes of other families with the same text as one named here are its copies.
"""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.attention import (
    plain_attention,
    projected_attention,
    require_known_attention,
    rotary_group,
    stacked_attention,
)
from quotientopt.symmetries.adapters.branches import (
    Branch,
    Sublayer,
    Units,
    add_branches,
    add_embeddings,
    dense,
    head_adapter,
    layer_adapter,
    register_sublayer,
    require_known,
    stack_adapter,
)
from quotientopt.symmetries.adapters.decoders import norms
from quotientopt.symmetries.adapters.layers import (
    HeadView,
    add_consumer,
    add_norm,
    add_pair,
    add_reader,
    add_writer,
    blocks_of,
    consecutive,
    known,
    output_heads,
    register_embedding,
    require,
    transformers_classes,
)
from quotientopt.symmetries.registry import Adapter, Contribution, NotUnderstoodError, qualified

BERT_LAYERS = ("self.query", "self.key", "self.value", "output.dense")
BERT_ATTENTIONS = transformers_classes("bert.BertSelfAttention", "bert.BertCrossAttention")
BERT_OUTPUTS = transformers_classes("bert.BertSelfOutput")


@known("bert.BertAttention")
def bert_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head, of a self- or a cross-attention."""
    inner = require(module.self, *BERT_ATTENTIONS)
    require(module.output, *BERT_OUTPUTS)
    if getattr(inner, "position_embedding_type", "absolute") != "absolute":
        raise NotUnderstoodError("positions enter the scores through the queries' coordinates")
    require_known_attention(inner)
    rank = inner.attention_head_size
    return projected_attention(module, name, rank=rank, layers=BERT_LAYERS, qk_group=GL(rank))


register_sublayer(Sublayer(BERT_LAYERS[:3], BERT_LAYERS[3:]), "bert.BertAttention")


def _layer_with_norms_behind(norm: str) -> Adapter:
    """BERT's kind of layer; keys and values of a cross-attention read the encoder."""

    def adapter(module: Any, name: str) -> Contribution:
        branches = [Branch("attention", after=norm)]
        if hasattr(module, "crossattention"):
            cross = "crossattention.output.LayerNorm"
            branches.append(Branch("crossattention", after=cross, cross=True))
        contribution = layer_adapter(*branches)(module, name)
        require(module.intermediate, *transformers_classes("bert.BertIntermediate"))
        require(module.output, *transformers_classes("bert.BertOutput"))
        form = dense("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
        add_branches(contribution, module, name, Branch(form, after="output.LayerNorm"))
        return contribution

    return adapter


known("bert.BertLayer")(_layer_with_norms_behind("attention.output.LayerNorm"))
BERT_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")
BERT_EMBEDDING_CLASSES = transformers_classes(
    *("bert.BertEmbeddings", "roberta.RobertaEmbeddings"),
    *("mpnet.MPNetEmbeddings", "distilbert.Embeddings"),
)
BERT_POOLERS = transformers_classes("bert.BertPooler", "mpnet.MPNetPooler")


@known("bert.BertModel", "roberta.RobertaModel", "mpnet.MPNetModel")
def bert_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, whose norm writes to the stream, and of the pooler."""
    contribution = Contribution(outputs={name: None})
    _add_embeddings(contribution, module, name)
    if module.pooler is not None:
        require(module.pooler, *BERT_POOLERS)
        add_reader(contribution, module.pooler.dense, qualified(name, "pooler.dense"))
    return contribution


def _add_embeddings(contribution: Contribution, module: Any, name: str) -> None:
    embeddings = require(module.embeddings, *BERT_EMBEDDING_CLASSES)
    path = qualified(name, "embeddings")
    present = [part for part in BERT_EMBEDDINGS if hasattr(embeddings, part)]
    add_embeddings(contribution, embeddings, path, *present)
    add_norm(contribution, embeddings.LayerNorm, qualified(path, "LayerNorm"))


@known("electra.ElectraModel", "distilbert.DistilBertModel")
def electra_model(module: Any, name: str) -> Contribution:
    """No pooler; ELECTRA's embeddings of another width are projected to the stream."""
    contribution = Contribution(outputs={name: None})
    if hasattr(module, "embeddings_project"):
        path = qualified(name, "embeddings_project")
        add_writer(contribution, module.embeddings_project, path)
    else:
        _add_embeddings(contribution, module, name)
    return contribution


known("bert.BertForMaskedLM", "bert.BertLMHeadModel")(
    head_adapter("bert", "cls.predictions.transform.dense")
)
known("roberta.RobertaForMaskedLM", "roberta.RobertaForCausalLM")(
    head_adapter("roberta", "lm_head.dense")
)
known("electra.ElectraForMaskedLM", "electra.ElectraForCausalLM")(
    head_adapter("electra", "generator_predictions.dense")
)
known("electra.ElectraForPreTraining")(head_adapter("electra", "discriminator_predictions.dense"))
known("mpnet.MPNetForMaskedLM")(head_adapter("mpnet", "lm_head.dense"))

MPNET_LAYERS = ("attn.q", "attn.k", "attn.v", "attn.o")


@known("mpnet.MPNetAttention")
def mpnet_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head: the relative positions add to the scores."""
    inner = require(module.attn, *transformers_classes("mpnet.MPNetSelfAttention"))
    rank = inner.attention_head_size
    return projected_attention(module, name, rank=rank, layers=MPNET_LAYERS, qk_group=GL(rank))


register_sublayer(Sublayer(MPNET_LAYERS[:3], MPNET_LAYERS[3:]), "mpnet.MPNetAttention")


known("mpnet.MPNetLayer")(_layer_with_norms_behind("attention.LayerNorm"))

# DeBERTa: queries also meet the keys of relative positions, keys their queries.
DEBERTA_LAYERS = ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")


@known("deberta_v2.DebertaV2Attention")
def deberta_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs; matrices of relative positions go with queries and with keys."""
    inner = require(module.self, *transformers_classes("deberta_v2.DisentangledSelfAttention"))
    require(module.output, *transformers_classes("deberta_v2.DebertaV2SelfOutput"))
    rank = inner.attention_head_size
    contribution = projected_attention(
        module, name, rank=rank, layers=DEBERTA_LAYERS, qk_group=None
    )

    def heads(*paths: str) -> list[HeadView]:
        rows, pick = inner.all_head_size, consecutive(inner.num_attention_heads)
        return [
            view
            for path in paths
            if hasattr(inner, path)
            for view in output_heads(
                getattr(inner, path), qualified(name, "self", path), rows, pick
            )
        ]

    left = blocks_of(heads("query_proj", "pos_query_proj"))
    right = blocks_of(heads("key_proj", "pos_key_proj"))
    add_pair(contribution, qualified(name, "qk"), GL(rank), left, right)
    contribution.heads.reverse()
    return contribution


def _deberta_projections(module: Any) -> Sublayer:
    positions = ("self.pos_key_proj", "self.pos_query_proj")
    present = [path for path in positions if hasattr(module.self, path.rpartition(".")[2])]
    return Sublayer((*DEBERTA_LAYERS[:3], *present), DEBERTA_LAYERS[3:])


register_sublayer(_deberta_projections, "deberta_v2.DebertaV2Attention")


known("deberta_v2.DebertaV2Layer")(_layer_with_norms_behind("attention.output.LayerNorm"))


@known("deberta_v2.DebertaV2Model")
def deberta_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, and of the relative positions that layers read like them."""
    contribution = Contribution(outputs={name: None})
    embeddings = require(module.embeddings, *transformers_classes("deberta_v2.DebertaV2Embeddings"))
    encoder = require(module.encoder, *transformers_classes("deberta_v2.DebertaV2Encoder"))
    path = qualified(name, "embeddings")
    if embeddings.embed_proj is None:
        # The positions are kept, and not added, where they come in by the attention alone.
        parts = ["word_embeddings"]
        parts += ["position_embeddings"] if embeddings.position_biased_input else []
        parts += ["token_type_embeddings"]
        present = [part for part in parts if getattr(embeddings, part, None) is not None]
        add_embeddings(contribution, embeddings, path, *present)
    else:
        add_writer(contribution, embeddings.embed_proj, qualified(path, "embed_proj"))
    add_norm(contribution, embeddings.LayerNorm, qualified(path, "LayerNorm"))
    if encoder.conv is not None:
        contribution.residual_breakers.append(f"activation of {qualified(name, 'encoder.conv')}")
    if encoder.relative_attention:
        path = qualified(name, "encoder")
        add_embeddings(contribution, encoder, path, "rel_embeddings")
        if "layer_norm" in encoder.norm_rel_ebd:
            add_norm(contribution, encoder.LayerNorm, qualified(path, "LayerNorm"))
    return contribution


@known("deberta_v2.DebertaV2ForMaskedLM")
def deberta_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head's first layer; what follows it is another space."""
    if not module.legacy:
        raise NotUnderstoodError("a head that reads the stream through its own embeddings")
    return head_adapter("deberta", "cls.predictions.transform.dense")(module, name)


# ModernBERT: norms in front, but none in front of the first attention.
@known("modernbert.ModernBertAttention")
def modernbert_attention(module: Any, name: str) -> Contribution:
    """(C*)^{r/2} on QK; queries, keys and values are rows of one matrix."""
    require_known_attention(module)
    rank = module.head_dim
    heads = module.Wqkv.weight.shape[0] // (3 * rank)
    layer_type = "sliding_attention" if module.sliding_window is not None else "full_attention"
    group, layers = rotary_group(module.config, rank, layer_type=layer_type), ("Wqkv", "Wo")
    return stacked_attention(module, name, rank=rank, heads=heads, layers=layers, qk_group=group)


register_sublayer(Sublayer(("Wqkv",), ("Wo",)), "modernbert.ModernBertAttention")
register_sublayer(
    Sublayer(("Wi",), ("Wo",), units=Units("Wi", "Wo", 1, 2)), "modernbert.ModernBertMLP"
)
known("modernbert.ModernBertEncoderLayer")(
    layer_adapter(Branch("attn", before="attn_norm"), Branch("mlp", before="mlp_norm"))
)
known("modernbert.ModernBertModel")(
    stack_adapter("embeddings.tok_embeddings", norm="final_norm", first="embeddings.norm")
)
known("modernbert.ModernBertForMaskedLM")(head_adapter("model", "head.dense"))
known("eurobert.EuroBertForMaskedLM")(head_adapter("model", "lm_head"))


# DistilBERT and ALBERT.
DISTILBERT_LAYERS = ("q_lin", "k_lin", "v_lin", "out_lin")
plain_attention(DISTILBERT_LAYERS, "distilbert.DistilBertSelfAttention", rank="attention_head_size")
register_sublayer(dense("lin1", "lin2", "activation"), "distilbert.FFN")
known("distilbert.TransformerBlock")(
    layer_adapter(
        Branch("attention", after="sa_layer_norm"), Branch("ffn", after="output_layer_norm")
    )
)
known("distilbert.DistilBertForMaskedLM")(head_adapter("distilbert", "vocab_transform"))
ALBERT_LAYERS = ("query", "key", "value", "dense")
# One layer, used many times, counts once.
plain_attention(ALBERT_LAYERS, "albert.AlbertAttention", rank="attention_head_size")
known("albert.AlbertLayer")(
    layer_adapter(
        Branch("attention", after="attention.LayerNorm"),
        Branch(dense("ffn", "ffn_output", "activation"), after="full_layer_layer_norm"),
    )
)


@known("albert.AlbertModel")
def albert_model(module: Any, name: str) -> Contribution:
    """Residual axes of the map from the embeddings, which are another space, and of the pooler."""
    contribution = Contribution(outputs={name: None})
    require(module.encoder, *transformers_classes("albert.AlbertTransformer"))
    path = "encoder.embedding_hidden_mapping_in"
    add_writer(contribution, module.get_submodule(path), qualified(name, path))
    if module.pooler is not None:
        add_reader(contribution, module.pooler, qualified(name, "pooler"))
    return contribution


@known("albert.AlbertForMaskedLM")
def albert_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head's first layer; what follows it is another space."""
    require(module.predictions, *transformers_classes("albert.AlbertMLMHead"))
    return head_adapter("albert", "predictions.dense")(module, name)


# ---- encoder-decoders ----------------------------------------------------------------------------


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = dense("fc1", "fc2", "activation_fn")
plain_attention(
    PROJECTIONS,
    "bart.BartAttention",
    "whisper.WhisperAttention",
    "clip.CLIPAttention",
    "siglip.SiglipAttention",
    "wav2vec2.Wav2Vec2Attention",
)


def _layer(*, first: bool, decoder: bool) -> Adapter:
    """Layers of BART's kind, with norms in front of every branch or behind it."""
    branches = [Branch.beside("self_attn_layer_norm", "self_attn", first=first)]
    if decoder:
        norm = "encoder_attn_layer_norm"
        branches.append(Branch.beside(norm, "encoder_attn", first=first, cross=True))
    branches.append(Branch.beside("final_layer_norm", FEED_FORWARD, first=first))
    return layer_adapter(*branches)


known("bart.BartEncoderLayer")(_layer(first=False, decoder=False))
known("bart.BartDecoderLayer")(_layer(first=False, decoder=True))
known("mbart.MBartEncoderLayer", "whisper.WhisperEncoderLayer")(_layer(first=True, decoder=False))
known("mbart.MBartDecoderLayer", "whisper.WhisperDecoderLayer")(_layer(first=True, decoder=True))
register_embedding(
    "bart.BartScaledWordEmbedding",
    "bart.BartLearnedPositionalEmbedding",
    "mbart.MBartScaledWordEmbedding",
    "mbart.MBartLearnedPositionalEmbedding",
    "pegasus.PegasusSinusoidalPositionalEmbedding",
    "whisper.WhisperPositionalEmbedding",
)


@known("bart.BartEncoder", "bart.BartDecoder", "mbart.MBartEncoder", "mbart.MBartDecoder")
@known("pegasus.PegasusEncoder", "pegasus.PegasusDecoder", "whisper.WhisperDecoder")
def stack(module: Any, name: str) -> Contribution:
    """Embeddings of tokens and positions; a norm behind them writes to the stream."""
    last, first = (n if hasattr(module, n) else None for n in ("layer_norm", "layernorm_embedding"))
    adapter = stack_adapter("embed_tokens", "embed_positions", norm=last, first=first)
    return adapter(module, name)


@known("bart.BartModel", "mbart.MBartModel", "pegasus.PegasusModel", "whisper.WhisperModel")
def encoder_decoder(module: Any, name: str) -> Contribution:
    """Residual axes of the keys and values that read the encoder.

    Encoder and decoder have a stream each; with the embedding shared, both turn together.
    """
    contribution = Contribution()
    require_known(module.encoder)
    require_known(module.decoder)
    if hasattr(module, "shared"):
        add_embeddings(contribution, module, name, "shared")
    paths = [
        f"decoder.layers.{index}.encoder_attn.{part}"
        for index in range(len(module.decoder.layers))
        for part in PROJECTIONS[1:3]
    ]
    add_consumer(contribution, module, name, "encoder", *paths)
    return contribution


def _decoder_head(head: str) -> Adapter:
    """Residual axis of the head, tied to the embedding or not."""

    def adapter(module: Any, name: str) -> Contribution:
        require_known(module.model)
        return head_adapter("model.decoder", head)(module, name)

    return adapter


known(
    "bart.BartForConditionalGeneration",
    "mbart.MBartForConditionalGeneration",
    "pegasus.PegasusForConditionalGeneration",
)(_decoder_head("lm_head"))
known("whisper.WhisperForConditionalGeneration")(_decoder_head("proj_out"))


@known("whisper.WhisperEncoder")
def whisper_encoder(module: Any, name: str) -> Contribution:
    """Residual axis of the positions; the activation behind the convolutions breaks O(d)."""
    contribution = stack_adapter("embed_positions", norm="layer_norm")(module, name)
    contribution.residual_breakers.append(f"activation behind {qualified(name, 'conv2')}")
    return contribution


# T5: relative position biases, RMS norms, no scaling of scores.
norms("t5.T5LayerNorm")
T5_LAYERS = ("q", "k", "v", "o")
# The position bias is added to the scores.
plain_attention(T5_LAYERS, "t5.T5Attention", rank="key_value_proj_dim")
register_sublayer(dense("wi", "wo", "act"), "t5.T5DenseActDense")
register_sublayer(
    Sublayer(("wi_0", "wi_1"), ("wo",), units=Units("wi_1", "wo")), "t5.T5DenseGatedActDense"
)


@known("t5.T5Block")
def t5_block(module: Any, name: str) -> Contribution:
    """Norms in front of the branches; keys and values of a cross-attention read the encoder."""
    require(module.layer[0], *transformers_classes("t5.T5LayerSelfAttention"))
    branches = [Branch("layer.0.SelfAttention", before="layer.0.layer_norm")]
    if module.is_decoder:
        require(module.layer[1], *transformers_classes("t5.T5LayerCrossAttention"))
        norm = "layer.1.layer_norm"
        branches.append(Branch("layer.1.EncDecAttention", before=norm, cross=True))
    last = len(module.layer) - 1
    require(module.layer[last], *transformers_classes("t5.T5LayerFF"))
    branches.append(Branch(f"layer.{last}.DenseReluDense", before=f"layer.{last}.layer_norm"))
    return layer_adapter(*branches)(module, name)


known("t5.T5Stack")(stack_adapter("embed_tokens", norm="final_layer_norm"))


@known("t5.T5Model", "t5.T5ForConditionalGeneration", "t5.T5EncoderModel")
def t5_model(module: Any, name: str) -> Contribution:
    """Residual axes of the shared embedding, of what reads the encoder, and of the head."""
    contribution = Contribution()
    add_embeddings(contribution, module, name, "shared")
    require_known(module.encoder)
    if hasattr(module, "decoder"):
        require_known(module.decoder)
        paths = [
            f"decoder.block.{index}.layer.1.EncDecAttention.{part}"
            for index in range(len(module.decoder.block))
            for part in T5_LAYERS[1:3]
        ]
        add_consumer(contribution, module, name, "encoder", *paths)
    if hasattr(module, "lm_head"):
        add_consumer(contribution, module, name, "decoder", "lm_head")
    return contribution

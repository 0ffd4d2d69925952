"""Text encoders of the transformers package: BERT and what follows it, norms behind the branches.

As for decoders, classes of other families with the same text as one named here are its copies.
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
    stack_adapter,
)
from quotientopt.symmetries.adapters.layers import (
    HeadView,
    add_norm,
    add_pair,
    add_reader,
    add_writer,
    blocks_of,
    consecutive,
    known,
    output_heads,
    require,
    transformers_classes,
)
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified

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


@known("bert.BertLayer")
def bert_layer(module: Any, name: str) -> Contribution:
    """Norms behind the branches; keys and values of a cross-attention read the encoder."""
    branches = [Branch("attention", after="attention.output.LayerNorm")]
    if hasattr(module, "crossattention"):
        norm = "crossattention.output.LayerNorm"
        branches.append(Branch("crossattention", after=norm, cross=True))
    contribution = layer_adapter(*branches)(module, name)
    _add_bert_feed_forward(contribution, module, name)
    return contribution


def _add_bert_feed_forward(contribution: Contribution, module: Any, name: str) -> None:
    require(module.intermediate, *transformers_classes("bert.BertIntermediate"))
    require(module.output, *transformers_classes("bert.BertOutput"))
    form = dense("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
    add_branches(contribution, module, name, Branch(form, after="output.LayerNorm"))


BERT_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")
BERT_EMBEDDING_CLASSES = transformers_classes(
    "bert.BertEmbeddings", "roberta.RobertaEmbeddings", "mpnet.MPNetEmbeddings"
)
BERT_POOLERS = transformers_classes("bert.BertPooler", "mpnet.MPNetPooler")


@known("bert.BertModel", "roberta.RobertaModel", "mpnet.MPNetModel")
def bert_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, whose norm writes to the stream, and of the pooler."""
    contribution = Contribution(outputs={name: None})
    _add_embeddings(contribution, module, name, BERT_EMBEDDINGS)
    if module.pooler is not None:
        require(module.pooler, *BERT_POOLERS)
        add_reader(contribution, module.pooler.dense, qualified(name, "pooler.dense"))
    return contribution


def _add_embeddings(
    contribution: Contribution, module: Any, name: str, parts: tuple[str, ...]
) -> None:
    embeddings = require(module.embeddings, *BERT_EMBEDDING_CLASSES)
    path = qualified(name, "embeddings")
    present = [part for part in parts if hasattr(embeddings, part)]
    add_embeddings(contribution, embeddings, path, *present)
    add_norm(contribution, embeddings.LayerNorm, qualified(path, "LayerNorm"))


@known("electra.ElectraModel")
def electra_model(module: Any, name: str) -> Contribution:
    """Embeddings of another width are projected to the stream."""
    contribution = Contribution(outputs={name: None})
    if hasattr(module, "embeddings_project"):
        path = qualified(name, "embeddings_project")
        add_writer(contribution, module.embeddings_project, path)
    else:
        _add_embeddings(contribution, module, name, BERT_EMBEDDINGS)
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


@known("mpnet.MPNetLayer")
def mpnet_layer(module: Any, name: str) -> Contribution:
    """Norms behind the branches."""
    branch = Branch("attention", after="attention.LayerNorm")
    contribution = layer_adapter(branch)(module, name)
    _add_bert_feed_forward(contribution, module, name)
    return contribution


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


@known("deberta_v2.DebertaV2Layer")
def deberta_layer(module: Any, name: str) -> Contribution:
    """Norms behind the branches."""
    branch = Branch("attention", after="attention.output.LayerNorm")
    contribution = layer_adapter(branch)(module, name)
    _add_bert_feed_forward(contribution, module, name)
    return contribution


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
    return stacked_attention(
        module,
        name,
        rank=rank,
        heads=heads,
        layers=("Wqkv", "Wo"),
        qk_group=rotary_group(module.config, rank, layer_type=layer_type),
    )


register_sublayer(Sublayer(("Wqkv",), ("Wo",)), "modernbert.ModernBertAttention")
register_sublayer(
    Sublayer(("Wi",), ("Wo",), units=Units("Wi", "Wo", 1, 2)), "modernbert.ModernBertMLP"
)
known("modernbert.ModernBertEncoderLayer")(
    layer_adapter(Branch("attn", before="attn_norm"), Branch("mlp", before="mlp_norm"))
)


@known("modernbert.ModernBertModel")
def modernbert_model(module: Any, name: str) -> Contribution:
    """The norm behind the embedding writes to the stream."""
    contribution = stack_adapter("embeddings.tok_embeddings", norm="final_norm")(module, name)
    norm = qualified(name, "embeddings.norm")
    add_norm(contribution, module.embeddings.norm, norm)
    return contribution


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


@known("distilbert.DistilBertModel")
def distilbert_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, whose norm writes to the stream."""
    contribution = Contribution(outputs={name: None})
    require(module.embeddings, *transformers_classes("distilbert.Embeddings"))
    path = qualified(name, "embeddings")
    add_embeddings(contribution, module.embeddings, path, *BERT_EMBEDDINGS[:2])
    add_norm(contribution, module.embeddings.LayerNorm, qualified(path, "LayerNorm"))
    return contribution


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

"""Acting on a model in training: by group elements, and by new orders of heads.

In reading order: what cannot be moved; :func:`move_`, which acts on parameters, gradients and the
optimizer's state together; orders of heads (:class:`HeadOrder`), how they act (:func:`reorder_`),
which attentions allow them (:data:`EXCHANGEABLE`), and which one matches a reference
(:func:`best_order`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import outside_autocast, wide
from quotientopt.canonical.reading import (
    BlockView,
    factor,
    query_groups,
    right_blocks,
    rotate_axis,
    stored,
    untranslated,
)
from quotientopt.symmetries import Block, HeadSymmetry, ScaleSymmetry, SymmetryMap
from quotientopt.symmetries.block import laid_out_as
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION
from quotientopt.symmetries.registry import follows


def refuse_uneven(symmetries: SymmetryMap) -> None:
    """Refuse pairs that cannot be moved as one.

    Raises
    ------
    ValueError
        If one parameter of a pair is trained and another frozen, or dtypes or devices differ. The
        output bias that takes up a translation belongs to the pair.
    """
    for symmetry in symmetries.linear:
        parameters = [(_name(block), block.parameter) for block in _touched(symmetry)]
        trained = [name for name, p in parameters if p.requires_grad]
        frozen = [name for name, p in parameters if not p.requires_grad]
        if trained and frozen:
            raise ValueError(
                f"symmetry {symmetry.name!r}: {trained[0]!r} is trained and {frozen[0]!r} is "
                "frozen, and a change of gauge changes both; make requires_grad equal, or leave "
                "the symmetry out with symmetries="
            )
        for kind in ("dtype", "device"):
            found = {getattr(p, kind): name for name, p in parameters}
            if len(found) > 1:
                (one, name), (other, second) = list(found.items())[:2]
                raise ValueError(
                    f"symmetry {symmetry.name!r}: {name!r} has {kind} {one} and {second!r} has "
                    f"{other}; give all parameters of a pair one {kind}"
                )


def refuse_sparse_gradients(symmetries: SymmetryMap) -> None:
    """Refuse sparse gradients, which cannot be moved along; ``ValueError`` names the parameter."""
    moved = symmetries.linear
    touched = [(_name(b), b.parameter) for symmetry in moved for b in _touched(symmetry)]
    if symmetries.residual is not None:
        touched += symmetries.residual.parameters.items()
    for name, parameter in touched:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name!r} is sparse and cannot be moved along; set it to None "
                "with zero_grad() first"
            )


def _touched(symmetry: HeadSymmetry | ScaleSymmetry) -> tuple[Block, ...]:
    """All blocks that an element changes."""
    translation = getattr(symmetry, "translation", None)
    sink = None if translation is None else translation.sink
    return symmetry.blocks if sink is None else (*symmetry.blocks, sink)


def _name(block: Block) -> str:
    """The parameter's name, or its shape where a hand-made block has none."""
    return block.name or f"parameter of shape {tuple(block.parameter.shape)}"


def refuse_foreign_optimizer(optimizer: Any, symmetries: SymmetryMap) -> None:
    """Refuse an optimizer whose state cannot be moved by elements of these symmetries.

    Raises
    ------
    TypeError
        If it has no ``move_state_``: the state of Adam has no law of transformation.
    ValueError
        If its symmetries do not have the same names on the same parameters.
    """
    if not hasattr(optimizer, "move_state_") or not hasattr(optimizer, "symmetries"):
        raise TypeError(
            f"the state of {type(optimizer).__name__} depends on the gauge and cannot be moved "
            "along; train with QuotientAdam, or make the optimizer anew after optimizer=None"
        )
    own = {symmetry.name: symmetry for symmetry in optimizer.symmetries.pairs}
    for symmetry in symmetries.pairs:
        other = own.get(symmetry.name)
        if other is None or _places(other) != _places(symmetry):
            raise ValueError(
                f"symmetry {symmetry.name!r} is not among those of the optimizer; pass "
                "symmetries=optimizer.symmetries, of the model that it trains"
            )


def _places(symmetry: HeadSymmetry) -> list[tuple[object, ...]]:
    sides = (symmetry.left_blocks, symmetry.right_blocks)
    return [
        (side, id(block.parameter), block.size, block.stride, block.offset)
        for side, blocks in enumerate(sides)
        for block in blocks
    ]


@torch.no_grad()
@outside_autocast()
def move_(symmetries: SymmetryMap, element: Mapping[str, Tensor], optimizer: Any = None) -> None:
    """Act on parameters, on gradients that are there, and on the optimizer's state.

    Gradients move contragrediently: ``(∂_A, ∂_B) ↦ (g ∂_A, g^{-T} ∂_B)``, along the residual stream
    like the parameters, and under a translation that the output bias takes up ``∂_{W_O} ↦ ∂_{W_O} +
    t ∂_{b_O}ᵀ``. So a step taken afterwards is the one that was due.

    Parameters
    ----------
    symmetries : SymmetryMap
    element : mapping of str to Tensor
        As for :meth:`SymmetryMap.act_`, in the groups.
    optimizer : optional
        With ``move_state_``, which gets the linear part of the element.

    Raises
    ------
    ValueError
        If an element is not in its group, or the optimizer refuses it; nothing is changed then.
    """
    linear: dict[str, HeadSymmetry | ScaleSymmetry] = {
        symmetry.name: symmetry for symmetry in symmetries.linear
    }
    affine = {symmetry.name + TRANSLATION: symmetry for symmetry in symmetries.heads}
    for name, g in element.items():
        if name in affine:
            affine[name].check_translation(g)
        elif name != RESIDUAL:
            linear[name].check_element(g)
        elif symmetries.residual is not None:
            symmetries.residual.check_element(g)
    if optimizer is not None:
        optimizer.move_state_({name: g for name, g in element.items() if name not in affine})
    symmetries.act_(element)
    for name, g in element.items():
        if name in linear:
            _move_gradients_(linear[name], g)
    # Translations act last.
    for name, t in element.items():
        if name in affine:
            _translate_gradients_(affine[name], t)
    stream = symmetries.residual
    if RESIDUAL in element and stream is not None:
        for name, axis in stream.axes.items():
            gradient = stream.parameters[name].grad
            if gradient is not None:
                gradient.copy_(rotate_axis(wide(gradient), axis, element[RESIDUAL]))


def _move_gradients_(symmetry: HeadSymmetry | ScaleSymmetry, element: Tensor) -> None:
    contragredient = symmetry.group.inverse(wide(element)).mT
    sides: tuple[tuple[tuple[Block, ...], Tensor], ...] = ((symmetry.blocks, contragredient),)
    if isinstance(symmetry, HeadSymmetry):
        sides = (
            (symmetry.left_blocks, wide(element)),
            (symmetry.right_blocks, contragredient),
        )
    for blocks, g in sides:
        for block in blocks:
            if block.parameter.grad is not None:
                view = gradient_view(block)
                moved = g.to(view.device)
                scalar = moved.shape[-1] == 1
                view.copy_(moved * wide(view) if scalar else moved @ wide(view))


def _translate_gradients_(symmetry: HeadSymmetry, t: Tensor) -> None:
    assert symmetry.translation is not None
    sink = symmetry.translation.sink
    if sink is None or sink.parameter.grad is None:
        return
    outputs = wide(gradient_view(sink))
    for block in symmetry.left_blocks:
        if block.parameter.grad is not None:
            view = gradient_view(block)
            view.copy_(wide(view) + wide(t).to(view.device).unsqueeze(-1) * outputs)


def gradient_view(block: Block) -> Tensor:
    """The block of its parameter's gradient, to be written to.

    Blocks are views by strides: a gradient laid out otherwise than the parameter is laid out anew,
    or the block would be one of a copy.
    """
    parameter = block.parameter
    assert parameter.grad is not None
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = laid_out_as(parameter.shape, parameter.stride(), parameter.grad)
    return block.view(parameter.grad)


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """Where the heads of one attention come from.

    Attributes
    ----------
    heads : Tensor
        Key-value head j of the new order was head ``heads[j]``.
    queries : Tensor
        Query head i of the new j-th group was number ``queries[j, i]`` of the group it was in;
        ``(heads, k)``, k = 1 without grouped queries.
    """

    heads: Tensor
    queries: Tensor

    @property
    def flat(self) -> Tensor:
        """The same as an order of all query heads, group after group."""
        return (self.heads[:, None] * self.queries.shape[1] + self.queries).flatten()

    @property
    def trivial(self) -> bool:
        """Whether all heads stay where they are."""
        return torch.equal(self.flat, torch.arange(len(self.flat)))


@torch.no_grad()
def reorder_(symmetry: HeadSymmetry, order: HeadOrder) -> None:
    """Let the heads of one symmetry change places, in parameters and gradients."""
    sources = _sources(symmetry, order)
    with_gradient = [block for block in symmetry.blocks if block.parameter.grad is not None]
    for blocks, view in ((symmetry.blocks, Block.view), (with_gradient, gradient_view)):
        values = [_gather(sources[id(block)], view) for block in blocks]
        for block, value in zip(blocks, values, strict=True):
            view(block).copy_(value)


def reordered(symmetry: HeadSymmetry, order: HeadOrder, view: BlockView) -> BlockView:
    """Blocks as they will be once the heads have changed places."""
    sources = _sources(symmetry, order)

    def moved(block: Block) -> Tensor:
        return _gather(sources[id(block)], view)

    return moved


def _gather(sources: list[tuple[Block, Tensor, Tensor]], view: BlockView) -> Tensor:
    """A block put together from heads of several."""
    result = torch.empty_like(view(sources[0][0]))
    for block, to, origin in sources:
        result[to.to(result.device)] = view(block)[origin.to(result.device)]
    return result


def _sources(
    symmetry: HeadSymmetry, order: HeadOrder
) -> Mapping[int, list[tuple[Block, Tensor, Tensor]]]:
    """For every block, by ``id``: blocks it takes heads from, with places here and there."""
    everywhere = torch.arange(symmetry.heads)
    found = {id(block): [(block, everywhere, order.heads)] for block in symmetry.right_blocks}
    groups = query_groups(symmetry)
    for i, blocks in enumerate(groups):
        for part, block in enumerate(blocks):
            taken = []
            for number, source in enumerate(groups):
                places = (order.queries[:, i] == number).nonzero().flatten()
                if len(places):
                    taken.append((source[part], places, order.heads[places]))
            found[id(block)] = taken
    return found


# Attentions in which nothing but the blocks of their pairs tells one head from another: no slopes
# or biases per head (as ALiBi's or T5's), no gains or sinks per head, whatever the configuration
# (Falcon's can have slopes).
EXCHANGEABLE = (
    "torch.nn.modules.activation.MultiheadAttention",
    "quotientopt.models.attention.Attention",
    "transformers.models.albert.modeling_albert.AlbertAttention",
    "transformers.models.bart.modeling_bart.BartAttention",
    "transformers.models.bert.modeling_bert.BertAttention",
    "transformers.models.clip.modeling_clip.CLIPAttention",
    "transformers.models.cohere.modeling_cohere.CohereAttention",
    "transformers.models.cohere2.modeling_cohere2.Cohere2Attention",
    "transformers.models.deberta_v2.modeling_deberta_v2.DebertaV2Attention",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
    "transformers.models.distilbert.modeling_distilbert.DistilBertSelfAttention",
    "transformers.models.ernie4_5.modeling_ernie4_5.Ernie4_5Attention",
    "transformers.models.gemma2.modeling_gemma2.Gemma2Attention",
    "transformers.models.glm.modeling_glm.GlmAttention",
    "transformers.models.glm4.modeling_glm4.Glm4Attention",
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention",
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention",
    "transformers.models.gptj.modeling_gptj.GPTJAttention",
    "transformers.models.helium.modeling_helium.HeliumAttention",
    "transformers.models.hubert.modeling_hubert.HubertAttention",
    "transformers.models.llama.modeling_llama.LlamaAttention",
    "transformers.models.llama4.modeling_llama4.Llama4TextAttention",
    "transformers.models.mbart.modeling_mbart.MBartAttention",
    "transformers.models.mistral.modeling_mistral.MistralAttention",
    "transformers.models.modernbert.modeling_modernbert.ModernBertAttention",
    "transformers.models.olmo.modeling_olmo.OlmoAttention",
    "transformers.models.opt.modeling_opt.OPTAttention",
    "transformers.models.pegasus.modeling_pegasus.PegasusAttention",
    "transformers.models.phi.modeling_phi.PhiAttention",
    "transformers.models.phi3.modeling_phi3.Phi3Attention",
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLAttention",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
    "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention",
    "transformers.models.roberta.modeling_roberta.RobertaAttention",
    "transformers.models.seed_oss.modeling_seed_oss.SeedOssAttention",
    "transformers.models.siglip.modeling_siglip.SiglipAttention",
    "transformers.models.smollm3.modeling_smollm3.SmolLM3Attention",
    "transformers.models.stablelm.modeling_stablelm.StableLmAttention",
    "transformers.models.starcoder2.modeling_starcoder2.Starcoder2Attention",
    "transformers.models.vit.modeling_vit.ViTAttention",
    "transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2Attention",
    "transformers.models.whisper.modeling_whisper.WhisperAttention",
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",
)

PARTS = ("qk", "vo")


def attentions(symmetries: Iterable[HeadSymmetry]) -> dict[str, tuple[HeadSymmetry, ...]]:
    """Symmetries of one attention together: those named ``<attention>.qk`` and ``<attention>.vo``.

    Others stand alone under their own name.
    """
    found: dict[str, tuple[HeadSymmetry, ...]] = {}
    for symmetry in symmetries:
        prefix, _, part = symmetry.name.rpartition(".")
        name = prefix if part in PARTS else symmetry.name
        found[name] = (*found.get(name, ()), symmetry)
    return found


def complete(pair: tuple[HeadSymmetry, ...]) -> bool:
    """Whether both pairs of an attention are there, with the same heads."""
    shapes = {(symmetry.heads, len(query_groups(symmetry))) for symmetry in pair}
    return len(pair) == len(PARTS) and len(shapes) == 1


def exchangeable(model: nn.Module, name: str) -> bool:
    """Whether an attention is known to have nothing of single heads outside its pairs."""
    module = dict(model.named_modules()).get(name)
    if module is None:
        return False
    return any(follows(module, class_name) for class_name in EXCHANGEABLE)


def overlaps(
    fixed: HeadSymmetry, moving: HeadSymmetry, view: BlockView, fixed_view: BlockView = stored
) -> Tensor:
    """``⟨A₂ᵀB₂, A₁ᵀB₁⟩`` of every query head of one symmetry with every one of another.

    From r×r products: ``⟨ρ(A₂A₁ᵀ), B₂B₁ᵀ⟩``, ρ the completion to complex products on rotary planes.

    Parameters
    ----------
    fixed, moving : HeadSymmetry
        The reference's and the model's.
    view, fixed_view : callable
        How the model's and the reference's blocks are read.

    Returns
    -------
    Tensor
        Shape ``(query heads, query heads)``, rows for the reference's.
    """
    k, r = len(query_groups(fixed)), fixed.rank

    def products(groups: tuple[list[tuple[Block, ...]], list[tuple[Block, ...]]]) -> Tensor:
        ours, theirs = (
            torch.stack(
                [factor(blocks, untranslated(symmetry, read)) for blocks in side], dim=1
            ).flatten(0, 2)
            for symmetry, side, read in zip(
                (fixed, moving), groups, (fixed_view, view), strict=True
            )
        )
        cross = ours.to(theirs.device) @ theirs.mT
        return cross.unflatten(0, (-1, r)).unflatten(2, (-1, r)).transpose(1, 2)

    left = products((query_groups(fixed), query_groups(moving)))
    right = products(([right_blocks(fixed)], [right_blocks(moving)]))
    right = right.repeat_interleave(k, dim=0).repeat_interleave(k, dim=1)
    return (fixed.group.row_products(left) * right).sum(dim=(-2, -1))


def best_order(overlap: Tensor, k: int) -> HeadOrder:
    """The order of heads with the largest total overlap, by linear assignment.

    Exact for grouped queries too: the best order of query heads for every pair of key-value heads,
    then the best order of key-value heads.

    Parameters
    ----------
    overlap : Tensor
        See :func:`overlaps`, summed over the symmetries of the attention.
    k : int
        Query heads per key-value head.

    Raises
    ------
    ImportError
        Without SciPy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "matching heads needs SciPy: pip install scipy, or pass permute_heads=False"
        ) from error
    heads = len(overlap) // k
    blocks = (
        overlap.cpu().double().unflatten(0, (heads, k)).unflatten(2, (heads, k)).transpose(1, 2)
    )
    queries = torch.zeros(heads, heads, k, dtype=torch.long)
    for j, i in itertools.product(range(heads), repeat=2) if k > 1 else ():
        _, columns = linear_sum_assignment(blocks[j, i].numpy(), maximize=True)
        queries[j, i] = torch.from_numpy(columns)
    values = blocks.gather(3, queries.unsqueeze(-1)).sum(dim=(2, 3))
    _, chosen = linear_sum_assignment(values.numpy(), maximize=True)
    order = torch.from_numpy(chosen)
    return HeadOrder(order, queries[torch.arange(heads), order])

"""What is found, what is left alone, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from quotientopt.groups import GL
from quotientopt.models import GPT
from quotientopt.symmetries import (
    Contribution,
    HeadSymmetry,
    NotUnderstoodError,
    find_symmetries,
    register,
    registry,
)
from tests.symmetries.architectures import (
    HEADS,
    WIDTH,
    randomize_,
    small_gpt,
    small_gpt2,
    small_llama,
    tokens,
    values,
)


class HomeMadeAttention(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, x):
        return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ x


class DoubledAttention(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        return super().forward(2 * query, key, value, **kwargs)


class RenamedAttention(nn.MultiheadAttention):
    """Computes what its base class computes."""


class SelfAttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.mlp(self.attention(x, x, x)[0])


class Pair(nn.Module):
    """Two attentions after one another."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        x = self.first(x, x, x)[0]
        return self.second(x, x, x)[0]


def attention(**options):
    return randomize_(nn.MultiheadAttention(WIDTH, HEADS, **options))


def names(model):
    return [symmetry.name for symmetry in find_symmetries(model).heads]


def test_unknown_attention_is_listed_outermost_only():
    outer = nn.Module()
    outer.attention_inside = HomeMadeAttention()
    layer = nn.ModuleDict({"known": attention(), "unknown": HomeMadeAttention()})
    symmetries = find_symmetries(layer)
    assert symmetries.unrecognized == ("unknown",)
    assert [s.name for s in symmetries.heads] == ["known.qk", "known.vo"]
    assert find_symmetries(HomeMadeAttention()).unrecognized == ("HomeMadeAttention",)
    assert find_symmetries(outer).unrecognized == ("attention_inside",)


def test_a_block_around_a_known_attention_is_not_listed():
    symmetries = find_symmetries(SelfAttentionBlock())
    assert symmetries.unrecognized == ()
    assert [s.name for s in symmetries.heads] == ["attention.qk", "attention.vo"]


def test_subclasses():
    model = nn.ModuleList([DoubledAttention(WIDTH, HEADS), RenamedAttention(WIDTH, HEADS)])
    symmetries = find_symmetries(model)
    assert symmetries.unrecognized == ("0",)
    assert [s.name for s in symmetries.heads] == ["1.qk", "1.vo"]


def test_replaced_forward_of_an_instance():
    model = attention()
    model.forward = lambda *args, **kwargs: None
    assert find_symmetries(model).unrecognized == ("MultiheadAttention",)


def test_replaced_layers_are_not_understood():
    model = small_llama()
    model.blocks[0].attention.query = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh())
    model.blocks[1].attention.key.bias = nn.Parameter(torch.ones(16))
    symmetries = find_symmetries(model)
    assert symmetries.heads == ()
    assert symmetries.unrecognized == ("blocks.0.attention", "blocks.1.attention")
    assert symmetries.residual is None
    assert "Sequential" in symmetries.residual_reason


def test_parametrized_weights_are_not_understood():
    model = small_gpt()
    parametrizations.weight_norm(model.blocks[0].attention.key)
    symmetries = find_symmetries(model)
    assert symmetries.unrecognized == ("blocks.0.attention",)
    assert symmetries.residual is None
    one = attention()
    parametrize.register_parametrization(one, "in_proj_weight", nn.Tanh())
    assert find_symmetries(one).heads == ()


def test_too_few_columns_for_full_rank_is_not_claimed():
    assert names(nn.MultiheadAttention(WIDTH, HEADS, kdim=4)) == ["vo"]


def test_shared_module_counts_once():
    shared = attention()
    model = Pair(shared, shared)
    symmetries = find_symmetries(model)
    assert [s.name for s in symmetries.heads] == ["first.qk", "first.vo"]
    assert max(symmetries.verify(model, values(5, 2, WIDTH)).values()) < 1e-10


def test_attentions_sharing_a_fused_matrix():
    model = Pair(attention(bias=False), attention(bias=False))
    model.second.in_proj_weight = model.first.in_proj_weight
    symmetries = find_symmetries(model)
    # Both query-key pairs are the same pair; the value matrix meets two output matrices.
    assert [s.name for s in symmetries.heads] == ["first.qk"]
    assert symmetries.unrecognized == ("first.vo", "second.qk", "second.vo")
    assert max(symmetries.verify(model, values(5, 2, WIDTH)).values()) < 1e-10


def test_a_matrix_shared_by_two_circuits():
    model = small_gpt()
    model.blocks[1].attention.key = model.blocks[0].attention.key
    model.blocks[1].attention.output.weight = model.blocks[1].attention.value.weight
    symmetries = find_symmetries(model)
    assert [s.name for s in symmetries.heads] == ["blocks.0.attention.vo"]
    assert len(symmetries.unrecognized) == 3
    assert "two different axes of blocks.1.attention.value.weight" in symmetries.residual.broken_by
    assert max(symmetries.verify(model, tokens()).values()) < 1e-10


def test_a_matrix_used_outside_the_attention():
    model = nn.ModuleDict({"attention": attention(), "other": nn.Linear(WIDTH, WIDTH)})
    model["other"].weight = model["attention"].out_proj.weight
    symmetries = find_symmetries(model)
    assert [s.name for s in symmetries.heads] == ["attention.qk"]
    assert symmetries.unrecognized == ("attention.vo",)


def test_memory_shared_by_two_parameters():
    model = nn.ModuleDict({"attention": attention(), "other": nn.Linear(WIDTH, WIDTH)})
    model["other"].weight = nn.Parameter(model["attention"].out_proj.weight.data)
    assert names(model) == ["attention.qk"]
    gpt = small_gpt()
    gpt.head.weight = nn.Parameter(gpt.embedding.weight.data)
    assert not find_symmetries(gpt).residual.exact


def test_tied_embeddings():
    model = small_gpt()
    model.head.weight = model.embedding.weight
    symmetries = find_symmetries(model)
    assert symmetries.residual.exact
    assert "head.weight" not in symmetries.residual.axes
    assert max(symmetries.verify(model, tokens()).values()) < 1e-10


def test_residual_claim_is_withdrawn_when_the_stream_may_be_used_elsewhere():
    model = nn.ModuleDict({"gpt": small_gpt(), "probe": nn.Linear(WIDTH, 2)})
    assert any("probe.weight" in reason for reason in find_symmetries(model).residual.broken_by)
    del model["probe"]
    assert find_symmetries(model).residual.exact
    model["probe"] = nn.Embedding(50, WIDTH)
    model["probe"].weight = model["gpt"].embedding.weight
    assert "another use of gpt.embedding.weight" in find_symmetries(model).residual.broken_by


def test_streams_of_different_widths():
    model = nn.ModuleList([small_gpt(), small_llama()])
    symmetries = find_symmetries(model)
    assert symmetries.residual is None
    assert "24, 32" in symmetries.residual_reason
    assert len(symmetries.heads) == 8


def test_bad_models():
    with pytest.raises(TypeError, match="list"):
        find_symmetries(list(small_gpt().parameters()))
    with torch.device("meta"):
        on_meta = nn.MultiheadAttention(WIDTH, HEADS)
    with pytest.raises(ValueError, match=r"0\.in_proj_weight.*meta"):
        find_symmetries(nn.ModuleList([on_meta]))
    quantized = small_gpt()
    quantized.head.weight = nn.Parameter(torch.ones(50, WIDTH).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"head\.weight.*int8"):
        find_symmetries(quantized)
    with pytest.raises(ValueError, match=r"weight.*uninitialised"):
        find_symmetries(nn.LazyLinear(3))


def test_other_models_have_no_symmetries():
    symmetries = find_symmetries(nn.Linear(3, 3))
    assert symmetries.heads == ()
    assert symmetries.unrecognized == ()
    assert symmetries.residual is None
    assert symmetries.redundancy() == {"total": 0}
    assert "no head symmetries" in str(symmetries)
    assert "residual stream: none" in str(symmetries)


def test_table_is_readable():
    text = str(find_symmetries(small_gpt2()))
    assert "transformer.h.0.attn.qk" in text
    assert "GL(8)" in text
    assert "24 + 1" in text
    assert "and 7 more" in text
    assert max(map(len, text.splitlines())) < 250
    assert "O(24) exact" in str(find_symmetries(small_gpt()))
    listed = str(find_symmetries(nn.ModuleList([HomeMadeAttention()])))
    assert "not understood, without head frames: 0" in listed


def test_acting_with_an_unknown_name_changes_nothing():
    model = small_gpt()
    symmetries = find_symmetries(model)
    before = [p.clone() for p in model.parameters()]
    element = symmetries.random_element() | {"blocks.7.attention.qk": torch.eye(8)}
    with pytest.raises(ValueError, match=r"blocks\.7\.attention\.qk"):
        symmetries.act_(element)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_user_adapter(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", registry._adapters.copy())

    @register(f"{__name__}.HomeMadeAttention")
    def home_made(module, name):
        if module.query.bias is None:
            raise NotUnderstoodError("no bias")
        left, right = (
            [layer.weight.unflatten(0, (1, -1)), layer.bias.unflatten(0, (1, -1))]
            for layer in (module.query, module.key)
        )
        return Contribution(heads=[HeadSymmetry(left, right, GL(WIDTH), f"{name}.qk")])

    model = nn.Sequential(HomeMadeAttention(), HomeMadeAttention())
    symmetries = find_symmetries(model)
    assert [s.name for s in symmetries.heads] == ["0.qk", "1.qk"]
    assert symmetries.heads[0].left_blocks[0].name == "0.query.weight"
    assert symmetries.unrecognized == ()
    assert max(symmetries.verify(model, values(2, 5, WIDTH)).values()) < 1e-10
    with pytest.raises(TypeError, match="qualified class name"):
        register("HomeMadeAttention")
    model[1].query.bias = None
    assert find_symmetries(model).unrecognized == ("1",)


def test_adapter_naming_an_unknown_parameter(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", registry._adapters.copy())
    register("torch.nn.modules.linear.Linear")(
        lambda module, name: Contribution(residual_axes={"typo": 0})
    )
    with pytest.raises(ValueError, match="typo"):
        find_symmetries(nn.Linear(3, 3))


def test_symmetry_made_by_hand():
    model = HomeMadeAttention()
    by_hand = HeadSymmetry(
        left=[model.query.weight.view(1, WIDTH, WIDTH), model.query.bias.view(1, WIDTH)],
        right=[model.key.weight.view(1, WIDTH, WIDTH), model.key.bias.view(1, WIDTH)],
        group=GL(WIDTH),
        name="attention.qk",
    )
    result = find_symmetries(model).__class__([by_hand]).verify(model, values(2, 5, WIDTH))
    assert result["attention.qk"] < 1e-10


def test_a_changed_memory_layout_is_noticed():
    model = GPT(vocabulary=8, layers=1, width=16, heads=2, context=4)
    symmetries = find_symmetries(model)
    weight = model.blocks[0].attention.query.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match=r"layout of parameter 'blocks\.0\.attention\.query"):
        symmetries.heads[0].left  # noqa: B018
    find_symmetries(model).heads[0].left[0].zero_()
    assert weight.abs().max() == 0

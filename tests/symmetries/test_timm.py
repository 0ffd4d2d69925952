"""timm's fused attention: on a stand-in of the same structure, and on timm itself where it is."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quotientopt.groups import GL, O, StabilizerOfOnes
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries
from tests.symmetries.architectures import randomize_, values

WIDTH, HEADS = 24, 3
TOLERANCE = 1e-10
CAUGHT = 1e-3


class Attention(nn.Module):
    """Queries, keys and values from one matrix, parts first, as timm's class of this name."""

    def __init__(self, norm_layer=None, bias=True, head_dim=WIDTH // HEADS, scale_norm=False):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, head_dim
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * head_dim, bias=bias)
        self.q_norm = nn.Identity() if norm_layer is None else norm_layer(head_dim)
        self.k_norm = nn.Identity() if norm_layer is None else norm_layer(head_dim)
        self.norm = nn.LayerNorm(HEADS * head_dim) if scale_norm else nn.Identity()
        self.proj = nn.Linear(HEADS * head_dim, WIDTH)

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(self.norm(mixed.transpose(1, 2).flatten(2)))


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.norm = nn.Identity()

    def forward(self, x):
        return self.fc2(self.norm(functional.gelu(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, scaled=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), Mlp()
        self.ls1, self.ls2 = (LayerScale() if scaled else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


@pytest.fixture(autouse=True)
def as_in_timm(monkeypatch):
    """Adapters go by qualified names, so that they need not import timm."""
    for kind, module in (
        (Attention, "timm.layers.attention"),
        (Mlp, "timm.layers.mlp"),
        (LayerScale, "timm.layers.layer_scale"),
        (Block, "timm.models.vision_transformer"),
    ):
        monkeypatch.setattr(kind, "__module__", module)


def images():
    return values(2, 5, WIDTH)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"head_dim": 4}])
def test_pairs_of_a_fused_attention(options):
    model = randomize_(Attention(**options))
    symmetries = find_symmetries(model)
    rank = options.get("head_dim", WIDTH // HEADS)
    assert [symmetry.group for symmetry in symmetries.heads] == [GL(rank)] * 2
    assert {symmetry.heads for symmetry in symmetries.heads} == {HEADS}
    assert max(symmetries.verify(model, images(), cond=100.0).values()) <= TOLERANCE
    # Parts come first: heads first would mix queries, keys and values.
    weight = model.qkv.weight
    views = [weight.unflatten(0, (HEADS, 3, -1))[:, part] for part in range(2)]
    wrong = HeadSymmetry(views[:1], views[1:], GL(rank), "wrong")
    assert SymmetryMap([wrong]).verify(model, images())["wrong"] > CAUGHT


NORMS = {
    "no gains": (lambda width: nn.RMSNorm(width, elementwise_affine=False), O(8)),
    "centred": (lambda width: nn.LayerNorm(width, elementwise_affine=False), StabilizerOfOnes(8)),
    "frozen": (lambda width: nn.RMSNorm(width).requires_grad_(False), O(8)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_normalised_queries_and_keys(kind):
    norm_layer, group = NORMS[kind]
    model = Attention(norm_layer)
    for layer in (model.qkv, model.proj):
        randomize_(layer)
    symmetries = find_symmetries(model)
    assert [symmetry.group for symmetry in symmetries.heads] == [group, GL(8)]
    assert max(symmetries.verify(model, images(), cond=100.0).values()) <= TOLERANCE
    qk = symmetries.heads[0]
    wider = GL(8) if isinstance(group, O) and group == O(8) else O(8)
    wrong = HeadSymmetry(qk.left_blocks, qk.right_blocks, wider, "wrong")
    assert SymmetryMap([wrong]).verify(model, images())["wrong"] > CAUGHT


def test_gains_leave_queries_and_keys_alone():
    model = randomize_(Attention(nn.LayerNorm))
    symmetries = find_symmetries(model)
    assert [symmetry.name for symmetry in symmetries.heads] == ["vo"]
    assert symmetries.unrecognized == ()
    assert symmetries.verify(model, images())["vo"] <= TOLERANCE


def test_a_norm_in_front_of_the_output_is_not_understood():
    model = nn.ModuleList([Attention(scale_norm=True)])
    assert find_symmetries(model).heads == ()
    assert find_symmetries(model).unrecognized == ("0",)


@pytest.mark.parametrize("scaled", [False, True])
def test_residual_axes_of_a_block(scaled):
    model = nn.Sequential(Block(scaled), Block(scaled))
    symmetries = find_symmetries(model)
    residual = symmetries.residual
    assert len(symmetries.heads) == 4
    assert residual.axes["0.attn.qkv.weight"] == residual.axes["1.mlp.fc1.weight"] == 1
    assert residual.axes["0.attn.proj.weight"] == residual.axes["1.mlp.fc2.bias"] == 0
    assert "0.attn.qkv.bias" not in residual.axes
    breakers = str(residual.broken_by)
    assert "outside the recognised layers" in breakers
    assert ("layer scale 1.ls2" in breakers) is scaled
    assert max(symmetries.verify(model, images()).values()) <= TOLERANCE


def test_timm_itself():
    timm = pytest.importorskip(
        "timm", reason="needs timm, with a torchvision that fits torch: pip install timm"
    )
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=3
    )
    symmetries = find_symmetries(randomize_(model))
    assert [symmetry.group for symmetry in symmetries.heads] == [GL(8)] * 4
    assert symmetries.unrecognized == ()
    assert max(symmetries.verify(model, values(2, 3, 16, 16)).values()) <= TOLERANCE

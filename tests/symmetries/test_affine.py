"""Translations of biases, scales of hidden units and of normalised queries, made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu, scaled_dot_product_attention

from quotientopt.groups import GL, Scale
from quotientopt.symmetries import Block, HeadSymmetry, ScaleSymmetry, SymmetryMap, Translation

WIDTH, HEADS, RANK, HIDDEN = 12, 3, 4, 10


class Layer(nn.Module):
    """Attention with biases, a ReLU MLP; optionally normalised queries and keys."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.normalised = normalised
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, RANK)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if self.normalised:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.down(relu(self.up(x)))


def rows(layer: nn.Linear, heads: int = HEADS) -> list[Block]:
    """Weight and bias, one head per entry of the first axis."""
    return [
        Block.of(layer.weight.detach().unflatten(0, (heads, -1)), layer.weight),
        Block.of(layer.bias.detach().unflatten(0, (heads, -1)), layer.bias),
    ]


def symmetries_of(layer: Layer, wrong_sink: bool = False) -> SymmetryMap:
    q, k, v = (rows(f) for f in (layer.q, layer.k, layer.v))
    o, down = (f.weight for f in (layer.o, layer.down))
    output = Block.of(o.detach().mT.unflatten(0, (HEADS, RANK)), o)
    bias = (layer.down if wrong_sink else layer.o).bias
    sink = Block.of(bias.detach()[None, None], bias)
    heads = [HeadSymmetry([output], v, GL(RANK), "vo", translation=Translation((v[1],), sink))]
    scales = []
    if layer.normalised:
        scales = [ScaleSymmetry(q, "q"), ScaleSymmetry(k, "k")]
    else:
        heads.append(HeadSymmetry(q, k, GL(RANK), "qk", translation=Translation((k[1],))))
    units = HeadSymmetry(
        [Block.of(down.detach().mT.unsqueeze(1), down)], rows(layer.up, HIDDEN), Scale(1), "mlp"
    )
    return SymmetryMap(heads, hidden_units=[units], scales=scales)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalised", [False, True])
def test_all_parts_of_the_gauge_change_no_output(x, normalised):
    layer = Layer(normalised)
    symmetries = symmetries_of(layer)
    deviations = symmetries.verify(layer, x)
    expected = {
        "vo",
        "vo.translation",
        "mlp",
        *(("q", "k") if normalised else ("qk", "qk.translation")),
    }
    assert set(deviations) == expected
    assert max(deviations.values()) < 1e-13


def test_all_parts_together_are_one_element(x):
    layer = Layer().double()
    symmetries = symmetries_of(layer)
    x = x.double()
    before = layer(x)
    weights = [p.detach().clone() for p in layer.parameters()]
    symmetries.act_(symmetries.random_element(cond=100.0))
    assert (layer(x) - before).abs().max() < 1e-12
    moved = [not torch.equal(p, w) for p, w in zip(layer.parameters(), weights, strict=True)]
    assert all(
        m
        for m, (name, _) in zip(moved, layer.named_parameters(), strict=True)
        if name != "down.bias"
    )


def test_controls_move_the_outputs(x):
    layer = Layer()
    # The wrong output bias: after a residual connection and a ReLU it is not the same.
    assert symmetries_of(layer, wrong_sink=True).verify(layer, x)["vo.translation"] > 1e-3
    # A translation of keys that are normalised.
    layer = Layer(normalised=True)
    k = rows(layer.k)
    wrong = HeadSymmetry(rows(layer.q), k, GL(RANK), "qk", translation=Translation((k[1],)))
    deviations = SymmetryMap([wrong]).verify(layer, x)
    assert min(deviations.values()) > 1e-3
    # A negative factor is no symmetry of a ReLU: GL(1) is larger than the scales.
    layer = Layer()
    units = symmetries_of(layer).hidden_units[0]
    negative = HeadSymmetry(units.left_blocks, units.right_blocks, GL(1), "mlp")
    before = layer(x)
    negative.act_(-torch.ones(HIDDEN, 1, 1, dtype=torch.float64))
    assert (layer(x) - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="'mlp': g is no positive multiple"):
        units.check_element(-torch.ones(HIDDEN, 1, 1, dtype=torch.float64))


def test_counts_of_the_affine_part():
    counts = symmetries_of(Layer()).redundancy()
    assert counts["qk"] == HEADS * RANK**2
    assert counts["qk.translation"] == counts["vo.translation"] == HEADS * RANK
    assert counts["mlp"] == HIDDEN
    assert "GL(4) ⋉ R^4" in str(symmetries_of(Layer()))


def test_bad_translations_are_refused(x):
    layer = Layer()
    symmetries = symmetries_of(layer)
    q, k = rows(layer.q), rows(layer.k)
    with pytest.raises(ValueError, match="biases of the right factor"):
        HeadSymmetry(q, k, GL(RANK), "qk", translation=Translation((q[1],)))
    with pytest.raises(ValueError, match="biases of the right factor"):
        HeadSymmetry(q, k, GL(RANK), "qk", translation=Translation((k[0],)))
    weights = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=r"'qk' needs a finite translation of shape \(3, 4\)"):
        symmetries.act_(
            {"vo": torch.eye(4).expand(3, 4, 4) * 2, "qk.translation": torch.ones(3, 5)}
        )
    with pytest.raises(ValueError, match=r"no symmetry called 'mlp\.translation'"):
        symmetries.act_({"mlp.translation": torch.ones(HIDDEN, 1)})
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)

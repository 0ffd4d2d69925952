"""Models for tests of canonical forms: every recognised architecture, and two made by hand."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.groups import GL, O, RotaryCommutant, RotaryPhases, StabilizerOfOnes
from quotientopt.models.attention import rotary_angles, rotate
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from tests.symmetries.architectures import EXAMPLES, values

ARCHITECTURES = tuple(EXAMPLES)


def example(name, dtype=torch.float64):
    """A model in evaluation mode and a function that gives its output."""
    model, inputs, kwargs = EXAMPLES[name][0]()
    model = model.to(dtype).eval()

    def cast(value):
        floating = torch.is_tensor(value) and value.is_floating_point()
        return value.to(dtype) if floating else value

    inputs, kwargs = tuple(map(cast, inputs)), {key: cast(value) for key, value in kwargs.items()}

    @torch.no_grad()
    def run(other):
        output = other(*inputs, **kwargs)
        output = getattr(output, "logits", output)
        return output[0] if isinstance(output, tuple) else output

    return model, run


GROUPS = {
    "normalized": O(8),
    "centred": StabilizerOfOnes(8),
    "partial": RotaryCommutant(8, rotary_dim=4),
    "phases": RotaryPhases(8, rotary_dim=4),
}


class HandMade(nn.Module):
    """An attention of 3 heads of width 8 with something special between queries and keys.

    `kind` "normalized": both are normalised per head, symmetry O(8); "centred": they lose their
    mean as well, the stabiliser of ones; "partial": their first four rows are rotated by the
    position, symmetry GL(4) × (C*)²; "phases": normalised and rotated, O(4) × U(1)².
    """

    def __init__(self, kind, width=20):
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(5)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Parameter(torch.randn(24, width, generator=generator) / 4))

    def forward(self, x):
        def split(weight):
            return (x @ weight.mT).unflatten(-1, (3, 8)).transpose(-3, -2)

        query, key, value = split(self.query), split(self.key), split(self.value)
        if self.kind == "centred":
            query, key = query - query.mean(-1, keepdim=True), key - key.mean(-1, keepdim=True)
        if self.kind != "partial":
            query, key = 3 * functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
        if self.kind in ("partial", "phases"):
            angles = rotary_angles(x.shape[-2], 4, x)
            query, key = (
                torch.cat((rotate(part[..., :4], *angles), part[..., 4:]), dim=-1)
                for part in (query, key)
            )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(-3, -2).flatten(-2) @ self.output

    def symmetries(self, group=None):
        """The symmetries, of another group than the right one if that is given."""
        group = GROUPS[self.kind] if group is None else group
        views = {name: p.unflatten(0, (3, 8)) for name, p in self.named_parameters()}
        return SymmetryMap(
            [
                HeadSymmetry([views["query"]], [views["key"]], group, "qk"),
                HeadSymmetry([views["output"]], [views["value"]], GL(8), "vo"),
            ]
        )


def hand_made(kind):
    model = HandMade(kind).double()
    inputs = values(2, 6, 20).double()

    @torch.no_grad()
    def run(other):
        return other(inputs)

    return model, run


def deviation(run, one, two):
    """Largest difference of outputs, relative to the largest output."""
    expected = run(one)
    return ((run(two) - expected).abs().max() / expected.abs().max()).item()


def difference(one, two):
    """Largest difference of parameters, relative to the largest parameter."""
    largest = max(p.abs().max() for p in one.parameters())
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return (max((p - q).abs().max() for p, q in pairs) / largest).item()


def twin_of(model, cond=1000.0, seed=2, residual=True, symmetries=None):
    """A copy of the model in another gauge; `symmetries` finds those of the copy."""
    twin = copy.deepcopy(model)
    found = (symmetries or qo.find_symmetries)(twin)
    generator = torch.Generator().manual_seed(seed)
    element = found.random_element(cond=cond, generator=generator)
    if not residual:
        element.pop("residual", None)
    found.act_(element)
    return twin


def snapshot(model):
    """All parameters, bit for bit."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model, before):
    """Bit for bit, so that NaN equals itself."""
    return all(
        p.detach().numpy().tobytes() == before[name].numpy().tobytes()
        for name, p in model.named_parameters()
    )

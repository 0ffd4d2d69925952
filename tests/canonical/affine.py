"""Maps with the affine gauge and the scales of hidden units, made by hand for known models."""

from __future__ import annotations

from torch import nn

import quotientopt as qo
from quotientopt.groups import GL, RotaryCommutant, Scale
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap, Translation

# Incoming and outgoing matrix, what has to stand beside them, and the group of gated units (GL(1))
# and of ReLU units (positive scales).
UNITS = (
    ("up", "down", "gate", GL(1)),
    ("up_proj", "down_proj", "gate_proj", GL(1)),
    ("wi_1", "wo", "wi_0", GL(1)),
    ("wi", "wo", "dropout", Scale(1)),
    ("linear1", "linear2", "linear2", Scale(1)),
)


def affine(model: nn.Module) -> SymmetryMap:
    """What is found, with translations of biases and scales of hidden units where they are."""
    found = qo.find_symmetries(model)
    parameters = dict(model.named_parameters())
    heads = [_with_translation(symmetry, parameters) for symmetry in found.heads]
    units = list(found.hidden_units)
    for name, module in model.named_modules() if not units else ():
        for into, out, beside, group in UNITS:
            if all(hasattr(module, part) for part in (into, out, beside)):
                path = f"{name}." if name else ""
                units.append(_units(parameters, f"{path}{into}", f"{path}{out}", group))
    return SymmetryMap(
        heads,
        found.residual,
        residual_reason=found.residual_reason,
        unrecognized=found.unrecognized,
        hidden_units=units,
        further=found.further,
    )


def _units(parameters, into, out, group):
    weight, down = parameters[f"{into}.weight"], parameters[f"{out}.weight"]
    right = [Block.of(weight.detach().unsqueeze(1), weight, f"{into}.weight")]
    bias = parameters.get(f"{into}.bias")
    if bias is not None:
        right.append(Block.of(bias.detach()[:, None, None], bias, f"{into}.bias"))
    left = [Block.of(down.detach().mT.unsqueeze(1), down, f"{out}.weight")]
    return HeadSymmetry(left, right, group, f"{into}.units")


def _with_translation(symmetry, parameters):
    if symmetry.translation is not None or isinstance(symmetry.group, RotaryCommutant):
        return symmetry
    columns = [block for block in symmetry.right_blocks if block.size[2] == 1]
    if not any(block.name.endswith("bias") for block in columns):
        return symmetry
    sink = None
    if symmetry.name.endswith("vo"):
        name = symmetry.left_blocks[0].name.removesuffix("weight") + "bias"
        if name not in parameters:
            return symmetry
        bias = parameters[name]
        sink = Block.of(bias.detach()[None, None], bias, name)
    return HeadSymmetry(
        symmetry.left_blocks,
        symmetry.right_blocks,
        symmetry.group,
        symmetry.name,
        translation=Translation(tuple(columns), sink),
    )

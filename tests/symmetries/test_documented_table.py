"""The table of architectures in docs/symmetries.md is what the code finds.

``python -m tests.symmetries.test_documented_table`` prints it.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from quotientopt.symmetries import find_symmetries, fold_norms_
from quotientopt.symmetries.residual import CentredStream
from tests.symmetries.architectures import EXAMPLES
from tests.symmetries.families import FAMILIES, make_neutral_, transformers

DOCUMENT = Path(__file__).parents[2] / "docs" / "symmetries.md"
HEADER = "| architecture | QK | VO | residual stream |\n|---|---|---|---|\n"
OTHERS = {
    "attention-bias-kv": "`torch.nn.MultiheadAttention`",
    "encoder-layer": "`torch.nn.TransformerEncoderLayer`, `TransformerDecoderLayer`",
    "gpt": "`quotientopt.models.GPT`, `ViT`",
    "llama": "`quotientopt.models.Llama`",
}
BROKEN = {
    "outside the recognised layers": "broken by what a layer does not see",
    "skip connection": "broken by norms that write to the stream",
    "no plain LayerNorm": "broken by norms of a class of its own",
    "activation behind": "broken by an activation that writes to the stream",
    "activation of": "broken by an activation that writes to the stream",
    "layer scale": "broken by layer scales",
    "images, which": "broken by images, which are not followed",
    "pooling by": "broken by a pooling head",
    "no model or layer": "not seen from inside",
}


def group_cell(symmetries, suffix: str) -> str:
    groups = {str(s.group) for s in symmetries.heads if suffix in s.name.rpartition(".")[2]}
    if not groups:
        return "left alone"
    cells = set()
    for group in groups:
        rows, rotated = re.search(r"\((\d+)(?:, rotary_dim=(\d+))?", group).groups()
        if rotated is None:
            cells.add("GL(r)")
        else:
            whole = rotated == rows
            cells.add("(C*)^(r/2)" if whole else "GL(r − m) × (C*)^(m/2)")
    return " and ".join(sorted(cells))


def residual_cell(model: nn.Module) -> str:
    if find_symmetries(model).residual is not None and find_symmetries(model).residual.exact:
        return "O(d)"
    cell = "O(d) after `fold_norms_`"
    for untie in (False, True):
        try:
            fold_norms_(model, untie=untie)
        except ValueError as error:
            refusal = str(error)
        else:
            return cell.replace("norms_", "norms_(model, untie=True)") if untie else cell
    cell = next(words for reason, words in BROKEN.items() if reason in refusal)
    residual = find_symmetries(make_neutral_(model)).residual
    if residual is not None and residual.exact:
        return f"{cell}; O(d) where their gains are one"
    if isinstance(residual, CentredStream):
        return f"{cell}; O(d − 1) where their gains are one"
    return cell


def row(title: str, model: nn.Module) -> str:
    symmetries = find_symmetries(model)
    cells = [title, group_cell(symmetries, "qk"), group_cell(symmetries, "vo")]
    return f"| {' | '.join([*cells, residual_cell(model)])} |\n"


def table() -> str:
    transformers()
    rows = [row(title, EXAMPLES[name][0]()[0]) for name, title in OTHERS.items()]
    for family in FAMILIES.values():
        model = family.model()
        # A masked head is tied to the embedding, but reads another space than the stream.
        if family.tied and "Masked" in family.class_name:
            model = family.model(tie_word_embeddings=False)
        rows.append(row(f"`transformers` {family.title}", model))
    return HEADER + "".join(rows)


def test_the_documented_table_is_what_is_found():
    assert table() in DOCUMENT.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())

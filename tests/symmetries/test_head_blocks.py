"""Heads of every layout for optimizers that work head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quotientopt as qo
from quotientopt.symmetries import matrix_groups
from tests.symmetries.architectures import small_gpt2, small_llama
from tests.symmetries.strangers import Plan, Stranger, tokens


def polar(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def split(name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """Heads of the two models by hand, as rows."""
    if name.endswith("c_attn.weight"):
        parts = zip(("query", "key", "value"), weight.T.chunk(3), strict=True)
        return [(kind, part.reshape(3, 8, 24)) for kind, part in parts]
    if name.endswith("attn.c_proj.weight"):
        return [("output", weight.reshape(3, 8, 24))]
    if name.endswith("attention.output.weight"):
        return [("output", weight.T.reshape(4, 8, 32))]
    for kind in ("query", "key", "value"):
        if name.endswith(f"{kind}.weight"):
            return [(kind, weight.reshape(-1, 8, 32))]
    return []


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_fused_transposed_and_grouped_heads(build):
    model = build()
    found = qo.find_symmetries(model).head_blocks()
    expected = [
        (name, *entry) for name, p in model.named_parameters() for entry in split(name, p.detach())
    ]
    assert len(found) == len(expected) == 8
    by_hand = {(name, kind): heads for name, kind, heads in expected}
    for heads in found:
        assert torch.equal(heads.view, by_hand[heads.name, heads.kind])
        assert heads.view.data_ptr() >= heads.parameter.data_ptr()
    # Orthogonalised in place, head by head, in the layout of the parameter.
    parameter = found[0].parameter
    update = torch.randn_like(parameter)
    before = update.clone()
    for heads in (h for h in found if h.parameter is parameter):
        view = heads.block.view(update)
        view.copy_(polar(view))
    for (_, one), (_, two) in zip(
        split(found[0].name, update), split(found[0].name, before), strict=True
    ):
        assert torch.allclose(one, polar(two), atol=1e-5)
    assert not torch.allclose(update, polar(before), atol=1e-2)


@pytest.mark.parametrize("strided", [False, True])
def test_query_heads_of_a_stranger_are_one_view(strided):
    plan = Plan(layout="fused", heads=4, shared=2, rank=4, strided=strided)
    model = Stranger(plan, layers=1)
    found = {h.kind: h for h in qo.find_symmetries(model, tokens()).head_blocks()}
    assert {kind: h.view.shape[0] for kind, h in found.items()} == {
        "query": 4,
        "key": 2,
        "value": 2,
        "output": 4,
    }
    weight = model.steps[0].mixer.all.weight.detach()
    assert torch.equal(found["query"].view, weight[:16].view(4, 4, 20))
    back = model.steps[0].mixer.back.weight.detach()
    assert torch.equal(found["output"].view, back.T.reshape(4, 4, 20))


def test_low_rank_pairs_and_chains_are_no_heads():
    model = Stranger(Plan(mlp="linear"), layers=1)
    symmetries = qo.find_symmetries(model, tokens())
    assert "steps.0.stuff.chain" in {s.name for s in symmetries.heads}
    assert {h.symmetry for h in symmetries.head_blocks()} == {
        "steps.0.mixer.vo",
        "steps.0.mixer.qk",
    }


def test_groups_for_muon_of_torch_dion_and_deepspeed():
    model = small_gpt2()
    matrices, rest = matrix_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".", 1)[1] for p in matrices["params"]} == {
        f"h.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))
    if hasattr(torch.optim, "Muon"):
        optimizers = torch.optim.Muon([matrices], lr=1e-2), torch.optim.AdamW([rest], lr=1e-3)
        model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    dion = matrix_groups(model, "dion")
    assert [group["algorithm"] for group in dion] == ["muon", "adamw"]
    (everything,) = matrix_groups(model, "deepspeed")
    assert sum(p.use_muon for p in everything["params"]) == 8
    model.transformer.wte.weight.requires_grad_(False)
    assert len(matrix_groups(model)[1]["params"]) == len(rest["params"]) - 1
    with pytest.raises(ValueError, match="optimizer must be 'torch', 'dion' or 'deepspeed'"):
        matrix_groups(model, "adam")

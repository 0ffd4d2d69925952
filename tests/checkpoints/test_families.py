"""Checkpoints of every family: dressed copies load with plain from_pretrained and compute the same.

"Plain" means by class and folder, with no argument but the dtype.
"""

import json

import pytest
import torch

import quotientopt as qo
from quotientopt.checkpoints import (
    CheckpointError,
    dress_checkpoint,
    example_inputs,
    find_checkpoint,
    load_checkpoint,
    verify_checkpoint,
)
from tests.symmetries.families import FAMILIES, WIDTH, OutputsOnly, transformers

safe_open = pytest.importorskip(
    "safetensors", reason="needs transformers: pip install transformers"
).safe_open

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.09}
# Attention scores are not scaled, and large for random weights: rounding errors are too.
SENSITIVE = {("t5", torch.bfloat16): 0.3}


def saved(name, folder, dtype=torch.float32, **options):
    model = FAMILIES[name].model().to(dtype)
    model.save_pretrained(folder, **options)
    return model


def logits(model, family):
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in family.inputs().items()
    }
    with torch.no_grad():
        return OutputsOnly(model)(**inputs).float()


def reloaded(family, folder, dtype):
    return getattr(transformers(), family.class_name).from_pretrained(folder, dtype=dtype).eval()


def contents(folder):
    """All tensors with their metadata, by file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found[path.name] = (file.metadata(), tensors)
    return found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_dressed_copies_compute_the_same(name, dtype, tmp_path):
    family = FAMILIES[name]
    source, out = tmp_path / "source", tmp_path / "out"
    model = saved(name, source, dtype)
    bytes_before = {path.name: path.read_bytes() for path in source.iterdir()}
    report = dress_checkpoint(source, out)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == bytes_before
    assert sorted(path.name for path in out.iterdir()) == sorted(bytes_before)

    copied = reloaded(family, out, dtype)
    tolerance = SENSITIVE.get((name, dtype), TOLERANCES[dtype])
    # In float32, so that what is compared are the weights.
    expected = logits(model.float(), family)
    difference = logits(reloaded(family, out, torch.float32), family) - expected
    assert difference.abs().max() <= tolerance * expected.abs().max()
    assert report.deviation <= report.allowed
    assert report.deviation <= tolerance

    before, after = contents(source), contents(out)
    changed = set()
    for file, (metadata, tensors) in after.items():
        assert metadata == before[file][0]
        assert tensors.keys() == before[file][1].keys()
        for key, tensor in tensors.items():
            original = before[file][1][key]
            assert (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
            if not torch.equal(tensor, original):
                changed.add(key)
    assert changed == set(report.changed)
    assert changed
    # It really is dressed: what dress_ makes of the loaded source.
    wanted = reloaded(family, source, torch.float32)
    qo.dress_(wanted)
    for (key, one), two in zip(copied.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, two.to(dtype)), key


@pytest.mark.parametrize("name", FAMILIES)
def test_symmetries_hold_on_inputs_made_from_the_configuration(name, tmp_path):
    saved(name, tmp_path)
    model = load_checkpoint(find_checkpoint(tmp_path)).model
    symmetries = qo.find_symmetries(model)
    deviations = verify_checkpoint(model, symmetries)
    assert len(deviations) >= len(symmetries.heads) > 0
    assert max(deviations.values()) <= 1e-9
    inputs = example_inputs(model)
    assert inputs.keys() - {"use_cache"} == FAMILIES[name].inputs().keys()


@pytest.mark.parametrize("name", ["llama", "t5", "gpt-neox"])
def test_a_wrong_group_is_caught(name, tmp_path):
    saved(name, tmp_path)
    model = load_checkpoint(find_checkpoint(tmp_path)).model
    symmetry = qo.find_symmetries(model).heads[0]
    blocks = symmetry.left_blocks, symmetry.right_blocks
    if name == "t5":  # right group, wrong partners
        blocks = blocks[0], qo.find_symmetries(model).heads[1].right_blocks
    wrong = qo.HeadSymmetry(*blocks, qo.groups.GL(symmetry.rank), "wrong")
    symmetries = type(qo.find_symmetries(model))([wrong])
    assert verify_checkpoint(model, symmetries)["wrong"] > 1e-3


@pytest.mark.parametrize("section", ["balanced", "orthonormal", "triangular"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_other_sections(name, section, tmp_path):
    model = saved(name, tmp_path / "source")
    out = tmp_path / "out"
    dress_checkpoint(tmp_path / "source", out, section)
    copied = reloaded(FAMILIES[name], out, torch.float32)
    expected = logits(model, FAMILIES[name])
    difference = (logits(copied, FAMILIES[name]) - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()
    wanted = reloaded(FAMILIES[name], tmp_path / "source", torch.float32)
    qo.dress_(wanted, section)
    assert all(map(torch.equal, copied.parameters(), wanted.parameters()))


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "t5"])
def test_the_residual_stream(name, tmp_path):
    """Folded norms leave O(d), or O(d − 1) where the loaded ones centre; embeddings turn along."""
    family = FAMILIES[name]
    model = family.model()
    qo.fold_norms_(model, untie=True)
    model.save_pretrained(tmp_path / "source")
    source = reloaded(family, tmp_path / "source", torch.float32)
    report = dress_checkpoint(tmp_path / "source", tmp_path / "out", residual=True)
    assert report.dressing["residual"].shape == (WIDTH, WIDTH)
    assert any("embed" in key or "shared" in key for key in report.changed)
    expected = logits(source, family)
    difference = logits(reloaded(family, tmp_path / "out", torch.float32), family) - expected
    assert difference.abs().max() <= 1e-4 * expected.abs().max()


def test_a_residual_stream_that_gains_break_is_refused(tmp_path):
    saved("llama", tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"O\(d\) is broken by gain .*fold_norms_"):
        dress_checkpoint(tmp_path / "source", tmp_path / "out", residual=True)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "source"]


# ---- layouts ------------------------------------------------------------------------------------


def test_shards(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = saved("llama", source, max_shard_size="20KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    dress_checkpoint(source, out)
    assert json.loads((out / "model.safetensors.index.json").read_text()) == index
    assert contents(out).keys() == contents(source).keys()
    family = FAMILIES["llama"]
    expected = logits(model, family)
    difference = logits(reloaded(family, out, torch.float32), family) - expected
    assert difference.abs().max() <= 1e-4 * expected.abs().max()
    single = tmp_path / "single"
    saved("llama", tmp_path / "whole")
    dress_checkpoint(tmp_path / "whole", single)
    (_, whole), *_ = contents(single).values()
    parts = {key: t for _, tensors in contents(out).values() for key, t in tensors.items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in parts)

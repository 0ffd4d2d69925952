"""The commands from end to end, on folders and on single files."""

import json
import subprocess
import sys

import pytest
import torch

import quotientopt as qo
from quotientopt.checkpoints import dress_checkpoint, find_checkpoint, load_checkpoint, loading
from quotientopt.cli import main
from quotientopt.cli.checkpoints import NOT_EXACT
from tests.symmetries.families import FAMILIES, transformers

safetensors = pytest.importorskip(
    "safetensors.torch", reason="needs transformers: pip install transformers"
)
load_file, save_file = safetensors.load_file, safetensors.save_file


@pytest.fixture
def source(tmp_path):
    FAMILIES["llama"].model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def logits(model):
    with torch.no_grad():
        return model(**FAMILIES["llama"].inputs()).logits


def load(path):
    return transformers().LlamaForCausalLM.from_pretrained(path).eval()


def test_inspect(source, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    record, plot = tmp_path / "found.json", tmp_path / "spectra.png"
    assert main(["inspect", str(source), "--json", str(record), "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    model = load(source).requires_grad_(False)
    symmetries = qo.find_symmetries(model)
    # Two pairs of heads, a translation and hidden units in each of two layers.
    for part in ("LlamaForCausalLM", str(symmetries), str(qo.redundancy(model)), "8 symmetries"):
        assert part in output
    assert "all exact" in output
    found = json.loads(record.read_text())
    assert found["model"] == "LlamaForCausalLM"
    assert [row["name"] for row in found["symmetries"]] == [s.name for s in symmetries.heads]
    assert found["redundancy"]["total"]["redundant"] == symmetries.redundancy()["total"]
    assert found["deviations"].keys() == symmetries.random_element().keys()
    assert max(found["deviations"].values()) < 1e-9
    values = qo.spectra(model)["model.layers.0.self_attn.qk"].singular_values
    stored = found["spectra"]["model.layers.0.self_attn.qk"]["singular_values"]
    assert torch.allclose(torch.tensor(stored, dtype=values.dtype), values, atol=1e-12)
    assert found["environment"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_inspect_without_running_the_model(source, capsys, monkeypatch):
    model_class = transformers().LlamaForCausalLM
    monkeypatch.setattr(model_class, "forward", lambda *_, **__: pytest.fail("it ran"))
    assert main(["inspect", str(source), "--no-verify", "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr().out
    assert "not verified" in output
    assert "bfloat16" in output


def test_a_symmetry_that_is_not_exact(source, capsys, monkeypatch):
    """Exit status 1, and the number stands in the output."""
    found = qo.find_symmetries

    def wrong(model, **inputs):
        heads = [
            qo.HeadSymmetry(s.left_blocks, s.right_blocks, qo.groups.GL(s.rank), s.name)
            for s in found(model).heads
        ]
        return qo.SymmetryMap(heads)

    monkeypatch.setattr("quotientopt.checkpoints.outputs.find_symmetries", wrong)
    assert main(["inspect", str(source)]) == NOT_EXACT == 1
    assert "2 NOT EXACT" in capsys.readouterr().out


def test_dress_carries_everything_along(source, tmp_path, capsys):
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"a": 1}')
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "linked.txt").symlink_to(source / "tokenizer.json")
    (source / "config.json").chmod(0o444)
    out = tmp_path / "deep" / "out"
    assert main(["dress", str(source), "--out", str(out)]) == 0
    assert "written" in capsys.readouterr().out
    copied = {str(path.relative_to(out)) for path in out.rglob("*")}
    original = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert copied == {name for name in original if not name.startswith(".git")}
    assert not (out / "linked.txt").is_symlink()
    for name in copied - {"model.safetensors", "1_Pooling"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (logits(load(out)) - logits(load(source))).abs().max() < 1e-4


def test_links_to_weights_are_followed(source, tmp_path):
    """As in the cache of the hub, whose snapshots are links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in source.iterdir():
        (linked / path.name).symlink_to(path)
    before = (source / "model.safetensors").read_bytes()
    dress_checkpoint(linked, tmp_path / "out")
    assert (source / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_single_file(source, tmp_path, ending, capsys):
    weights, out = tmp_path / f"weights.{ending}", tmp_path / f"out.{ending}"
    tensors = load_file(source / "model.safetensors")
    if ending == "pt":
        torch.save(tensors, weights)
    else:
        save_file(tensors, weights)
    before = weights.read_bytes()
    more = ["--config", str(source / "config.json")]
    assert main(["dress", str(weights), *more, "--out", str(out)]) == 0
    assert weights.read_bytes() == before
    dressed = torch.load(out) if ending == "pt" else load_file(out)
    assert dressed.keys() == tensors.keys()
    model = load(source)
    before = logits(model)
    result = model.load_state_dict(dressed, strict=False)
    assert result.unexpected_keys == []
    assert (logits(model) - before).abs().max() < 1e-4
    wanted = load(source)
    qo.dress_(wanted)
    assert all(map(torch.equal, model.parameters(), wanted.parameters()))
    assert main(["inspect", str(weights), *more, "--no-verify"]) == 0
    other = ["dress", str(weights), *more, "--out", str(tmp_path / "other.bin")]
    with pytest.raises(SystemExit, match="2"):
        main(other)
    assert "the format stays" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["dress", str(weights), *more, "--out", str(out)])
    assert main(["dress", str(weights), *more, "--overwrite", "--out", str(out)]) == 0


def test_pickled_folders_keep_their_format_and_shared_memory(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors["spare." + key] = tensors[key]  # one memory, under a second name
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    dress_checkpoint(source, tmp_path / "out")
    dressed = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert dressed.keys() == tensors.keys()
    assert dressed[key].data_ptr() == dressed["spare." + key].data_ptr()
    assert not torch.equal(dressed[key], tensors[key])
    assert (logits(load(tmp_path / "out")) - logits(load(source))).abs().max() < 1e-4


def test_weights_under_other_names(source, tmp_path):
    """The base model's names, as files of models with another head have; biases still zero."""
    tensors = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        name = key.removeprefix("model.")
        tensors[name] = torch.zeros_like(tensor) if name.endswith("proj.bias") else tensor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "by": "hand"})
    expected = logits(load(source))
    report = dress_checkpoint(source, tmp_path / "out")
    assert set(report.changed) == {
        f"layers.{layer}.{part}_proj.weight"
        for layer in (0, 1)
        for part in (*(f"self_attn.{p}" for p in "qkvo"), "mlp.up", "mlp.down")
    }
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert (logits(load(tmp_path / "out")) - expected).abs().max() < 1e-4


def equal_biases(tmp_path):
    """A BERT of which two biases have the same values, on disk."""
    model = FAMILIES["bert"].model()
    first, second = (layer.attention.self.key for layer in model.bert.encoder.layer)
    with torch.no_grad():
        second.bias.copy_(first.bias)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_equal_values_are_told_apart_by_names(tmp_path):
    report = dress_checkpoint(equal_biases(tmp_path), tmp_path / "out")
    assert sum(name.endswith("self.key.bias") for name in report.changed) == 2
    written = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (f"bert.encoder.layer.{i}.attention.self.key" for i in (0, 1))
    # The biases are translated away.
    assert not written[first + ".bias"].any()
    assert not written[second + ".bias"].any()
    assert not torch.equal(written[first + ".weight"], written[second + ".weight"])


def test_equal_values_are_told_apart_by_their_neighbours(tmp_path):
    source = equal_biases(tmp_path)
    model = load_checkpoint(find_checkpoint(source)).model
    marks = loading.fingerprints(model)
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("self.key", "self.memory"): t for name, t in tensors.items()}
    save_file(renamed, source / "model.safetensors")
    checkpoint = find_checkpoint(source)
    keys = [f"bert.encoder.layer.{i}.attention.self.key" for i in (0, 1)]
    biases, weights = ([f"{key}.{part}" for key in keys] for part in ("bias", "weight"))
    places = loading.places_of(checkpoint, model, marks, biases + weights)
    for name in biases + weights:
        assert [place.name for place in places[name]] == [name.replace("key", "memory")]
    with pytest.raises(ValueError, match="cannot tell which tensor"):
        loading.places_of(checkpoint, model, marks, biases + weights[:1])


def test_the_module_runs_as_a_command(tmp_path):
    for arguments, part in ((["--help"], "inspect"), (["dress", "--help"], "--section")):
        call = [sys.executable, "-m", "quotientopt", *arguments]
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert part in done.stdout


def test_importing_the_commands_imports_no_other_package():
    code = (
        "import sys, quotientopt.cli; "
        "print(sorted({'transformers', 'safetensors', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dressing_a_dressed_checkpoint(source, tmp_path):
    dress_checkpoint(source, tmp_path / "once")
    dress_checkpoint(tmp_path / "once", tmp_path / "twice")
    one, two = (load(tmp_path / name) for name in ("once", "twice"))
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert (first - second).abs().max() < 1e-5
    moved = zip(load(source).parameters(), one.parameters(), strict=True)
    assert any((first - second).abs().max() > 1e-2 for first, second in moved)

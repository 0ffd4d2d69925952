"""Every mistake is one line and exit status 2, and nothing is written."""

import builtins
import json
import os
import shutil

import pytest
import torch

from quotientopt.checkpoints import dressing, files, writing
from quotientopt.cli import main
from tests.symmetries.families import FAMILIES, transformers

safetensors = pytest.importorskip(
    "safetensors.torch", reason="needs transformers: pip install transformers"
)
load_file, save_file = safetensors.load_file, safetensors.save_file


@pytest.fixture
def source(tmp_path):
    FAMILIES["llama"].model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(capfd):
    """Runs a command that must be refused with a matching line, and leave everything as it was."""

    def run(root, *arguments, match):
        before = snapshot(root)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        output, errors = capfd.readouterr()
        lines = [line for line in errors.splitlines() if line.startswith("quotientopt")]
        assert len(lines) == 1, errors
        assert "Traceback" not in output + errors
        for part in (match,) if isinstance(match, str) else match:
            assert part in lines[0]
        assert snapshot(root) == before

    return run


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


COMMANDS = ("inspect", "dress")


def command(name, source, *more):
    target = ("--out", source.parent / "out") if name == "dress" else ("--no-verify",)
    return (name, source, *target, *more)


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_files(name, source, tmp_path, refused):
    refused(tmp_path, *command(name, tmp_path / "nowhere"), match=("no such file", "nowhere"))
    weights = source / "model.safetensors"
    refused(tmp_path, *command(name, weights), match=("is a file", "--config"))
    moved = weights.rename(tmp_path / "moved")
    refused(tmp_path, *command(name, source), match=("no weights in", "model.safetensors"))
    (source / "old.gguf").write_bytes(b"GGUF")
    refused(tmp_path, *command(name, source), match=("GGUF", "original model"))
    moved.rename(weights)
    (source / "config.json").unlink()
    refused(tmp_path, *command(name, source), match="GGUF")
    (source / "old.gguf").unlink()
    refused(tmp_path, *command(name, source), match=("cannot read", "config.json"))
    (source / "adapter_config.json").write_text("{}")
    refused(tmp_path, *command(name, source), match=("PEFT adapter", "merge_and_unload"))


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_shards(name, tmp_path, refused):
    source = tmp_path / "source"
    FAMILIES["llama"].model().save_pretrained(source, max_shard_size="20KB")
    first = min(source.glob("*.safetensors"))
    first.unlink()
    refused(tmp_path, *command(name, source), match=("names", first.name))
    (source / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, *command(name, source), match="has no weight_map")


@pytest.mark.parametrize("name", COMMANDS)
def test_configurations(name, source, tmp_path, refused):
    edit_config(source, architectures=["WondrousForCausalLM"])
    refused(tmp_path, *command(name, source), match="unknown architecture 'WondrousForCausalLM'")
    edit_config(source, auto_map={"AutoModel": "modeling.Wondrous"})
    refused(tmp_path, *command(name, source), match="code of the folder is not run")
    edit_config(source, architectures=["Linear"])  # a name of torch, and no model
    refused(tmp_path, *command(name, source), match="unknown architecture 'Linear'")
    edit_config(source, architectures=None, model_type="wondrous")
    refused(tmp_path, *command(name, source), match="no known model_type, got 'wondrous'")
    edit_config(source, architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64)
    refused(tmp_path, *command(name, source), match=("does not have the shape", "and"))
    edit_config(source, quantization_config={"quant_method": "gptq"})
    refused(tmp_path, *command(name, source), match=("quantised weights", "gptq"))
    (source / "config.json").write_text("{")
    refused(tmp_path, *command(name, source), match="is not JSON")
    (source / "config.json").write_text("[]")
    refused(tmp_path, *command(name, source), match="should hold an object")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_base_model_where_no_architecture_is_named(name, source, tmp_path, capsys):
    edit_config(source, architectures=None)
    assert main([str(part) for part in command(name, source)]) == 0
    assert "lm_head" not in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_and_foreign_weights(name, source, tmp_path, refused):
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, *command(name, source), match=("cannot read", "SafetensorError"))
    save_file({"other": torch.ones(2)}, weights, metadata={"format": "pt"})
    refused(tmp_path, *command(name, source), match="no tensor in")
    save_file({"other": torch.ones(2, dtype=torch.int8)}, weights, metadata={"format": "pt"})
    refused(tmp_path, *command(name, source), match="no floating-point tensors")


def test_quantised_values_without_a_word_in_the_configuration(source, tmp_path, refused):
    def quantise(tensors):
        key = "model.layers.0.self_attn.k_proj.weight"
        tensors[key] = (100 * tensors[key]).to(torch.int8)

    edit_weights(source, quantise)
    refused(tmp_path, *command("dress", source), match=("k_proj.weight", "I8", "quantised"))
    refused(tmp_path, *command("inspect", source), match=("k_proj.weight", "I8", "quantised"))


def test_an_architecture_that_no_class_tells_is_found_from_inputs(tmp_path, capfd):
    package = transformers()
    model = package.NemotronForCausalLM(package.NemotronConfig(**FAMILIES["llama"].settings))
    model.save_pretrained(tmp_path / "source")
    assert main(["inspect", str(tmp_path / "source")]) == 0
    output = capfd.readouterr().out
    assert "model.layers.0.self_attn.vo" in output
    assert "found, proved to" in output
    assert "all exact" in output
    assert main(["inspect", str(tmp_path / "source"), "--no-verify"]) == 0
    output = capfd.readouterr().out
    assert "not understood, without head frames: model.layers.0.self_attn" in output
    assert "not verified" in output
    assert main([str(word) for word in command("dress", tmp_path / "source")]) == 0


def test_a_pair_that_is_not_all_there(source, tmp_path, refused):
    name = "model.layers.0.self_attn.v_proj.weight"
    edit_weights(source, lambda tensors: tensors.pop(name))
    match = (f"{name!r} is not in", "complete the checkpoint")
    refused(tmp_path, *command("dress", source), match=match)


def test_two_dtypes_in_a_pair(source, tmp_path, refused):
    def narrow(tensors):
        for key in tensors:
            if key.endswith("layers.1.self_attn.k_proj.weight"):
                tensors[key] = tensors[key].bfloat16()

    edit_weights(source, narrow)
    match = ("layers.1.self_attn.qk'", "torch.float32", "torch.bfloat16", "convert")
    refused(tmp_path, *command("dress", source), match=match)


def test_two_dtypes_in_different_pairs(source, tmp_path):
    """Attention in bfloat16, everything else in float32: every tensor keeps its dtype."""

    def narrow(tensors):
        for key in tensors:
            if "self_attn" in key:
                tensors[key] = tensors[key].bfloat16()

    edit_weights(source, narrow)
    assert main([str(part) for part in command("dress", source)]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    assert {key: t.dtype for key, t in before.items()} == {key: t.dtype for key, t in after.items()}
    assert not all(torch.equal(before[key], after[key]) for key in before)


def test_values_that_do_not_fit(source, tmp_path, refused):
    def large(tensors):
        for key in tensors:
            if "self_attn" in key:
                scale = 300 if key.endswith("q_proj.weight") or "k_proj" in key else 1
                tensors[key] = (scale * tensors[key]).half()

    edit_weights(source, large)
    arguments = command("dress", source, "--section", "orthonormal")
    refused(tmp_path, *arguments, match=("does not fit torch.float16", "balanced"))


def test_sections(tmp_path, refused):
    FAMILIES["gpt2"].model().save_pretrained(tmp_path / "source")
    refused(tmp_path, *command("dress", tmp_path / "source", "--section", "polar"), match="'polar'")
    refused(tmp_path, *command("dress", tmp_path / "source", "--section", "odd"), match="odd")


def test_rank_deficient_and_non_finite_weights(source, tmp_path, refused):
    def spoil(value):
        def change(tensors):
            tensors["model.layers.0.self_attn.v_proj.weight"][:8] = value

        return change

    edit_weights(source, spoil(0.0))
    match = ("layers.0.self_attn.vo'", "rank-deficient")
    refused(tmp_path, *command("dress", source, "--section", "balanced"), match=match)
    edit_weights(source, spoil(float("nan")))
    refused(tmp_path, *command("dress", source), match="not finite")


# ---- files of pickled tensors -------------------------------------------------------------------


@pytest.fixture
def pickled(source):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    return source, tensors


class Payload:
    """What must not be run by loading."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_content_that_is_no_tensor(pickled, tmp_path, refused):
    source, tensors = pickled
    path = source / "pytorch_model.bin"
    for content, match in (
        ({**tensors, "payload": Payload(tmp_path / "ran")}, "pickled objects that are no tensors"),
        ({**tensors, "step": 3}, "'step' is a int"),
        ({"model": tensors}, "'model' is a dict"),
        (list(tensors.values()), "holds a list"),
        ({key: t.to("meta") for key, t in tensors.items()}, "is on the meta device"),
    ):
        torch.save(content, path)
        refused(tmp_path, *command("dress", source), match=match)
        refused(tmp_path, *command("inspect", source), match=match)
    path.write_bytes(b"nonsense")
    refused(tmp_path, *command("dress", source), match="pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


# ---- targets ------------------------------------------------------------------------------------


def test_targets_that_would_lose_something(source, tmp_path, refused):
    refused(tmp_path, "dress", source, "--out", source, match="is the checkpoint itself")
    link = tmp_path / "link"
    link.symlink_to(source)
    refused(tmp_path, "dress", source, "--overwrite", "--out", link, match="checkpoint itself")
    refused(tmp_path, "dress", source, "--out", source / "inside", match="lie in one another")
    refused(tmp_path, "dress", source, "--overwrite", "--out", tmp_path, match="in one another")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    refused(tmp_path, "dress", source, "--out", full, match=("there already", "--overwrite"))
    refused(tmp_path, "dress", source, "--out", full / "notes.txt", match="is a file")
    refused(tmp_path, "dress", source, match="--out")


def test_linked_folders_are_copied(source, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "notes.txt").write_text("kept")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    assert main(["dress", str(source), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "link").is_symlink()
    assert (tmp_path / "out" / "link" / "deep" / "notes.txt").read_text() == "kept"


def test_an_empty_target_and_one_to_be_overwritten(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert main(["dress", str(source), "--out", str(out)]) == 0
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    (out / "stale.txt").write_text("old")
    first = (out / "model.safetensors").read_bytes()
    arguments = ["--section", "balanced", "--overwrite", "--out", str(out)]
    assert main(["dress", str(source), *arguments]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "stale.txt"])
    assert (out / "model.safetensors").read_bytes() != first
    assert sorted(tmp_path.iterdir()) == [out, source]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writes_leave_nothing(source, tmp_path, monkeypatch, capfd, error, existing):
    out = tmp_path / "out"
    if existing:
        shutil.copytree(source, out)
    (source / "zzz.txt").write_text("copied last")
    before = snapshot(tmp_path)
    copy = shutil.copyfile

    def failing(origin, target, **options):
        if str(origin).endswith("zzz.txt"):
            raise error
        return copy(origin, target, **options)

    monkeypatch.setattr(writing.shutil, "copyfile", failing)
    arguments = ["dress", str(source), "--out", str(out), *["--overwrite"] * existing]
    if isinstance(error, OSError):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "cannot write" in capfd.readouterr().err
    else:
        assert main(arguments) == 130
        assert "nothing written" in capfd.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_rename_that_fails_puts_back_what_was_there(source, tmp_path, monkeypatch, refused):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    rename = os.rename

    def failing(origin, target):
        if str(target) == str(out) and origin.name != writing.OLD:
            raise OSError(1, "Operation not permitted")
        rename(origin, target)

    monkeypatch.setattr(writing.os, "rename", failing)
    arguments = ("dress", source, "--overwrite", "--out", out)
    refused(tmp_path, *arguments, match=("cannot write", "not permitted"))


def test_unreadable_copies_are_not_kept(source, tmp_path, monkeypatch, refused):
    """The copy is loaded again before it gets its name."""
    write = files.SafetensorsFile.write

    def forgetful(self, path, values):
        write(self, path, dict(list(values.items())[1:]))

    monkeypatch.setattr(files.SafetensorsFile, "write", forgetful)
    refused(tmp_path, *command("dress", source), match="does not come back from the files")


def test_outputs_that_change_are_refused(source, tmp_path, monkeypatch, refused):
    def careless(model, *_, **options):
        result = dress(model, **options)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.01)
        return result

    dress = dressing.dress_
    monkeypatch.setattr(dressing, "dress_", careless)
    refused(tmp_path, *command("dress", source), match="would change the outputs")


# ---- without packages ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_without_transformers(name, source, tmp_path, monkeypatch, refused):
    original = builtins.__import__

    def without(module, *arguments, **options):
        if module.partition(".")[0] == "transformers":
            raise ImportError(module)
        return original(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(tmp_path, *command(name, source), match="pip install 'transformers>=")


def test_plots_need_a_folder(source, tmp_path, refused):
    target = tmp_path / "nowhere" / "spectra.png"
    refused(tmp_path, "inspect", source, "--plot", target, match="no such folder")
    refused(tmp_path, "inspect", source, "--dtype", "int8", match="int8")

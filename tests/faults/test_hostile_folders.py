"""Folders made to do harm: one clear line, exit status 2, nothing run, fetched or written."""

import builtins
import json
import os
import resource
import shutil
import socket
import sys
import time

import pytest
import torch

from quotientopt.checkpoints import dress_checkpoint, find_checkpoint, load_checkpoint
from quotientopt.cli import main
from tests.faults.conftest import snapshot
from tests.symmetries.families import FAMILIES, transformers

COMMANDS = ("inspect", "dress")


def command(name, source, *more):
    target = ("--out", source.parent / "out") if name == "dress" else ("--no-verify",)
    return (name, source, *target, *more)


def edit(source, **changes):
    path = source / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def nested(depth):
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.fixture
def both(refused, tmp_path, source):
    """Runs both commands, which must refuse within seconds."""

    def run(match):
        for name in COMMANDS:
            start = time.monotonic()
            refused(tmp_path, *command(name, source), match=match)
            assert time.monotonic() - start < 10

    return run


ARCHITECTURES = [
    "LlamaForCausalLM",
    7,
    {"a": 1},
    [7],
    [["LlamaForCausalLM"]],
    [None],
    ["__class__"],
    ["PreTrainedModel"],
    ["AutoModelForCausalLM"],
    ["modeling_utils"],
    ["\x1b[31mred\x07"],
    ["x" * 100_000],
    ["\ud800"],
    True,
]


@pytest.mark.parametrize("value", ARCHITECTURES, ids=lambda v: repr(v)[:24])
def test_architectures_of_another_type(source, both, value, capfd):
    edit(source, architectures=value)
    both("architectur")


@pytest.mark.parametrize("value", [7, ["llama"], {"a": 1}, None, "../llama", ""])
def test_model_types_of_another_type(source, both, value):
    edit(source, architectures=..., model_type=value)
    both("model_type")


SETTINGS = {
    "hidden_size": [0, -32, 10**9, 10**30, 1e400, float("nan"), "32", None, [32], 33, 2.5],
    "num_hidden_layers": [-1, 10**6, 10**12, 10**30, 2.5, "2", [2], 1e400],
    "num_attention_heads": [0, -4, 10**9, "4", 3, None],
    "vocab_size": [-1, 10**12, "40", [1]],
    "max_position_embeddings": [-1, "x", [1]],
    "head_dim": [0, -8, 10**9, "8"],
    "hidden_act": [7, "__import__", ["gelu"], {"a": 1}],
    "rope_parameters": [7, {"rope_type": "x"}, {"rope_type": ["default"]}, [1]],
    "layer_types": [7, ["x", "y"], ["full_attention"] * 5],
    "num_key_value_heads": [0, 3, 10**9, "2"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_wrong_in_any_way(source, tmp_path, name, capfd):
    """Refused in one line, or harmless: where a model is built all the same."""
    for value in SETTINGS[name]:
        path = source / "config.json"
        before = path.read_text()
        edit(source, **{name: value})
        for one in COMMANDS:
            start = time.monotonic()
            one_line([str(part) for part in command(one, source)], capfd)
            assert time.monotonic() - start < 20, value
        path.write_text(before)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def one_line(arguments, capfd):
    """Run a command and require success, or one line on standard error and status 1 or 2."""
    capfd.readouterr()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    output, errors = capfd.readouterr()
    assert status in (0, 1, 2)
    assert "Traceback" not in output + errors
    if status == 2:
        lines = [line for line in errors.splitlines() if line.startswith("quotientopt: error: ")]
        assert len(lines) == 1, errors
        assert lines[0].isprintable()
        assert len(lines[0]) < 2000
    return status


@pytest.mark.parametrize("name", COMMANDS)
def test_a_million_layers(source, tmp_path, refused, name):
    for key in ("num_hidden_layers", "n_layer", "encoder_layers", "depths"):
        shutil.copytree(source, tmp_path / key)
        edit(tmp_path / key, **{key: [10**6] if key == "depths" else 10**6})
        refused(tmp_path, *command(name, tmp_path / key), match=(key, "the files hold"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("GPT2LMHeadModel", {"n_positions": 300_000}),  # a mask of 90 GB per layer
        ("GPT2LMHeadModel", {"n_embd": 32_768, "n_inner": 10**6}),
        ("LlamaForCausalLM", {"vocab_size": 10**9, "hidden_size": 32}),
        ("SwinModel", {"depths": [1] * 100_000, "num_heads": [1] * 100_000}),
        ("MixtralForCausalLM", {"num_local_experts": 10**6}),
    ],
)
def test_large_models_around_small_files(source, both, kind, settings):
    known = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2", "SwinModel": "swin"}
    (source / "config.json").write_text(
        json.dumps(
            {
                "architectures": [kind],
                "model_type": known.get(kind, "mixtral"),
                **settings,
            }
        )
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both("the files hold")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB


@pytest.mark.parametrize("depth", [70, 5_000, 500_000])
def test_deep_json(source, both, depth):
    (source / "config.json").write_text(nested(depth))
    both("nested too deeply")
    (source / "config.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    both("nested too deeply")


JSON = ["", "nul", "NaN", '"text"', "[1]", "\x00", '{"a": 1' + "0" * 10_000 + "}", "\ufeff{}"]


@pytest.mark.parametrize("text", JSON, ids=lambda v: repr(v)[:12])
def test_json_that_is_none(source, both, text):
    (source / "config.json").write_bytes(text.encode() + b"\xff" * (text == ""))
    both("config.json")


MAPS = [
    ({"a": 1}, "names a int"),
    ({"a": ["x"]}, "names a list"),
    ({"a": None}, "names a NoneType"),
    ({"a": {"b": "c"}}, "names a dict"),
    ({"a": "x" * 5_000}, "5000 characters"),
    ({"a": "../elsewhere.safetensors"}, "no file of its own folder"),
    ({"a": "/etc/passwd"}, "no file of its own folder"),
    ({"a": "sub/x.safetensors"}, "no file of its own folder"),
    ({"a": ".."}, "no file of its own folder"),
    ({"a": ""}, "no file of its own folder"),
    ({"a": "x\x00.safetensors"}, "no file of its own folder"),
    ([1, 2], "has no weight_map"),
    ("x", "has no weight_map"),
    (None, "has no weight_map"),
    ({}, "has no weight_map"),
]


@pytest.mark.parametrize(("weight_map", "match"), MAPS, ids=lambda v: repr(v)[:24])
def test_weight_maps(source, tmp_path, both, weight_map, match):
    weights = source / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    both(match)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json"],
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "loop", "folder", "device"])
def test_special_files(source, both, name, kind, monkeypatch):
    monkeypatch.chdir(source)  # names of sockets are short
    if name == "model.safetensors.index.json":
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    elif kind == "loop":
        os.symlink(name, name)
    elif kind == "folder":
        (source / name).mkdir()
    else:
        os.symlink("/dev/zero", name)
    if name == "generation_config.json" and kind in ("loop", "folder"):
        return  # nothing reads it: dress copies a folder and refuses the loop
    both(name)


@pytest.mark.parametrize("kind", ["inspect", "dress"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn", "attacker/kernel", {"": "a/b"}])
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_are_not_looked_up(source, tmp_path, kind, value, nested, monkeypatch):
    """Whatever a configuration names; the choice is overridden, and no socket is opened."""
    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    choice = dict.fromkeys(keys, value) | {"experts_implementation": "attacker/experts"}
    if nested:
        FAMILIES["clip"].model().save_pretrained(source)
        parts = json.loads((source / "config.json").read_text())
        edit(source, text_config=parts["text_config"] | choice)
    else:
        edit(source, **choice)
    opened = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: opened.append(a))
    loaded = load_checkpoint(find_checkpoint(source))
    for module in loaded.model.modules():
        if hasattr(module, "config"):
            assert module.config._attn_implementation in ("sdpa", "eager")
    assert main([str(part) for part in command(kind, source)]) == 0
    assert opened == []


def test_backbones_and_other_repositories_are_not_fetched(source, both, monkeypatch):
    opened = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: opened.append(a))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = {
        "architectures": ["DetrModel"],
        "model_type": "detr",
        "backbone": "microsoft/resnet-50",
        "use_pretrained_backbone": True,
        "use_timm_backbone": False,
        "backbone_config": None,
    }
    (source / "config.json").write_text(json.dumps(config))
    both("")
    assert opened == []
    assert constants.HF_HUB_OFFLINE is False


def test_transformers_opens_nothing_in_the_folder(source, tmp_path, monkeypatch):
    """Neither adapters nor pickled metadata nor further weights that a configuration names."""
    (source / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "other.safetensors").write_bytes(b"nonsense")
    edit(source, transformers_weights="../other.safetensors", _name_or_path="attacker/model")
    (source / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    (source / "__0_0.distcp").write_bytes(b"x")
    (source / "modeling_llama.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(source, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    opened = []
    model = transformers().modeling_utils
    monkeypatch.setattr(model, "load_state_dict", lambda *a, **k: opened.append(a))
    original = builtins.open

    def watched(file, *arguments, **options):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "transformers" and str(tmp_path) in str(file):
            opened.append(file)
        return original(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", watched)
    report = dress_checkpoint(source, tmp_path / "out")
    assert report.deviation < 1e-4
    assert opened == []
    assert not (tmp_path / "ran").exists()


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_not_run(source, tmp_path, both):
    """In weights, and in the state of an optimizer."""
    tensors = {"x": torch.ones(2), "payload": Payload(tmp_path / "ran")}
    torch.save(tensors, source / "optimizer.pt")
    report = dress_checkpoint(source, tmp_path / "dressed")
    assert "cannot be read as a state" in report.left_out[0]
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    both("no tensors")
    assert not (tmp_path / "ran").exists()


def test_names_with_control_characters_are_printed_harmlessly(source, tmp_path, capfd):
    odd = tmp_path / "a\x1b[2Jb\nquotientopt: all is well"
    with pytest.raises(SystemExit):
        main(["inspect", str(odd)])
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1
    assert errors.strip().isprintable()


def test_safetensors_headers(source, both):
    path = source / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for content in (
        b"",
        whole[:7],
        (2**63).to_bytes(8, "little") + whole[8:],
        (length + 10**9).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"[" * length + whole[8 + length :],
        whole[:8] + b" " * length + whole[8 + length :],
        whole[:-100],
        whole + b"x",
    ):
        path.write_bytes(content)
        both("model.safetensors")


def test_a_copy_is_left_alone_when_anything_fails(source, tmp_path):
    out = tmp_path / "out"
    dress_checkpoint(source, out)
    before = snapshot(out)
    edit(source, num_hidden_layers=10**6)
    with pytest.raises(ValueError, match="the files hold"):
        dress_checkpoint(source, out, overwrite=True)
    assert snapshot(out) == before

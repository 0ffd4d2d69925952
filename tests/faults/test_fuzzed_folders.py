"""Folders made by hypothesis: both commands end in success or one line, and write nowhere else."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quotientopt.cli import main
from tests.faults.conftest import snapshot
from tests.symmetries.families import FAMILIES, transformers

# Seconds for one command.
MOST = 20
FAMILIES_USED = ("llama", "gpt2", "t5", "vit")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    transformers().logging.disable_progress_bar()
    folders = {}
    for name in FAMILIES_USED:
        folders[name] = tmp_path_factory.mktemp(name) / "model"
        FAMILIES[name].model().save_pretrained(folders[name])
        if name == "llama":  # in shards
            shards = tmp_path_factory.mktemp("shards") / "model"
            FAMILIES[name].model().save_pretrained(shards, max_shard_size="20KB")
            folders["shards"] = shards
    yield folders
    transformers().logging.enable_progress_bar()


NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([0, -1, 2**31, 2**63, 10**6, 10**12, 10**40]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["../x", "/etc/passwd", "a/b", "", "\x00", "\x1b[2J", "float32", "float8_e4m3fn", "gelu"]
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "generation_config.json",
        "adapter_config.json",
        "optimizer.pt",
        "tokenizer.json",
        "notes.txt",
        "sub/notes.txt",
        "model-00001-of-00002.safetensors",
    ]
)
KEYS = st.sampled_from(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "attn_implementation",
        "auto_map",
        "quantization_config",
        "text_config",
        "transformers_weights",
        "num_labels",
        "id2label",
        "tie_word_embeddings",
        "is_encoder_decoder",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "use_cache",
        "pad_token_id",
        "eos_token_id",
        "image_size",
        "num_channels",
    ]
)


@st.composite
def changes(draw):
    """What is done to a folder: a list of (kind, …)."""
    kinds = st.one_of(
        st.tuples(st.just("known key"), st.integers(0, 200), JSON),
        st.tuples(st.just("key"), KEYS | TEXTS, JSON),
        st.tuples(st.just("no key"), st.integers(0, 200)),
        st.tuples(st.just("json"), NAMES, JSON),
        st.tuples(st.just("bytes"), NAMES, st.binary(max_size=40)),
        st.tuples(st.just("flip"), NAMES, st.integers(0, 4000), st.integers(0, 255)),
        st.tuples(st.just("cut"), NAMES, st.integers(0, 3000)),
        st.tuples(st.just("header"), st.text(max_size=12), JSON),
        st.tuples(st.just("shard"), st.integers(0, 40), JSON),
        st.tuples(st.just("pipe"), NAMES),
        st.tuples(st.just("folder"), NAMES),
        st.tuples(st.just("link"), NAMES, st.sampled_from([".", "..", "nowhere", "config.json"])),
        st.tuples(st.just("remove"), NAMES),
    )
    return draw(st.lists(kinds, min_size=1, max_size=3))


def dump(value):
    return json.dumps(value, allow_nan=True).encode("utf-8", "surrogatepass")


def read(path):
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def vacate(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)


def change(folder, kind, *values):
    config = folder / "config.json"
    if kind in ("known key", "key", "no key"):
        content = read(config)
        keys = sorted(content) or ["model_type"]
        key = values[0] if kind == "key" else keys[values[0] % len(keys)]
        if kind == "no key":
            content.pop(key, None)
        else:
            content[key] = values[1]
        if config.is_file():
            config.write_bytes(dump(content))
        return
    if kind == "shard":
        index = folder / "model.safetensors.index.json"
        content = read(index)
        shards = content.get("weight_map")
        if isinstance(shards, dict) and shards and index.is_file():
            shards[sorted(shards)[values[0] % len(shards)]] = values[1]
            index.write_bytes(dump(content))
        return
    if kind == "header":
        path = folder / "model.safetensors"
        if path.is_file():
            header = dump({values[0]: values[1]})
            path.write_bytes(struct.pack("<Q", len(header)) + header)
        return
    path = folder / values[0]
    if kind in ("flip", "cut"):
        if path.is_file():
            content = bytearray(path.read_bytes())
            if kind == "cut":
                path.write_bytes(content[: values[1]])
            elif content:
                content[values[1] % len(content)] = values[2]
                path.write_bytes(content)
        return
    if any(part.is_symlink() or part.is_file() for part in (path.parent,)):
        return
    vacate(path)
    if kind == "json":
        path.write_bytes(dump(values[1]))
    elif kind == "bytes":
        path.write_bytes(values[1])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(values[1])


def run(arguments):
    """Exit status and standard error of a command that must end in time."""

    def late(*_):
        raise AssertionError(f"{arguments[0]} was still at work after {MOST} s")

    errors = io.StringIO()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(arguments)
            except SystemExit as end:
                status = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, errors.getvalue()


ENOUGH = 40  # folders, however slow the machine


@pytest.mark.parametrize("budget", [12.0, pytest.param(100.0, marks=pytest.mark.long)])
def test_both_commands_on_folders_of_all_kinds(originals, monkeypatch, budget):
    opened, tried, outcomes = [], [], {}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: opened.append(a))
    start = time.monotonic()

    @settings(
        max_examples=400,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from([*FAMILIES_USED, "shards"]), changes())
    def commands(name, wanted):
        if time.monotonic() - start > budget and len(tried) > ENOUGH:
            return
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            shutil.copytree(originals[name], root / "model")
            for kind, *values in wanted:
                with contextlib.suppress(UnicodeEncodeError):
                    change(root / "model", kind, *values)
            before = snapshot(root)
            for arguments in (
                ("inspect", root / "model"),
                ("dress", root / "model", "--out", root / "out"),
            ):
                status, errors = run([str(part) for part in arguments])
                outcomes[status] = outcomes.get(status, 0) + 1
                assert status in (0, 1, 2), (arguments[0], errors)
                if status == 2:
                    lines = [s for s in errors.splitlines() if s.startswith("quotientopt: error: ")]
                    assert len(lines) == 1, errors
                    assert lines[0].isprintable()
                assert "Traceback" not in errors
                after = snapshot(root)
                written = {path for path in after if path not in before}
                assert all(path.startswith(str(root / "out")) for path in written), written
                assert before.items() <= after.items()
                assert not written or (status == 0 and arguments[0] == "dress")
        tried.append(name)

    commands()
    print(f"{len(tried)} folders, exit statuses {outcomes}")
    assert opened == []
    assert len(tried) > 30
    assert outcomes[0] > 5
    assert outcomes[2] > 20

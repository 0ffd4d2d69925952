"""The commands of docs/command_line.md run, and its options are those of the commands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from quotientopt.cli import build_parser, main
from tests.symmetries.families import FAMILIES
from tests.symmetries.trained import ENCODERS, located

PAGE = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FAMILIES["llama"].model().save_pretrained("MODEL_DIR")
    return tmp_path


def test_commands_run(folder):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [block for block in blocks if block.startswith("quotientopt")]
    assert len(commands) == 3
    shutil.copy(folder / "MODEL_DIR" / "model.safetensors", folder / "weights.safetensors")
    shutil.copy(folder / "MODEL_DIR" / "config.json", folder / "config.json")
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
    for name in ("found.json", "spectra.png", "DRESSED_DIR", "dressed.safetensors"):
        assert (folder / name).exists()


def test_what_inspect_is_shown_to_print(capsys):
    """Line by line, up to the dots that shorten it; but for the model's run, which rounds."""
    model = located(*ENCODERS["minilm"][1:])
    assert main(["inspect", str(model), "--no-verify"]) == 0
    printed = capsys.readouterr().out.replace(str(model), "MODEL_DIR").splitlines()
    (sample,) = re.findall(r"```text\nMODEL_DIR(.*?)```", PAGE, re.DOTALL)
    shown = [line for line in f"MODEL_DIR{sample}".splitlines() if line.strip("… ")]
    assert len(shown) > 15
    for line in shown:
        if not line.startswith("verified in float64: "):
            assert any(own.startswith(line.rstrip("… ")) for own in printed), line


@pytest.mark.parametrize("command", ["inspect", "dress"])
def test_every_option_is_in_its_table(command):
    (subparsers,) = (a for a in build_parser()._actions if a.choices and "dress" in a.choices)
    options = {
        option
        for action in subparsers.choices[command]._actions
        for option in action.option_strings
        if option.startswith("--") and option not in ("--help", "--out")
    }
    section = PAGE.split(f"## {command.capitalize()}")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
    assert listed == options

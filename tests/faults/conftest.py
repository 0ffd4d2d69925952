"""Small checkpoints, and commands that must end in one line."""

import os

import pytest

from quotientopt.cli import main
from tests.symmetries.families import FAMILIES


@pytest.fixture
def source(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    FAMILIES["llama"].model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def snapshot(folder):
    """Everything below a folder: contents of files, targets of links."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(here, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = file.read()
            else:
                found[path] = None
    return found


@pytest.fixture
def refused(capfd):
    """Runs a command that must be refused in one matching line and leave everything as it was."""

    def run(root, *arguments, match):
        before = snapshot(root)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        output, errors = capfd.readouterr()
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("quotientopt: error: ")
        assert "Traceback" not in output + errors
        for part in (match,) if isinstance(match, str) else match:
            assert part in errors
        assert snapshot(root) == before

    return run

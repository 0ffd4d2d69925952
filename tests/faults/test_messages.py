"""What is said where something is missing or wrong, and what type checkers say before."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import torch

import quotientopt as qo
from quotientopt._system import REQUIREMENTS, install_command
from quotientopt.cli import main
from tests.symmetries.families import FAMILIES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = [
    *ROOT.joinpath("quotientopt").rglob("*.py"),
    *ROOT.joinpath("docs").glob("*.md"),
    *ROOT.joinpath("tests").rglob("*.py"),
    *ROOT.glob("*.md"),
]


def test_a_source_tree_that_is_not_installed(tmp_path):
    """No metadata of a distribution: a copy of the package on the path is enough."""
    shutil.copytree(ROOT / "quotientopt", tmp_path / "quotientopt")
    code = (
        "import importlib.metadata as m\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.version = m.distribution = none\n"
        "import sys\n"
        "from quotientopt.cli import main\n"
        "sys.exit(main(['--version']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout == f"quotientopt {qo.__version__}\n", done.stderr


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    place = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert place == "quotientopt._version.__version__"
    # Read without importing anything, as a build does.
    tree = ast.parse((ROOT / "quotientopt" / "_version.py").read_text(encoding="utf-8"))
    values = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert values == [qo.__version__]


def test_hints_name_packages_that_an_index_knows():
    extras = {
        line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines
    }
    assert set(REQUIREMENTS.values()) <= extras
    assert install_command("transformers") == "pip install 'transformers>=5.0'"
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        # The project's own name is on no index.
        assert not re.search(r"pip install ['\"]?quotientopt\b", text), path


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "gemma2"])
def test_advice_on_rotating_the_stream_can_be_followed(tmp_path, capfd, family):
    model = FAMILIES[family].model()
    model.save_pretrained(tmp_path / "model")
    arguments = ["dress", str(tmp_path / "model"), "--residual", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)
    line = capfd.readouterr().err.splitlines()[-1]
    folds = "fold_norms_(model, untie=True)" in line
    assert folds != ("folding cannot make it exact" in line)
    assert "symmetries=" not in line
    assert "residual=True" not in line
    if not folds:
        with pytest.raises(ValueError, match="folding is not available"):
            qo.fold_norms_(model, untie=True)
        return
    qo.fold_norms_(model, untie=True)
    model.save_pretrained(tmp_path / "folded")
    arguments[1] = str(tmp_path / "folded")
    assert main(arguments) == 0


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_every_section_that_is_offered_is_one(tmp_path, capfd, family):
    FAMILIES[family].model().save_pretrained(tmp_path / "model")
    arguments = ["dress", str(tmp_path / "model"), "--overwrite", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*arguments, "--section", "polar"])
    offered = re.findall(r"'(\w+)'", capfd.readouterr().err.partition("choose from")[2])
    assert offered == ["svd", "balanced", "orthonormal", "triangular"]
    for section in offered:
        assert main([*arguments, "--section", section]) == 0


def choices(function, name):
    """The values that a type checker lets through, without None."""
    hint = typing.get_type_hints(function)[name]
    literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part)]
    return {v for part in literals for v in typing.get_args(part) if isinstance(v, str)}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (qo.QuotientAdam, "head_frame"),
        (qo.QuotientAdam, "residual_frame"),
        (qo.QuotientAdam, "lora_frame"),
        (qo.QuotientSGD, "metric"),
    ],
)
def test_types_allow_what_is_taken(make, name):
    """Literals, so that type checkers refuse what the constructor refuses, and nothing else."""
    found = choices(make.__init__, name)
    options = {"lr": 1e-3, "symmetries": ()}
    for value in found:
        make([torch.nn.Parameter(torch.ones(2))], **options, **{name: value})
    with pytest.raises(ValueError, match=name) as refusal:
        make([torch.nn.Parameter(torch.ones(2))], **options, **{name: "foo"})
    assert set(re.findall(r"'([\w-]+)'", str(refusal.value))) - {"foo"} == found


def test_sections_have_a_type():
    found = choices(qo.dress_, "section")
    assert found == {"svd", "balanced", "orthonormal", "triangular", "polar"}


def test_adapters_have_types():
    """Imported on first use, which type checkers take for Any, unless they are told."""
    tree = ast.parse((ROOT / "quotientopt" / "__init__.py").read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.asname for node in guarded for line in node.body for alias in line.names}
    assert names == set(qo.ADAPTERS)


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    folder = Path(__file__).parent
    named, current = 0, ""
    for quoted in re.findall(r"`((?:test_|…)[\w:]*)`", text):
        module, _, function = quoted.partition("::")
        if module.startswith("test_"):
            current = (folder / f"{module}.py").read_text(encoding="utf-8")
        if function:
            assert f"def {function}(" in current, quoted
        named += 1
    assert named > 40

"""Every code block of README, CONTRIBUTING and docs runs as it stands, and so does every example.

The Python blocks of a page run from top to bottom in an interpreter and a folder of their own. A
block that cannot (another language aside) says why in a comment above it, ``<!-- not run: … -->``,
and is listed here.
"""

import ast
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from tests.docs.pages import ROOT, blocks, pages, program

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
EXAMPLES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "examples").glob("*.py")}
# Imported on first use by the package, not by the page.
NEEDED = {"docs/flow.md": ("scipy",), "docs/canonical.md": ("scipy",)}
# Python blocks that do not run, page by page: how many, and all of them say why.
NOT_RUN: dict[str, int] = {"docs/trainers.md": 2, "docs/distributed.md": 1}
# Shell blocks, page by page: how many, and what runs them.
SHELL = {
    "README.md": (3, "installation and tests by .ci/run, the comparison by tests/compare"),
    "CONTRIBUTING.md": (2, "every command is a step of .ci/run, or costs hours"),
    "docs/command_line.md": (3, "tests/checkpoints/test_documentation.py"),
    "docs/compare.md": (3, "options by tests/compare/test_cli.py"),
    "docs/from_adamw.md": (1, "installation, by tests/matrix/run"),
}
SHOWN = ("text",)


def run(code: str, name: str, folder, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program in a fresh interpreter; tracebacks have the lines of the page."""
    (folder / "program").write_text(code, encoding="utf-8")
    start = (
        "import sys; import torch; torch.manual_seed(0); torch.set_num_threads(1); "
        f"exec(compile(open('program', encoding='utf-8').read(), {name!r}, 'exec'))"
    )
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:quotientopt", "-c", start, *arguments],
        cwd=folder,
        env=os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def skip_without(code: str, *more: str) -> None:
    """Skip where a package is missing that the program imports."""
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for name in sorted({name.partition(".")[0] for name in names} | set(more)):
        if find_spec(name) is None:
            pytest.skip(f"needs {name}")


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if program(page)])
def test_a_page_runs_from_top_to_bottom(name, tmp_path):
    code = program(PAGES[name])
    skip_without(code, *NEEDED.get(name, ()))
    done = run(code, name, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    code = EXAMPLES[name].read_text(encoding="utf-8")
    skip_without(code)
    done = run(code, name, tmp_path, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", PAGES)
def test_blocks_that_do_not_run_are_listed(name):
    found = blocks(PAGES[name])
    languages = Counter(block.language for block in found if not block.language.startswith("{"))
    assert set(languages) <= {"python", "bash", *SHOWN}
    assert languages["bash"] == SHELL.get(name, (0, ""))[0]
    assert sum(bool(b.not_run) for b in found if b.language == "python") == NOT_RUN.get(name, 0)


@pytest.mark.parametrize("fault", ["raise ValueError('no')", "undefined", "1 +"])
def test_a_block_that_fails_fails_its_page(fault, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"A page.\n\n```python\nx = 1\n```\n\n```python\nprint(x)\n{fault}\n```\n")
    done = run(program(page), "page.md", tmp_path)
    assert done.returncode == 1
    assert 'File "page.md", line 9' in done.stderr


def test_a_block_with_a_reason_is_left_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a GPU -->\n```python\nboom\n```\n\n```text\nboom\n```\n")
    assert program(page) == ""
    assert [block.not_run for block in blocks(page)] == ["needs a GPU", ""]


def test_the_script_of_the_readme_is_short_and_complete():
    lines = [line for line in program(ROOT / "README.md").splitlines() if line.strip()]
    assert len(lines) <= 20
    assert any("QuotientAdam" in line for line in lines)

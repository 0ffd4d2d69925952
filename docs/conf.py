"""Settings of Sphinx. The source folder is the repository, so that pages link to it as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from quotientopt import __version__  # noqa: E402 -- the tree's own, installed or not

project = "quotientopt"
author = "The quotientopt maintainers"
version = release = __version__
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# With `docs/build --online` names of Python, torch and geoopt in signatures become links: their
# sites are asked for what they document. The ordinary build needs no network.
if tags.has("online"):  # type: ignore[name-defined]  # noqa: F821 -- Sphinx puts it here
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "geoopt": ("https://geoopt.readthedocs.io/en/latest", None),
    }
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "examples/README.md",
    "benchmarks/README.md",
    "benchmarks/results/**/*.md",
]
exclude_patterns = ["benchmarks/results/**/notes.md"]  # part of the report beside each
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
highlight_language = "text"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"quotientopt {version}"
html_extra_path = ["site/index.html"]
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
templates_path: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases: dict[str, str] = {}
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
copybutton_exclude = ".linenos, .gp, .go"

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[\w./-]+)\)")
SHAPES = re.compile(r"(?<![\\*\w])\*(?=batch)")


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are read in a terminal: |x| is an absolute value there, (*batch, N, d) a shape."""
    for number, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [SHAPES.sub(r"\*", part.replace("|", r"\|")) for part in parts[::2]]
        lines[number] = "``".join(parts)


def visit_math(writer: Any, node: nodes.math) -> None:
    """Formulas as MathML, made here: browsers draw it without a script or a font of ours."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(writer: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    writer.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def without_folders(app: Any, docname: str, source: list[str]) -> None:
    """Links to folders of the repository become links to their README, or their names."""
    here = (Path(app.srcdir) / docname).parent

    def rewrite(match: re.Match[str]) -> str:
        folder = here / match["target"]
        if not folder.is_dir():
            return match[0]
        readme = Path(match["target"]) / "README.md"
        return f"[{match['text']}]({readme})" if (here / readme).exists() else match["text"]

    source[0] = LINK.sub(rewrite, source[0])


def setup(app: Any) -> dict[str, bool]:
    """Register what is above."""
    app.connect("source-read", without_folders)
    app.connect("autodoc-process-docstring", escape)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None)
    )
    return {"parallel_read_safe": True}

"""The code blocks of a page, and the program that its Python blocks make together."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<comment><!--(?P<words>[^>]*)-->\n+)?(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN = "not run:"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of the page where its code starts, its code."""

    language: str
    line: int
    code: str
    not_run: str  # the reason that the comment above it gives, or nothing


def pages() -> list[Path]:
    """Everything that is written for a reader and may hold code."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(page for page in pages if page.exists())


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        words = (match["words"] or "").strip()
        reason = words.removeprefix(NOT_RUN).strip() if words.startswith(NOT_RUN) else ""
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], line, match["code"], reason))
    return found


def program(page: Path) -> str:
    """The Python blocks of a page as one program, every line on its line of the page."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and not block.not_run:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.code.splitlines()
    return "\n".join(lines) + "\n" if lines else ""

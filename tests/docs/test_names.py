"""What pages name exists: functions, files, links, pictures, and what the version is."""

import re
import tomllib
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter

import pytest

import quotientopt as qo
from tests.docs.pages import ROOT, pages

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
RESULTS = ROOT / "benchmarks" / "results"
OPTIONAL = ("geoopt", "peft", "pymanopt")


def prose(page) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def resolve(dotted: str):
    """The object of a name that starts with qo."""
    names = dotted.split(".")[1:]
    if names[0] in OPTIONAL and find_spec(names[0]) is None:
        pytest.skip(f"needs {names[0]}")
    thing = qo
    for name in names:
        if not hasattr(thing, name):
            import_module(f"{thing.__name__}.{name}")
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("name", PAGES)
def test_names_on_a_page_exist(name):
    text = prose(PAGES[name])
    for dotted in set(re.findall(r"`(qo(?:\.\w+)+)", text)):
        resolve(dotted)
    for path in set(
        re.findall(r"`((?:tests|benchmarks|quotientopt|docs|examples)/[\w./-]*)`", text)
    ):
        assert (ROOT / path).exists(), path


def module_of(length, parts):
    """The module of a name's first parts; a function of its package may have its name."""
    try:
        return import_module(".".join(parts[:length]))
    except ModuleNotFoundError:
        return None


def test_names_in_docstrings_exist():
    """Modules, classes and functions that the package's own files name in full."""
    found = set()
    for folder in ("quotientopt", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            roles = re.findall(r":(?:mod|func|class|meth):`~?quotientopt((?:\.\w+)+)`", text)
            found |= {(path.relative_to(ROOT).as_posix(), name) for name in roles}
    assert len(found) > 50
    missing = []
    for path, name in sorted(found):
        parts = f"quotientopt{name}".split(".")
        found_modules = (module_of(length, parts) for length in range(len(parts), 0, -1))
        module = next(module for module in found_modules if module is not None)
        try:
            attrgetter(".".join(parts[module.__name__.count(".") + 1 :]) or "__name__")(module)
        except AttributeError:
            missing.append((path, name))
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name):
    page = PAGES[name]
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def anchors(page) -> set[str]:
    """Names of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


def test_every_page_is_in_the_index():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "index.md":
            assert f"({page.name})" in text, page.name
            assert f"\n{page.stem}\n" in text, page.name


def test_every_picture_is_shown_and_every_record_is_listed():
    files = [*PAGES.values(), *RESULTS.rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    shown = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for picture in [*RESULTS.rglob("*.png"), *(ROOT / "docs" / "figures").glob("*.png")]:
        inside = "/".join(picture.parts[-2:])
        assert f"{inside})" in shown or f"]({picture.name})" in shown, inside
    evidence = PAGES["docs/evidence.md"].read_text(encoding="utf-8")
    for folder in RESULTS.iterdir():
        if folder.suffix != ".png":
            assert f"results/{folder.name}" in evidence, folder.name


def test_one_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {qo.__version__}\n" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "tests" / "matrix" / "versions.txt").read_text(encoding="utf-8").splitlines()
    tested = [line.split() for line in lines if not line.startswith("#")]
    classifiers = "Programming Language :: Python :: "
    claimed = {c.removeprefix(classifiers) for c in project["classifiers"] if classifiers in c}
    assert claimed - {"3"} == {line[0] for line in tested}
    extras = project["optional-dependencies"]
    oldest = [*project["dependencies"], *extras["transformers"], *extras["peft"]]
    for requirement in oldest:
        name, _, version = requirement.partition(">=")
        pinned = [p for line in tested for p in line if p.startswith(f"{name}=={version}")]
        assert pinned, f"the oldest {name} that is claimed, {version}, is tested nowhere"


def test_what_does_not_exist_is_noticed(tmp_path):
    with pytest.raises(ModuleNotFoundError):
        resolve("qo.no_such_function")
    page = tmp_path / "page.md"
    page.write_text("# A heading, with signs!\n\n```text\n# none\n```\n")
    assert anchors(page) == {"a-heading-with-signs"}
    links = sum(len(re.findall(r"\]\((?!http)", prose(page))) for page in PAGES.values())
    assert links > 150

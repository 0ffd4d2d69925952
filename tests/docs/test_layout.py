"""How the package is laid out: which folder imports which, and that a name means one thing."""

import ast
from collections import defaultdict

import quotientopt as qo
from tests.docs.pages import ROOT

PACKAGE = ROOT / "quotientopt"
# Each may import those before it (CONTRIBUTING.md has them with what they are for).
ORDER = (
    *("_version", "_system", "_linalg", "groups", "sections", "manifolds", "symmetries", "models"),
    *("optim", "canonical", "checks", "flow", "nn", "peft", "checkpoints", "geoopt", "pymanopt"),
    *("integrations", "compare", "cli", "report", "__main__"),
)
# The same manifolds for other solvers, under the same names.
ADAPTERS = ("geoopt", "pymanopt")


def parts_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


def imports_of(tree):
    """What a file imports from the package, but for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quotientopt."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if "quotientopt." in a.name)
        else:
            yield from imports_of(node)


def test_folders_import_those_before_them():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        own = parts_of(path)[0]
        if own == "__init__":
            continue
        for other in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            seen.add((own, other))
            assert ORDER.index(other) <= ORDER.index(own), (path, other)
    assert {("optim", "manifolds"), ("optim", "symmetries"), ("cli", "compare")} <= seen
    assert {parts_of(path)[0] for path in PACKAGE.rglob("*.py")} == {*ORDER, "__init__"}


def test_no_two_classes_have_one_name():
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        parts = parts_of(path)
        if parts[0] in ADAPTERS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].add(".".join(parts))
    assert len(found) > 200
    assert "optim.quotient_adam" in found["QuotientAdam"]
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_files_of_the_optimizers_are_short():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in (PACKAGE / "optim").rglob("*.py")
    }
    assert qo.QuotientAdam.__module__ == "quotientopt.optim.quotient_adam"
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)

"""The packages import each other in one direction: what one of them needs from another never needs it back."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import modeling_bwr_dnc

ROOT = Path(modeling_bwr_dnc.__file__).parent
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            here = ["modeling_bwr_dnc", *path.relative_to(ROOT).parent.parts]
            base = here[: len(here) + 1 - node.level] if node.level else []
            full = [*base, *(node.module or "").split("."), *(name.name for name in node.names)]
            found |= PACKAGES.intersection(full[1:2] if full[0] == "modeling_bwr_dnc" else [])
    return found


def test_packages_import_each_other_in_one_direction():
    graph = {
        package: {name for path in (ROOT / package).rglob("*.py") for name in imported_packages(path)} - {package}
        for package in PACKAGES
    }
    assert {"training", "tasks", "retrofit"} < PACKAGES and graph["training"] >= {"tasks", "evaluation"}
    TopologicalSorter(graph).prepare()

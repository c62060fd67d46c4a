"""The house: imports point down only, no script imports another, and each library that is imported is pinned."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # from the ground up; a module may import its own room and what lies on a lower floor
    ("distill.files",),
    ("distill.hardware", "distill.run_record"),
    ("distill.model",),
    ("common",),
    ("distill.tasks",),
    ("distill.evaluate", "distill.calibrate"),
    ("distill.report", "distill.train", "distill.serve", "distill.export"),
    tuple(p.stem for p in ROOT.glob("*.py") if p.stem != "common"),
]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("distill/**/*.py")])


def place(module):
    """(floor, room) of a module of the project, or None."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return floor, room
    return None


def imported(path):
    """Names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(path):
    """The imports of a file that do not point down, as text."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "distill":
        return []
    floor, room = place(module)
    found = []
    for line, name in imported(path):
        there = place(name)
        if there and name != module and there[0] >= floor and there[1] != room:
            found.append(f"{path.relative_to(ROOT)}:{line}: {module} (floor {floor}) imports {name} (floor {there[0]})")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    assert upward(path) == []


def test_every_module_has_its_place():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES]
    assert [m for m in modules if m != "distill" and place(m) is None] == []


@pytest.mark.parametrize(
    "code", ["from infer_idp import generate", "import common", "def f():\n    from distill.train import ema"]
)
def test_an_import_that_points_up_is_found(tmp_path, monkeypatch, code):
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    (tmp_path / "distill" / "model").mkdir(parents=True)
    path = tmp_path / "distill" / "model" / "hub.py"
    path.write_text(code)
    assert len(upward(path)) >= 1


@pytest.mark.parametrize(("pattern", "most"), [("*.py", 330), ("distill/**/*.py", 400)])
def test_no_file_is_too_long_to_be_read(pattern, most):
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in ROOT.glob(pattern)}
    lengths.pop(Path("common.py"), None)
    assert {path: n for path, n in lengths.items() if n > most} == {}


def test_common_stays_small():
    assert len((ROOT / "common.py").read_text().splitlines()) < 500


def test_every_library_that_is_imported_is_pinned():
    text = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    lines = [line for line in text.splitlines() if not line.startswith(("#", "-r"))]
    pinned = {re.sub("[-_.]+", "-", line.partition("==")[0].partition("[")[0]).lower() for line in lines}
    assert [line for line in lines if not re.fullmatch(r"[\w-]+(\[[\w,-]+\])?==[\w.]+", line)] == []
    files = [*FILES, *ROOT.glob("tests/*.py")]
    names = {name.partition(".")[0] for path in files for _, name in imported(path)}
    own = {"distill", *(path.stem for path in files)}
    distributions = packages_distributions()
    unpinned = {
        name: distributions.get(name, [name])
        for name in names - own - set(sys.stdlib_module_names)
        if not pinned & {re.sub("[-_.]+", "-", found).lower() for found in distributions.get(name, [name])}
    }
    assert len(names) > 20 and unpinned == {}

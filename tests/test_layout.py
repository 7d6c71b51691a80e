"""The package's layout: imports point down, files and functions are short, and what has an underscore stays at home."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {str(file.relative_to(ROOT / "diffpeft")): file for file in sorted((ROOT / "diffpeft").rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}

LOWER = {
    "sparse": set(),
    "gates": {"sparse"},
    "files": {"sparse"},
    "config": {"files"},
    "layer": {"config", "gates", "files", "sparse"},
    "tuner": {"layer", "config", "gates", "files", "sparse"},
    "model": {"tuner", "layer", "config", "gates", "files", "sparse"},
    "trainer": {"model", "gates", "files", "sparse"},
    "tools": {"model", "tuner", "layer", "config", "files", "sparse"},
}
"""What each top-level entry may import beside itself; the package's `__init__` may import all."""
MAX_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL, MAX_FLOORS = 300, 60, 6, 12

ALLOWED_IMPORTS: set[str] = set()
ALLOWED_LONG_FILES: set[str] = set()
ALLOWED_FUNCTIONS: set[str] = set()
ALLOWED_UNDERSCORES: set[str] = set()
ALLOWED_FLOORS = MAX_FLOORS


def entry(name):
    """The top-level entry that a file belongs to."""
    return name.partition("/")[0].removesuffix(".py")


@cache
def imports(name):
    """(file, imported name or "") of each import of one's own package, wherever in the file it stands."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            pairs = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            pairs = [(f"{node.module}.{alias.name}", alias.name) for alias in node.names]
        else:
            continue
        for path, attribute in pairs:
            parts = path.split(".")
            if parts[0] == "diffpeft":
                file = _file(parts[1:]) or _file(parts[1:-1])
                found.add((file, attribute if _file(parts[1:]) is None else ""))
    return found


def _file(parts):
    return next(
        (f for f in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"]).lstrip("/")) if f in FILES), None
    )


def test_imports_point_down():
    wrong = set()
    for name in FILES:
        for file, attribute in imports(name):
            if name != "__init__.py" and entry(file) not in {*LOWER.get(entry(name), ()), entry(name)}:
                wrong.add(f"{name} imports {file}")
            if attribute and file.endswith("__init__.py"):
                wrong.add(f"{name} imports {attribute} through {file}")
    assert wrong == ALLOWED_IMPORTS


def test_files_are_at_most_so_many_floors_above_torch():
    below = {name: {file for file, _ in imports(name)} - {name} for name in FILES}
    floors: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():  # raises CycleError
        floors[name] = 1 + max((floors[file] for file in below[name]), default=0)
    assert max(floors.values()) <= ALLOWED_FLOORS


def test_the_top_is_no_longer_than_the_table():
    entries = {entry(name) for name in FILES} - {"__init__"}
    assert entries - ALLOWED_IMPORTS <= LOWER.keys()


def test_files_are_short():
    assert {
        name for name, file in FILES.items() if len(file.read_text().splitlines()) > MAX_LINES
    } == ALLOWED_LONG_FILES


def test_functions_are_short_and_take_few_positional_arguments():
    wrong = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                too_long = node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
                if (
                    too_long
                    or len([argument for argument in given if argument not in ("self", "cls")]) > MAX_POSITIONAL
                ):
                    wrong.add(f"{name}:{node.name}")
    assert wrong == ALLOWED_FUNCTIONS


def test_underscores_stay_at_home():
    """A module with an underscore is used in its folder alone, a name with one in the file that defines it."""
    wrong, defined, used = set(), {}, {}
    for name, tree in TREES.items():
        for file, attribute in imports(name):
            outside = Path(file).name.startswith("_") and not file.endswith("__init__.py")
            if (outside and Path(file).parent != Path(name).parent) or _private(attribute):
                wrong.add(f"{name}:{attribute or file}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _private(node.attr):
                stored = isinstance(node.ctx, ast.Store)
                (defined if stored else used).setdefault(node.attr, set()).add(name)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef) and _private(node.name):
                defined.setdefault(node.name, set()).add(name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and _private(node.id):
                defined.setdefault(node.id, set()).add(name)
    wrong |= {f"{name}:{word}" for word, homes in defined.items() for name in used.get(word, set()) - homes}
    assert wrong == ALLOWED_UNDERSCORES


def _private(name):
    return name.startswith("_") and not name.startswith("__")

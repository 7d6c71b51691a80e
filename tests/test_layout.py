"""The package's layout: imports point down, files and functions are short, underscored names stay in their file."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "diffpeft"
SOURCES = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

LOWER = {
    "sparse": [],
    "gates": ["sparse"],
    "files": ["sparse"],
    "config": ["files"],
    "layer": ["config", "gates", "files", "sparse"],
    "tuner": ["layer", "config", "gates", "files", "sparse"],
    "model": ["tuner", "layer", "config", "gates", "files", "sparse"],
    "trainer": ["model", "tuner", "gates", "files", "sparse"],
    "tools": ["model", "tuner", "layer", "config", "files", "sparse"],
}
"""What each entry at the top may import beside itself; the package's `__init__` may import all."""
FOREIGN = {"_active_adapter", "_buffers", "_disable_adapters", "_parameters"}
"""Attributes of torch's and PEFT's classes that classes of ours set too."""
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL, MAX_FLOORS = 300, 60, 6, 12


def imported(name):
    """(file, imported name, or "" for a module) of each import of our own, wherever it stands in a file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for path in (f"{start}{alias.name}".split(".") for alias in node.names):
                if path[0] == "diffpeft":
                    module = file_of(path[1:])
                    yield (module, "") if module else (file_of(path[1:-1]), path[-1])


def file_of(path):
    return next((f for f in ("/".join(path) + ".py", "/".join([*path, "__init__.py"])) if f in SOURCES), None)


def test_imports_point_down():
    wrong = set()
    for name in SOURCES:
        entry = name.split("/")[0].removesuffix(".py")
        for file, attribute in imported(name):
            below = file.split("/")[0].removesuffix(".py")
            if name != "__init__.py" and below not in [entry, *LOWER.get(entry, [])]:
                wrong.add(f"{name} imports {file}")
            if attribute and Path(file).name == "__init__.py":
                wrong.add(f"{name} imports {attribute} through {file}")
    assert sorted(wrong) == []
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert entries - LOWER.keys() - {"__init__", "__pycache__", "py.typed"} == set()


def test_no_file_is_above_too_many_floors():
    below = {name: {file for file, _ in imported(name)} - {name} for name in SOURCES}
    floors = {}
    for name in TopologicalSorter(below).static_order():  # a circle raises
        floors[name] = 1 + max((floors[file] for file in below[name]), default=0)
    assert max(floors.values()) <= MAX_FLOORS


def test_files_and_functions_are_short():
    wrong = {name for name, source in SOURCES.items() if len(source.splitlines()) > MAX_FILE_LINES}
    for name, tree in TREES.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            given = {one.arg for one in node.args.posonlyargs + node.args.args} - {"self", "cls", "ctx"}
            if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES or len(given) > MAX_POSITIONAL:
                wrong.add(f"{name}:{node.name}")
    assert sorted(wrong) == []


def test_underscored_names_stay_in_their_file_and_modules_in_their_folder():
    members, used, wrong = {}, {}, set()
    for name, tree in TREES.items():
        for file, attribute in imported(name):
            if is_private(attribute) or (is_private(Path(file).name) and Path(file).parent != Path(name).parent):
                wrong.add(f"{name}:{attribute or file}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for one in node.body:
                    fields = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", one)]
                    for field in fields:
                        members.setdefault(getattr(field, "id", getattr(field, "name", "")), set()).add(name)
            elif isinstance(node, ast.Attribute):
                own = isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
                (members if own else used).setdefault(node.attr, set()).add(name)
    for word in filter(is_private, members.keys() - FOREIGN):
        wrong |= {f"{name}:{word}" for name in used.get(word, set()) - members[word]}
    assert sorted(wrong) == []


def is_private(name):
    return name.startswith("_") and not name.startswith("__")

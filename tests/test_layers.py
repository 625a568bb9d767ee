"""The layers: each module imports only from those below it, and each rule of the house that a parser can check."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdjax"

# From the ground up: each package imports only from those before it. "kdjax" is `kdjax/__init__.py`.
LAYERS = (
    "types",
    "cli",
    "losses",
    "parallel",
    "config",
    "distributed",
    "data",
    "model",
    "training",
    "checkpoint",
    "convert",
    "cache",
    "plan",
    "launch",
    "train",
    "kdjax",
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def unit(name: str) -> str:
    """The entry of the table that a module belongs to."""
    return [*name.split("."), "kdjax"][1]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in NAMES else module) for name in names)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_from_below(path: Path) -> None:
    here = unit(module_name(path))
    for line, name in imports(path):
        if not name.startswith("kdjax") or unit(name) == here:
            continue
        there = unit(name)
        assert LAYERS.index(there) < LAYERS.index(here), f"{path}:{line}: {here} imports {there}, which is above it"


def test_every_entry_of_the_table_exists() -> None:
    assert {unit(module_name(path)) for path in MODULES} == set(LAYERS)


def test_no_package_imports_itself_in_a_circle() -> None:
    graph = {module_name(path): {name for _, name in imports(path)} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for below in sorted(graph[name] & graph.keys()):
                visit(below, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_axis_names_are_written_in_one_module() -> None:
    """No other module spells an axis's name. "data" is a config group too, so it counts only where an axis is meant."""
    found = []
    for path in MODULES:
        if module_name(path) == "kdjax.parallel.axes":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ("pipe", "fsdp", "tensor"):
                found.append(f"{path}:{node.lineno} {node.value}")
            means_axis = (isinstance(node, ast.Subscript) and "shape" in ast.unparse(node.value)) or (
                isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("P", "psum", "all_gather")
            )
            if means_axis and '"data"' in ast.unparse(node).replace("'", '"'):
                found.append(f"{path}:{node.lineno} data")
    assert found == []


def test_the_config_dict_ends_in_config() -> None:
    users = {module_name(path) for path in MODULES for _, name in imports(path) if name.startswith("ml_collections")}
    assert users == {"kdjax.config.build"}


def test_recipes_import_ml_collections_pathlib_and_each_other_only() -> None:
    recipes = sorted((ROOT / "configs").glob("*.py"))
    allowed = {"ml_collections", "pathlib", *(path.stem for path in recipes)}
    for path in recipes:
        assert {name.split(".")[0] for _, name in imports(path)} <= allowed, path
        assert len(path.read_text().splitlines()) < 100, path


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / "scripts").glob("*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    """About 400 lines a file, about 75 a function; every module says what it is."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    assert len(path.read_text().splitlines()) <= 400, path
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 80, f"{path}:{node.lineno} {node.name}"

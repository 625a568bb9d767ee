"""The layers: each module imports only from those below it, and each rule of the house that a parser can check."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdjax"

LAYERS = {
    "kdjax": 0,
    "kdjax.types": 0,
    "kdjax.config": 0,
    "kdjax.validate": 0,
    "kdjax.mesh": 1,
    "kdjax.losses": 1,
    "kdjax.data": 1,
    "kdjax.optim": 1,
    "kdjax.metrics": 1,
    "kdjax.flops": 1,
    "kdjax.hlo": 1,
    "kdjax.targets": 1,
    "kdjax.leaves": 1,
    "kdjax.processes": 1,
    "kdjax.rollcall": 1,
    "kdjax.watchdog": 1,
    "kdjax.xla_flags": 1,
    "kdjax.model": 2,
    "kdjax.pipeline": 2,
    "kdjax.step": 3,
    "kdjax.checkpoint": 3,
    "kdjax.rundir": 3,
    "kdjax.estimate": 4,
    "kdjax.plan_search": 4,
    "kdjax.plan_picture": 4,
    "kdjax.cli": 4,
    "kdjax.preamble": 4,
    "kdjax.convert": 4,
    "kdjax.launch": 5,
    "kdjax.train": 5,
    "kdjax.plan": 5,
}
# Within a layer, who may import whom; a subpackage may always import itself.
SIDEWAYS = {
    "kdjax.config": {"kdjax.types"},
    "kdjax.validate": {"kdjax.config", "kdjax.types"},
    "kdjax.processes": {"kdjax.rollcall", "kdjax.watchdog"},
    "kdjax.checkpoint": {"kdjax.step"},
    "kdjax.convert": {"kdjax.cli"},
    "kdjax.preamble": {"kdjax.estimate"},
    "kdjax.plan_search": {"kdjax.estimate"},
    "kdjax.plan_picture": {"kdjax.estimate"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(name: str) -> str:
    """The entry of the table that a module belongs to: itself, or the subpackage it lies in."""
    parts = name.split(".")
    return ".".join(parts[:2])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "kdjax":
                yield from ((node.lineno, f"kdjax.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_from_below(path: Path) -> None:
    here = unit(module_name(path))
    assert here in LAYERS, f"{here} has no layer"
    for line, name in imports(path):
        if not name.startswith("kdjax") or unit(name) == here:
            continue
        there = unit(name)
        allowed = LAYERS[there] < LAYERS[here] or there in SIDEWAYS.get(here, set())
        assert allowed, f"{path}:{line}: {here} (layer {LAYERS[here]}) imports {there} (layer {LAYERS[there]})"


def test_every_entry_of_the_table_exists() -> None:
    assert {unit(module_name(path)) for path in MODULES} == set(LAYERS)


def test_axis_names_occur_in_the_mesh_only() -> None:
    axes = {"pipe", "data", "fsdp", "tensor"}
    found = [
        f"{path}:{call.lineno}"
        for path in MODULES
        if path.name != "mesh.py"
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and getattr(call.func, "attr", getattr(call.func, "id", "")) in ("P", "PartitionSpec", "psum", "all_gather")
        and any(isinstance(arg, ast.Constant) and arg.value in axes for arg in ast.walk(call))
    ]
    assert found == []


def test_the_config_dict_ends_in_config() -> None:
    users = {module_name(path) for path in MODULES for _, name in imports(path) if name.startswith("ml_collections")}
    assert users == {"kdjax.config"}


def test_configs_import_ml_collections_and_the_standard_library_only() -> None:
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for _, name in imports(path)} <= {"ml_collections", "pathlib"}, path
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

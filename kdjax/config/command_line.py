"""The command line of a configuration: `--config RECIPE --config.group.key=value`."""

import argparse
import contextlib
import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kdjax.config.build import build
from kdjax.config.schema import GROUPS, KNOBS, TYPES, Config
from kdjax.types import UserError


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Callable[[], Config]]:
    """Adds `--config` and one argument per knob, then parses.

    Returns the arguments and a function that reads the configuration. Both raise UserError for a mistake.
    """
    parser.usage = f"{parser.prog} --config RECIPE [--config.GROUP.KEY=VALUE ...] [options]"
    parser.allow_abbrev = False
    parser.error = _fail  # type: ignore[method-assign]  # argparse would print its usage and exit
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        required=True,
        help=f"a Python file whose get_config() returns a ConfigDict, or a shipped recipe: {', '.join(recipes())}",
    )
    for group, cls in GROUPS.items():
        arguments = parser.add_argument_group(f"knobs of {group}", cls.__doc__)
        for field in dataclasses.fields(cls):
            dotted = f"{group}.{field.name}"
            arguments.add_argument(
                f"--config.{dotted}", metavar=_type_name(dotted), default=argparse.SUPPRESS, help=_help(dotted)
            )
    parsed, rest = parser.parse_known_args(argv)
    overrides = {key.removeprefix("config."): value for key, value in vars(parsed).items() if key.startswith("config.")}
    for word in rest:
        if not word.startswith("--config."):
            raise UserError(f"unknown argument {word!r}; --help lists them")
        overrides |= {word.removeprefix("--config.").partition("=")[0]: ""}  # which `build` refuses
    return parsed, lambda: build(load(Path(parsed.config)), overrides)


def _fail(message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the arguments")


def _type_name(dotted: str) -> str:
    """Returns how --help names the knob's type, such as INT, FLOAT or PATHS."""
    if KNOBS[dotted].choices:
        return "NAME"
    kinds = [kind for kind in typing.get_args(TYPES[dotted]) or (TYPES[dotted],) if kind is not type(None)]
    names = {tuple[str, ...]: "PATHS", tuple[int, ...]: "INTS", tuple[float, ...]: "FLOATS", str: "TEXT"}
    return names.get(kinds[0]) or kinds[0].__name__.upper()


def _help(dotted: str) -> str:
    """Returns the knob's meaning, choices or range, and default."""
    knob, default = KNOBS[dotted], Config()[dotted]
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", knob.above), (">=", knob.low), ("<=", knob.high), ("<", knob.below))
        if bound is not None
    ]
    allowed = f"; one of {', '.join(knob.choices)}" if knob.choices else f"; {' and '.join(bounds)}" if bounds else ""
    return f"{knob.meaning}{allowed} (default: {'empty' if default == () else default})".replace("%", "%%")


def recipes() -> dict[str, Path]:
    """Returns the shipped recipes' files by name. A wheel has them inside the package, a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "configs", package.parent / "configs"
    directory = inside if inside.is_dir() else beside
    return {path.stem: path for path in sorted(directory.glob("*.py"))}


def load(path: Path) -> Mapping[str, Any]:
    """Returns what a recipe's `get_config()` returns; `path` is a Python file or the name of a shipped recipe.

    The recipe may import other recipes by name: those in its own directory, and the shipped ones.
    """
    shipped = recipes()
    file = shipped.get(str(path), path)
    if not file.is_file():
        remedy = f"write --config {path.stem}" if path.stem in shipped else f"choose from {', '.join(shipped)}"
        raise UserError(f"--config {path}: there is no such file; for a shipped recipe {remedy}")
    spec = importlib.util.spec_from_file_location(f"kdjax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    with _importable(file.resolve().parent, *{recipe.parent for recipe in shipped.values()}):
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config {path}: it defines no get_config()")
        return module.get_config()


@contextlib.contextmanager
def _importable(*directories: Path) -> Iterator[None]:
    """Makes the modules in these directories importable, then forgets them: names may recur in other directories."""
    added, before = [str(directory) for directory in directories], set(sys.modules)
    sys.path[:0] = added
    try:
        yield
    finally:
        for directory in added:
            sys.path.remove(directory)
        for name in sys.modules.keys() - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent in directories:
                del sys.modules[name]

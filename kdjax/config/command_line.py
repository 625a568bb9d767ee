"""Reads `--config FILE --config.group.key=value`."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.config.schema import Config, build, describe
from kdjax.types import UserError


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Callable[[], Config]]:
    """The arguments, and what reads the configuration of `--config FILE` with its `--config.group.key=value`."""
    parser.add_argument(
        "--config",
        metavar="FILE.py",
        required=True,
        help="Python file whose get_config() returns a ConfigDict",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.epilog = "any knob of the configuration, with its default:\n\n" + "\n".join(describe()).replace("%", "%%")
    arguments, rest = parser.parse_known_args(argv)
    return arguments, lambda: build(load(Path(arguments.config)), overrides(rest))


def overrides(words: Sequence[str]) -> dict[str, str]:
    """`--config.a.b=v` and `--config.a.b v` as {"a.b": "v"}. Raises UserError for any other word."""
    found: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--config."):
            raise UserError(f"unknown argument {word!r}; --help lists them")
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            if not queue:
                raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
            value = queue.pop(0)
        found[key] = value
    return found


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

"""Reads `--config FILE --config.group.key=value`."""

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
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


def load(path: Path) -> Mapping[str, Any]:
    """What the file's `get_config()` returns."""
    if not path.is_file():
        raise UserError(f"--config {path}: there is no such file; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location(f"kdjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {path}: it defines no get_config()")
    return module.get_config()

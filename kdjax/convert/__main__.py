"""`python -m kdjax.convert COMMAND ...`: converts checkpoints. Each command is a module with its own --help.

A command's module has `add_arguments(parser)` and `run(arguments)`, which may return an exit code. The module's
docstring is the command's help.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from kdjax import cli

COMMANDS = {
    "from-megatron": "kdjax.convert.from_megatron",
    "to-megatron": "kdjax.convert.to_megatron",
    "from-hf": "kdjax.convert.from_hf",
    "to-hf": "kdjax.convert.to_hf",
    "from-gguf": "kdjax.convert.from_gguf",
    "verify": "kdjax.convert.verify",
    "inspect": "kdjax.convert.inspect_model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.convert",
        description="Convert checkpoints to and from kdjax, verify and inspect them. Each command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text.replace("%", "%%"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, computes=name == "verify")
    arguments = parser.parse_args(argv)
    if not arguments.computes:
        cli.stay_on_host()
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))

"""`kdjax cache COMMAND ...`: makes, imports, checks and describes caches of teacher targets.

A command's module has `add_arguments(parser)` and `run(arguments)`, which may return an exit code. The module's
docstring is the command's help.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from kdjax import cli

COMMANDS = {
    "build": "kdjax.cache.build",
    "import": "kdjax.cache.import_records",
    "export": "kdjax.cache.export_records",
    "info": "kdjax.cache.info",
    "verify": "kdjax.cache.verify",
    "merge": "kdjax.cache.merge",
    "split": "kdjax.cache.split",
}
COMPUTE = ("build", "verify")  # these run a model; the others leave accelerators alone


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser(
        prog="kdjax cache",
        description="Make, import, check and describe caches of teacher targets. Each command has its own --help.",
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
        command.set_defaults(run=module.run, computes=name in COMPUTE)
    arguments = parser.parse_args(argv)
    if not arguments.computes:
        cli.stay_on_host()
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))

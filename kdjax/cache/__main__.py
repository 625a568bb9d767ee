"""`kdjax cache COMMAND ...`: makes, imports, checks and describes caches of teacher targets.

A command's module has `add_arguments(parser)` and `run(arguments)`, which may return an exit code. The module's
docstring is the command's help.
"""

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
    return cli.run_subcommand(
        COMMANDS,
        COMPUTE,
        argv,
        prog="kdjax cache",
        description="Make, import, check and describe caches of teacher targets. Each command has its own --help.",
    )


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))

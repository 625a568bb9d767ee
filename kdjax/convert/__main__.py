"""`python -m kdjax.convert COMMAND ...`: converts checkpoints. Each command is a module with its own --help.

A command's module has `add_arguments(parser)` and `run(arguments)`, which may return an exit code. The module's
docstring is the command's help.
"""

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
COMPUTE = ("verify",)  # this runs a model; the others leave accelerators alone


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Raises UserError for the user's mistakes."""
    return cli.run_subcommand(
        COMMANDS,
        COMPUTE,
        argv,
        prog="python -m kdjax.convert",
        description="Convert checkpoints to and from kdjax, verify and inspect them. Each command has its own --help.",
    )


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))

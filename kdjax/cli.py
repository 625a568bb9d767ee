"""What the commands share: ending on a user's mistake, staying on the host."""

import logging
import sys
from collections.abc import Callable

import jax

from kdjax.types import UserError


def stay_on_host() -> None:
    """For commands that compute nothing: looks for no accelerator and takes none. Before anything of JAX runs."""
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # JAX makes its options at run time
        jax.config.update("jax_platforms", "cpu")


def run(main: Callable[[], int]) -> None:
    """Exits with main's code; on a user's mistake prints it, without a traceback, and exits with 2."""
    # By force: some libraries set logging up when they are imported, and theirs would stay.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("kdjax").setLevel(logging.INFO)
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)

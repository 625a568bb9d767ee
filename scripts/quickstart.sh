#!/usr/bin/env bash
# Sets up .venv, then distils a small student on the bundled teacher logits. Passes its arguments on to kdjax.train.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/setup.sh")
# The tests install JAX's CUDA plugin, which prints long warnings on a machine without an NVIDIA GPU unless told not to run.
[[ -e /dev/nvidiactl ]] || export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "$python" -m kdjax.train --config quickstart --workdir "$root/runs/quickstart" "$@"

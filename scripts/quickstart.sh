#!/usr/bin/env bash
# Sets up, then distils a small student on the bundled teacher logits. Arguments go on to kdjax.train.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/setup.sh")
# Without this, the CUDA plugin that the tests install complains at length where there is no NVIDIA GPU.
[[ -e /dev/nvidiactl ]] || export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "$python" -m kdjax.train --config "$root/configs/quickstart.py" --workdir "$root/runs/quickstart" "$@"

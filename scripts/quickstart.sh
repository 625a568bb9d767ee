#!/usr/bin/env bash
# Sets up, then distils a small student on the bundled teacher logits. Arguments go on to kdjax.train.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/setup.sh")
exec "$python" -m kdjax.train --config "$here/../configs/quickstart.py" --workdir "$here/../runs/quickstart" "$@"

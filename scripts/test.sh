#!/usr/bin/env bash
# Sets up .venv, then runs every check: lint, format, types, tests. Passes its arguments on to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/setup.sh" dev,aot,triton)
cd "$here/.."
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder \
    --durations=20 "$@"

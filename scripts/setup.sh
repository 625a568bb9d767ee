#!/usr/bin/env bash
# Creates .venv and installs kdjax in it, with the extras named by the argument (such as dev,aot). Does nothing if that
# is done already and neither Python nor pyproject.toml has changed. Prints the path of .venv's Python.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "kdjax needs Python 3.11 or newer: put it on the PATH, or name it: PYTHON=/path/to/python3 $0" >&2
    return 1
}

python=$(find_python)
extras=${1:-}
stamp="$root/.venv/kdjax.stamp"
want="$("$python" -VV; cat "$root/pyproject.toml"; echo "$root")"
if [[ ! -f $stamp || $(cat "$stamp") != "$want" ]]; then
    "$python" -m venv --clear "$root/.venv" || {
        echo "the venv module is missing; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    printf '%s\n' "$want" >"$stamp"
fi
installed="$root/.venv/kdjax.installed.$extras"
if [[ ! -f $installed ]]; then
    echo "setting up $root/.venv (a few minutes the first time)" >&2
    requirement="$root${extras:+[$extras]}"
    # uv takes a tenth of pip's time. pip takes over where uv fails, as where only pip knows the package index.
    "$root/.venv/bin/python" -m pip install -qq --disable-pip-version-check uv >&2 &&
        "$root/.venv/bin/uv" pip install --quiet --python "$root/.venv" --editable "$requirement" >&2 ||
        "$root/.venv/bin/python" -m pip install -qq --disable-pip-version-check --editable "$requirement" >&2
    touch "$installed"
fi
echo "$root/.venv/bin/python"

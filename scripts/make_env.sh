#!/bin/sh
# Makes .venv with the pinned packages; needs a Python from 3.11 to 3.12 and nothing else (`make env`).
set -eu
cd "$(dirname "$0")/.."

find_python() {
    # A pyenv shim answers to its name and then fails, so each candidate is run.
    for candidate in "${PYTHON:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
        python3.11 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3.11 python3; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    echo "make env: no Python 3.11 or 3.12 here; install one, or name it: make env PYTHON=/path/to/python3.12" >&2
    exit 1
}

uv_version=0.13.9
if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "env: $("$python" --version) at $python"
    # Without pip, so that a Python that lacks ensurepip is enough; uv installs from outside.
    "$python" -m venv --without-pip .venv
fi
python=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys.executable))')
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
if command -v uv >/dev/null 2>&1; then
    uv=uv
elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install --quiet --root-user-action ignore --disable-pip-version-check --target "$tools" "uv==$uv_version"
    uv=$tools/bin/uv
elif "$python" -m venv "$tools/venv" 2>/dev/null; then
    "$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
    uv=$tools/venv/bin/uv
else
    echo "make env: $python has neither pip nor ensurepip; install one (Debian: apt install python3-pip)" >&2
    exit 1
fi
echo "env: installing the packages of constraints.txt"
# On a terminal uv shows its progress: it is some gigabytes the first time.
[ -t 2 ] && quiet="" || quiet=--quiet
"$uv" pip install $quiet --python .venv/bin/python -c constraints.txt -e '.[dev]'
touch .venv/.installed
echo "env: .venv is ready"

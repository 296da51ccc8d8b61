#!/usr/bin/env bash
# Sets everything up and passes the tests.
# Usage: bash launch/test.sh [--all] [pytest arguments]     --all adds the slow ones
set -euo pipefail
cd "$(dirname "$0")/.."

select=(-m "not slow")
if [ "${1:-}" = --all ]; then
  shift
  select=()
fi
bash launch/setup.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
# Two workers, one file each at a time: what a file compiles, its tests share. None takes the place of one that
# crashed: it would wait for ever where that left off.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 "${select[@]}" "$@"

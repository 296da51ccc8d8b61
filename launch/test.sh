#!/usr/bin/env bash
# Installs everything, then runs lint and tests.
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
.venv/bin/basedpyright --pythonpath .venv/bin/python
# Two workers, each with whole files, because the tests of a file share what they compile. A crashed worker ends the
# run: a replacement would repeat the test that crashed it.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 "${select[@]}" "$@"

#!/usr/bin/env bash
# Makes .venv, or brings it up to date, with everything that tests and demo need. A second run takes seconds.
# Usage: bash launch/setup.sh [extra ...]     extras of setup.py beyond test and demo: tpu, cuda, cuda13, parity
set -euo pipefail
cd "$(dirname "$0")/.."

extras=(test demo "$@")
venv=.venv
stamp=$venv/.installed

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it, or name one: PYTHON=/path/to/python bash launch/setup.sh" >&2
  exit 1
}

if [ ! -x $venv/bin/python ]; then
  python=$(find_python)
  echo "Making $venv with $("$python" --version)"
  "$python" -m venv $venv || {
    echo "error: 'python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
  rm -f $stamp
fi

# Extras that an earlier run installed are kept.
installed=$(cat $stamp 2>/dev/null || true)
# shellcheck disable=SC2046  # a word per extra
wanted=$(printf '%s\n' "${extras[@]}" $(echo "$installed" | sed -n 's/^extras: //p') | sort -u | paste -sd, -)
key="extras: ${wanted//,/ }
$(cksum setup.py)"
if [ "$key" != "$installed" ]; then
  echo "Installing ross_jax[$wanted]"
  rm -f $stamp
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  $venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$wanted]"
  echo "$key" >$stamp
fi

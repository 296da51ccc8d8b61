#!/usr/bin/env bash
# Makes .venv, or brings it up to date, with everything that tests and demo need. A second run takes seconds.
# Usage: bash launch/setup.sh [extra ...]     extras of setup.py beyond test and demo: tpu, cuda, cuda13, quantize, parity
#        bash launch/setup.sh --env NAME      makes .venv-NAME instead, with launch/environments/NAME.txt
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() { # newest minor version of Python 3 or any, names to try
  local newest=$1 range="3.11 to 3.$1" name
  [ "$1" != any ] || newest=99 range="3.11 or newer"
  shift
  for name in ${PYTHON:-} "$@"; do
    if command -v "$name" >/dev/null &&
      "$name" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python $range is needed; install it, or name one: PYTHON=/path/to/python bash launch/setup.sh" >&2
  exit 1
}

make_venv() { # folder, and the arguments of find_python
  local folder=$1 python
  shift
  [ -x "$folder/bin/python" ] && return
  python=$(find_python "$@")
  echo "Making $folder with $("$python" --version)"
  "$python" -m venv "$folder" || {
    echo "error: 'python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
  rm -f "$folder/.installed"
}

install() { # folder, what its stamp must say, what to install
  local folder=$1 key=$2
  shift 2
  [ "$key" != "$(cat "$folder/.installed" 2>/dev/null || true)" ] || return 0
  echo "Installing $*"
  rm -f "$folder/.installed"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  echo "$key" >"$folder/.installed"
}

if [ "${1:-}" = --env ]; then
  name=${2:-}
  list=launch/environments/$name.txt
  if [ -z "$name" ] || [ ! -f "$list" ] || [ $# -gt 2 ]; then
    echo "error: --env takes one of: $(basename -s .txt launch/environments/*.txt | paste -sd' ')" >&2
    exit 1
  fi
  make_venv ".venv-$name" 12 python3.11 python3.12 python3 # old packages have no wheels for newer Pythons
  install ".venv-$name" "$(cksum "$list")" -r "$list"
  after=launch/environments/$name.sh # what a list cannot say
  if [ -f "$after" ]; then bash "$after" ".venv-$name"; fi
  exit
fi

make_venv .venv any python3 python3.13 python3.12 python3.11 python

# Extras that an earlier run installed are kept.
installed=$(sed -n 's/^extras: //p' .venv/.installed 2>/dev/null || true)
# shellcheck disable=SC2086  # a word per extra
extras=$(printf '%s\n' test demo "$@" $installed | sort -u | paste -sd, -)
install .venv "extras: ${extras//,/ }
$(cksum setup.py)" -e ".[$extras]"

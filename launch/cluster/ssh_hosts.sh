#!/usr/bin/env bash
# Trains on a list of hosts that ssh reaches without a password, with one process per host. The same command continues.
# Usage: bash launch/cluster/ssh_hosts.sh HOSTFILE -- TRAIN_FLAG ...
#   HOSTFILE: one host or user@host per line; # begins a comment. The first host is the coordinator, which the others
#   must reach by this name on PORT (default 8476). On every host the repository is at the same path as here, or at DIR.
#   DRY_RUN=1 prints the command of each host instead of starting it.
#
# A signal to this script, or its end, makes every host save and end, because each ssh reads from a pipe that closes then.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -lt 3 ] || [ "$2" != -- ]; then
  sed -n 's/^# Usage/usage/p' launch/cluster/ssh_hosts.sh >&2
  exit 2
fi
if [ ! -r "$1" ]; then
  echo "error: $1: no such file; it has one host per line" >&2
  exit 1
fi
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$1")
if [ ${#hosts[@]} = 0 ]; then
  echo "error: $1: names no host" >&2
  exit 1
fi
shift 2

coordinator=${hosts[0]#*@}:${PORT:-8476}
alive=$(mktemp -u)
mkfifo -m 600 "$alive"
exec 9<>"$alive"
exec 8<"$alive"
rm "$alive"

children=()
for process in "${!hosts[@]}"; do
  command=("${PYTHON:-.venv/bin/python}" launch/train.py --distributed "--coordinator=$coordinator"
    "--processes=${#hosts[@]}" "--process=$process" "$@")
  if [ -n "${DRY_RUN:-}" ]; then
    echo "${hosts[process]}: $(printf '%q ' "${command[@]}")"
    continue
  fi
  # The shell on the host turns the end of its input into a SIGTERM for Python.
  remote="cd $(printf %q "${DIR:-$PWD}") || exit; exec 3<&0; $(printf '%q ' "${command[@]}") </dev/null 3<&- & child=\$!;"
  remote+=" { cat <&3; kill -TERM \$child; } >/dev/null 2>&1 & exec 3<&-; wait \$child"
  (ssh -o BatchMode=yes -o ServerAliveInterval=30 "${hosts[process]}" "bash -c '${remote//\'/\'\\\'\'}'" \
    <&8 2>&1 | sed -u "s/^/[${hosts[process]}] /") 9>&- &
  children+=($!)
done
exec 8<&-
trap 'exec 9>&-' TERM INT HUP

status=0
for child in "${children[@]}"; do
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # if the child still runs, a signal has ended the wait
  done
  [ "$code" = 0 ] || status=$code
done
exit "$status"

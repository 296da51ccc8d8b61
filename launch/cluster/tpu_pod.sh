#!/usr/bin/env bash
# Trains on Cloud TPU VMs: on all hosts of one slice, or on all slices of a queued resource.
# Usage: bash launch/cluster/tpu_pod.sh create NAME ZONE TYPE          asks for a slice, such as v5litepod-64 or v6e-16
#        bash launch/cluster/tpu_pod.sh setup NAME ZONE                installs on all hosts, and mounts BUCKET if it is set
#        bash launch/cluster/tpu_pod.sh slice NAME ZONE -- TRAIN_FLAG ...
#        bash launch/cluster/tpu_pod.sh slices QUEUED_RESOURCE ZONE -- TRAIN_FLAG ...
#        bash launch/cluster/tpu_pod.sh log|stop NAME ZONE             of a run that was started with DETACH=1
#   DIR: the repository on every host (default: ~/ross_jax).
#   DETACH=1: the run goes on when ssh ends; what it says goes to DIR/train.log on each host.
#   REPO: what `setup` clones where DIR is not there. BUCKET: mounted at ~/shared with gcsfuse by `setup`.
#   DRY_RUN=1 prints the commands instead of running them. ALL_SLICES=1: setup, log and stop act on all slices.
#   --workdir is gs://BUCKET/NAME, or a directory that all hosts share: Filestore, or a bucket mounted with gcsfuse.
#   Several slices, made by `gcloud compute tpus queued-resources create ... --node-count=2`, need
#   --config.mesh.data=2 or a multiple: only that axis crosses them.
#
# The same command continues the run. To save and end: `stop`.
set -euo pipefail

usage() {
  sed -n 's/^# Usage/usage/p; s/^#        bash/       bash/p' "$0" >&2
  exit 2
}

call() {
  local word
  if [ -n "${DRY_RUN:-}" ]; then
    for word in "$@"; do
      [[ $word = *[!a-zA-Z0-9_./:=@-]* ]] && word=${word@Q}
      printf '%s ' "$word"
    done
    echo
  else
    "$@"
  fi
}

on_hosts() { # KIND NAME ZONE COMMAND: runs a command on all hosts
  local where=(tpu-vm ssh "$2" --worker=all)
  [ "$1" = slice ] || where=(queued-resources ssh "$2" --worker=all --node=all)
  call gcloud compute tpus "${where[@]}" --zone="$3" --command="$4"
}

[ $# -ge 3 ] || usage
kind=$1 name=$2 zone=$3 dir=$(printf %q "${DIR:-ross_jax}")
scope=slice
[ -z "${ALL_SLICES:-}" ] || scope=slices
shift 3

case $kind in
  create)
    [ $# = 1 ] || usage
    case $1 in # the images that Cloud TPU states for each kind
      v5litepod-*) image=v2-alpha-tpuv5-lite ;;
      v5p-*) image=v2-alpha-tpuv5 ;;
      v6e-*) image=v2-alpha-tpuv6e ;;
      *) image=tpu-ubuntu2204-base ;;
    esac
    call gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$1" --runtime-version="${IMAGE:-$image}"
    ;;
  setup)
    # The images come with Python 3.10, so uv brings a newer one.
    remote="set -e; export PATH=\$HOME/.local/bin:\$PATH;"
    remote+=" command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh;"
    [ -z "${REPO:-}" ] || remote+=" [ -d $dir ] || git clone $(printf %q "$REPO") $dir;"
    remote+=" cd $dir; uv python install 3.12; PYTHON=\$(uv python find 3.12) bash launch/setup.sh tpu gcs;"
    if [ -n "${BUCKET:-}" ]; then
      remote+=" command -v gcsfuse >/dev/null || { echo 'error: gcsfuse is not installed on this image' >&2; exit 1; };"
      remote+=" mkdir -p ~/shared; mountpoint -q ~/shared || gcsfuse --implicit-dirs $(printf %q "$BUCKET") ~/shared;"
    fi
    on_hosts "$scope" "$name" "$zone" "$remote"
    ;;
  slice | slices)
    { [ $# -ge 2 ] && [ "$1" = -- ]; } || usage
    shift
    # JAX finds the coordinator, and with several slices the MEGASCALE settings, in the metadata of each VM.
    train=".venv/bin/python launch/train.py --distributed $(printf '%q ' "$@")"
    if [ -n "${DETACH:-}" ]; then
      remote="cd $dir && { setsid nohup $train >>train.log 2>&1 </dev/null & }"
    else
      remote="cd $dir && exec $train"
    fi
    on_hosts "$kind" "$name" "$zone" "$remote"
    ;;
  log) on_hosts "$scope" "$name" "$zone" "tail -n 40 $dir/train.log" ;;
  stop) on_hosts "$scope" "$name" "$zone" "pkill -TERM -f '[l]aunch/train.py'" ;;
  *)
    echo "error: $kind: expected create, setup, slice, slices, log or stop" >&2
    exit 2
    ;;
esac

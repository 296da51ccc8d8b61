#!/usr/bin/env bash
# Trains on Cloud TPU VMs: on all hosts of one slice, or on all slices of a queued resource.
# Usage: bash launch/cluster/tpu_pod.sh slice NAME ZONE -- TRAIN_FLAG ...
#        bash launch/cluster/tpu_pod.sh slices QUEUED_RESOURCE ZONE -- TRAIN_FLAG ...
#   DIR: the repository on every host, with .venv made by `bash launch/setup.sh tpu` (default: ~/ross_jax).
#   --workdir is a directory that all hosts share: Filestore, or a bucket mounted with gcsfuse.
#   Several slices, made by `gcloud compute tpus queued-resources create ... --node-count=2`, need
#   --config.mesh.data=2 or a multiple: only that axis crosses them.
#
# The same command continues the run. To save and end: the same gcloud ssh with --command="pkill -TERM -f launch/train.py".
set -euo pipefail

if [ $# -lt 5 ] || [ "$4" != -- ]; then
  sed -n 's/^# Usage/usage/p; s/^#        bash/       bash/p' "$0" >&2
  exit 2
fi
case $1 in
  slice) ssh=(tpu-vm ssh "$2" --worker=all) ;;
  slices) ssh=(queued-resources ssh "$2" --worker=all --node=all) ;;
  *)
    echo "error: $1: expected slice or slices" >&2
    exit 2
    ;;
esac
zone=$3
shift 4

# JAX finds the coordinator, and with several slices the MEGASCALE settings, in the metadata of each VM.
remote="cd $(printf %q "${DIR:-ross_jax}") && exec .venv/bin/python launch/train.py --distributed $(printf '%q ' "$@")"
exec gcloud compute tpus "${ssh[@]}" --zone="$zone" --command="$remote"

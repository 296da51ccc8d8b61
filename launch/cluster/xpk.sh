#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk has made (`xpk cluster create`); xpk writes the JobSet.
# Usage: CLUSTER=my-cluster ZONE=us-east5-a TPU_TYPE=v5litepod-32 SLICES=2 IMAGE=REGISTRY/ross_jax:TAG STORAGE=shared \
#          bash launch/cluster/xpk.sh NAME --workdir=/shared/runs/ross-7b --config.mesh.data=2 TRAIN_FLAG ...
#   IMAGE: of launch/cluster/Dockerfile.     STORAGE: from `xpk storage attach`, mounted on all hosts; --workdir is in it
#
# The cluster restarts the job where it was, up to 20 times, except after an error that one must mend. By
# hand: xpk workload delete, and the same command.
set -euo pipefail

name=${1:?usage: see the head of this script}
shift
command="exec .venv/bin/python launch/train.py --distributed --start_timeout=1800 --stopped_status=75 $(printf '%q ' "$@")"
exec xpk workload create --cluster="${CLUSTER:?}" --zone="${ZONE:?}" --workload="$name" --tpu-type="${TPU_TYPE:?}" \
  --num-slices="${SLICES:-1}" --docker-image="${IMAGE:?}" --storage="${STORAGE:?}" --max-restarts=20 \
  --restart-on-exit-codes=75 --termination-grace-period-seconds=600 --command="$command"

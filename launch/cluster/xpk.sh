#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster made by xpk (`xpk cluster create`). xpk writes the JobSet.
# Usage: CLUSTER=my-cluster ZONE=us-east5-a TPU_TYPE=v5litepod-32 SLICES=2 IMAGE=REGISTRY/ross_jax:TAG \
#          bash launch/cluster/xpk.sh NAME --workdir=gs://my-bucket/runs/ross-7b --config.mesh.data=2 TRAIN_FLAG ...
#   IMAGE: image built from launch/cluster/Dockerfile.
#   STORAGE: name given to `xpk storage attach`, which is mounted on all hosts; where --workdir is not in a bucket
#   DRY_RUN=1 prints the command instead of running it.
#
# The cluster restarts a job that failed, up to 20 times, and the job continues from its last checkpoint. It does not
# restart after an error of config, code or data. To restart by hand: xpk workload delete, then the same command.
set -euo pipefail

for setting in CLUSTER ZONE TPU_TYPE IMAGE; do
  [ -n "${!setting:-}" ] || {
    echo "error: $setting is not set; the head of $0 says what it is" >&2
    exit 2
  }
done
if [ $# = 0 ] || [[ $1 = -* ]]; then
  echo "error: the first argument is the workload's name; the head of $0 has an example" >&2
  exit 2
fi
name=$1
shift
command="exec .venv/bin/python launch/train.py --distributed --start_timeout=1800 --stopped_status=75 $(printf '%q ' "$@")"
exec ${DRY_RUN:+echo} xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$name" --tpu-type="$TPU_TYPE" \
  --num-slices="${SLICES:-1}" --docker-image="$IMAGE" ${STORAGE:+--storage="$STORAGE"} --max-restarts=20 \
  --restart-on-exit-codes=75 --termination-grace-period-seconds=600 --command="$command"

#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has the JobSet controller: fills in gke_jobset.yaml and applies it.
# Usage: NAME=ross-7b IMAGE=REGISTRY/ross_jax:TAG \
#          ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x8 HOSTS=8 CHIPS=4 SLICES=2 \
#          bash launch/cluster/gke.sh --workdir=gs://my-bucket/runs/ross-7b --config.mesh.data=2 TRAIN_FLAG ...
#   IMAGE: image built from launch/cluster/Dockerfile.
#   CLAIM: ReadWriteMany volume claim, mounted at /shared on all hosts. Without it, /shared is a host's own, and is empty
#   HOSTS: hosts per slice.     CHIPS: chips per host.     DRY_RUN=1 prints the manifest instead of applying it
#
# The cluster restarts a job that failed, up to 20 times, and the job continues from its last checkpoint. It does not
# restart after an error of config, code or data. To restart by hand: kubectl delete jobset NAME, then the same command.
set -euo pipefail

for setting in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS; do
  [ -n "${!setting:-}" ] || {
    echo "error: $setting is not set; the head of $0 says what it is" >&2
    exit 2
  }
done
export NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS SLICES=${SLICES:-1}
FLAGS=$(printf '%q ' "$@")
VOLUME="emptyDir: {}"
[ -z "${CLAIM:-}" ] || VOLUME="persistentVolumeClaim: {claimName: $CLAIM}"
export FLAGS VOLUME
# shellcheck disable=SC2016  # envsubst takes the names of the variables to replace
envsubst '$NAME $IMAGE $VOLUME $ACCELERATOR $TOPOLOGY $HOSTS $CHIPS $SLICES $FLAGS' \
  <"$(dirname "$0")/gke_jobset.yaml" | if [ -n "${DRY_RUN:-}" ]; then cat; else ${KUBECTL:-kubectl apply -f -}; fi

#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has the JobSet controller: fills gke_jobset.yaml in and applies it.
# Usage: NAME=ross-7b IMAGE=REGISTRY/ross_jax:TAG CLAIM=shared \
#          ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x8 HOSTS=8 CHIPS=4 SLICES=2 \
#          bash launch/cluster/gke.sh --workdir=/shared/runs/ross-7b --config.mesh.data=2 TRAIN_FLAG ...
#   IMAGE: of launch/cluster/Dockerfile.     CLAIM: a ReadWriteMany volume claim, mounted at /shared on all hosts
#   HOSTS, CHIPS: hosts of a slice, and chips of a host.     KUBECTL=cat shows the manifest instead
#
# The cluster restarts the job where it was, up to 20 times, except after an error that one must mend. By
# hand: kubectl delete jobset NAME, and the same command.
set -euo pipefail

export NAME=${NAME:?} IMAGE=${IMAGE:?} CLAIM=${CLAIM:?} ACCELERATOR=${ACCELERATOR:?} TOPOLOGY=${TOPOLOGY:?}
export HOSTS=${HOSTS:?} CHIPS=${CHIPS:?} SLICES=${SLICES:-1}
FLAGS=$(printf '%q ' "$@")
export FLAGS
# shellcheck disable=SC2016  # envsubst wants the names; $0 and the like stay
envsubst '$NAME $IMAGE $CLAIM $ACCELERATOR $TOPOLOGY $HOSTS $CHIPS $SLICES $FLAGS' \
  <"$(dirname "$0")/gke_jobset.yaml" | ${KUBECTL:-kubectl apply -f -}

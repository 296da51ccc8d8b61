#!/usr/bin/env bash
# Trains on all GPUs of this host. The same command continues the run.
# Usage: bash launch/cluster/multi_gpu.sh TRAIN_FLAG ...     CUDA_VISIBLE_DEVICES=0,1 selects GPUs
#   DRY_RUN=1 prints the command instead of running it.
#
# One process drives all GPUs, which needs no coordinator and reads the data once. On Slurm use slurm.sbatch, because
# JAX expects one process per GPU there.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} # without it JAX trains on the CPU if it finds no GPU
exec ${DRY_RUN:+echo} "$python" launch/train.py "$@"

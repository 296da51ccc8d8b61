#!/usr/bin/env bash
# Trains on all GPUs of this host. The same command continues the run.
# Usage: bash launch/cluster/multi_gpu.sh TRAIN_FLAG ...     CUDA_VISIBLE_DEVICES=0,1 chooses among the GPUs
#
# One process drives all of them: that is what JAX does by itself, one pipeline reads the data, and there is no
# coordinator that could be missing. (On Slurm JAX starts with a GPU per process; see slurm.sbatch.)
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} # without it JAX trains on the CPU if it finds no GPU
exec "$python" launch/train.py "$@"

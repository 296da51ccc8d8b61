#!/usr/bin/env bash
# Installs everything, trains a tiny Ross on real pictures on the CPU, and reports what it learned, under runs/demo.
# Usage: bash launch/demo.sh [--kind KIND ...] [--denoiser] [--baseline] [--lora] [--seeds 0 1 2] [--quick] [--root DIR]
#   --kind      objective: denoise (default), pixel, latent, latent2pixel or none
#   --denoiser  afterwards train the denoiser alone     --baseline  also train without reconstruction
#   --lora      also train stage 2 with low-rank updates
#   --quick     very little data, to check that everything runs
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Huge pages make training on a CPU faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec .venv/bin/python launch/demo.py "$@"

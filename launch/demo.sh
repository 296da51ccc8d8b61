#!/usr/bin/env bash
# Sets everything up, trains a tiny Ross on real pictures on the CPU, and shows what it learned, under runs/demo.
# Usage: bash launch/demo.sh [--kind KIND ...] [--denoiser] [--baseline] [--seeds 0 1 2] [--quick] [--root DIR]
#   --kind: of reconstruction, denoise (default), pixel, latent, latent2pixel or none
#   --denoiser: then the denoiser alone     --baseline: also without reconstruction     --quick: little data, to see that all runs
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Huge pages save a quarter of the time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec .venv/bin/python launch/demo.py "$@"

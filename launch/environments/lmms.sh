#!/usr/bin/env bash
# torchvision, which comes with lmms-eval, does not load beside a CPU build of torch; nothing here needs it.
set -euo pipefail
"$1/bin/python" -m pip uninstall --quiet --yes torchvision

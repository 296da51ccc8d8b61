#!/usr/bin/env bash
# VLMEvalKit without its dependencies, most of which only its models and other data sets need.
set -euo pipefail
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps ms-vlmeval==0.0.20

#!/usr/bin/env bash
# Everything that only a GPU can show, in one command, from a checkout on a machine with a GPU, nvcc and a CUDA build of
# torch in the Python that PYTHON names:
#
#   PYTHON=python3 scripts/check_on_gpu.sh
#
# In this order, and stopping at the first failure: the library is built for this GPU; each PTX wrapper is compared with
# the emulator's version; the machine code is checked; every test runs on the GPU; compute-sanitizer looks for memory
# errors and races.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

"$PYTHON" - <<'CHECK'
import torch
assert torch.cuda.is_available(), "this Python's torch finds no GPU"
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK

"$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
"$PYTHON" -m torch_attn.info
"$PYTHON" -m pytest tests/cuda/test_conformance.py -rs
"$PYTHON" scripts/check_sass.py
"$PYTHON" -m pytest tests/cuda -rs

if sanitizer=$(command -v compute-sanitizer); then
  for check in memcheck racecheck synccheck; do
    "$sanitizer" --tool "$check" --error-exitcode 1 "$PYTHON" -m pytest tests/cuda/test_on_gpu.py \
      -k "causal_bottom_right or grouped_query or everything"
  done
else
  echo "compute-sanitizer is not installed: memory and race checks left out" >&2
fi

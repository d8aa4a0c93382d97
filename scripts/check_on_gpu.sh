#!/usr/bin/env bash
# Everything that only a GPU can show, in one command, from a checkout on a machine with a GPU, nvcc and a CUDA build of
# torch in the Python that PYTHON names:
#
#   PYTHON=python3 scripts/check_on_gpu.sh
#
# In this order, and stopping at the first failure: the library is built for this GPU; each PTX wrapper is compared with
# the emulator's version; the machine code is checked; every test runs on the GPU; compute-sanitizer, if it is installed,
# looks for memory errors and races; the benchmarks run against PyTorch's backends and leave
# benchmarks/results/<GPU>*.json, to be committed.
#
# QUICK=1 leaves the benchmarks out. SECONDS_PER_PAIR (default 0.5) is the time spent on each of their pairs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }

say "the machine"
"$PYTHON" - <<'CHECK'
import torch
assert torch.cuda.is_available(), "this Python's torch finds no GPU"
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK

say "build"
"$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
"$PYTHON" -m torch_attn.info

say "each PTX wrapper against the emulator's version"
"$PYTHON" -m pytest tests/cuda/test_conformance.py -rs

if "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("nvidia.cu13"))' 2>/dev/null; then
  say "machine code"
  "$PYTHON" scripts/check_sass.py
fi

say "every test on the GPU"
"$PYTHON" -m pytest tests/cuda -rs

say "compute-sanitizer"
if sanitizer=$(command -v compute-sanitizer); then
  for check in memcheck racecheck synccheck; do
    "$sanitizer" --tool "$check" --error-exitcode 1 "$PYTHON" -m pytest tests/cuda/test_on_gpu.py \
      -k "causal_bottom_right or grouped_query or everything or decode or atomics"
  done
else
  echo "compute-sanitizer is not installed: memory and race checks left out" >&2
fi

if [[ -z "${QUICK:-}" ]]; then
  say "benchmarks"
  gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower())')
  benchmark() {
    "$PYTHON" -m benchmarks --device cuda --seconds "${SECONDS_PER_PAIR:-0.5}" "$@"
  }
  benchmark --dtype float16 bfloat16 --sdpa flash efficient cudnn --name "$gpu"
  benchmark --dtype float16 bfloat16 --sdpa flash --mode forward+backward --deterministic --name "${gpu}_deterministic"
  benchmark --dtype float32 --sdpa efficient --name "${gpu}_float32"
  benchmark --dtype float32 --sdpa efficient --tf32 --name "${gpu}_tf32"
fi

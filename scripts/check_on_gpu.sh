#!/usr/bin/env bash
# Everything that only a GPU can show, in one command, from a checkout on a machine with a GPU, nvcc, CMake, Ninja, pytest
# and a CUDA build of torch in the Python that PYTHON names. Nothing is downloaded or installed:
#
#   PYTHON=python3 scripts/check_on_gpu.sh            # all stages
#   scripts/check_on_gpu.sh build conformance tests   # some
#
# Stages, in this order: build (the library, for this GPU alone), conformance (each PTX wrapper against the emulator's
# version) and, beside it, tests (tests/cuda, a process for each part and dtype), sanitizer (compute-sanitizer, if it is there),
# benchmark (against PyTorch's backends, into benchmarks/results/<GPU>*.json, to be committed). Each has a time limit, and
# the next one runs also where one fails; the exit status is that of the worst. What they print is in build/gpu_check.
#
# SECONDS_PER_PAIR (default 0.1): the time spent on each pair of a benchmark. TIME_FACTOR (default 1) multiplies limits.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LOGS=build/gpu_check
STAGES=${*:-build conformance tests sanitizer benchmark}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$LOGS"
summary=() failed=0

say() { printf '\n== %s\n' "$*"; }
has() { [[ " $STAGES " == *" $1 "* ]]; }

# start NAME SECONDS COMMAND...: in the background, at most so long; finish NAME...: waits, shows and notes the outcome.
declare -A pids started
start() {
  local name=$1 seconds=$(($2 * ${TIME_FACTOR:-1}))
  shift 2
  timeout -k 10 "$seconds" "$@" </dev/null >"$LOGS/$name.log" 2>&1 &
  pids[$name]=$! started[$name]=$SECONDS
}
finish() {
  local name status
  for name in "$@"; do
    wait "${pids[$name]}"
    status=$?
    say "$name: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status; 124 and 137: out of time)")"
    tail -n "$([[ $status == 0 ]] && echo 12 || echo 60)" "$LOGS/$name.log"
    summary+=("$(printf '%-28s %-8s %4d s' "$name" "$([[ $status == 0 ]] && echo passed || echo "FAILED")" $((SECONDS - started[$name])))")
    [[ $status == 0 ]] || failed=1
  done
}
pytest=("$PYTHON" -m pytest -rs -p no:cacheprovider)

say "the machine"
timeout 120 "$PYTHON" - <<'CHECK' || exit 1
import torch
if not torch.cuda.is_available():
    raise SystemExit("this Python's torch finds no GPU")
print("torch", torch.__version__, "on", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK
read -r architecture gpu torch_dir < <(timeout 120 "$PYTHON" - <<'FACTS'
import pathlib, re, torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}{'a' * (major == 9)}", re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower(), pathlib.Path(torch.__file__).parent)
FACTS
)
export CUDACXX=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
export PATH=$PATH:$(dirname "$CUDACXX")

build_library() {
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DTORCH_DIR="$torch_dir" -DTORCH_ATTN_CUDA=ON \
    -DTORCH_ATTN_CUDA_ARCHS="$architecture-real" &&
    cmake --build build/gpu --parallel "$(env -u OMP_NUM_THREADS nproc)" && cmake --install build/gpu --prefix torch_attn &&
    "$PYTHON" -m torch_attn.info
}
export -f build_library
export torch_dir architecture PYTHON
if has build; then
  start build 300 bash -c build_library
  finish build
fi

# An illegal access ends all that a process does on the GPU, so no other dtype's tests share it.
processes=()
test_in_a_process() {
  local name=$1
  shift
  start "$name" 240 "${pytest[@]}" "$@"
  processes+=("$name")
}
if has conformance; then test_in_a_process conformance tests/cuda/test_conformance.py; fi
if has tests; then
  for dtype in bfloat16 float16 float32 float64; do
    test_in_a_process "tests_$dtype" tests/cuda/test_on_gpu.py -k "torch.$dtype"
  done
  test_in_a_process tests_others tests/cuda/test_on_gpu.py -k "not torch."
  for part in maps packed selection models; do test_in_a_process "tests_$part" "tests/cuda/test_${part}_on_gpu.py"; done
fi
finish "${processes[@]}"

if has sanitizer; then
  if sanitizer=$(command -v compute-sanitizer); then
    checks=(memcheck racecheck synccheck)
    for check in "${checks[@]}"; do
      start "$check" 150 "$sanitizer" --tool "$check" --error-exitcode 1 "${pytest[@]}" tests/cuda/test_on_gpu.py \
        -k "torch.bfloat16 and (causal_bottom_right or grouped_query or everything or one_row) or tf32 and everything"
    done
    finish "${checks[@]}"
  else
    say "compute-sanitizer is not installed: its stage is left out"
  fi
fi

if has benchmark; then
  benchmark() {  # its results are written pair by pair, so that a limit keeps what there is
    local name=$1 seconds=$2
    shift 2
    start "$name" "$seconds" "$PYTHON" -m benchmarks --device cuda --seconds "${SECONDS_PER_PAIR:-0.1}" --no-accuracy "$@"
    finish "$name"
  }
  benchmark benchmark_half 150 --dtype bfloat16 float16 --sdpa flash cudnn efficient --name "$gpu"
  benchmark benchmark_deterministic 40 --dtype bfloat16 --sdpa flash --mode forward+backward --deterministic \
    --name "${gpu}_deterministic"
  benchmark benchmark_float32 40 --dtype float32 --sdpa efficient --name "${gpu}_float32"
  benchmark benchmark_tf32 40 --dtype float32 --sdpa efficient --tf32 --name "${gpu}_tf32"
fi

say "summary"
printf '%s\n' "${summary[@]}"
exit $failed

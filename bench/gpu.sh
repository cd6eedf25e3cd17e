#!/usr/bin/env bash
# bench/gpu.sh [FOLDER]: on a machine with an NVIDIA GPU, in a checkout: build, test, measure, in about ten minutes.
#
# Needs nvcc, a C++ compiler, ninja and pybind11, and a torch with CUDA as `python3` ($PYTHON). Nothing is fetched.
# FOLDER (default: gpu-results) gets a log of each step, primitives.json, tune.json, block.json and gpu.json. A step that
# fails or runs over its time does not stop the others. Exit code: how many did.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${1:-gpu-results}")
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

failed=0
step() { # NAME SECONDS COMMAND...: output goes to the terminal's end and to NAME.log
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '== %-12s %s in %d s\n' "$name" "$( ((status)) && echo "FAILED ($status)" || echo ok)" $((SECONDS - began))
  tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
  ((status == 0)) || failed=$((failed + 1))
}

build() {
  LUTGEMM_BUILD=cuda "$python" setup.py -q build_ext --inplace || return
  nvcc -std=c++17 -O3 -arch=native -o "$out/primitives" bench/cuda/primitives.cu || return
  "$python" -c 'import lutgemm, sys; found = lutgemm.backends(); print(found); sys.exit(bool(found["cuda"] or found["triton"]))'
}
export -f build
export out python

step build 240 bash -c build
step primitives 60 bash -c '"$out/primitives" > "$out/primitives.json"'
files=(tests/test_{kernels,cuda_gpu,gpu_behaviour,fusion_cuda,tune_gpu}.py)
step tests 200 "$python" -m pytest -q --maxfail=50 --require cuda,triton -m gpu "${files[@]}"
step sanitizer 90 compute-sanitizer --tool memcheck --error-exitcode 9 \
  "$python" -m pytest -q --maxfail=50 --require cuda -m sanitizer tests/test_cuda_gpu.py
step tune 90 bash -c '"$python" -m lutgemm tune --device cuda --quick --dry-run --json > "$out/tune.json"'
step block 60 "$python" -m lutgemm bench --suite block --device cuda --dtype fp16,bf16 --seconds 1 --json "$out/block.json"
LINES_SHOWN=60 step gpu 420 "$python" -m lutgemm bench --suite gpu --cold --seconds 0.02 --json "$out/gpu.json"
rm -f "$out/primitives"
exit "$failed"

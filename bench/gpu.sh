#!/usr/bin/env bash
# bench/gpu.sh [FOLDER [STEPS]]: on a machine with an NVIDIA GPU, in a checkout: build, test, measure.
#
# Needs nvcc, a C++ compiler, ninja and pybind11, and a torch with CUDA as `python3` ($PYTHON). Nothing is fetched.
# FOLDER (default: gpu-results) gets a log of each step, primitives.json, tune.json, block.json and gpu.json. A step that
# fails or runs over its time does not stop the others. Exit code: how many did.
# STEPS (default: all) is some of them, "build tune gpu" say; each half below takes less than ten minutes whatever happens:
#   build primitives tests triton sanitizer          build tune block gpu
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${1:-gpu-results}")
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

steps=" ${2:-build primitives tests triton sanitizer tune block gpu} "
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist worksteal)

failed=0
step() { # NAME SECONDS COMMAND...: output goes to the terminal's end and to NAME.log
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  [[ $steps == *" $name "* ]] || return 0
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

step build 180 bash -c build
step primitives 30 bash -c '"$out/primitives" > "$out/primitives.json"'
tests=("$python" -m pytest -q --maxfail=50 -m gpu "${workers[@]}")
step tests 130 "${tests[@]}" --require cuda --backend cuda tests/test_{kernels,cuda_gpu,fusion_cuda,tune_gpu}.py
step triton 130 "${tests[@]}" --require triton --backend triton tests/test_{kernels,gpu_behaviour}.py
step sanitizer 90 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
  "$python" -m pytest -q --maxfail=50 --require cuda -m sanitizer tests/test_cuda_gpu.py
step tune 60 bash -c '"$python" -m lutgemm tune --device cuda --quick --dry-run --json > "$out/tune.json"'
step block 60 "$python" -m lutgemm bench --suite block --device cuda --dtype fp16,bf16 --seconds 1 --json "$out/block.json"
LINES_SHOWN=60 step gpu 280 "$python" -m lutgemm bench --suite gpu --cold --seconds 0.02 --json "$out/gpu.json"
rm -f "$out/primitives"
exit "$failed"

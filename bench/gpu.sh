#!/usr/bin/env bash
# bench/gpu.sh [FOLDER [STEPS]]: on a machine with an NVIDIA GPU, in a checkout: build, test, measure.
#
# Needs a torch with CUDA as `python3` ($PYTHON), nvcc, a C++ compiler, ninja, pybind11, pytest. Nothing is fetched or
# installed. It ends within $GPU_SECONDS (default 580) whatever happens: a step gets what is left, at most its limit, and
# measuring goes from what is wanted most to the rest, saved as it goes. A step that fails does not stop the others.
# FOLDER (default: gpu-results) gets a log of each step and the JSON files named below. Exit code: how many steps failed;
# measuring that is cut short has not failed.
#
# Without STEPS, in this order (expected on an H100, and the limit, in seconds):
#   build           40   150   lutgemm/*.so, unless they are there and newer than their sources
#   tests           60   120   every kernel test on the CUDA backend; graphs, streams, devices, memory, tuning
#   triton          50    65   the behaviour of the Triton backend and its accuracy; all its cases: triton-all
#   sanitizer       25    45   small calls of every CUDA algorithm under compute-sanitizer (memcheck)
#   primitives       5    15   primitives.json: shared memory, mma, launches
#   gpu            150   240   gpu.json: the CUDA kernels beside torch and the textbook LUT-GEMM, one token first
#   block           20    40   gpu-block.json: all linear layers of a Llama 3.1 8B block
#   gpu-triton      90   240   gpu-triton.json: the Triton kernels, likewise
#   goals            2    10   goals.txt: which of the figures asked for are reached
# By name, for further calls, any of the above and
#   peers          240   500   gpu-peers.json: beside gemlite, humming, torchao, bitsandbytes, as far as they are there
#   profile         90   300   profile.json: Nsight Compute's counters of the kernels that miss their figure in FOLDER
#   timeline        30    60   block.nsys-rep: Nsight Systems' timeline of the blocks
#   tune           120   300   tune.json: thresholds of "auto" on this GPU, which no other step uses
#   tune-triton    150   300   tune-triton.json: block sizes of the Triton kernels, which a later gpu-triton uses
#   triton-all     300   500   every kernel test on the Triton backend
#   checks          90   300   racecheck, initcheck and synccheck, as sanitizer
#   shapes         400   550   gpu-all.json: every shape at every number of tokens
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${1:-gpu-results}")
python=${PYTHON:-python3}
deadline=${GPU_SECONDS:-580}
usual="build tests triton sanitizer primitives gpu block gpu-triton goals"
known="$usual peers profile timeline tune tune-triton triton-all checks shapes"
steps=" ${2:-$usual} "
for name in $steps; do
  [[ " $known " == *" $name "* ]] || { echo "gpu.sh: no step $name; there are: $known" >&2; exit 2; }
done
mkdir -p "$out"

# The package as an installation has it, without installing: bench/ and kernels/triton/ are parts of it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
link_package() {
  mkdir -p "$work/lutgemm"
  ln -sfn "$root"/lutgemm/* "$work/lutgemm/"
  ln -sfn "$root/bench" "$work/lutgemm/bench"
  ln -sfn "$root/kernels/triton" "$work/lutgemm/kernels"
}
link_package
cd "$work" || exit
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin"
export root out python XDG_CACHE_HOME="$out/cache" # what is kept between runs is in FOLDER too

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 10 --dist worksteal)

failed=0
# [KEEP=SECONDS] step NAME LIMIT COMMAND...: KEEP of what is left is for later steps. The end of the output goes to the
# terminal, all of it to NAME.log. SIGINT first, so that pytest sums up and `lutgemm bench` stops in good order.
step() {
  local name=$1 limit=$2 began=$SECONDS status=0 left=$((deadline - SECONDS - ${KEEP:-0})) verdict=ok
  shift 2
  [[ $steps == *" $name "* ]] || return 0
  ((limit <= left)) || limit=$left
  if ((limit < 1)); then
    printf '== %-10s no time left\n' "$name"
    is_measure "$name" || failed=$((failed + 1))
    return 0
  fi
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if ((status == 124 || status == 137)); then
    verdict="cut at its limit"
    is_measure "$name" || failed=$((failed + 1))
  elif ((status)); then
    verdict="FAILED ($status)"
    failed=$((failed + 1))
  fi
  printf '== %-10s %s, %d s\n' "$name" "$verdict" $((SECONDS - began))
  tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
}
is_measure() { [[ " primitives gpu block gpu-triton peers profile timeline tune tune-triton shapes " == *" $1 "* ]]; }

build() {
  local library=$root/lutgemm/_C_cuda.so changed
  cd "$root" || return
  changed=$(find csrc setup.py build_tools -newer "$library" -print -quit 2>&1)
  if [[ -f $library && -z $changed ]]; then
    echo "$library is newer than its sources: nothing is built"
  else
    echo "building: ${changed:-the library} is new"
    # this GPU's machine code only, unless asked otherwise
    local arch
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
    export LUTGEMM_BUILD=cuda LUTGEMM_CUDA_ARCHS=${LUTGEMM_CUDA_ARCHS:-${arch/#90/90a}}
    "$python" setup.py -q build_ext --inplace || return
  fi
  link_package
  cd "$work" || return
  "$python" -c '
import sys, lutgemm
found = lutgemm.backends()
for name, reason in found.items():
    print(name, reason or "ok", sep=": ")
sys.exit(bool(found["cuda"] or found["triton"]))'
}
primitives() {
  nvcc -std=c++17 -O3 -arch=native -o "$work/primitives" "$root/bench/cuda/primitives.cu" || return
  "$work/primitives" >"$out/primitives.json"
}
bench() { "$python" -m lutgemm bench --cold --device cuda "$@"; }
sanitize() { # TOOL
  compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider --maxfail=50 --require cuda -m sanitizer "$root/tests/test_cuda_gpu.py"
}
checks() {
  local status=0 tool
  for tool in racecheck initcheck synccheck; do
    echo "-- $tool"
    sanitize "$tool" || status=$?
  done
  return "$status"
}
peers() {
  local package found=""
  for package in gemlite humming torchao bitsandbytes; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" && found+=" $package"
  done
  [[ $found ]] || { echo "none of gemlite, humming, torchao, bitsandbytes is installed: nothing to measure"; return 0; }
  echo "installed:$found"
  bench --backends cuda --shapes 8192x8192,28672x4096,4096x4096 --m 1,8,16 --bits 1,2,3,4 --codebooks 1x4x8,2x8x8 \
    --dtype fp16 --seconds 0.1 --json "$out/gpu-peers.json" \
    --baselines "torch_fp16,torchao_int4,bnb_nf4_cuda$(printf ',gemlite_%dbit' 1 2 4)$(printf ',humming_%dbit' 1 2 3 4)"
}
timeline() {
  command -v nsys >/dev/null || { echo "nsys is not on PATH: no timeline"; return 0; }
  nsys profile --force-overwrite true --cuda-graph-trace node --output "$out/block" \
    "$python" -m lutgemm bench --suite block --device cuda --dtype fp16 --seconds 0.05
}
export -f link_package build primitives bench sanitize checks peers timeline
export work

export own="torch_fp16,torch_bf16,torch_int4,textbook_1bit,textbook_2bit,textbook_3bit,textbook_4bit"
of_triton=("$root"/tests/test_{kernels,gpu_behaviour}.py) of_cuda=("$root"/tests/test_kernels.py)
while read -r file; do
  case ${file##*/} in
    test_gpu_behaviour.py) ;;
    *triton*) of_triton+=("$file") ;;
    *) of_cuda+=("$file") ;;
  esac
done < <(grep -ls "mark\.gpu" "$root"/tests/test_*.py)
tests=("$python" -m pytest -q -p no:cacheprovider --maxfail=50 -m gpu "${workers[@]}")

step build 150 bash -c build
link_package
step tests 120 "${tests[@]}" --require cuda --backend cuda "${of_cuda[@]}"
step triton 65 "${tests[@]}" --require triton --backend triton -k "not tier" "${of_triton[@]}"
step sanitizer 45 bash -c "sanitize memcheck"
step primitives 15 bash -c primitives
KEEP=80 step gpu 240 bash -c 'bench --suite gpu --backends cuda --seconds 0.1 --baselines $own --json "$out/gpu.json"'
KEEP=20 step block 40 bash -c 'bench --suite block --dtype fp16,bf16 --seconds 1 --json "$out/gpu-block.json"'
step gpu-triton 240 bash -c 'bench --suite gpu --backends triton --seconds 0.1 --json "$out/gpu-triton.json" \
  --baselines torch_fp16,gemlite_1bit,gemlite_2bit,gemlite_4bit'
step peers 500 bash -c peers
step shapes 550 bash -c 'bench --suite gpu-all --seconds 0.1 --json "$out/gpu-all.json"'
step tune 300 bash -c '"$python" -m lutgemm tune --device cuda --dry-run --json > "$out/tune.json"'
step tune-triton 300 bash -c '"$python" -m lutgemm tune --backend triton --layer 8192x8192 --layer 28672x4096 \
  --layer 4096x4096 --json > "$out/tune-triton.json"'
step profile 300 "$python" -m lutgemm.bench.counters "$out/profile.json" "$out"/gpu{,-all}.json
step timeline 60 bash -c timeline
step triton-all 500 "${tests[@]}" --require triton --backend triton "${of_triton[@]}"
step checks 300 bash -c checks
if [[ $steps == *" goals "* ]]; then deadline=$((deadline + 10)); fi # it reads what there is, in a second or two
LINES_SHOWN=60 step goals 10 "$python" -m lutgemm.bench.goals "$out"/gpu{,-block,-triton,-peers,-all}.json
cp -f "$out/goals.log" "$out/goals.txt" 2>/dev/null
exit "$failed"

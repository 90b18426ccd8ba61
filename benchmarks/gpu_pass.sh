#!/usr/bin/env bash
# Everything to do on a machine with a GPU, stage by stage: gpu_pass.sh [--small] FOLDER [STAGE ...]
#
# Logs, reports (JSON) and plots go to FOLDER; a stage whose STAGE.done is there is not run again, so a pass that was cut
# short goes on where it stopped; naming stages runs only those, for a pass in several calls. Stages, in their order:
# compile mechanics operations graphs kernels weights frame host serving peers models. Full-size random weights, 3.6 GB,
# go to WEIGHTS (default: aloud-weights in the system's temporary folder), outside FOLDER; a stage that needs them makes
# them. A stage has LIMIT seconds (default: 240; peers wants 540).
# The machine needs Python with torch, triton, pybind11, pytest and transformers, and a C++ compiler; for `aloud serve`
# in the stage serving, the extra `server`, too. Nothing is downloaded. --small rehearses it on a machine without a GPU.
# The figures that decide are printed last.
set -uo pipefail
small=""
if [ "${1:-}" = --small ]; then
    small=yes
    export OMP_NUM_THREADS=1 # small products on busy cores: threads that wait for each other take 20 times as long
    shift
fi
folder=${1:?usage: gpu_pass.sh [--small] FOLDER [STAGE ...]}
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(compile mechanics operations graphs kernels weights frame host serving peers models)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
python=${PYTHON:-python3}
limit=${LIMIT:-240} # seconds of a stage; it is then interrupted, so that it prints what it knows
# The tree as the package, without installing: kernels/ and benchmarks/ are aloud.kernels and aloud.benchmarks.
site=$folder/site
export PYTHONUNBUFFERED=1 PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
size=csm-1b dtype=bfloat16
[ -z "$small" ] || size=small dtype=float32
weights=${WEIGHTS:-${TMPDIR:-/tmp}/aloud-weights}/$size-$dtype

# Always: another tree may have been here before, and it takes seconds.
build() {
    "$python" setup.py --quiet build_ext --inplace || return
    rm -rf "$site" && mkdir -p "$site/aloud" || return
    cp -r runtime/. "$site/aloud/" || return
    cp -r kernels "$site/aloud/" && cp -r benchmarks "$site/aloud/" || return
    (cd "$folder" && "$python" -c "import aloud._sampler, torch, triton; print(torch.__version__, triton.__version__)")
}
tests() {
    # cuBLAS is deterministic, as the tests ask of torch, only with this.
    CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout -s INT -k 20 "$limit" \
        "$python" -m pytest -q -p no:cacheprovider --rootdir "$root" --durations 10 "$@"
}
bench() { (cd "$folder" && timeout -s INT -k 20 "$limit" "$python" -m aloud.benchmarks "$@"); }
suite() { bench "$1" --json "$folder/$1.json" "${@:2}"; }

# All processors fill Triton's cache, from which the stages after it take their kernels.
compile() {
    local given=()
    [ -z "$small" ] || given=(--cases norm.backbone)
    bench aot "${given[@]}" --capabilities "$(capability)"
}
capability() {
    "$python" -c "
import torch
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print(10 * major + minor)"
}
mechanics() { if [ -n "$small" ]; then TRITON_INTERPRET=1 suite mechanics --repeats 2; else suite mechanics; fi; }
# Most of its time is compilation of small shapes, each in one thread.
operations() { tests -n 8 --dist load -m gpu tests/gpu/test_operations.py; }
graphs() { if [ -n "$small" ]; then tests -n 0 tests/gpu/test_graphs.py; else tests -n 0 -m gpu tests/gpu/test_graphs.py; fi; }
models() { tests -n 0 -m gpu tests/gpu/test_csm.py; }
kernels() {
    local given=()
    [ -z "$small" ] || given=(--small --dtype "$dtype" --rows 1 3 16 --repeats 2 --compile-rows)
    bench kernels "${given[@]}" || return
    tail -n 1 "$folder/kernels.log" >"$folder/kernels.json"
}
weights() {
    [ -e "$weights/config.json" ] && return
    mkdir -p "$(dirname "$weights")" || return
    # Under its name only once it is whole.
    rm -rf "$weights.part"
    (cd "$folder" && "$python" -c "
import sys
from pathlib import Path
from aloud.checkpoint.random import write_random
write_random(Path(sys.argv[1]), sys.argv[2], seed=0, dtype=sys.argv[3])
" "$weights.part" "$size" "$dtype") && mv "$weights.part" "$weights" && du -sh "$weights"
}
model() { # a suite on the weights
    weights || return
    suite "$1" --model "$weights" --dtype "$dtype" --plot "$folder/$1.png" "${@:2}"
}
frame() {
    local given=(--seconds 3)
    [ -z "$small" ] || given=(--seconds 1 --rows 1 2 --repeats 2 --context 100)
    model frame "${given[@]}"
}
host() { suite host --plot "$folder/host.png"; }
serving() {
    local given=(--seconds 6)
    [ -z "$small" ] || given=(--seconds 1 --streams 1 2 --rates 4 --context 100)
    model serving "${given[@]}"
}
peers() {
    local given=(--rows 1 16)
    [ -z "$small" ] || given=(--rows 1 2 --frames 4 --repeats 1 --no-compile)
    model peers "${given[@]}"
}

start=$SECONDS
if ! build >"$folder/build.log" 2>&1; then
    tail -n 5 "$folder/build.log"
    echo "the build failed: $folder/build.log"
    exit 1
fi
echo "$((SECONDS - start)) s" >"$folder/build.seconds"
failed=0
for stage in "${stages[@]}"; do
    [ -e "$folder/$stage.done" ] && continue
    start=$SECONDS
    if "$stage" >"$folder/$stage.log" 2>&1; then touch "$folder/$stage.done"; else failed=1; fi
    echo "$((SECONDS - start)) s" >"$folder/$stage.seconds"
done

printf '%-12s %-8s %s\n' stage result last
for stage in build "${stages[@]}"; do
    result=failed
    { [ "$stage" = build ] || [ -e "$folder/$stage.done" ]; } && result=ok
    last=$(grep -v '^{' "$folder/$stage.log" 2>/dev/null | tail -n 1 | cut -c1-100)
    printf '%-12s %-8s %s (%s)\n' "$stage" "$result" "$last" "$(cat "$folder/$stage.seconds" 2>/dev/null)"
done
echo
(cd "$folder" && "$python" -m aloud.benchmarks.summary "$folder")
exit $failed

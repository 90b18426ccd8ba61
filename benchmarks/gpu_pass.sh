#!/usr/bin/env bash
# Everything to do on a machine with a GPU, stage by stage: gpu_pass.sh [--small] FOLDER [STAGE ...]
#
# Logs, reports (JSON) and plots go to FOLDER; a stage whose STAGE.done is there is not run again, so a pass that was cut
# short goes on where it stopped; naming stages runs only those, for a pass in several calls. Stages, in their order:
# compile mechanics operations graphs kernels weights frame host serving peers models. Full-size random weights, 3.6 GB,
# go to WEIGHTS (default: aloud-weights in the system's temporary folder), outside FOLDER; a stage that needs them makes
# them. A stage has LIMIT seconds (default: 240; peers wants 540); then it is interrupted, and reports what it measured.
# After each stage its line is printed, and FOLDER/summary.txt and FOLDER/pass.tgz, with all of FOLDER but the copied
# package, are written anew. Reports name the commit of the tree, or COMMIT where the tree is no clone.
#
# The machine needs a C++ compiler and Python (PYTHON; default: python3) with torch, triton, numpy, safetensors,
# huggingface_hub, tokenizers, tqdm, soxr and soundfile, which needs cffi; pybind11 and setuptools for the build;
# pytest, pytest-xdist, pytest-timeout and transformers for operations, graphs and models; transformers for peers.
# Without matplotlib there are no plots, and without the extra `server` the stage serving leaves out HTTP; both say so.
# Nothing is downloaded. --small rehearses it on a machine without a GPU. The figures that decide are printed last.
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
echo '*' >"$folder/.gitignore" # in a clone, it is no change of the tree
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
python=${PYTHON:-python3}
limit=${LIMIT:-240}
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
    commit >"$site/aloud/benchmarks/COMMIT"
    # All that the suites import, some of it later: what is missing is named here, and not by each of the stages.
    (cd "$folder" && "$python" -c "
import aloud._sampler, aloud.api, aloud.benchmarks.__main__, aloud.checkpoint.random, safetensors, torch, triton
print(torch.__version__, triton.__version__)")
}
# As aloud.benchmarks.measure writes it: "+" behind it when the tree has changes.
commit() {
    local name=${COMMIT:-}
    if [ -z "$name" ] && name=$(git rev-parse --short HEAD 2>/dev/null) && [ -n "$(git status --porcelain)" ]; then
        name+=+
    fi
    echo "$name"
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
    suite kernels "${given[@]}"
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

line() { # of a stage: how it ended, the last it said, and how long it took
    local result=failed last took
    if [ -e "$folder/$1.done" ]; then
        result=ok
    elif [ ! -e "$folder/$1.log" ]; then
        result=-
    fi
    last=$(grep -v '^{' "$folder/$1.log" 2>/dev/null | tail -n 1 | cut -c1-100)
    took=$(cat "$folder/$1.seconds" 2>/dev/null)
    printf '%-12s %-8s %s\n' "$1" "$result" "$last${took:+ ($took)}"
}
figures() { (cd "$folder" && "$python" -m aloud.benchmarks.summary "$folder"); }
# What there is so far, for when the whole pass is cut short.
keep() {
    local each
    {
        for each in build "${stages[@]}"; do line "$each"; done
        echo
        figures
    } >"$folder/summary.txt"
    # Into a file that is there before tar begins: a folder that changes under it is an error to tar.
    tar -cz -C "$folder" --exclude=./site --exclude='./pass.tgz*' . >"$folder/pass.tgz.part" &&
        mv "$folder/pass.tgz.part" "$folder/pass.tgz"
}

printf '%-12s %-8s %s\n' stage result last
failed=0
for stage in build "${stages[@]}"; do
    if [ "$stage" = build ] || [ ! -e "$folder/$stage.done" ]; then
        rm -f "$folder/$stage.done" "$folder/$stage.seconds"
        start=$SECONDS
        "$stage" >"$folder/$stage.log" 2>&1
        status=$?
        took="$((SECONDS - start)) s"
        case $status in
            0) touch "$folder/$stage.done" ;;
            124 | 137) took+=", its limit" ;; # as timeout ends, after an interrupt and after a kill
        esac
        [ $status = 0 ] || failed=1
        echo "$took" >"$folder/$stage.seconds"
    fi
    line "$stage"
    if [ "$stage" = build ] && [ $failed = 1 ]; then
        tail -n 5 "$folder/build.log"
        echo "the build failed: $folder/build.log"
        exit 1
    fi
    keep
done

echo
figures
exit $failed

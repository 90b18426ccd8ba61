#!/usr/bin/env bash
# Everything to do on a machine with a GPU, stage by stage: gpu_pass.sh [--small] FOLDER [STAGE ...]
#
# Logs and results go to FOLDER; a stage whose STAGE.done is there is not run again, so a pass that was cut short goes on
# where it stopped. The machine needs Python with torch, triton, pybind11, pytest and transformers, and a C++ compiler;
# nothing is downloaded. --small rehearses it on a machine without a GPU.
set -uo pipefail
small=()
if [ "${1:-}" = --small ]; then
    small=(--small --rows 1 3 --repeats 2 --no-compile)
    shift
fi
folder=${1:?usage: gpu_pass.sh [--small] FOLDER [STAGE ...]}
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build operations kernels models)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
python=${PYTHON:-python3}
# The tree as the package, without installing: kernels/ and benchmarks/ are aloud.kernels and aloud.benchmarks.
site=$folder/site
export PYTHONUNBUFFERED=1 PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

build() {
    "$python" setup.py --quiet build_ext --inplace || return
    mkdir -p "$site/aloud" || return
    cp -r runtime/. "$site/aloud/" || return
    cp -r kernels "$site/aloud/" && cp -r benchmarks "$site/aloud/" || return
    (cd "$folder" && "$python" -c "import aloud._sampler, torch, triton; print(torch.__version__, triton.__version__)")
}
tests() { "$python" -m pytest -q -n 0 -m gpu -p no:cacheprovider --rootdir "$root" --durations 10 "$@"; }
operations() { tests tests/gpu/test_operations.py; }
models() { tests tests/gpu/test_csm.py; }
kernels() { (cd "$folder" && "$python" -m aloud.benchmarks kernels "${small[@]}"); }

failed=0
for stage in "${stages[@]}"; do
    [ -e "$folder/$stage.done" ] && continue
    start=$SECONDS
    if "$stage" >"$folder/$stage.log" 2>&1; then touch "$folder/$stage.done"; else failed=1; fi
    echo "$((SECONDS - start)) s" >"$folder/$stage.seconds"
done

[ -e "$folder/kernels.log" ] && tail -n 1 "$folder/kernels.log" >"$folder/kernels.json"
printf '%-12s %-8s %s\n' stage result last
for stage in "${stages[@]}"; do
    result=failed
    [ -e "$folder/$stage.done" ] && result=ok
    last=$(grep -v '^{' "$folder/$stage.log" 2>/dev/null | tail -n 1 | cut -c1-100)
    printf '%-12s %-8s %s (%s)\n' "$stage" "$result" "$last" "$(cat "$folder/$stage.seconds" 2>/dev/null)"
done
exit $failed

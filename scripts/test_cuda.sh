#!/usr/bin/env bash
# The CUDA paths without a GPU: the tests of the marker `fakegpu`, those of `gpu` among them, under
# the real torch on the stand-in for CUDA's libraries (tests/fake_gpu/README.md), from a clean clone.
#   scripts/test_cuda.sh           all with torch 2.13, then flows, GPU tests and worlds with 2.11
#   scripts/test_cuda.sh --quick   what scripts/test.sh runs of it, with torch 2.13: two minutes
#   scripts/test_cuda.sh WORDS     options for pytest, with torch 2.13: -k ppo
# The environment is scripts/dev/cuda_env.sh's, and so is exit code 3 where it cannot be made.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # a module compiled once serves every process
newest=$(sed -n 's/^torch==//p' requirements.txt)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
closing=()
# the files that have such tests: to import the others would take long, and more packages
mapfile -t files < <(grep -lrE 'mark\.(fake)?gpu' tests --include='test_*.py' | sort)

# Runs pytest with a release of torch: its words, and its closing line at the end of everything.
run() {
    local torch=$1 env build log code=0
    shift
    env=$(scripts/dev/cuda_env.sh "$torch") || exit $?
    # of these sources: another checkout may run on its own build at the same time
    build=$env/stand-in-$(cat tests/fake_gpu/build.sh tests/fake_gpu/libraries/* |
        sha256sum | cut -c1-12)
    tests/fake_gpu/build.sh "$build" "$env/bin/python" || exit 1
    log=$(mktemp)
    PYTHONPATH=$PWD/src PYTHONPYCACHEPREFIX=$env/pycache tests/fake_gpu/run.sh "$build" \
        "$env/bin/python" -m pytest -p no:cacheprovider "$@" 2>&1 | tee "$log" || code=$?
    closing+=("torch $torch: $(tail -1 "$log")")
    rm "$log"
    return "$code"
}

code=0
case ${1:-} in
"")
    run "$newest" -m fakegpu "${files[@]}" || code=1
    run 2.11.0 -m fakegpu tests/gpu tests/fake_gpu \
        -k "not test_world or dp2 or tp2 or first_to_last" || code=1
    ;;
--quick) run "$newest" -m "fakegpu and quick" --durations=5 "${files[@]}" || code=1 ;;
*) run "$newest" -m fakegpu "${files[@]}" "$@" || code=1 ;;
esac
echo
printf 'stand-in CUDA, %s\n' "${closing[@]}"
exit "$code"

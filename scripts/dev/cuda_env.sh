#!/usr/bin/env bash
# Makes the Python environment of the stand-in CUDA (tests/fake_gpu) and prints its directory:
#   scripts/dev/cuda_env.sh [TORCH]
# It has the CUDA 13.0 build of that release of torch (default: requirements.txt's), lies outside the
# checkout in $SPMDRL_CUDA_ENV (default: spmdrl in the user's cache), and is named after its
# requirements, so that it is made once (5 GB, some minutes of pip) and reused. Where it cannot be
# made, one line says why and the exit code is 3.
# PYTHON312 names the interpreter; SPMDRL_CUDA_ENV_SECONDS is how long pip may take (default 900).
set -euo pipefail
cd "$(dirname "$0")/../.."
torch=${1:-$(sed -n 's/^torch==//p' requirements.txt)}
wanted=tests/fake_gpu/requirements.txt
base=${SPMDRL_CUDA_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/spmdrl}
seconds=${SPMDRL_CUDA_ENV_SECONDS:-900}

cannot() {
    echo "cuda_env: $*" >&2
    exit 3
}

command -v g++ >/dev/null || cannot "no g++ (apt-get install g++), which compiles tests/fake_gpu"
key=$({ echo "torch==$torch"; grep -v '^#' "$wanted"; } | sha256sum | cut -c1-12)
env=$base/cuda-$torch-$key
if [ -e "$env/complete" ] && [ -x "$env/bin/python" ]; then
    echo "$env"
    exit 0
fi

python=
for found in ${PYTHON312:-python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12}; do
    # a command of this name may be one of pyenv's that finds no interpreter
    if "$found" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' \
        2>/dev/null; then
        python=$found
        break
    fi
done
[ -n "$python" ] ||
    cannot "no Python 3.12 with venv (${PYTHON312:-python3.12}); set PYTHON312=/path/to/python3.12"
mkdir -p "$base" 2>/dev/null || cannot "$base cannot be made; set SPMDRL_CUDA_ENV to a directory"
exec 9>"$base/.cuda_env.lock"
flock 9
if [ -e "$env/complete" ]; then # another process has made it meanwhile
    echo "$env"
    exit 0
fi
free=$(df -Pk "$base" | awk 'NR == 2 { print int($4 / 1e6) }')
[ "$free" -ge 8 ] || cannot "$base has $free GB free, and the environment needs 8 to be made"

# without the file `complete` it is half made, whatever ended its making, and is made afresh
rm -rf "$env"
echo "cuda_env: installing torch $torch for CUDA into $env" >&2
"$python" -m venv "$env" || cannot "$python makes no virtual environment"
# not compiled: scripts/test_cuda.sh keeps what it compiles elsewhere
if ! timeout "$seconds" "$env/bin/python" -m pip install -q --disable-pip-version-check --no-compile \
    "torch==$torch" -r "$wanted" >"$env/pip.log" 2>&1; then
    why=$(grep -i error "$env/pip.log" | tail -1 || true)
    rm -rf "$env"
    cannot "pip does not install torch $torch and $wanted in $seconds s: ${why:-no error is named}"
fi
build=$("$env/bin/python" -c 'import torch; print(torch.__version__)') || build="none that starts"
case $build in
*+cu130) ;;
*)
    rm -rf "$env"
    cannot "pip finds torch $build, which is not a build for CUDA 13.0"
    ;;
esac
touch "$env/complete"
echo "$env"

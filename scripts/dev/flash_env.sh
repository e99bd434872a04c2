#!/usr/bin/env bash
# Makes the Python environment in which flash-attn-4 is compiled without a GPU and prints its
# directory:
#   scripts/dev/flash_env.sh
# It lies beside the stand-in CUDA's (scripts/dev/cuda_env.sh), whose packages it sees: there the
# package would be what `auto` takes, and the stand-in device cannot launch its kernels. Where it
# cannot be made, one line says why and the exit code is 3.
set -euo pipefail
cd "$(dirname "$0")/../.."
wanted=$(sed -n 's/^flash = //p' setup.cfg)
base=$(scripts/dev/cuda_env.sh) || exit $?
seconds=${SPMDRL_CUDA_ENV_SECONDS:-900}
key=$(echo "$wanted" | sha256sum | cut -c1-12)
env=$base-flash-$key

cannot() {
    echo "flash_env: $*" >&2
    exit 3
}

exec 9>"$(dirname "$base")/.flash_env.lock"
flock 9
if [ ! -e "$env/complete" ]; then
    rm -rf "$env"
    echo "flash_env: installing $wanted into $env" >&2
    "$base/bin/python" -m venv "$env" || cannot "$base/bin/python makes no virtual environment"
    packages=$("$env/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$base/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$packages/base.pth"
    if ! timeout "$seconds" "$env/bin/python" -m pip install -q --disable-pip-version-check \
        --no-compile "$wanted" >"$env/pip.log" 2>&1; then
        why=$(grep -i error "$env/pip.log" | tail -1 || true)
        rm -rf "$env"
        cannot "pip does not install $wanted in $seconds s: ${why:-no error is named}"
    fi
    touch "$env/complete"
fi
echo "$env"

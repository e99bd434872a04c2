#!/usr/bin/env bash
# Runs a command on the stand-in device: run.sh DIRECTORY COMMAND...
#
# DIRECTORY: where build.sh has built. Environment variables: README.md.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2p' "$0" | cut -c3- >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=$(cd "$1" && pwd)
shift
[ -e "$build/key" ] || { echo "run.sh: build first: build.sh $build PYTHON" >&2; exit 1; }
preload=$build/libcudart.so.13:$build/libcublasLt.so.13:$build/libcublas.so.13
preload+=:$build/libcuda.so.1:$build/libnccl.so.2
export FAKE_GPU_BUILD=$build
export LD_LIBRARY_PATH=$build${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$here/site${PYTHONPATH:+:$PYTHONPATH}
export TRITON_LIBCUDA_PATH=$build
LD_PRELOAD=$preload exec "$@"

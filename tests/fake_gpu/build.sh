#!/usr/bin/env bash
# Builds the stand-in libraries: build.sh DIRECTORY PYTHON
#
# PYTHON has torch's CUDA wheel: its libraries say which functions are needed, and its wheels have
# CUDA's headers (CUDA_HOME/include is used instead where CUDA_HOME is set). DIRECTORY lies outside
# the checkout. Builds again only if a source, the compiler or torch has changed.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2p' "$0" | cut -c3- >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
build=$(cd "$1" && pwd)
packages=$("$2" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
torch=$packages/torch
[ -e "$torch/lib/libtorch_cuda.so" ] || { echo "build.sh: $2 has no CUDA build of torch" >&2; exit 1; }

if [ -n "${CUDA_HOME:-}" ]; then
    headers=(-I"$CUDA_HOME/include")
else
    headers=(-I"$packages/nvidia/cu13/include" -I"$packages/triton/backends/nvidia/include")
fi

exec 9>"$build/lock"
flock 9
key=$({ cat "$here"/build.sh "$here"/libraries/*; g++ --version; cat "$torch/version.py"; echo "$packages"; } | sha256sum)
[ "$key" = "$(cat "$build/key" 2>/dev/null)" ] && exit 0
rm -f "$build/key"

flags=(-std=c++17 -O1 -fPIC -shared -fvisibility=default -Wall -Wextra "${headers[@]}" -L"$build")

# What the wheels' libraries import, without versions.
find "$torch/lib" "$packages/nvidia" -name '*.so*' -type f -print0 |
    xargs -0 nm -D --undefined-only 2>/dev/null | awk '{ sub("@.*", "", $2); print $2 }' |
    sort -u >"$build/imported"

# library NAME PREFIX ERROR SOURCES...: imported functions that begin with PREFIX and have no
# definition in SOURCES become stubs that name themselves and return ERROR ("not supported").
library() {
    local name=$1 prefix=$2 error=$3 version=${1%%.so*}
    shift 3
    local objects=()
    for source in "$@"; do
        g++ "${flags[@]/-shared/-c}" "$here/libraries/$source.cpp" -o "$build/$source.o"
        objects+=("$build/$source.o")
    done
    nm --defined-only "${objects[@]}" | awk 'NF == 3 { print $3 }' | sort -u >"$build/defined"
    {
        echo '#include <cstdio>'
        sed -nE "/$prefix/p" "$build/imported" | comm -23 - "$build/defined" | while read -r function; do
            printf 'extern "C" int %s() { fputs("stand-in CUDA lacks %s\\n", stderr); return %s; }\n' \
                "$function" "$function" "$error"
        done
    } >"$build/$version-stubs.cpp"
    # Importers of the first three ask for symbols with the library's name as their version.
    local versioned=()
    case $version in libcudart | libcublas | libcublasLt)
        echo "$name { global: *; };" >"$build/$version.map"
        versioned=(-Wl,--version-script="$build/$version.map") ;;
    esac
    local runtime=()
    [ "$version" = libcudart ] || runtime=(-l:libcudart.so.13)
    g++ "${flags[@]}" "${objects[@]}" "$build/$version-stubs.cpp" -o "$build/$name" \
        -Wl,-soname,"$name" "${versioned[@]}" "${runtime[@]}" -ldl
}

library libcudart.so.13 '^(cuda[A-Z]|__cuda)' 801 counters memory streams races launches device
library libcublasLt.so.13 '^cublasLt' 15 cublaslt
library libcublas.so.13 '^cublas[A-KM-Z]' 15 cublas
library libnccl.so.2 '^nccl' 3 nccl
library libcuda.so.1 '^cu(Ctx|Device|Func|Get|Launch|Link|Mem|Module|Occupancy|Pointer|Stream|Tensor)' 801 driver
library libnvidia-ml.so.1 '^nvml[A-Z]' 3 nvml
ln -sf libcuda.so.1 "$build/libcuda.so" # what Triton links with
echo "$key" >"$build/key"

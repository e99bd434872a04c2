#!/usr/bin/env bash
# A C compiler from Debian (or Ubuntu), for the tests of the CPU's kernels. As root.
set -euo pipefail
for name in "${CC:-cc}" gcc clang; do
    ! command -v "$name" >/dev/null || exit 0
done
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    { echo "install_compiler: install gcc or clang: tests of the CPU's kernels need one" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null

#!/usr/bin/env bash
# Installs spmdrl for use, not for work on it: into PREFIX, a virtual environment (default: .venv
# beside this script's checkout or bundle). The Dockerfile, apptainer.def and bundles call it.
#   install.sh [--system] [--wheels DIR] [PREFIX]
#   --system      first installs Python and a C compiler by apt-get, as in an image of Debian
#   --wheels DIR  takes every package from DIR, without a network
# A bundle (scripts/bundle.sh) has its wheels beside this script; its files are compared with their
# checksums first. PYTHON names the interpreter (3.11 or later).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
[ ! -f "$here/SHA256SUMS" ] || root=$here # a bundle
system=0 wheels="" prefix=$root/.venv
while [ $# -gt 0 ]; do
    case "$1" in
        --system) system=1; shift ;;
        --wheels) wheels=$(realpath "$2"); shift 2 ;;
        -*) echo "install.sh: unknown word $1" >&2; exit 2 ;;
        *) prefix=$1; shift ;;
    esac
done
if [ -f "$root/SHA256SUMS" ]; then
    (cd "$root" && sha256sum --check --quiet SHA256SUMS) ||
        { echo "install.sh: $root is not as it was packed: carry it over again" >&2; exit 1; }
    wheels=${wheels:-$root/wheels}
fi
if [ $system = 1 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # gcc compiles the kernels for CPUs at their first use
    apt-get install -y -qq --no-install-recommends python3 python3-venv gcc libc6-dev ca-certificates
fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "install.sh: $python is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
"$python" -m venv "$prefix"
from=()
[ -z "$wheels" ] || from=(--no-index --find-links "$wheels")
pip() { "$prefix/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --no-cache-dir ${from[@]+"${from[@]}"} -r "$root/requirements.txt"
own=("$root")
[ ! -f "$root/SHA256SUMS" ] || own=("$root"/wheels/spmdrl-*.whl)
pip install -q --no-cache-dir --no-deps ${from[@]+"${from[@]}"} "${own[@]}"
echo "install.sh: spmdrl is in $prefix/bin"

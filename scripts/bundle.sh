#!/usr/bin/env bash
# Makes a bundle for machines without a network: a directory with spmdrl, its packages as wheels,
# models, data and the Slurm scripts. It runs on a machine with a network and with the same Linux,
# architecture and Python; BUNDLE/install.sh then installs from it.
#   scripts/bundle.sh [--model DIR ...] [--data FILE ...] [--requirements FILE] BUNDLE
# BUNDLE is a new directory, or FILE.tar, which unpacks to one of that name. Without --model it has
# SmolLM2-135M-Instruct, which the quickstart trains.
set -euo pipefail
models=() data=() requirements="" bundle=""
while [ $# -gt 0 ]; do
    case "$1" in
        --model) models+=("$(realpath "$2")"); shift 2 ;;
        --data) data+=("$(realpath "$2")"); shift 2 ;;
        --requirements) requirements=$(realpath "$2"); shift 2 ;;
        -*) echo "bundle.sh: unknown word $1" >&2; exit 2 ;;
        *) bundle=$(realpath -m "$1"); shift ;;
    esac
done
[ -n "$bundle" ] || { echo "bundle.sh: name the bundle, a new directory or FILE.tar" >&2; exit 2; }
directory=${bundle%.tar}
for path in "$bundle" "$directory"; do
    [ ! -e "$path" ] || { echo "bundle.sh: $path exists: name another" >&2; exit 2; }
done
for path in ${models[@]+"${models[@]}"}; do
    [ -f "$path/config.json" ] ||
        { echo "bundle.sh: --model $path has no config.json: give a Hugging Face directory" >&2; exit 2; }
done
for path in ${data[@]+"${data[@]}"}; do
    [ -f "$path" ] || { echo "bundle.sh: --data $path is no file" >&2; exit 2; }
done
cd "$(dirname "$0")/.."
if [ -z "$requirements" ]; then
    scripts/setup.sh requirements.txt
    requirements=$PWD/requirements.txt
fi
if [ ${#models[@]} = 0 ]; then
    scripts/get_model.sh
    models=("$PWD/models/SmolLM2-135M-Instruct")
fi
trap 'rm -rf "$directory"' ERR
mkdir -p "$directory/wheels" "$directory/models" "$directory/data" "$directory/scripts"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
# also makes wheels of the packages that have none; setuptools is for packages of the user's own
[ ! -s "$requirements" ] || pip wheel -q -w "$directory/wheels" -r "$requirements" "setuptools>=68"
# a copy: building leaves files in the sources
copy=$(mktemp -d)
cp -r src setup.cfg pyproject.toml README.md LICENSE "$copy"
pip wheel -q --no-deps --no-build-isolation -w "$directory/wheels" "$copy"
rm -rf "$copy"
for path in "${models[@]}"; do cp -rL "$path" "$directory/models/"; done
for path in ${data[@]+"${data[@]}"}; do cp "$path" "$directory/data/"; done
cp -r scripts/slurm "$directory/scripts/"
cp "$requirements" "$directory/requirements.txt"
cp scripts/install.sh LICENSE "$directory/"
(cd "$directory" && find . -type f ! -name SHA256SUMS -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
if [ "$bundle" != "$directory" ]; then
    tar -C "$(dirname "$directory")" -cf "$bundle" "$(basename "$directory")"
    rm -rf "$directory"
fi
du -sh "$bundle"

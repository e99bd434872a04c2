#!/usr/bin/env bash
# Slurm and munge from Debian (or Ubuntu), for the tests that start a cluster on this host. As root.
set -euo pipefail
! command -v slurmctld >/dev/null || exit 0
[ "$(id -u)" = 0 ] || { echo "install_slurm: not root, so tests with Slurm are skipped" >&2; exit 0; }
command -v apt-get >/dev/null || { echo "install_slurm: no apt-get here; install Slurm by hand" >&2; exit 0; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null

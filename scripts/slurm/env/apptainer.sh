# Ranks in a container by apptainer, which wraps the launcher on every node.
# shellcheck source=/dev/null
source "${SPMDRL_HOME:-$PWD}/scripts/slurm/env/example.sh"
export SPMDRL_WRAP="apptainer exec --nv --bind $PWD,$RUN_DIR,/tmp ${SPMDRL_IMAGE:?the .sif file}"
export PYTHON=${SPMDRL_CONTAINER_PYTHON:-python3}

# Ranks in a container by pyxis: srun does it. Import the image once:
#   enroot import -o /shared/spmdrl.sqsh docker://...
# shellcheck source=/dev/null
source "${SPMDRL_HOME:-$PWD}/scripts/slurm/env/example.sh"
export SPMDRL_SRUN_ARGS="--container-image=${SPMDRL_IMAGE:?the .sqsh file} --container-mounts=$PWD:$PWD,$RUN_DIR:$RUN_DIR,/tmp:/tmp --container-workdir=$PWD --no-container-mount-home"
export PYTHON=${SPMDRL_CONTAINER_PYTHON:-python3}

# A site's settings: SPMDRL_ENV=scripts/slurm/env/example.sh sbatch ... Copy it and edit the copy.
# It is sourced on the first node; what it exports reaches all ranks.

# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# What NCCL's flight recorder needs, so that a hang shows which collective every rank was in.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
export TORCH_FR_DUMP_TEMP_FILE=$SPMDRL_ATTEMPT_DIR/stacks/nccl_rank_
export PYTHONFAULTHANDLER=1
# Compute nodes often have no network, and caches on a shared file system are slow.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TRITON_CACHE_DIR=$TMPDIR/triton TORCHINDUCTOR_CACHE_DIR=$TMPDIR/inductor

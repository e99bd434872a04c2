# A site's settings: SPMDRL_ENV=scripts/slurm/env/example.sh sbatch ... Copy it and edit the copy.
# It is sourced on the first node; what it exports reaches all ranks.

# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export PYTHONFAULTHANDLER=1
# Compute nodes often have no network.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

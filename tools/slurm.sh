#!/usr/bin/env bash
# A stage on several machines under Slurm:    sbatch tools/slurm.sh pretrain.py --epochs 800
# Two minutes before the time limit Slurm sends SIGTERM: the run writes a checkpoint and ends.
# The same line goes on.
#SBATCH --job-name=peco
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.txt
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100                   # seconds; else torchrun kills after 30
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun does not inherit --cpus-per-task (Slurm 22.05 and later)
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" \
    .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" "$@"

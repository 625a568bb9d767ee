#!/usr/bin/env bash
# A run on several nodes under Slurm, one process for each GPU:
#
#   sbatch --nodes=8 scripts/slurm.sh --config configs/gpt2b_nemotron8b.py --workdir /shared/runs/mine
#
# What follows the script's name goes to kdjax.train. The run directory must be on a file system that all nodes share;
# the records too, or a copy at the same path on each node. JAX learns the processes' addresses from Slurm's variables.
#
# What a step sends is hidden behind compute by XLA flags that kdjax.train chooses; --xla picks others, and what you put
# into XLA_FLAGS stays. On Hopper NVIDIA advises `export CUDA_DEVICE_MAX_CONNECTIONS=1` with them, on Blackwell not.
#
# Every task must see all GPUs of its node and takes the one of its local number: so --gres, and no --gpus-per-task.
#SBATCH --job-name=kdjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the time is up every process gets SIGTERM: the step is finished and a checkpoint saved. The job
# then goes back into the queue, and the same command takes the run up again where it left off.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# kdjax ends all processes when one does not come, fails, is lost (after the heartbeat), or no step ends any more. Slurm
# only kills what hangs beyond that; if it killed at the first code but 0 it would hide the 130 of a run that was
# interrupted and saved. Ten minutes to come: nodes that start with cold file caches take their time to load Python.
patience=(--join-timeout 600 --heartbeat 60 --step-timeout 1800)
srun --kill-on-bad-exit=0 --wait=180 --label "${PYTHON:-.venv/bin/python}" -u -m kdjax.train "${patience[@]}" "$@"
code=$?
if [ "$code" -eq 130 ]; then # interrupted, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

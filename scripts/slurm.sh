#!/usr/bin/env bash
# Trains on several nodes under Slurm, with one process per GPU:
#
#   sbatch --nodes=8 scripts/slurm.sh --config gpt2b_nemotron8b --workdir /shared/runs/mine
#
# The arguments go to kdjax.train. The run directory must be on a file system that all nodes share; the records too, or
# each node has a copy at the same path. JAX reads the processes' addresses from Slurm's variables.
#
# kdjax.train sets XLA flags that hide communication behind compute; --xla chooses others, and flags that you put into
# XLA_FLAGS stay. With them, NVIDIA advises `export CUDA_DEVICE_MAX_CONNECTIONS=1` on Hopper, but not on Blackwell.
#
# Every task must see all GPUs of its node, and uses the one with its local index: so --gres, and not --gpus-per-task.
#SBATCH --job-name=kdjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the time limit every process gets SIGTERM, finishes its step and saves a checkpoint. The job then
# goes back into the queue, and resumes the run from that checkpoint.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# kdjax ends all processes when one is missing, fails, is lost (after the heartbeat), or when no step completes. Slurm
# only kills what hangs beyond that: if it killed the job at the first exit code but 0, it would hide the 130 of a run
# that was interrupted and saved. Joining may take ten minutes, as nodes with cold file caches load Python slowly.
timeouts=(--join-timeout 600 --heartbeat 60 --step-timeout 1800)
srun --kill-on-bad-exit=0 --wait=180 --label "${PYTHON:-.venv/bin/python}" -u -m kdjax.train "${timeouts[@]}" "$@"
code=$?
if [ "$code" -eq 130 ]; then # interrupted, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

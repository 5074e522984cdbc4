#!/bin/bash
# Eight GPUs of one machine, or as many as PROCESSES says. Run it again to resume, on another number of GPUs too.
#
#   scripts/launch/train_eight_gpus.sh --config configs/train/sd21.yaml accumulate=4 data.shards.laion.folder=shards
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# --standalone: a rendezvous of this machine alone, on a free port; a process that dies ends all, nothing hangs.
exec torchrun --standalone --nproc_per_node="${PROCESSES:-8}" train/run.py "$@"

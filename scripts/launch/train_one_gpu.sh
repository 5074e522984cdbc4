#!/bin/bash
# One GPU, or the CPU where there is none. Run it again to resume.
#
#   scripts/launch/train_one_gpu.sh --config configs/train/sd15_24gb.yaml \
#       data.shards.laion.folder=shards data.cache=cache
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="$PWD/.venv/bin:$PATH"
exec subject-diffusion train "$@"

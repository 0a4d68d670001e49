#!/usr/bin/env bash
# Train on this machine, one process (rank) per GPU, or on 2 processes without a GPU.
#
#   launch/local.sh [SETTING=VALUE ...]
#   NPROC=4 launch/local.sh data=movielens model=dlrm codec=int8
#   launch/local.sh resume=runs/RUN_FOLDER
#
# NPROC            number of ranks (default: the number of GPUs, else 2)
# OMP_NUM_THREADS  CPU threads of each rank (default: cores / NPROC, at least 1)
# TORCHRUN         the torchrun to use (default: that of .venv where `make setup` built one, else of PATH)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
NPROC="${NPROC:-$((gpus > 0 ? gpus : 2))}"
if ! [[ "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local.sh: NPROC is '$NPROC'; give a number of ranks of at least 1." >&2
  exit 2
fi

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
# How long torchrun lets the ranks save a checkpoint after SIGTERM (its default is 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
# A restarted attempt gets a store of its own; in torchrun's shared one it would read addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ -z "${TORCHRUN:-}" ]]; then
  TORCHRUN=torchrun
  if [[ -x "$root/.venv/bin/torchrun" ]]; then TORCHRUN="$root/.venv/bin/torchrun"; fi
fi
if ! command -v "$TORCHRUN" >/dev/null; then
  echo "launch/local.sh: $TORCHRUN was not found. Run \`make setup\` in $root, or activate an environment." >&2
  exit 2
fi

exec "$TORCHRUN" --standalone --nproc-per-node "$NPROC" -m tightrec.trainer "$@"

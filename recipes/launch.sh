# Sourced by the recipes: checks their variables, and runs their commands.
#
#   DATA=IMAGENET OUT=DIR bash recipes/imagenet/base.sh           # on one GPU
#   DATA=IMAGENET OUT=DIR GPUS=8 bash recipes/imagenet/base.sh    # on eight GPUs of this machine
#   DATA=IMAGENET OUT=DIR GPUS=8 NODES=2 SLURM="--cpus-per-task=96 --time=24:00:00" \
#       bash recipes/imagenet/base.sh                             # Slurm jobs, one after another
#
# GPU_GB is the memory of a GPU: 24, 40 (if not given) or 80. FLAGS are given to every training,
# such as FLAGS="--compile --num_workers 14". SLURM are flags of sbatch, see docs/clusters.md; before
# the same command submits its jobs again, scancel those that still wait.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

command -v python > /dev/null || fail "there is no python here: . .venv/bin/activate"
for name in DATA OUT; do
    [ -n "${!name:-}" ] || fail "$name is not set: DATA=IMAGES OUT=FOLDER bash $0"
done
[ -e "$DATA" ] || fail "DATA=$DATA does not exist: give the folder of the images"
mkdir -p "$OUT"
DATA=$(cd "$(dirname "$DATA")" && pwd -P)/$(basename "$DATA") OUT=$(cd "$OUT" && pwd -P)
GPUS=${GPUS:-1} NODES=${NODES:-1} GPU_GB=${GPU_GB:-40} SLURM=${SLURM:-} FLAGS=${FLAGS:-}
for name in GPUS NODES EPOCHS FINETUNE_EPOCHS CLASSES SIZE; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is not an integer of at least 1"
done
((512 % (GPUS * NODES) == 0)) ||
    fail "GPUS=$GPUS on NODES=$NODES can't share the effective batch: take 1, 2, 4, ... or 512 GPUs"
[[ $GPU_GB =~ ^(24|40|80)$ ]] || fail "GPU_GB=$GPU_GB: take 24, 40 or 80, the next lower one"
[ -n "$SLURM" ] || [ "$NODES" = 1 ] ||
    fail "NODES=$NODES without SLURM: see docs/clusters.md for several machines without Slurm"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

one_process() {  # of recipes that use one GPU or the CPU
    [ "$GPUS $NODES$SLURM" = "1 1" ] ||
        fail "GPUS, NODES and SLURM are for recipes/imagenet and efficient.sh: leave them out"
}

run() {  # COMMAND...: show it, then run it
    printf '\n$'
    printf ' %q' "$@"
    echo
    "$@"
}

job=  # of Slurm, which the next one waits for
launch() {  # COMMAND.py FLAGS...: run it on all GPUs
    if [ -n "$SLURM" ]; then
        local after=${job:+--dependency=afterok:$job --kill-on-invalid-dep=yes}
        job=$(sbatch --parsable --nodes="$NODES" --gpus-per-node="$GPUS" $SLURM $after \
            slurm/train.sbatch "$@")
        job=${job%%;*}
        printf "\njob %s: %s\n" "$job" "$*"
    elif [ "$GPUS" = 1 ]; then
        run python "$@"
    else
        run torchrun --nproc_per_node "$GPUS" --max-restarts 3 "$@"
    fi
}

# batch EFFECTIVE A B C: flags of an effective batch on all GPUs, with at most A images for each
# and step if it has 24 GB, B if it has 40, and C if it has 80.
batch() {
    local share=$(($1 / (GPUS * NODES))) most=$3 steps=1
    case $GPU_GB in 24) most=$2 ;; 80) most=$4 ;; esac
    while ((share % steps || share / steps > most)); do steps=$((steps + 1)); done
    echo "--batch_size $((share / steps)) --accum_iter $steps"
}

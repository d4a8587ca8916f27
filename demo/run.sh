#!/usr/bin/env bash
# The demo: a small masked autoencoder, pre-trained on 8,000 bundled images on the CPU. It runs the
# commands that it prints and no others; interrupted, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run python demo/unpack.py demo/fashion_mnist
run python main_pretrain.py --data_path demo/fashion_mnist --output_dir demo/output \
    --model mae_vit_nano_patch4 --input_size 28 --batch_size 64 --lr 2e-3 \
    --epochs 8 --warmup_epochs 1 --device cpu
run python main_visualize.py --checkpoint demo/output/checkpoint-last.pth \
    --data_path demo/fashion_mnist --seed 1 --output demo/output/reconstructions.png --device cpu
run python demo/summary.py demo/output

#!/usr/bin/env bash
# The demo: a small masked autoencoder, pre-trained on 8,000 bundled images on the CPU, then
# fine-tuned as a classifier and probed. It runs only the commands that it prints;
# interrupted, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source demo/recipes.sh
out=demo/output

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run python demo/unpack.py demo/fashion_mnist
run python "${pretrain[@]}" --output_dir $out/pretrain
run python main_visualize.py --checkpoint $out/pretrain/checkpoint-last.pth \
    --data_path demo/fashion_mnist --seed 1 --output $out/reconstructions.png --device cpu
run python "${finetune[@]}" --finetune $out/pretrain/checkpoint-last.pth --output_dir $out/finetune
run python "${probe[@]}" --finetune $out/pretrain/checkpoint-last.pth --output_dir $out/probe
run python main_visualize.py --curves $out/pretrain --output $out/curves.png
run python demo/summary.py $out

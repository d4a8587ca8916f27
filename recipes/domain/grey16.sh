#!/usr/bin/env bash
# 16-bit grey images, such as X-rays: statistics, pre-training, pictures, features, a classifier.
#
#   DATA=SCANS OUT=DIR bash recipes/domain/grey16.sh               # SCANS/train/..., no labels
#   DATA=SCANS OUT=DIR CLASSES=2 bash recipes/domain/grey16.sh     # SCANS/{train,val}/CLASS/...
#
# Files are PNG, TIFF or .npy of one band. EPOCHS (200), MODEL (small_patch16) and SIZE (224) may
# be given; docs/choosing.md says which. Organs have a left and a right: no flips. The same command
# continues after an interruption. FLAGS are given to every training.
#
# not run here on real images; tests/test_recipes.py runs it on a few small ones
# hours: not measured here
# expected: no figure; OUT/recon.png shows more than noise, and val_loss in
#     OUT/pretrain/log.txt falls (only with SCANS/val)
set -e  # so that another shell than bash ends here
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
one_process
MODEL=${MODEL:-small_patch16} EPOCHS=${EPOCHS:-200}

[ -f "$OUT/stats.json" ] ||
    run python main_data.py stats --data_path "$DATA" --output "$OUT/stats.json"
pixels=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["flags"])' "$OUT/stats.json")

run python main_pretrain.py --data_path "$DATA" --output_dir "$OUT/pretrain" $pixels \
    --model "mae_vit_$MODEL" --input_size "${SIZE:-224}" --norm_pix_loss --no_flip \
    --batch_size 256 --epochs "$EPOCHS" --warmup_epochs $((EPOCHS / 10)) \
    --knn_every 10 $FLAGS

run python main_visualize.py --checkpoint "$OUT/pretrain/checkpoint-last.pth" \
    --data_path "$DATA" --output "$OUT/recon.png" --pca "$OUT/parts.png"
run python main_embed.py --checkpoint "$OUT/pretrain/encoder.safetensors" --data_path "$DATA" \
    --split train --output "$OUT/features.npz"

[ -n "${CLASSES:-}" ] || exit 0
run python main_finetune.py --data_path "$DATA" --output_dir "$OUT/finetune" \
    --finetune "$OUT/pretrain/encoder.safetensors" --model "vit_$MODEL" \
    --input_size "${SIZE:-224}" --nb_classes "$CLASSES" --no_flip --aa none \
    --epochs "${FINETUNE_EPOCHS:-50}" $FLAGS

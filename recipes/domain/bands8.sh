#!/usr/bin/env bash
# Images of 8 bands of uint16, such as satellite tiles: statistics, pre-training, pictures,
# features, a classifier. Any other number of bands is treated the same.
#
#   DATA=TILES OUT=DIR bash recipes/domain/bands8.sh               # TILES/train/..., no labels
#   DATA=TILES OUT=DIR CLASSES=9 bash recipes/domain/bands8.sh     # TILES/{train,val}/CLASS/...
#
# Files are .npy [H, W, 8] or TIFF, which needs pip install tifffile imagecodecs. NODATA=0 leaves
# these samples out. PICTURE ("3 2 1") are the bands to show as red, green and blue. EPOCHS (200),
# MODEL (small_patch16) and SIZE (224) are as in grey16.sh. The same command continues after an
# interruption. FLAGS are given to every training.
#
# not run here on real images; tests/test_recipes.py runs it on a few small ones
# hours: not measured here
# expected: no figure; OUT/recon.png shows more than noise, and val_loss in OUT/pretrain/log.txt
#     falls (only with TILES/val)
set -e  # so that another shell than bash ends here
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
one_process
MODEL=${MODEL:-small_patch16} EPOCHS=${EPOCHS:-200} SIZE=${SIZE:-224}

if [ ! -f "$OUT/stats.json" ]; then
    run python main_data.py stats --data_path "$DATA" ${NODATA:+--nodata "$NODATA"} \
        --output "$OUT/stats.json"
fi
pixels=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["flags"])' "$OUT/stats.json")

run python main_pretrain.py --data_path "$DATA" --output_dir "$OUT/pretrain" $pixels \
    --model "mae_vit_$MODEL" --input_size "$SIZE" --norm_pix_loss --batch_size 256 \
    --epochs "$EPOCHS" --warmup_epochs $((EPOCHS / 10)) --knn_every 10 $FLAGS

run python main_visualize.py --checkpoint "$OUT/pretrain/checkpoint-last.pth" \
    --data_path "$DATA" --picture_bands ${PICTURE:-3 2 1} \
    --output "$OUT/recon.png" --pca "$OUT/parts.png"
run python main_embed.py --checkpoint "$OUT/pretrain/encoder.safetensors" \
    --data_path "$DATA" --split train --output "$OUT/features.npz"

if [ -n "${CLASSES:-}" ]; then
    run python main_finetune.py --data_path "$DATA" --output_dir "$OUT/finetune" \
        --model "vit_$MODEL" --input_size "$SIZE" --nb_classes "$CLASSES" --aa none \
        --finetune "$OUT/pretrain/encoder.safetensors" \
        --epochs "${FINETUNE_EPOCHS:-50}" $FLAGS
fi

# The flags of the demo's commands: two minutes of pre-training, then a minute each for the rest.

shared=(--data_path demo/fashion_mnist --input_size 28 --batch_size 64 --device cpu)

pretrain=(main_pretrain.py "${shared[@]}" --model mae_vit_nano_patch4
    --epochs 4 --warmup_epochs 1 --lr 2e-3 --knn_every 1 --knn_images 500)

# Two epochs are too few for the strong regularisation that is made for fifty.
finetune=(main_finetune.py "${shared[@]}" --model vit_nano_patch4 --nb_classes 10
    --epochs 2 --warmup_epochs 0.4 --lr 2e-3 --aa none --reprob 0 --drop_path 0 --smoothing 0)

probe=(main_linprobe.py "${shared[@]}" --model vit_nano_patch4 --nb_classes 10
    --epochs 2 --warmup_epochs 0.2 --lr 20)

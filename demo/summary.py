"""Say what the demo has learned and left: summary.py OUTPUT_DIR"""

import json
import sys
from pathlib import Path


def main(output_dir):
    logs = {
        name: [json.loads(line) for line in (output_dir / name / "log.txt").open()]
        for name in ("pretrain", "finetune", "probe")
    }
    first, last = logs["pretrain"][0], logs["pretrain"][-1]
    print("mean squared error of the removed patches (normalised pixels):")
    for images, loss in (("training", "train_loss"), ("held-out", "val_loss")):
        print(
            f"  {images} images   epoch {first['epoch']}: {first[loss]:.3f}"
            f"   epoch {last['epoch']}: {last[loss]:.3f}"
        )
    measured = [record for record in logs["pretrain"] if "knn_acc1" in record]
    if measured:  # not if an older version has made this pre-training
        print("accuracy of its features by nearest neighbours, from 500 labels:")
        epochs = (f"epoch {r['epoch']}: {r['knn_acc1']:.1f}%" for r in (measured[0], measured[-1]))
        print(f"  held-out images   {'   '.join(epochs)}")
    print(f"reconstructions     {output_dir / 'reconstructions.png'}")
    print(f"curves              {output_dir / 'curves.png'}")
    print(f"checkpoints, logs   {output_dir}/*/checkpoint-last.pth, {output_dir}/*/log.txt")
    print(f"TensorBoard         .venv/bin/tensorboard --logdir {output_dir}")
    print()
    print("method                               accuracy on 2,000 held-out images")
    print(
        f"fine-tuned, {len(logs['finetune'])} epochs                 {accuracy(logs['finetune'])}"
    )
    print(f"linear probe (frozen), {len(logs['probe'])} epochs      {accuracy(logs['probe'])}")
    print()
    print("next, on your own images:")
    print(
        "  .venv/bin/python main_pretrain.py --data_path DIR --model mae_vit_tiny_patch16 "
        "--epochs 100 --warmup_epochs 10"
    )


def accuracy(records):
    return f"{records[-1]['test_acc1']:.1f}%"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Say what the demo has learned and left: summary.py OUTPUT_DIR"""

import json
import sys
from pathlib import Path


def main(output_dir):
    records = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    first, last = records[0], records[-1]
    print("mean squared error of the removed patches (normalised pixels):")
    print(f"  training images   epoch {first['epoch']}: {first['train_loss']:.3f}", end="")
    print(f"   epoch {last['epoch']}: {last['train_loss']:.3f}")
    print(f"  held-out images   epoch {first['epoch']}: {first['val_loss']:.3f}", end="")
    print(f"   epoch {last['epoch']}: {last['val_loss']:.3f}")
    print(f"reconstructions     {output_dir / 'reconstructions.png'}")
    print(f"checkpoint          {output_dir / 'checkpoint-last.pth'}")
    print(f"epochs as JSON      {output_dir / 'log.txt'}")
    print(f"curves              .venv/bin/tensorboard --logdir {output_dir}")
    print("next, on your own images:")
    print(
        "  .venv/bin/python main_pretrain.py --data_path DIR --model mae_vit_tiny_patch16 "
        "--epochs 100 --warmup_epochs 10"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

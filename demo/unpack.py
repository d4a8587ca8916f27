"""Write the bundled Fashion-MNIST images to OUT/{train,val}/CLASS/*.png: unpack.py OUT"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
NUM_TRAIN = 8000


def main(out):
    archive = np.load(Path(__file__).with_name("fashion_mnist.npz"))
    for index, (pixels, label) in enumerate(zip(archive["x"], archive["y"], strict=True)):
        folder = Path(out) / ("train" if index < NUM_TRAIN else "val") / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")


if __name__ == "__main__":
    main(sys.argv[1])

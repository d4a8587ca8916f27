"""Write CIFAR-10 as an image folder, OUT/{train,val}/CLASS/NUMBER.png.

    python recipes/cifar10_folder.py CIFAR10

torchvision downloads the archive (170 MB) to OUT/download, unless it is there.
"""

from pathlib import Path

import running  # noqa: F401  finds util
from PIL import Image
from torchvision.datasets import CIFAR10

from util import cli
from util.errors import UserError


def write(images, folder):
    """Write a torchvision dataset's images, uint8 [N, 32, 32, 3], as FOLDER/CLASS/NUMBER.png."""
    for name in images.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(images.data, images.targets, strict=True)):
        Image.fromarray(pixels).save(folder / images.classes[label] / f"{number:05d}.png")


def main(args):
    out = args.out
    for part, train in (("train", True), ("val", False)):
        try:
            images = CIFAR10(out / "download", train=train, download=True)
        except (OSError, RuntimeError) as error:  # no network, or a damaged archive
            raise UserError(
                f"CIFAR-10 can't be downloaded ({error}): put cifar-10-python.tar.gz into "
                f"{out / 'download'}"
            ) from error
        write(images, out / part)
    print(f"{out}: 50,000 training and 10,000 held-out images of 10 classes")


if __name__ == "__main__":
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    cli.run(main, parser)

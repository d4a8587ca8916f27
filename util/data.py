"""Images from a folder to normalised batches on the device.

Files are decoded to uint8, cropped and flipped as uint8 in worker processes, travel as uint8 and
become normalised floats on the device: a quarter of the memory traffic of float images.
"""

import functools
import io
import os
import signal
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2

from util.errors import UserError
from util.seeding import derive_seed, seed_generators

IMAGE_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split()
MAX_UNREADABLE_SHARE = 0.01


# ---- reading one file


class UnreadableImage(Exception):
    """A file that no decoder reads."""


def read_image(path):
    """Decode an image file to a uint8 tensor [3, H, W], as Pillow's convert("RGB") would.

    16-bit images are scaled to 8 bits, of an animation the first frame counts.

    Raises:
        UnreadableImage: the file is missing, torn or no image.
    """
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("no such file")
        encoded = np.fromfile(path, dtype=np.uint8)
        try:
            return _decode_with_torchvision(encoded)
        except (RuntimeError, ValueError):
            return _decode_with_pillow(encoded)
    except Exception as error:  # decoders raise anything on broken files
        raise UnreadableImage(f"{path}: {error}") from error


def _decode_with_torchvision(encoded):
    """JPEG and WebP, to the bit as Pillow and faster; a ValueError for other formats."""
    # PNG would be no faster, and a damaged one ends the process in torchvision 0.29.
    if encoded[:4].tobytes() in (b"\x89PNG", b"GIF8"):
        raise ValueError("left to Pillow")
    return decode_image(torch.from_numpy(encoded), mode=ImageReadMode.RGB)


def _decode_with_pillow(encoded):
    """Everything that Pillow reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata and large images, once for every file
        image = Image.open(io.BytesIO(encoded))
        if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
            # 16 bits a pixel, which convert("RGB") would clip at 255.
            gray = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            image = Image.fromarray(gray)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


# ---- transforms, all from uint8 [3, H, W] to uint8 [3, height, width]


def pretrain_transform(input_size):
    """Random resized crop (area 0.2 to 1, bicubic) and horizontal flip (paper, appendix A.1)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                to_2tuple(input_size),
                scale=(0.2, 1.0),
                interpolation=InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(),
        ]
    )


def eval_transform(input_size):
    """Bicubic resize to 256 / 224 of the input size, up to 224, and a centre crop."""
    crop = to_2tuple(input_size)
    covered = tuple(side * 256 // 224 if max(crop) <= 224 else side for side in crop)
    return v2.Compose([ResizeToCover(covered), v2.CenterCrop(crop)])


def picture_transform(input_size):
    """Bicubic resize and centre crop that show as much of the image as fits."""
    size = to_2tuple(input_size)
    return v2.Compose([ResizeToCover(size), v2.CenterCrop(size)])


class ResizeToCover(torch.nn.Module):
    """Bicubic resize, aspect ratio kept, to the smallest image that covers (height, width)."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, image):
        (height, width), (h, w) = self.size, image.shape[-2:]
        if height * w >= width * h:
            size = (height, max(width, height * w // h))
        else:
            size = (max(height, width * h // w), width)
        return v2.functional.resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def normalize(images):
    """uint8 images [N, 3, H, W] to floats of ImageNet's mean 0 and standard deviation 1."""
    mean, std = _channel_statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


def denormalize(images):
    """Normalised images [N, 3, H, W] back to floats in [0, 1]."""
    mean, std = _channel_statistics(images.device)
    return (images * std + mean).clamp(0, 1)


@functools.cache  # making them on a GPU would wait for it, every time
def _channel_statistics(device):
    """ImageNet's mean and standard deviation of the channels, each [3, 1, 1]."""
    statistics = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device)
    return statistics[:, :, None, None]


# ---- folders


class ImagePaths:
    """The sorted paths of all images below a folder, in two tensors that processes share.

    A list of a million strings would be copied into every worker as its reference counts are
    written; here a worker adds nothing, however it was started.

    Raises:
        UserError: the folder is missing, not a folder or without images.
    """

    def __init__(self, root):
        root = Path(root)
        if not root.is_dir():
            kind = "is a file, not a folder" if root.exists() else "does not exist"
            raise UserError(f"{root} {kind}: give a folder of images")
        self.root = os.fsencode(root)
        names = sorted(_image_names(self.root))
        if not names:
            raise UserError(f"{root} has no images ({' '.join(IMAGE_SUFFIXES)}) in it or below")
        self.fingerprint = zlib.crc32(b"\0".join(names))
        self._ends = torch.tensor([len(name) for name in names]).cumsum(0).share_memory_()
        self._names = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        self._names.share_memory_()

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        start = self._ends[index - 1].item() if index else 0
        name = self._names[start : self._ends[index].item()].numpy().tobytes()
        return os.fsdecode(os.path.join(self.root, name))


def _image_names(root):
    """Paths of the image files below `root`, relative to it; hidden ones are passed over."""
    suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
    walked = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in walked:  # links may lead in circles
            subfolders.clear()
            continue
        walked.add(real_folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(b"."))
        below_root = os.path.relpath(folder, root)
        for name in files:
            if name.lower().endswith(suffixes) and not name.startswith(b"."):
                yield name if below_root == b"." else os.path.join(below_root, name)


def find_images(data_path, split):
    """Images of data_path/`split`, or None without such a folder.

    For split "train" data_path itself stands in for a missing folder, as pre-training needs no
    labels.

    Raises:
        UserError: no images there, or none of a sample of them readable.
    """
    folder = Path(data_path) / split
    if not folder.is_dir():
        if split != "train":
            return None
        folder = data_path
    paths = ImagePaths(folder)
    probes = np.unique(np.linspace(0, len(paths) - 1, 32).astype(int))
    for index in probes.tolist():
        try:
            read_image(paths[index])
            return paths
        except UnreadableImage:
            continue
    raise UserError(
        f"{folder} has no readable images: each of {len(probes)} tried, such as {paths[0]}, failed"
    )


class ImageDataset(torch.utils.data.Dataset):
    """Unlabelled images, transformed as a function of (seed, epoch, index).

    `dataset[epoch, index]` is (uint8 image [3, height, width], index, whether it was readable);
    an unreadable image is replaced by another one chosen from the seed.
    """

    def __init__(self, paths, transform, seed):
        self.paths = paths
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key
        seed_generators(self.seed, "augmentation", epoch, index)
        readable = True
        source = index
        for _ in range(10):
            try:
                image = read_image(self.paths[source])
                break
            except UnreadableImage:
                readable = False
                source = torch.randint(len(self.paths), ()).item()
        else:  # a share of unreadable images that stops the run at its next log line
            image = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return self.transform(image), index, readable


# ---- batches


class ShuffledBatches(torch.utils.data.Sampler):
    """The batches of one process: keys (epoch, index) of `ImageDataset`.

    An epoch is one permutation of the images, a function of (seed, epoch). Its step s takes the
    next batch_size x world_size of them, whichever way they are split over processes; what is
    left at the end and fills no such batch is dropped. Set `epoch` and `first_step` before
    iterating.
    """

    def __init__(self, num_images, batch_size, process, seed):
        self.num_images = num_images
        self.batch_size = batch_size
        self.process = process
        self.seed = seed
        self.epoch = 0
        self.first_step = 0

    def __len__(self):
        return self.num_images // (self.batch_size * self.process.world_size)

    def __iter__(self):
        generator = np.random.default_rng(derive_seed(self.seed, "order", self.epoch))
        order = generator.permutation(self.num_images)
        for step in range(self.first_step, len(self)):
            start = (step * self.process.world_size + self.process.rank) * self.batch_size
            batch = order[start : start + self.batch_size].tolist()
            yield [(self.epoch, index) for index in batch]


class OrderedBatches(torch.utils.data.Sampler):
    """The batches of one process in evaluation: every image once over all processes."""

    def __init__(self, num_images, batch_size, process):
        self.indices = range(process.rank, num_images, process.world_size)
        self.batch_size = batch_size

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class ImageLoader:
    """Batches of `dataset` as a batch sampler orders them, on the device of `process`.

    `unreadable` counts the unreadable images that this process met in the epoch. Its workers are
    kept between epochs if it is `persistent`.
    """

    def __init__(self, dataset, batches, process, *, num_workers, pin_mem, persistent=True):
        self.dataset = dataset
        self.batches = batches
        self.images_per_step = batches.batch_size * process.world_size
        self.device = process.device
        self.unreadable = 0
        self._warned = set()
        self._loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_mem and process.device.type == "cuda",
            persistent_workers=persistent and num_workers > 0,
            # A forked worker inherits the main thread alone, in which it can block signals.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, first_step=0):
        """Steps and normalised images [N, 3, height, width] of a training epoch."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        self.unreadable = 0
        for step, (images, _, _) in enumerate(self, first_step):
            yield step, images

    def __iter__(self):
        """Yields normalised images, their indices and whether each was readable (CPU tensors)."""
        for images, indices, readable in self._loader:
            for index in indices[~readable].tolist():
                self._note_unreadable(index)
            yield normalize(images.to(self.device, non_blocking=True)), indices, readable

    def _note_unreadable(self, index):
        self.unreadable += 1
        path = self.dataset.paths[index]
        if path not in self._warned:
            self._warned.add(path)
            print(f"warning: {path} is unreadable and skipped", file=sys.stderr)


def _leave_signals_to_the_main_process(_worker_id):
    """Keep a worker alive when a scheduler or a terminal signals every process of a run.

    The main process still needs its batches to finish the step and save. Only its own SIGTERM
    ends a worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end_with_the_main_process():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_with_the_main_process, daemon=True).start()

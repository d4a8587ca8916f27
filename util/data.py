"""From image files to normalised batches on the device.

Files are decoded to uint8, cropped and flipped as uint8 in worker processes, travel as uint8 and
become normalised floats on the device: a quarter of the memory traffic of float images.
"""

import functools
import os
import signal
import sys
import threading

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torchvision.transforms import InterpolationMode, v2

from util.image_files import UnreadableImage, read_image
from util.seeding import derive_seed, seed_generators

MAX_UNREADABLE_SHARE = 0.01


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


# ---- samples and batches


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

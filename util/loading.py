"""From image files to normalised batches on the device.

Files are decoded to uint8, cropped and flipped as uint8 in worker processes, travel as uint8 and
become normalised floats on the device: a quarter of the memory traffic of float images.
"""

import os
import signal
import sys
import threading

import numpy as np
import torch

from util.data import eval_transform, normalize
from util.errors import UserError
from util.image_files import UnreadableImage, read_image
from util.seeding import derive_seed, seed_generators

MAX_UNREADABLE_SHARE = 0.01


class ImageDataset(torch.utils.data.Dataset):
    """Images and their labels, transformed as a function of (seed, epoch, index).

    `dataset[epoch, index]` is (uint8 image [3, height, width], label, index, whether the image was
    readable); an unreadable one is replaced, with its label, by another one chosen from the seed.
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
        return self.transform(image), self.paths.labels[source], index, readable


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
        """Steps, normalised images [N, 3, height, width] and labels [N] of a training epoch."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        self.unreadable = 0
        for step, (imgs, labels, indices, readable) in enumerate(self, first_step):
            self.warn_unreadable(indices[~readable])
            yield step, imgs, labels

    def __iter__(self):
        """Yields normalised images, labels, and on the CPU indices and whether each is readable."""
        for images, labels, indices, readable in self._loader:
            imgs = normalize(images.to(self.device, non_blocking=True))
            yield imgs, labels.to(self.device, non_blocking=True), indices, readable

    def warn_unreadable(self, indices):
        """Count unreadable images, and warn once of each."""
        self.unreadable += len(indices)
        for index in indices.tolist():
            path = self.dataset.paths[index]
            if path not in self._warned:
                self._warned.add(path)
                print(f"warning: {path} is unreadable and skipped", file=sys.stderr)


def train_loader(paths, transform, process, *, batch_size, accum_iter, seed, num_workers, pin_mem):
    """The shuffled, augmented batches of `batch_size` images of one process.

    Raises:
        UserError: there are fewer images than one update of all processes takes.
    """
    effective_batch = batch_size * accum_iter * process.world_size
    if len(paths) < effective_batch:
        raise UserError(
            f"{os.fsdecode(paths.root)} has {len(paths)} training images, fewer than one global "
            f"batch of {effective_batch} (batch_size x accum_iter x processes): lower --batch_size"
        )
    batches = ShuffledBatches(len(paths), batch_size, process, seed)
    dataset = ImageDataset(paths, transform, seed)
    return ImageLoader(dataset, batches, process, num_workers=num_workers, pin_mem=pin_mem)


def eval_loader(paths, input_size, process, *, batch_size, seed, num_workers, pin_mem):
    """Every image once over all processes, in order, resized and cropped at the centre."""
    return ImageLoader(
        ImageDataset(paths, eval_transform(input_size), seed),
        OrderedBatches(len(paths), batch_size, process),
        process,
        num_workers=num_workers,
        pin_mem=pin_mem,
        persistent=False,
    )


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

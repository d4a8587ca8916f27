"""From image files to normalised batches on the device.

8-bit files are decoded, cropped and flipped as uint8 in worker processes, travel as uint8 and
become normalised floats on the device: a quarter of the memory traffic of float images, which other
files become when they are decoded.
"""

import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util import data, watching
from util.decoding import ImageSource, UnreadableImage, printable, read_image
from util.distributed import Process
from util.errors import UserError, say, warn
from util.image_files import Images
from util.pixels import RGB, PixelFormat
from util.seeding import derive_seed, seed_generators

MAX_UNREADABLE_SHARE = 0.01
MIN_UNREADABLE = 10  # fewer unreadable images never end a run, whatever their share
SHARED_MEMORY = "/dev/shm"


class Batch(NamedTuple):
    """One process's images of a training step, on the device."""

    step: int
    imgs: Tensor  # [N, bands, height, width], normalised
    labels: Tensor  # [N]
    unreadable: int  # how many images were unreadable and are replaced


class ImageDataset(torch.utils.data.Dataset):
    """Images and their labels, transformed as a function of (seed, epoch, index).

    `dataset[epoch, index]` is (image [bands, height, width] as `read_image` gives it, label, index,
    why the image is unreadable, or ""); an unreadable one is replaced, with its label, by one that
    the seed chooses. `decode` is "full", or "scaled" to decode large JPEGs at a reduced size.
    """

    def __init__(
        self,
        paths: Images,
        transform: data.Transform,
        seed: int,
        pixels: PixelFormat = RGB,
        decode: str = "full",
    ) -> None:
        self.paths = paths
        self.transform = transform
        self.seed = seed
        self.pixels = pixels
        self.reduces = decode == "scaled" and pixels.is_8_bit_rgb and pixels.bands is None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int, str]:
        epoch, index = key
        seed_generators(self.seed, "augmentation", epoch, index)
        problem = ""
        source = index
        for _ in range(10):
            try:
                image = self._read_and_transform(self.paths.source(source))
                break
            except UnreadableImage as error:
                reason, name = str(error), printable(self.paths[source])
                problem = problem or (reason if name in reason else f"{name} {reason}")
                source = torch.randint(len(self.paths), ()).item()
        else:  # ten unreadable in a row, each of which is warned of
            image = self.transform(torch.zeros(self.pixels.in_chans, 1, 1, dtype=torch.uint8))
        return image, self.paths.labels[source], index, problem

    def _read_and_transform(self, source: ImageSource) -> Tensor:
        if not self.reduces:
            return self.transform(read_image(source, self.pixels))
        view = None

        def reduction(height: int, width: int) -> int:
            nonlocal view
            view = self.transform.draw(height, width)
            return view.reduction()

        image = read_image(source, self.pixels, reduction)
        return self.transform(image, view)


def collate(samples: list[tuple[Tensor, Tensor, int, str]]) -> tuple[Tensor, Tensor, Tensor, list]:
    """A batch of an `ImageDataset`'s samples."""
    images, labels, indices, problems = zip(*samples, strict=True)
    return data.stack(images), torch.stack(labels), torch.tensor(indices), list(problems)


class ShuffledBatches(torch.utils.data.Sampler):
    """One process's batches: keys (epoch, index) of `ImageDataset`.

    An epoch is one permutation of the images, a function of (seed, epoch). Each step takes the
    next batch_size x world_size of them, however many processes share them; images at the end
    that fill no such batch are dropped. Set `epoch` and `first_step` before iterating.
    """

    def __init__(self, num_images: int, batch_size: int, process: Process, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.process = process
        self.seed = seed
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.process.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng(derive_seed(self.seed, "order", self.epoch))
        order = generator.permutation(self.num_images)
        for step in range(self.first_step, len(self)):
            start = (step * self.process.world_size + self.process.rank) * self.batch_size
            batch = order[start : start + self.batch_size].tolist()
            yield [(self.epoch, index) for index in batch]


def evenly_spread(count: int, most: int | None) -> Sequence[int]:
    """The numbers below `count`; if they are more than `most`, so many of them, from 0 to the last.

    So a sorted folder's classes keep their shares.
    """
    if most is None or most >= count:
        return range(count)
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


class OrderedBatches(torch.utils.data.Sampler):
    """One process's batches in evaluation: every image once over all processes.

    With `most` there are at most that many of them, `evenly_spread`.
    """

    def __init__(
        self, num_images: int, batch_size: int, process: Process, most: int | None = None
    ) -> None:
        self.indices = evenly_spread(num_images, most)[process.rank :: process.world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class BlockedBatches(torch.utils.data.Sampler):
    """One process's batches of blocks of consecutive images, of which the processes take turns.

    Process r of w has the blocks r, r + w, ...; a batch may hold any part of them.
    """

    def __init__(self, num_images: int, block: int, batch_size: int, process: Process) -> None:
        self.num_images = num_images
        self.block = block
        self.batch_size = batch_size
        self.process = process
        self.num_blocks = -(-num_images // block)

    def __len__(self) -> int:
        own = range(self.process.rank, self.num_blocks, self.process.world_size)
        images = len(own) * self.block
        if self.num_blocks - 1 in own:
            images -= self.num_blocks * self.block - self.num_images
        return -(-images // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        blocks = range(self.process.rank, self.num_blocks, self.process.world_size)
        indices = (
            index
            for number in blocks
            for index in range(self.num_images)[number * self.block : (number + 1) * self.block]
        )
        while batch := [(0, index) for index in itertools.islice(indices, self.batch_size)]:
            yield batch


class ImageLoader:
    """A dataset's batches, as a batch sampler orders them, on a process's device.

    Args:
        dataset: the images.
        batches: `ShuffledBatches` for training, `OrderedBatches` for evaluation,
            `BlockedBatches` for features.
        process: this `Process`.
        num_workers: processes that load images; 0 to load them in this one.
        pin_mem: whether to use page-locked memory on the way to a CUDA device.
        persistent: whether to keep the workers between epochs.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batches: ShuffledBatches | OrderedBatches | BlockedBatches,
        process: Process,
        *,
        num_workers: int,
        pin_mem: bool,
        persistent: bool = True,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.images_per_step = batches.batch_size * process.world_size
        self.device = process.device
        self._warned: set[int] = set()
        self._has_checked_memory = False
        self._loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_mem and process.device.type == "cuda",
            persistent_workers=persistent and num_workers > 0,
            # A worker blocks signals, which needs a single thread.
            multiprocessing_context=worker_context(num_workers),
            worker_init_fn=_leave_signals_to_the_main_process,
            collate_fn=collate,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """A training epoch's batches, from `first_step` on."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        for step, (imgs, labels, indices, problems) in enumerate(self._batches(), first_step):
            watching.at_step(epoch, step)
            yield Batch(step, imgs, labels, self._warn_unreadable(indices, problems))

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """All batches as (imgs, labels, indices, readable), the last two [N] on the CPU.

        An image that is not readable is warned of and replaced, see `ImageDataset`.
        """
        for number, (imgs, labels, indices, problems) in enumerate(self._batches()):
            watching.at_long(f"batch {number} of {self.dataset.paths.origin}")
            self._warn_unreadable(indices, problems)
            yield imgs, labels, indices, torch.tensor([not problem for problem in problems])

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The blocks of `BlockedBatches` as (imgs, indices, readable), see `eval_batches`."""
        size = self.batches.block
        held: tuple[Tensor, ...] = ()
        for imgs, _, indices, readable in self.eval_batches():
            batch = imgs, indices, readable
            held = tuple(map(torch.cat, zip(held, batch, strict=True))) if held else batch
            while len(held[0]) >= size:
                yield held[0][:size], held[1][:size], held[2][:size]
                held = tuple(part[size:] for part in held)
        if held and len(held[0]):
            yield held[0], held[1], held[2]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:
        if self._loader.num_workers and not self._has_checked_memory:
            self._has_checked_memory = True
            self._check_shared_memory()
        pixels = self.dataset.pixels
        for images, labels, indices, problems in self._loader:
            images = images.to(self.device, non_blocking=True)
            imgs = data.normalize(images, pixels.mean, pixels.std)
            yield imgs, labels.to(self.device, non_blocking=True), indices, problems

    def _check_shared_memory(self) -> None:
        """Refuse, with a UserError, to hand over more batches in shared memory than it holds.

        A worker that finds it full dies, or only its thread does and the run waits for ever.
        """
        if not os.path.isdir(SHARED_MEMORY):  # as on macOS
            return
        image, *_ = self.dataset[0, 0]
        workers, processes = self._loader.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        batches = workers * (self._loader.prefetch_factor or 2) * processes
        size = image.nbytes if self.dataset.paths.has_8_bits else 4 * image.numel()
        needed = batches * self.batches.batch_size * size
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            raise UserError(
                f"{SHARED_MEMORY} has {free >> 20} MiB free, and {workers} workers for each of "
                f"{processes} processes need up to {needed >> 20}: give a container more "
                f"(docker run --shm-size={(needed >> 30) + 1}g), or lower --num_workers"
            )

    def _warn_unreadable(self, indices: Tensor, problems: list[str]) -> int:
        """Warn once about each unreadable image; returns how many there are."""
        for index, problem in zip(indices.tolist(), problems, strict=True):
            if problem and index not in self._warned:
                self._warned.add(index)
                say(f"warning: an image is unreadable and skipped: {problem}", sys.stderr)
        return len(problems) - problems.count("")


def train_loader(
    paths: Images,
    transform: data.Transform,
    process: Process,
    *,
    batch_size: int,
    accum_iter: int,
    seed: int,
    num_workers: int,
    pin_mem: bool,
    pixels: PixelFormat = RGB,
    decode: str = "full",
) -> ImageLoader:
    """One process's shuffled, augmented batches of `batch_size` images.

    Raises:
        UserError: there are fewer images than one update of all processes needs.
    """
    effective_batch = batch_size * accum_iter * process.world_size
    if len(paths) < effective_batch:
        raise UserError(
            f"{paths.origin} has {len(paths)} training images, fewer than one global "
            f"batch of {effective_batch} (batch_size x accum_iter x processes): lower "
            "--batch_size, with --accept_changes if the training has begun"
        )
    batches = ShuffledBatches(len(paths), batch_size, process, seed)
    dataset = ImageDataset(paths, transform, seed, pixels, decode)
    if decode == "scaled" and not dataset.reduces:
        warn("--decode scaled is for the three bands of 8-bit RGB: these images are read in full")
    return ImageLoader(dataset, batches, process, num_workers=num_workers, pin_mem=pin_mem)


def eval_loader(
    paths: Images,
    input_size: int | tuple[int, int],
    process: Process,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_mem: bool,
    pixels: PixelFormat = RGB,
    decode: str = "full",
    most: int | None = None,
) -> ImageLoader:
    """Every image once over all processes, in order, resized and cropped at the centre.

    With `most` there are at most that many, spread evenly over them.
    """
    return ImageLoader(
        ImageDataset(paths, data.eval_transform(input_size), seed, pixels, decode),
        OrderedBatches(len(paths), batch_size, process, most),
        process,
        num_workers=num_workers,
        pin_mem=pin_mem,
        persistent=False,
    )


def block_loader(
    paths: Images,
    input_size: int | tuple[int, int],
    process: Process,
    *,
    block: int,
    batch_size: int,
    num_workers: int,
    pin_mem: bool,
    pixels: PixelFormat = RGB,
) -> ImageLoader:
    """Every image once over all processes, in blocks of consecutive ones, cropped as by
    `eval_loader`, and to the same bits whatever else is in a batch."""
    transform = data.eval_transform(input_size, as_floats=True)
    return ImageLoader(
        ImageDataset(paths, transform, 0, pixels),
        BlockedBatches(len(paths), block, batch_size, process),
        process,
        num_workers=num_workers,
        pin_mem=pin_mem,
        persistent=False,
    )


def map_in_order(dataset: torch.utils.data.Dataset, num_workers: int) -> Iterator[Any]:
    """A dataset's items in their order, made by `num_workers` processes, an item a worker ahead."""
    yield from torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
        multiprocessing_context=worker_context(num_workers),
        worker_init_fn=_leave_interrupts_to_the_main_process,
    )


def worker_context(num_workers: int) -> str | None:
    """How workers start: only a forked one starts with a single thread."""
    return "fork" if num_workers and sys.platform == "linux" else None


def _leave_interrupts_to_the_main_process(_worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_signals_to_the_main_process(_worker_id: int) -> None:
    """Keep a worker alive when a scheduler or a terminal signals every process of a run.

    The main process still needs its batches to finish the step and save. Only its own SIGTERM
    ends a worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end_with_the_main_process() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_with_the_main_process, daemon=True).start()

"""What several tests share: images, commands in this process or in their own, finished runs."""

import functools
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# For scripts in processes of their own: where they import from, and one thread each.
os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["benchmarks.train_step", "tiny_finetune", "tiny_linprobe", "tiny_pretrain"]
)


# ---- images


def write_images(folder, count, size=(12, 10), seed=0):
    """Write `count` PNG images of smooth random colours, named 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        coarse = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / f"{index:03d}.png")


@functools.cache
def photograph(width, height, seed=0):
    """An RGB image of smooth colours with some texture."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 40 + 3, width // 40 + 3, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    textured = smooth + random.normal(0, 5, (height, width, 1))
    return Image.fromarray(textured.clip(0, 255).astype(np.uint8))


def in_mode(mode):
    """A photograph in one of Pillow's modes; where there is an alpha channel, it varies."""
    image = photograph(61, 47)
    if mode == "P":
        return image.quantize(40)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(photograph(61, 47, seed=1).convert("L"))
    return image.convert(mode)


def encode(image_format, mode="RGB", **options):
    """A photograph as the bytes of a file; with `save_all` an animation that begins with it."""
    if "save_all" in options:
        options = options | {"append_images": [photograph(61, 47, seed=2).copy()]}
    buffer = io.BytesIO()
    in_mode(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def fill(root, names, content=None):
    """Write files of these names below `root`: readable images, if no content is given."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(encode("JPEG") if content is None else content)
    return root


def relative_names(paths):
    """What an ImagePaths lists, without its folder."""
    return [os.path.relpath(path, os.fsdecode(paths.root)) for path in paths]


def pixels(image):
    """A Pillow image in RGB as a tensor [3, height, width]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def difference(image, expected):
    """Of two uint8 images in levels: (the largest, the mean)."""
    assert image.dtype == torch.uint8
    assert image.shape == expected.shape
    levels = (image.int() - expected.int()).abs()
    return levels.max().item(), levels.float().mean().item()


def resize_in_passes(image, height, width):
    """Pillow's bicubic resize, widths first, as it always was before Pillow chose an order.

    Its own choice rounds the pixels in between at another place, which moves a quarter of them by
    one level.
    """
    return image.resize((width, image.height), Image.BICUBIC).resize((width, height), Image.BICUBIC)


# ---- commands


def command_line(flags):
    """Flags as words: {"lr": 1, "compile": True} becomes ["--lr", "1", "--compile"]."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(str(v) for v in values if v is not True)]
    return words


def runner(command):
    return lambda flags: command.main(command.get_args_parser().parse_args(command_line(flags)))


def start_fresh(script, flags, processes=1, torchrun=("--standalone",), **popen):
    """Start a script as users do, by Python or torchrun with these flags; returns a Popen."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *command_line(flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


class ForkedScript:
    """A script, used like a Popen, without the seconds that its imports take.

    It is forked from an interpreter that has done them. Several processes of it share their
    outputs; what torchrun does besides starting them is missing.
    """

    def __init__(self, script, flags, processes=1, environment=()):
        reader, writer = FORKS.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        self._stderr = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        argv = [str(ROOT / script), *command_line(flags)]
        # As torchrun does, this process holds the store, which outlives every rank.
        self._store = torch.distributed.TCPStore("localhost", 0, is_master=True)
        environment = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            **dict(environment),
        }
        self._logs = tempfile.TemporaryDirectory()
        attempt = Path(self._logs.name) / "attempt_0"
        attempt.mkdir()
        self._ranks = []
        for rank in map(str, range(processes)):
            environment |= {"RANK": rank, "LOCAL_RANK": rank}
            environment |= {"TORCHELASTIC_ERROR_FILE": str(attempt / rank / "error.json")}
            outputs = (writer, self._stderr.name)
            self._ranks.append(FORKS.Process(target=run_here, args=(argv, environment, *outputs)))
            self._ranks[-1].start()
        writer.close()
        self.pid = self._ranks[0].pid

    @property
    def returncode(self):
        return next((rank.exitcode for rank in self._ranks if rank.exitcode), 0)

    def send_signal(self, number, only=None):
        """To all processes, or to one rank."""
        for rank in self._ranks if only is None else [self._ranks[only]]:
            if rank.is_alive():
                os.kill(rank.pid, number)

    def wait_for(self, rank, timeout=120):
        """A rank's exit code, once it has ended."""
        self._ranks[rank].join(timeout)
        return self._ranks[rank].exitcode

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self):
        for rank in self._ranks:
            rank.join()
        return self.returncode

    def read_stderr(self):
        """All that is on stderr by now."""
        with open(self._stderr.name) as file:
            return file.read()

    def communicate(self, timeout=120):
        """The rest of stdout, and stderr; kills what still runs after so many seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout, self._stderr:
            out = self.stdout.read()
            self.wait()
            timer.cancel()
            return out, self._stderr.read()


def run_here(argv, environment, stdout, stderr):
    """In a forked process: run a script as the main module."""
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    os.environ |= environment
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run(script, flags, processes=1, *, timeout=120, start=ForkedScript):
    """Run a script to its end; returns (exit code, stdout, stderr)."""
    process = start(script, flags, processes)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


# ---- runs that are killed, and what finished ones left


# Flags of a run of 27 steps, in 15 updates, that saves after each. Its first checkpoint is on the
# disk when the fifth of its lines on steps is shown: the save after step 4 waits for it.
KILL_FLAGS = {
    "input_size": 8,
    "batch_size": 2,
    "accum_iter": 2,
    "epochs": 3,
    "warmup_epochs": 1,
    "clip_grad": 1,
    "save_minutes": 0,
    "log_every": 1,
    "num_workers": 0,
    "amp": "off",
    "device": "cpu",
}


def pretrain_kill_flags(image_folder, output_dir, workers=0):
    """Flags of tiny_pretrain.py for a run to kill."""
    return KILL_FLAGS | {
        "data_path": image_folder,
        "output_dir": output_dir,
        "model": "tiny_test_model",
        "lr": 1e-2,
        "num_workers": workers,
    }


def linprobe_kill_flags(image_folder, encoder, output_dir):
    """Flags of tiny_linprobe.py for a run to kill."""
    return KILL_FLAGS | {
        "data_path": image_folder,
        "output_dir": output_dir,
        "finetune": encoder,
        "model": "tiny_test_vit",
        "nb_classes": 2,
        "lr": 1e-3,
    }


def finetune_kill_flags(image_folder, encoder, output_dir):
    """Flags of tiny_finetune.py for a run to kill."""
    augmentation = {"drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0}
    return linprobe_kill_flags(image_folder, encoder, output_dir) | augmentation


def kill_and_resume(script, flags, number, kill_line):
    """Send a run a signal after so many lines on its steps, then run it to its end.

    With two steps an update and `save_minutes` 0, the fifth line tells of a checkpoint.
    """
    process = ForkedScript(script, flags)
    shown = (line for line in process.stdout if line.startswith("epoch "))
    for _ in range(kill_line):
        next(shown)
    process.send_signal(number)
    rest, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    elif process.returncode != 0:  # it may have been done when the signal came
        assert process.returncode == 128 + number, err
        assert f"{number.name}: stopped after step" in rest
    code, out, err = run(script, flags)
    assert code == 0, err
    assert "resuming" in out


def final_state(output_dir, figure="val_loss"):
    """Weights, optimizer state and logged losses of a finished run."""
    contents = load_checkpoint(output_dir / "checkpoint-last.pth")
    records = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    losses = [(r["epoch"], r["train_loss"], r[figure]) for r in records]
    return contents["model"], contents["optimizer"], losses


def assert_same_bits(state, other):
    """Two `final_state`s are equal to the last bit."""
    assert state[2] == other[2]
    for weights, others in ((state[0], other[0]), (state[1]["state"], other[1]["state"])):
        flat, others = (
            {
                (k, n): t
                for k, v in d.items()
                for n, t in (v if isinstance(v, dict) else {0: v}).items()
            }
            for d in (weights, others)
        )
        assert flat.keys() == others.keys()
        assert all(torch.equal(flat[key], others[key]) for key in flat)


def assert_ended_as_undisturbed(script, flags, processes=1):
    """A finished run left the same as one that is now run without disturbance."""
    undisturbed = flags["output_dir"] / "undisturbed"
    code, _, err = run(script, flags | {"output_dir": undisturbed}, processes)
    assert code == 0, err
    assert_same_bits(final_state(flags["output_dir"]), final_state(undisturbed))


def events(log_dir):
    """TensorBoard scalars as {tag: {x: value}}, each x once, and the image tags with their x."""
    accumulator = EventAccumulator(str(log_dir)).Reload()
    scalars = {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }
    for tag, curve in scalars.items():
        assert len(curve) == len(accumulator.Scalars(tag)), f"{tag} has an x twice"
    images = {
        tag: [event.step for event in accumulator.Images(tag)]
        for tag in accumulator.Tags()["images"]
    }
    return scalars, images

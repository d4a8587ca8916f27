"""Images a second of training steps on synthetic images: this project's and its peers'.

    python -m benchmarks.train_step --model mae_vit_base_patch16 --batch_size 32
    python -m benchmarks.train_step --task finetune --model vit_base_patch16 --batch_size 32

A side is NAME:AMP or NAME:AMP:compile. NAME is ours or transformers. AMP is off (float32), bf16,
fp16 or auto, which stands for one of these on each device.

Every side runs in its own process. After a warm-up they take turns, one at a time, in --pairs
rounds. A ratio compares two sides' turns of the same round. Shown are the median, the lowest and
the highest of the rounds.

    MFU = images/s x operations an image / peak

The operations are those that the method needs, however a side computes it. The peak is measured
in the same round: square matrix products in the side's type.
"""

import contextlib
import math
import multiprocessing
import resource
import time
from functools import partial

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import torch

from benchmarks import report, table
from benchmarks.sides import CLASSES, MASK_RATIO, SIDES, Setting
from util import cli
from util.distributed import select_device
from util.errors import UserError
from util.precision import resolve_amp

AMPS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SIDES = {  # on a CPU few, because those of a large model must fit into memory together
    "cpu": ["ours:auto", "ours:off", "transformers:off"],
    "cuda": ["ours:auto:compile", "ours:auto", "transformers:bf16", "transformers:bf16:compile"],
}


def get_args_parser():
    parser = report.parser(__doc__, pairs=5)
    parser.add_argument("--task", choices=["pretrain", "finetune"], default="pretrain")
    parser.add_argument("--model", default="mae_vit_base_patch16", help="name of the model")
    parser.add_argument("--input_size", type=cli.integer(1), default=224, help="pixels")
    parser.add_argument("--batch_size", type=cli.integer(1), default=32, help="images per step")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="what to time (see above)")
    parser.add_argument("--turn", type=cli.number(), default=5.0, help="seconds per turn, at least")
    return parser


def main(args):
    device = select_device(args.device)
    auto = next(amp for amp in AMPS if AMPS[amp] is resolve_amp("auto", device))
    asked = args.sides or DEFAULT_SIDES[device.type]
    labels = dict.fromkeys(label.replace(":auto", f":{auto}") for label in asked)
    sides = {}
    for label in labels:
        setting = setting_of(label, args, device)
        try:
            sides[label] = Side(label, setting)
        except UserError as error:
            print(error, flush=True)
    if not sides:
        raise UserError(f"none of the sides {' '.join(labels)} can be timed")
    amps = {label: label.split(":")[1] for label in sides}
    turns = {label: partial(steps_per_second, side, args.turn) for label, side in sides.items()}
    turns |= {amp: partial(matmul_flop_per_s, device, AMPS[amp]) for amp in amps.values()}
    measured = report.take_turns(turns, args.pairs)

    flop = training_flop(setting)
    peers = [label for label in sides if not label.startswith("ours")]
    results = {}
    for label, side in sides.items():
        images_per_s = [args.batch_size * steps for steps in measured[label]]
        results[label] = {
            "images_per_s": report.median_and_range(images_per_s),
            "mfu": report.ratio([flop * i for i in images_per_s], measured[amps[label]], digits=3),
            "peak_memory_gib": round(side.peak_memory_gib, 2),
            "times_as_fast_as": {
                peer: report.ratio(measured[label], measured[peer])
                for peer in peers
                if label not in peers
            },
        }
    written = report.write(
        f"{args.task}_{args.model}_{args.input_size}px_{device.type}",
        results,
        gflop_per_image=round(flop / 1e9, 2),
        amp_auto=auto,
        **{name: getattr(args, name) for name in "task model input_size batch_size pairs".split()},
    )
    print(table.step_table(written))


def setting_of(label, args, device):
    name, _, choice = label.partition(":")
    amp, _, compiled = choice.partition(":")
    if name not in SIDES or amp not in AMPS or compiled not in ("", "compile"):
        raise UserError(f"--sides {label}: a side is NAME:AMP or NAME:AMP:compile, see --help")
    return Setting(
        args.task, args.model, args.input_size, args.batch_size, device, amp, bool(compiled)
    )


def steps_per_second(side, seconds):
    """A side's speed in a turn of at least so many seconds."""
    steps = steps_in(seconds, side.seconds_per_step)
    return steps / side.train(steps)


def steps_in(seconds, seconds_per_step):
    """How many whole steps, and at least one, fill so many seconds."""
    return max(1, math.ceil(seconds / seconds_per_step))


def matmul_flop_per_s(device, dtype):
    """The device's peak, as measured: products of large square matrices."""
    size, times = (8192 if device.type == "cuda" else 2048), 30
    shape = (3, size, size)
    one, other, product = torch.randn(shape, device=device, dtype=dtype or torch.float32)

    def multiply(times):
        for _ in range(times):
            torch.mm(one, other, out=product)

    return times * 2 * size**3 / timed(multiply, times, device)


def timed(train, steps, device):
    """Seconds that so many steps take."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    train(steps)
    synchronize()
    return time.perf_counter() - started


class Side:
    """A side in its own process, which works only while it is asked to.

    Attributes:
        process: the process.
        peak_memory_gib: the most memory that it has used.
        seconds_per_step: about how long a step takes.

    Raises:
        UserError: it can't be timed.
    """

    def __init__(self, label, setting):
        context = multiprocessing.get_context("spawn")
        self._label = label
        self._pipe, pipe = context.Pipe()
        self.process = context.Process(target=serve, args=(pipe, label, setting), daemon=True)
        self.process.start()
        pipe.close()
        self.seconds_per_step = self.train(1)

    def train(self, steps):
        """Take so many steps; returns how many seconds they took."""
        try:
            self._pipe.send(steps)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"the process of {self._label} has ended, most likely for want of memory: take "
                "fewer --sides or a smaller --batch_size"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        seconds, self.peak_memory_gib = answer
        return seconds


def serve(pipe, label, setting):
    """A side's process: answers numbers of steps with seconds and the peak memory in GiB."""
    torch.manual_seed(0)
    try:
        train = SIDES[label.split(":")[0]](setting)
    except (ImportError, UserError) as error:
        pipe.send(UserError(f"{label} can't be timed: {error}"))
        return
    train(1)  # compiles
    with contextlib.suppress(EOFError):  # ends with the process that asks
        while steps := pipe.recv():
            seconds = timed(train, steps, setting.device)
            if setting.on_gpu:
                peak = torch.cuda.max_memory_allocated(setting.device) / 2**30
            else:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send((seconds, peak))


def training_flop(setting):
    """Floating point operations per image: matrix products, forward and backward.

    The backward pass counts twice the forward pass. In masked autoencoders every patch is projected
    and, with the class token, decoded, as in the paper.
    """
    model = setting.build_model()
    patches, width = model.patch_embed.num_patches, model.cls_token.shape[-1]
    patch_values = 3 * math.prod(model.patch_embed.patch_size)
    projection = 2 * patches * patch_values * width
    if setting.task == "finetune":
        return 3 * (projection + blocks_flop(model.blocks, 1 + patches) + 2 * width * CLASSES)
    visible = 1 + int(patches * (1 - MASK_RATIO))
    decoder_width = model.mask_token.shape[-1]
    encoder = projection + blocks_flop(model.blocks, visible)
    decoder = 2 * visible * width * decoder_width
    decoder += blocks_flop(model.decoder_blocks, 1 + patches)
    decoder += 2 * (1 + patches) * decoder_width * patch_values
    return 3 * (encoder + decoder)


def blocks_flop(blocks, tokens):
    """Forward pass of transformer blocks: their linear layers, and attention's two products."""
    width = blocks[0].norm1.normalized_shape[0]
    return len(blocks) * (2 * 12 * tokens * width**2 + 2 * 2 * tokens**2 * width)


if __name__ == "__main__":
    cli.run(main, get_args_parser())

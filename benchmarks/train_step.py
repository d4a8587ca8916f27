"""Images a second of training steps on synthetic images: this project's and its peers'.

    python -m benchmarks.train_step --model mae_vit_base_patch16 --batch_size 32
    python -m benchmarks.train_step --task finetune --model vit_base_patch16 --batch_size 32

A side is NAME:AMP or NAME:AMP:compile. NAME is ours, transformers, lightly (where it is installed),
or plain, which is this project's model in an unoptimised loop: eager, attention by an explicit
softmax, unfused AdamW, images sent as floats, and a wait for the device in each step. AMP is off
(float32), bf16, fp16 or auto, which stands for one of these on each device.

Every side runs in its own process. After a warm-up they take turns, one at a time, in --pairs
rounds. A ratio compares two sides' turns of the same round. Shown are the median, the lowest and
the highest of the rounds. A side that can't start, or dies, is left out.

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

PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
AMPS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SIDES = {  # on a CPU few, because those of a large model must fit into memory together
    "cpu": ["ours:auto", "ours:off", "transformers:off"],
    "cuda": (
        "ours:auto:compile ours:auto plain:auto transformers:auto transformers:auto:compile "
        "lightly:auto"
    ).split(),
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
    settings = {label: setting_of(label, args, device) for label in labels}
    started = {label: Side(label, setting) for label, setting in settings.items()}  # all at once
    sides = {}
    for label, side in started.items():
        try:
            side.warm_up()
            sides[label] = side
        except UserError as error:
            print(error, flush=True)
    amps = {label: label.split(":")[1] for label in sides}
    turns = {amp: partial(peak_flop_per_s, device, AMPS[amp]) for amp in amps.values()}
    turns |= {label: partial(steps_per_second, side, args.turn) for label, side in sides.items()}
    measured = report.take_turns(turns, args.pairs, may_fail=True)
    timed_sides = [label for label in sides if label in measured]
    if not timed_sides:
        raise UserError(f"none of the sides {' '.join(labels)} can be timed")

    flop = training_flop(settings[timed_sides[0]])
    peers = [label for label in timed_sides if not label.startswith("ours")]
    results = {}
    for label in timed_sides:
        images_per_s = [args.batch_size * steps for steps in measured[label]]
        results[label] = {"images_per_s": report.median_and_range(images_per_s)}
        if peak := measured.get(amps[label]):
            results[label]["mfu"] = report.ratio([flop * i for i in images_per_s], peak, digits=3)
        results[label] |= {
            "peak_memory_gib": round(sides[label].peak_memory_gib, 2),
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


def peak_flop_per_s(device, dtype):
    """`matmul_flop_per_s`; a UserError where it fails, as on a GPU that the sides fill."""
    try:
        return matmul_flop_per_s(device, dtype)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the peak can't be measured, so there is no MFU: {reason}") from error
    finally:
        free_memory(device)


def matmul_flop_per_s(device, dtype):
    """The device's peak, as measured: products of large square matrices."""
    size, times = PEAK_SIZE[device.type], 30
    shape = (3, size, size)
    one, other, product = torch.randn(shape, device=device, dtype=dtype or torch.float32)

    def multiply(times):
        for _ in range(times):
            torch.mm(one, other, out=product)

    return times * 2 * size**3 / timed(multiply, times, device)


def free_memory(device):
    """Give unused memory of a GPU back to it, for the other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    """

    def __init__(self, label, setting):
        context = multiprocessing.get_context("spawn")
        self._label = label
        self._pipe, pipe = context.Pipe()
        self.process = context.Process(target=serve, args=(pipe, label, setting), daemon=True)
        self.process.start()
        pipe.close()

    def warm_up(self):
        """Take the first steps, which compile; a UserError if the side can't be timed."""
        self.seconds_per_step = self.train(1)

    def train(self, steps):
        """Take so many steps; returns how many seconds they took.

        Raises:
            UserError: the side can't be timed.
        """
        try:
            with contextlib.suppress(OSError):  # one that has ended may have said why
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
    """A side's process: answers numbers of steps with seconds and the peak memory in GiB.

    Between its turns a side on a GPU holds only weights and optimizer.
    """
    torch.manual_seed(0)
    try:
        if setting.on_gpu:
            torch.cuda.set_device(setting.device)
        train = SIDES[label.split(":")[0]](setting)
        is_warm = False
        while steps := pipe.recv():
            if not is_warm:
                train(1)  # compiles, and takes the memory
            seconds = timed(train, steps, setting.device)
            if setting.on_gpu:
                peak = torch.cuda.max_memory_allocated() / 2**30
            else:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            is_warm = not setting.on_gpu
            free_memory(setting.device)
            pipe.send((seconds, peak))
    except EOFError:
        pass  # the process that asks has ended
    except ImportError as error:
        pipe.send(UserError(f"{label} can't be timed, its package is missing or too old: {error}"))
    except UserError as error:
        pipe.send(UserError(f"{label} can't be timed: {error}"))
    except torch.OutOfMemoryError:
        pipe.send(UserError(f"{label} can't be timed: the GPU has no memory left for it"))


def training_flop(setting):
    """Floating point operations per image: matrix products, forward and backward.

    The backward pass counts twice the forward pass. In masked autoencoders every patch is projected
    and, with the class token, decoded, as in the paper.
    """
    model = setting.build_sizes()
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

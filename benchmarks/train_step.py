"""Images a second of training steps on synthetic images: this project's, and its peers' beside it.

    python -m benchmarks.train_step --model mae_vit_base_patch16 --batch_size 32
    python -m benchmarks.train_step --task finetune --model vit_base_patch16 --batch_size 32

A side is NAME:AMP or NAME:AMP:compile. NAME is ours, transformers, lightly (where it is installed;
pre-training only) or plain: this project's model trained without a thought of speed, eager, with
attention by an explicit softmax, AdamW unfused, images that travel as floats and a host sync each
step. AMP is off (float32), bf16, fp16 or auto.

Every side lives in a process of its own. They take turns, one at a time, --pairs times, after as
many steps as it takes to compile and warm up. A ratio is that of two turns of one round; shown are
the median over the rounds, the lowest and the highest. MFU is the share of the peak, which is that
of products of square matrices in the same type, computed as our linear layers are and timed in the
same rounds, for the floating point operations that the method needs, however a side computes it.
"""

import math
import multiprocessing
import resource
import statistics
import time
import traceback
from functools import partial

import torch

from benchmarks import report
from benchmarks.sides import CLASSES, MASK_RATIO, SIDES, Setting, matmul_size
from util import cli
from util.distributed import select_device
from util.errors import UserError


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=["pretrain", "finetune"], default="pretrain")
    parser.add_argument("--model", default="mae_vit_base_patch16", help="name of the model")
    parser.add_argument("--input_size", type=cli.integer(1), default=224, help="pixels")
    parser.add_argument("--batch_size", type=cli.integer(1), default=32, help="images of a step")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is some), cuda or cpu"
    )
    parser.add_argument(
        "--sides", nargs="+", metavar="SIDE", help="what is timed (see above); ours come first"
    )
    parser.add_argument("--pairs", type=cli.integer(1), default=5, help="rounds of turns")
    parser.add_argument(
        "--turn", type=cli.number(), default=5.0, help="seconds of a turn, at least"
    )
    parser.add_argument(
        "--name", help="of the file in benchmarks/results; if not given, as it is set"
    )
    return parser


AMPS = ("off", "bf16", "fp16", "auto")
DEFAULT_SIDES = {  # on a CPU not lightly's: all sides of a large model must fit into the memory
    "cpu": "ours:off ours:bf16 plain:off transformers:off".split(),
    "cuda": "ours:auto:compile ours:auto plain:fp16 transformers:bf16 "
    "transformers:bf16:compile lightly:bf16".split(),
}


def main(args):
    device = select_device(args.device)
    labels = args.sides or DEFAULT_SIDES[device.type]
    settings = {label: setting_of(label, args, device) for label in labels}
    sides = start(settings)
    if not sides:
        raise UserError(f"none of the sides {' '.join(labels)} can be timed")
    sides |= start(
        {
            label: setting_of(label, args, device)
            for label in sorted({f"matmul:{side.split(':')[1]}" for side in sides})
        }
    )
    turns = {label: partial(side.steps_per_second, args.turn) for label, side in sides.items()}
    speeds = report.take_turns(turns, args.pairs)
    memory = {label: side.close() for label, side in sides.items()}

    flop = training_flop(settings[labels[0]])
    peaks = {label: [s * 2 * matmul_size(device) ** 3 for s in speeds[label]] for label in speeds}
    results = {}
    for label in labels:
        if label not in sides:
            continue
        images_per_s = [speed * args.batch_size for speed in speeds[label]]
        peak = peaks[f"matmul:{label.split(':')[1]}"]
        shares = [speed * flop / p for speed, p in zip(images_per_s, peak, strict=True)]
        results[label] = {
            "images_per_s": report.median_and_range(images_per_s),
            "seconds_per_step": round(args.batch_size / statistics.median(images_per_s), 4),
            "mfu": report.median_and_range(shares, digits=3),
            "peak_memory_gib": round(memory[label], 2),
            "times_as_fast_as": {
                peer: report.ratio(speeds[label], speeds[peer])
                for peer in labels
                if peer in sides and label.startswith("ours") and not peer.startswith("ours")
            },
        }
        show(label, results[label])
    report.write(
        args.name or f"{args.task}_{args.model}_{args.input_size}px_{device.type}",
        results,
        gflop_per_image=round(flop / 1e9, 2),
        matmul_peak_tflop_per_s={
            label.split(":")[1]: report.median_and_range([p / 1e12 for p in peak], digits=3)
            for label, peak in peaks.items()
            if label.startswith("matmul")
        },
        **{name: getattr(args, name) for name in "task model input_size batch_size pairs".split()},
    )


def setting_of(label, args, device):
    name, _, choice = label.partition(":")
    amp, _, compiled = choice.partition(":")
    if name not in SIDES or amp not in AMPS or compiled not in ("", "compile"):
        raise UserError(f"--sides {label}: a side is NAME:AMP or NAME:AMP:compile, see --help")
    return Setting(
        args.task, args.model, args.input_size, args.batch_size, device, amp, bool(compiled)
    )


def start(settings):
    """Sides in processes of their own, by label; one that can't start is told of and left out."""
    sides = {label: Side(label, setting) for label, setting in settings.items()}
    for label, side in sides.items():
        if side.failure:
            print(f"{label} can't be timed: {side.failure}", flush=True)
    return {label: side for label, side in sides.items() if not side.failure}


class Side:
    """A side in a process of its own, which works only while it is asked to."""

    def __init__(self, label, setting):
        context = multiprocessing.get_context("spawn")
        self._pipe, pipe = context.Pipe()
        self._process = context.Process(target=serve, args=(pipe, label, setting), daemon=True)
        self._process.start()
        pipe.close()
        self._label = label
        self._seconds_per_step, self.failure = self._answer()

    def steps_per_second(self, seconds=0.0, count=1):
        """Of a turn of `count` steps, or as many as take about so many seconds."""
        steps = max(count, math.ceil(seconds / self._seconds_per_step))
        return steps / self._answer(steps)

    def close(self):
        """End the process; returns its peak memory in GiB."""
        memory = self._answer(None)
        self._process.join()
        return memory

    def _answer(self, *question):
        try:
            if question:
                self._pipe.send(*question)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"the process of {self._label} has ended, most likely for want of memory: take "
                "fewer --sides or a smaller --batch_size"
            ) from error


def serve(pipe, label, setting):
    """The life of a side's process: warm up, then answer numbers of steps with seconds."""
    torch.manual_seed(0)
    try:
        train = SIDES[label.split(":")[0]](setting)
        timed(train, 1, setting.device)
        seconds_per_step = timed(train, 3 if setting.on_gpu else 1, setting.device)
    except Exception as error:
        if not isinstance(error, (ImportError, UserError)):
            traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))
        return
    pipe.send((seconds_per_step / (3 if setting.on_gpu else 1), None))
    while (steps := pipe.recv()) is not None:
        pipe.send(timed(train, steps, setting.device))
    if setting.on_gpu:
        pipe.send(torch.cuda.max_memory_allocated(setting.device) / 2**30)
    else:
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def timed(train, steps, device):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    train(steps)
    synchronize()
    return time.perf_counter() - started


def training_flop(setting):
    """Floating point operations of the matrix products in a forward and a backward pass, an image.

    The backward pass counts twice the forward pass. Of masked autoencoders the class token and
    every patch are projected and decoded, as the paper has it.
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


def show(label, figures):
    speed, mfu = figures["images_per_s"], figures["mfu"]["median"]
    print(
        f"{label:24} {speed['median']:8.2f} images/s ({speed['lowest']:.2f} to "
        f"{speed['highest']:.2f})  {figures['seconds_per_step']:.3f} s a step  MFU {mfu:.0%}  "
        f"peak memory {figures['peak_memory_gib']:.2f} GiB",
        flush=True,
    )
    for peer, ratio in figures["times_as_fast_as"].items():
        print(
            f"{'':24} {ratio['median']:8.2f} times {peer} ({ratio['lowest']:.2f} to "
            f"{ratio['highest']:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main, get_args_parser())

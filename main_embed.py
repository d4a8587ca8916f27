"""Write the features of unmasked images, by a pre-trained encoder or a classifier's.

    python main_embed.py --checkpoint CKPT --data_path DIR --output OUT.npz
    python main_embed.py --checkpoint CKPT --images cat.jpg dog.jpg --output OUT.csv
    torchrun --nproc_per_node 8 main_embed.py --checkpoint CKPT --data_path DIR --output OUT.npy

Images are resized and cropped as in evaluation, and keep their order. On a CPU in float32 any
number of processes and workers and any --batch_size give the same file, byte for byte. OUT.npz
holds the arrays embeddings, filenames and, where there are class folders, labels and classes.
"""

import contextlib
import itertools
import sys
import time
from datetime import timedelta
from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import models_mae
import models_vit
from util import (
    cli,
    distributed,
    feature_files,
    features,
    flags,
    image_files,
    loading,
    pixels,
    precision,
    pretrained,
    speed,
    survey,
)
from util.checkpoint import load_checkpoint
from util.decoding import printable
from util.errors import UserError, say, warn

BLOCK_TOKENS = 4096  # computed at a time: large enough for a GPU, and little memory
SECONDS_BETWEEN_LINES = 10
POOLED = {
    "mean": "mean of the patch tokens",
    "cls": "class token",
    "none": "all patch tokens",
}


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=cli.path,
        required=True,
        metavar="FILE",
        help="a pre-training, an encoder or a classifier",
    )
    parser.add_argument(
        "--output",
        type=cli.path,
        required=True,
        metavar="FILE",
        help="file to write, whole or not at all: .npz, .npy or .csv",
    )
    parser.add_argument(
        "--pool",
        choices=features.POOLS,
        help="mean of the patch tokens, cls for the class token, none for all patch tokens; if "
        "not given, what a classifier's head sees, else mean",
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="block whose tokens to take, from 0, or from the end if negative; the final norm "
        "follows",
    )
    images = parser.add_argument_group("Images")
    images.add_argument("--images", nargs="+", type=cli.path, metavar="FILE", help="image files")
    flags.add_source_flags(images, required=False)
    images.add_argument(
        "--split",
        metavar="NAME",
        help="images of DIR/NAME, DIR/NAME.txt or DIR/NAME-*.tar; if not given, of val, else of "
        "train, or all of DIR where there is neither",
    )
    runtime = parser.add_argument_group("Runtime")
    flags.add_device_flag(runtime)
    runtime.add_argument(
        "--batch_size", type=cli.integer(1), default=64, help="images loaded at a time"
    )
    runtime.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="off",
        help="mixed precision; off is float32, as features are compared",
    )
    flags.add_pixel_flags(parser)
    flags.add_unsaid_flags(parser, target=False)
    return parser


def main(args):
    with distributed.process_group(args.device) as process:
        if process.device.type == "cpu":
            speed.keep_freed_memory()
        embed(args, process)


def embed(args, process):
    # ---- setup
    amp_dtype = precision.resolve_amp(args.amp, process.device)
    if (args.data_path is None) == (args.images is None):
        raise UserError("give the images either by --data_path or by --images")
    if args.images and args.split is not None:
        raise UserError("--split chooses among the images of --data_path: leave it out")
    output = Path(args.output)
    check_output(output, args.pool)
    if process.is_main:
        cli.make_writable(output.parent, "folder of --output")

    # ---- model
    contents = load_checkpoint(args.checkpoint)
    pixel_format = pixels.resolve(vars(args), contents, args.checkpoint)
    model, config = build_encoder(
        contents,
        args.checkpoint,
        model=args.model,
        input_size=args.input_size,
        in_chans=pixel_format.in_chans,
    )
    features.check_layer(model, args.layer)
    usual_pool = what_is_pooled(contents["model"])
    pool = args.pool or usual_pool
    del contents  # it may hold an optimizer's state
    model.to(process.device).eval()
    speed.prepare(model, process.device, amp_dtype)

    # ---- data
    if args.images:
        images = image_files.ImagePaths.named(args.images, "--images")
        images.has_8_bits = survey.survey(images, pixel_format)
    else:
        images = image_files.find_images_to_embed(args.data_path, args.split, pixel_format)
    classes = images.classes if any(images.classes) else None
    num_patches, width = model.patch_embed.num_patches, model.cls_token.shape[-1]
    loader = loading.block_loader(
        images,
        config["input_size"],
        process,
        block=max(1, BLOCK_TOKENS // num_patches),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_mem=True,
        pixels=pixel_format,
    )

    # ---- what will be done
    def line(text):
        if process.is_main:
            say(text, sys.stdout)

    block = args.layer % len(model.blocks)
    line(
        f"{args.checkpoint}: {config['model']}, block {block} of 0 to {len(model.blocks) - 1}, "
        f"{POOLED[pool]}; {process.world_size} x {process.device}, computing in "
        f"{precision.dtype_name(amp_dtype)}"
    )
    if pool == "cls" and usual_pool == "mean":
        warn(
            "--pool cls: the class token has no loss of its own in this model's training, the mean "
            "of the patch tokens is the usual choice"
        )
    if args.data_path and not args.split and images.origin != args.data_path:
        line(f"without --split, the images of {images.origin} are taken")
    if classes and "" in classes:
        without = int((images.labels == classes.index("")).sum())
        warn(f"{survey.count(without, 'image')} in no class folder: the class is an empty name")
    if output.exists():
        line(f"{output} exists, and will be replaced")
    if output.suffix == ".npy":
        line(f"a .npy holds no names: {feature_files.names_file(output)} lists them")
    if output.suffix == ".csv" and classes:
        line("a .csv holds no labels: its filenames begin with the folder that is the class")

    # ---- compute and write
    shape = (num_patches, width) if pool == "none" else (width,)
    writing = contextlib.nullcontext()
    if process.is_main:
        writing = feature_files.writing(output, shape, len(images), classes)
    embedded = unreadable = 0
    start = last_line = time.monotonic()
    bar = tqdm(total=len(images), unit=" images", disable=None if process.is_main else True)
    with writing as add, bar:
        for found, indices, number in all_features(
            model, loader, layer=args.layer, pool=pool, amp_dtype=amp_dtype
        ):
            names = [images.name(index) for index in indices.tolist()]
            check_finite(found, names, amp_dtype)
            embedded += len(names)
            unreadable += number - len(names)
            check_readable(unreadable, len(images))
            if process.is_main:
                add(found, names, images.labels[indices].numpy())
            bar.update(number)
            now = time.monotonic()
            if bar.disable and now > last_line + SECONDS_BETWEEN_LINES:
                last_line, done = now, embedded + unreadable
                eta = timedelta(seconds=round((now - start) / done * (len(images) - done)))
                rate = done / (now - start)
                line(f"{done:,} of {len(images):,} images  eta {eta}  {rate:.1f} images/s")
    summary = f"{output}: features {' x '.join(map(str, (embedded, *shape)))} in float32"
    if unreadable:
        summary += f"; {survey.count(unreadable, 'unreadable image')} left out, see above"
    line(f"{summary}; {embedded / (time.monotonic() - start):.1f} images/s")


def all_features(model, loader, *, layer, pool, amp_dtype):
    """The features of all images, block by block in their order, in every process.

    A block holds the same images whatever the batches and however many processes share them, as
    the last bits of a product may depend on its size.

    Yields:
        float32 features [N, ...] of the readable images, their indices [N], and how many images
        there were with the unreadable ones.
    """
    rounds = -(-loader.batches.num_blocks // loader.batches.process.world_size)
    own_blocks = loader.blocks()
    for _ in range(rounds):
        part = None
        for imgs, indices, readable in itertools.islice(own_blocks, 1):
            with torch.inference_mode(), precision.autocast(imgs.device, amp_dtype):
                tokens = features.tokens(model, imgs, layer)
                pooled = features.pool(model, tokens, pool)
            part = pooled.float().cpu()[readable].numpy(), indices[readable], len(indices)
        yield from filter(None, distributed.gather(part))


def check_output(output, pool):
    """Refuse an --output that can't hold the features, before they are computed."""
    if output.suffix not in feature_files.FORMATS:
        raise UserError(f"--output {output} must end in {', '.join(feature_files.FORMATS)}")
    if output.suffix == ".csv" and pool == "none":
        raise UserError(
            "a .csv holds one row of numbers an image, --pool none gives one for each patch: "
            "write .npz or .npy"
        )
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give a file such as features.npz")


def check_finite(found, names, amp_dtype):
    for name, row in zip(names, found, strict=True):
        if not np.isfinite(row).all():
            hint = "use --amp off" if amp_dtype else "the weights are of no use"
            raise UserError(f"the features of {printable(name)} are not finite: {hint}")


def check_readable(unreadable, images):
    """As in training: under 10, or up to 1%, are only left out. None can't be."""
    limit = max(loading.MIN_UNREADABLE - 1, loading.MAX_UNREADABLE_SHARE * images)
    if unreadable > limit or unreadable == images:
        raise UserError(
            f"{unreadable} of {survey.count(images, 'image')} are unreadable, see above: repair or "
            "remove them"
        )


def what_is_pooled(weights):
    """What a classifier's head sees, or the mean: the class token of a pre-training is a dummy."""
    return "cls" if "head.weight" in weights and "fc_norm.weight" not in weights else "mean"


def build_encoder(contents, path, *, model, input_size, in_chans):
    """The model without its decoder or head, and its name and input size.

    Args:
        contents: of the checkpoint at `path`, as `load_checkpoint` returns them.
        model, input_size: flags for a file that doesn't say them, or None.
        in_chans: bands of an image.

    Raises:
        UserError: it holds no encoder, doesn't fit, or says another thing than the flags.
    """
    weights, saved = contents["model"], contents.get("args") or {}
    if contents.get("command") == "main_linprobe.py":
        raise UserError(
            f"{path} holds only the head of a linear probe, and no encoder: give the file that it "
            f"was trained on, --checkpoint {saved.get('finetune')}"
        )
    config = pretrained.settle(path, saved, model=model, input_size=input_size)
    if config["model"] in models_mae.MODELS:
        encoder = models_mae.build_encoder(config, in_chans)
    elif config["model"] in models_vit.MODELS:
        pooled = {"nb_classes": 0, "global_pool": "fc_norm.weight" in weights}
        encoder = models_vit.build_saved(config | pooled, in_chans)
    else:
        known = ", ".join([*models_mae.MODELS, *models_vit.MODELS])
        raise UserError(f"unknown model {config['model']!r}: choose one of {known}")
    pretrained.load_encoder(encoder, weights, str(path), pretrained.saved_input_size(contents))
    pretrained.check_heads(encoder, contents, path)
    return encoder, config


if __name__ == "__main__":
    cli.run(main, get_args_parser())

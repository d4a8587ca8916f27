"""Show what a pre-trained masked autoencoder reconstructs.

    python main_visualize.py --checkpoint output_dir/checkpoint-last.pth --images cat.jpg dog.jpg
    python main_visualize.py --checkpoint output_dir/checkpoint-last.pth --data_path DIR
    python main_visualize.py --curves output_dir other_dir --output curves.png

Writes a grid with one row an image: the original, what the encoder sees, the reconstruction, and
the reconstruction with the visible patches pasted in. Or the curves of trainings: losses, learning
rate and accuracies by epoch.
"""

from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import numpy as np
from PIL import Image

import models_mae
from util import cli, curves, data, decoding, distributed, flags, image_files, pixels, visualize
from util.checkpoint import load_checkpoint
from util.errors import UserError


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=cli.path, metavar="FILE", help="a pre-trained model; required"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", nargs="+", metavar="FILE", help="image files to show")
    images.add_argument(
        "--data_path",
        type=cli.path,
        metavar="DIR",
        help="choose images from DIR/val, DIR/train or DIR",
    )
    parser.add_argument(
        "--num_images", type=cli.integer(1), default=8, help="images to choose from --data_path"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the picture to write; if not given, recon.png, or curves.png with --curves",
    )
    parser.add_argument(
        "--curves",
        type=cli.path,
        nargs="+",
        metavar="OUTPUT_DIR",
        help="instead draw the curves of trainings from their log.txt, to --output",
    )
    parser.add_argument(
        "--mask_ratio", type=cli.number(), help="if not given, the one of the pre-training"
    )
    parser.add_argument(
        "--picture_bands",
        type=cli.integer(0),
        nargs="+",
        metavar="I",
        help="one of the model's bands to show as grey, or three as red, green and blue; if not "
        "given, the first three, or the first where there are fewer",
    )
    parser.add_argument(
        "--seed", type=cli.integer(0), default=0, help="random seed of the masks and the choice"
    )
    flags.add_device_flag(parser)
    flags.add_pixel_flags(parser)
    unsaid = parser.add_argument_group(
        "For checkpoints that hold only weights", "this project's checkpoints store all of this"
    )
    unsaid.add_argument("--model", metavar="NAME", help="name of the model")
    flags.add_input_size_flag(unsaid, default=None)
    unsaid.add_argument(
        "--norm_pix_loss", action="store_true", default=None, help="it predicts normalised pixels"
    )
    unsaid.add_argument("--no_norm_pix_loss", action="store_false", dest="norm_pix_loss")
    return parser


def main(args):
    args.output = args.output or ("curves.png" if args.curves else "recon.png")
    if args.curves:
        draw_curves(args)
        return
    if args.checkpoint is None:
        get_args_parser().error("the following arguments are required: --checkpoint")
    if args.images is None and args.data_path is None:
        get_args_parser().error("one of the arguments --images --data_path is required")

    # ---- setup
    device = distributed.select_device(args.device)
    output = Path(args.output)
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {output} has no suffix of an image format: use .png")
    cli.make_writable(output.parent, "folder of --output")

    # ---- model
    contents = load_checkpoint(args.checkpoint)
    weights, saved = contents["model"], contents.get("args") or {}
    if "decoder_pred.weight" not in weights:
        raise UserError(
            f"{args.checkpoint} has no decoder weights, which a reconstruction needs: it holds an "
            "encoder or a classifier, use the full checkpoint of a pre-training"
        )
    config = {name: saved.get(name) for name in models_mae.DECODER_SIZES}
    for name in ("model", "input_size", "norm_pix_loss"):
        given = getattr(args, name)
        config[name] = saved.get(name, given)
        if config[name] is None:
            raise UserError(f"{args.checkpoint} does not say its {name}: add --{name}")
        if given not in (None, config[name]):
            raise UserError(f"{args.checkpoint} says {name} {config[name]}: leave out --{name}")
    pixel_format = pixels.resolve(vars(args), contents, args.checkpoint)
    bands = args.picture_bands
    if bands and (len(bands) not in (1, 3) or max(bands) >= pixel_format.in_chans):
        raise UserError(f"--picture_bands: give one or three of the {pixel_format.in_chans} bands")
    model = models_mae.build_saved(config, pixel_format.in_chans)
    mask_ratio = args.mask_ratio
    if mask_ratio is None:
        mask_ratio = saved.get("mask_ratio", 0.75)
    model.check_mask_ratio(mask_ratio)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{args.checkpoint} is not a {config['model']}: {reason}") from error
    model.to(device)

    # ---- data
    paths = args.images
    if args.data_path is not None:
        found = image_files.find_images(args.data_path, "val", pixel_format)
        if found is None:
            found = image_files.find_images(args.data_path, "train", pixel_format)
        chosen = np.random.default_rng(args.seed).permutation(len(found))[: args.num_images]
        paths = [found.source(index) for index in chosen.tolist()]
    transform = data.picture_transform(config["input_size"])
    try:
        images = [transform(decoding.read_image(path, pixel_format)) for path in paths]
    except decoding.UnreadableImage as error:
        raise UserError(f"unreadable image {error}") from error

    # ---- picture
    imgs = data.normalize(data.stack(images).to(device), pixel_format.mean, pixel_format.std)
    columns = visualize.reconstruct(
        model, imgs, mask_ratio=mask_ratio, seed=args.seed, pixels=pixel_format
    )
    try:
        visualize.draw_grid(columns, bands=bands).save(output)
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error}") from error
    print(f"{output}: {len(paths)} images, {mask_ratio:.0%} of their patches masked")
    ranges = visualize.shown_ranges(pixel_format)
    if set(ranges) != {(0.0, 1.0)}:
        shown = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
        print(
            f"black to white is the mean +- 3 std of each band, on the scale from 0 to 1: {shown}"
        )
    if model.norm_pix_loss:
        print(
            "the model predicts normalised patches: their mean and variance are those of the "
            "original, so that colours and contrast are not its own guess"
        )


def draw_curves(args):
    for name in ("checkpoint", "images", "data_path"):
        if getattr(args, name) is not None:
            raise UserError(f"--curves draws trainings from their log.txt: leave out --{name}")
    cli.make_writable(Path(args.output).parent, "folder of --output")
    curves.save(args.curves, args.output)
    print(f"{args.output}: {', '.join(args.curves)}")


if __name__ == "__main__":
    cli.run(main, get_args_parser())

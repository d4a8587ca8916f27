"""Show what a pre-trained masked autoencoder reconstructs, and what an encoder looks at.

    python main_visualize.py --checkpoint output_dir/checkpoint-last.pth --images cat.jpg dog.jpg
    python main_visualize.py --checkpoint output_dir/checkpoint-last.pth --data_path DIR
    python main_visualize.py --checkpoint CKPT --data_path DIR --attention heads.png --pca parts.png
    python main_visualize.py --curves output_dir other_dir --output curves.png

Writes a grid with one row an image: the original, what the encoder sees, the reconstruction, and
the reconstruction with the visible patches pasted in. --attention and --pca write pictures of the
unmasked images; for these, the checkpoint may also be an encoder's or a classifier's. --curves
draws the losses, learning rate and accuracies of trainings by epoch.
"""

import io
from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import numpy as np
import torch
from PIL import Image

import models_mae
from main_embed import build_encoder
from util import (
    attention,
    cli,
    curves,
    data,
    decoding,
    distributed,
    features,
    flags,
    image_files,
    pixels,
    pretrained,
    visualize,
)
from util.checkpoint import load_checkpoint, write_whole
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
        type=cli.path,
        metavar="FILE",
        help="the picture of reconstructions or curves to write; if not given, recon.png, or "
        "curves.png with --curves",
    )
    parser.add_argument(
        "--curves",
        type=cli.path,
        nargs="+",
        metavar="OUTPUT_DIR",
        help="instead draw the curves of trainings from their log.txt, to --output",
    )
    parser.add_argument(
        "--attention",
        type=cli.path,
        metavar="FILE",
        help="a picture to write of what each head of a block attends to, for the class token and "
        "for the mean of the patches",
    )
    parser.add_argument(
        "--pca",
        type=cli.path,
        metavar="FILE",
        help="a picture to write of a block's patch features, by their principal components as "
        "colours",
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="the block of --attention and --pca, from 0, or from the end if negative",
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
    flags.add_unsaid_flags(parser)
    return parser


def main(args):
    if args.curves:
        draw_curves(args)
        return
    if not args.checkpoint or not (args.images or args.data_path):
        raise UserError("give a model by --checkpoint, and images by --images or --data_path")

    # ---- setup
    device = distributed.select_device(args.device)
    if args.layer != -1 and not (args.attention or args.pca):
        raise UserError("--layer chooses the block of --attention and --pca: add one of these")
    for flag in ("output", "attention", "pca"):
        if getattr(args, flag):
            check_picture(Path(getattr(args, flag)), flag)

    # ---- model
    contents = load_checkpoint(args.checkpoint)
    pixel_format = pixels.resolve(vars(args), contents, args.checkpoint)
    bands = args.picture_bands
    if bands and (len(bands) not in (1, 3) or max(bands) >= pixel_format.in_chans):
        raise UserError(f"--picture_bands: give one or three of the {pixel_format.in_chans} bands")
    output = args.output or "recon.png"
    if "decoder_pred.weight" in contents["model"]:
        if not args.output:
            check_picture(Path(output), "output")
        model, config = build_autoencoder(
            contents,
            args.checkpoint,
            model=args.model,
            input_size=args.input_size,
            norm_pix_loss=args.norm_pix_loss,
            in_chans=pixel_format.in_chans,
        )
        mask_ratio = args.mask_ratio
        if mask_ratio is None:
            mask_ratio = (contents.get("args") or {}).get("mask_ratio", 0.75)
        model.check_mask_ratio(mask_ratio)
    else:
        missing = f"{args.checkpoint} has no decoder weights, which a reconstruction needs"
        if args.output or not (args.attention or args.pca):
            raise UserError(
                f"{missing}: it holds an encoder or a classifier, use the full checkpoint of a "
                "pre-training"
            )
        print(f"{missing}: it is left out")
        output = None
        model, config = build_encoder(
            contents,
            args.checkpoint,
            model=args.model,
            input_size=args.input_size,
            in_chans=pixel_format.in_chans,
        )
    features.check_layer(model, args.layer)
    model.to(device).eval()

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
    imgs = data.normalize(data.stack(images).to(device), pixel_format.mean, pixel_format.std)

    # ---- pictures
    if output:
        columns = visualize.reconstruct(
            model, imgs, mask_ratio=mask_ratio, seed=args.seed, pixels=pixel_format
        )
        save(visualize.draw_grid(columns, bands=bands), output, "output")
        print(f"{output}: {len(paths)} images, {mask_ratio:.0%} of their patches masked")
    grid_size, block = model.patch_embed.grid_size, args.layer % len(model.blocks)
    if args.attention:
        weights = attention.attention(model, imgs, args.layer)
        picture = visualize.draw_attention(imgs, weights, grid_size, pixel_format, bands=bands)
        save(picture, args.attention, "attention")
        to_itself, to_class = weights[..., 0].mean(dim=(0, 2)).tolist()
        print(
            f"{args.attention}: {len(paths)} images, {weights.shape[2]} heads of block {block}; "
            f"the class token gives {to_itself:.0%} of its attention to itself, the patches give "
            f"it {to_class:.0%} of theirs: the maps leave this out"
        )
    if args.pca:
        with torch.inference_mode():
            patches = features.pool(model, features.tokens(model, imgs, args.layer), "none")
        picture = visualize.draw_components(imgs, patches, grid_size, pixel_format, bands=bands)
        save(picture, args.pca, "pca")
        print(
            f"{args.pca}: {len(paths)} images, components of the patches of all of them after "
            f"block {block}"
        )
    ranges = visualize.shown_ranges(pixel_format)
    if set(ranges) != {(0.0, 1.0)}:
        shown = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
        print(
            f"black to white is the mean +- 3 std of each band, on the scale from 0 to 1: {shown}"
        )
    if output and model.norm_pix_loss:
        print(
            "the model predicts normalised patches: their mean and variance are those of the "
            "original, so that colours and contrast are not its own guess"
        )


def check_picture(file, flag):
    """Refuse a file that can't be written, before anything is computed."""
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--{flag} {file} has no suffix of an image format: use .png")
    cli.make_writable(file.parent, f"folder of --{flag}")


def save(picture, file, flag):
    content = io.BytesIO()
    try:
        picture.save(content, Image.registered_extensions()[Path(file).suffix.lower()])
        write_whole(Path(file), content.getvalue())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--{flag} {file} can't be written: {reason}") from error


def build_autoencoder(contents, path, *, model, input_size, norm_pix_loss, in_chans):
    """The whole model in a checkpoint, and its name and sizes; the flags are as `build_encoder`'s.

    Raises:
        UserError: it doesn't fit, or says another thing than the flags.
    """
    saved = contents.get("args") or {}
    config = pretrained.settle(
        path, saved, model=model, input_size=input_size, norm_pix_loss=norm_pix_loss
    )
    sizes = {name: saved.get(name) for name in models_mae.DECODER_SIZES}
    autoencoder = models_mae.build_saved(sizes | config, in_chans)
    try:
        autoencoder.load_state_dict(contents["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} is not a {config['model']}: {reason}") from error
    pretrained.check_heads(autoencoder, contents, path)
    return autoencoder, config


def draw_curves(args):
    for name in ("checkpoint", "images", "data_path", "attention", "pca"):
        if getattr(args, name) is not None:
            raise UserError(f"--curves draws trainings from their log.txt: leave out --{name}")
    output = args.output or "curves.png"
    cli.make_writable(Path(output).parent, "folder of --output")
    curves.save(args.curves, output)
    print(f"{output}: {', '.join(args.curves)}")


if __name__ == "__main__":
    cli.run(main, get_args_parser())

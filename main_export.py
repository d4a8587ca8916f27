"""Export a pre-trained model or a classifier to timm, to transformers, or as .safetensors.

    python main_export.py --checkpoint output_dir/checkpoint-last.pth --format timm --output DIR
    python main_export.py --checkpoint output_dir/checkpoint-last.pth --format transformers \\
        --part encoder --output DIR
    python main_export.py --checkpoint finetuned/checkpoint-best.pth --format transformers \\
        --output DIR

Writes a folder with the weights, the library's settings, and a README.md that says what the model
is, what to feed it and how to load it. The folder can be pushed to a model hub as it is.
"""

import sys
from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import models_mae
import models_vit
from util import cli, exporting, flags, model_card, pixels, pretrained
from util.checkpoint import load_checkpoint
from util.errors import UserError, say
from util.exporting_timm import for_timm
from util.exporting_transformers import for_transformers


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=cli.path,
        required=True,
        metavar="CKPT",
        help="of main_pretrain.py, main_finetune.py or main_linprobe.py, or a released one",
    )
    parser.add_argument(
        "--format", choices=exporting.FORMATS, required=True, help="safetensors is for this project"
    )
    parser.add_argument(
        "--output", type=cli.path, required=True, metavar="DIR", help="a new or empty folder"
    )
    parser.add_argument(
        "--part",
        choices=["autoencoder", "encoder"],
        help="what of a pre-training; if not given, the whole autoencoder where the format holds "
        "it: timm holds the encoder",
    )
    parser.add_argument(
        "--global_pool",
        choices=["avg", "token"],
        help="what timm pools of an encoder: the mean of the patch tokens or the class token; if "
        "not given, avg, as main_finetune.py does; a classifier has its own",
    )
    parser.add_argument(
        "--finetune",
        type=cli.path,
        metavar="CKPT",
        help="the encoder of a linear probe; if not given, the file that was probed, but no "
        "https:// address",
    )
    flags.add_pixel_flags(parser)
    flags.add_unsaid_flags(parser)
    return parser


def main(args):
    # ---- setup
    output = Path(args.output)
    exporting.check_output(output)
    cli.make_writable(output.resolve().parent, "folder of --output")

    # ---- checkpoint
    contents = load_checkpoint(args.checkpoint)
    holds = exporting.part_in(contents["model"])
    if args.finetune and holds != "probe":
        raise UserError(f"--finetune is for a linear probe, which {args.checkpoint} is not")
    if holds == "probe":
        contents, holds = unite_probe(contents, args.checkpoint, args.finetune), "classifier"
    part = exporting.choose_part(holds, args.part, args.format, args.checkpoint)
    if args.global_pool and (part, args.format) != ("encoder", "timm"):
        raise UserError("--global_pool is for an encoder in timm's format: leave it out")
    if args.norm_pix_loss is not None and part != "autoencoder":
        flag = "--norm_pix_loss" if args.norm_pix_loss else "--no_norm_pix_loss"
        article = "an" if part == "encoder" else "a"
        raise UserError(f"{flag} is for an autoencoder, not for {article} {part}: leave it out")

    # ---- model
    pixel_format = pixels.resolve(vars(args), contents, args.checkpoint)
    given = {"model": args.model, "input_size": args.input_size}
    if part == "autoencoder":
        given["norm_pix_loss"] = args.norm_pix_loss
    config = describe(contents, given, part, args.checkpoint)
    model = build_model(config, part, pixel_format.in_chans)
    weights = exporting.take_part(model, contents["model"], part, args.checkpoint)
    pretrained.check_heads(model, contents, args.checkpoint)
    classes, global_pool = None, args.global_pool or "avg"
    if part == "classifier":
        classes = contents.get("classes") or []
        global_pool = "avg" if config["global_pool"] else "token"

    # ---- files
    if args.format == "timm":
        folder = for_timm(output, model, weights, global_pool, classes, pixel_format)
    elif args.format == "transformers":
        folder = for_transformers(
            output,
            model,
            weights,
            part,
            global_pool,
            classes,
            pixel_format,
            mask_ratio=(contents.get("args") or {}).get("mask_ratio", 0.75),
        )
    else:
        folder = exporting.for_safetensors(output, weights, part)
    about = {name: contents[name] for name in SAID if name in contents}
    about["args"] = (contents.get("args") or {}) | config | pixel_format.stored()
    if about.get("command") == "main_linprobe.py":
        about["command"] = "main_finetune.py"  # whose checkpoints are whole classifiers, too
    card = model_card.model_card(
        f"{config['model']}, {part}",
        what(part, model),
        loading=folder.example,
        library=folder.library,
        task=TASKS[part],
        remarks=folder.remarks,
        inputs=model_card.input_lines(model.patch_embed.img_size, pixel_format),
        recipe=model_card.recipe_lines(contents),
        figures=model_card.logged_figures(args.checkpoint, contents),
    )
    exporting.write_folder(output, folder, about, card)

    # ---- what there is now
    parameters = sum(weight.numel() for weight in weights.values())
    tell(
        f"{output}: {part} of {args.checkpoint}, {config['model']}, {parameters / 1e6:.1f} M "
        f"parameters, for {args.format}"
    )
    for remark in folder.remarks:
        tell(remark.replace("`", ""))
    mean, std = (" ".join(f"{v:.6g}" for v in vs) for vs in (pixel_format.mean, pixel_format.std))
    tell(f"its input is on the scale from 0 to 1, less the mean {mean}, over the std {std}")
    tell(f"to load it: {folder.load}")


# Not of an autoencoder: a pipeline for features would mask its images.
TASKS = {
    "classifier": "image-classification",
    "encoder": "image-feature-extraction",
    "autoencoder": None,
}
SAID = (  # beside weights
    *("command", "classes", "epoch", "step", "totals", "training", "versions"),
    "accepted_changes",
)


def describe(contents, given, part, path):
    """The flags that define a checkpoint's model: its own, or else those that are given."""
    saved, weights = contents.get("args") or {}, contents["model"]
    config = pretrained.settle(path, saved, **given)
    if part == "autoencoder":
        config |= {name: saved[name] for name in models_mae.DECODER_SIZES if saved.get(name)}
    if part == "classifier":
        config["nb_classes"] = len(weights["head.weight"])
        config["global_pool"] = saved.get("global_pool", "fc_norm.weight" in weights)
    return config


def build_model(config, part, in_chans):
    """The model whose weights a part is."""
    if part == "classifier":
        return models_vit.build_saved(config, in_chans)
    if part == "encoder" and config["model"] in models_vit.MODELS:
        return models_vit.build_saved(config | {"nb_classes": 0, "global_pool": False}, in_chans)
    return models_mae.build_saved({"norm_pix_loss": False} | config, in_chans)


def unite_probe(contents, path, finetune):
    """The contents of a classifier: a linear probe's head on the encoder that it probed."""
    if "training" not in contents:
        raise UserError(
            f"{path} does not say which encoder its probe is of: take main_linprobe.py's"
        )
    saved = contents["args"]
    origin = finetune or saved["finetune"]
    if not finetune and "://" in str(origin):
        raise UserError(
            f"{path} is a linear probe's head, of the encoder at {origin}, which is not downloaded "
            "unasked: give the encoder by --finetune, this address or a file"
        )
    tell(f"{path} is a linear probe's head: its encoder is read from {origin}")
    try:
        start = load_checkpoint(origin)
    except UserError as error:
        raise UserError(
            f"{path} is a linear probe's head: {error}; give its encoder by --finetune"
        ) from error
    # Version 0.1 knew only three bands.
    model = models_vit.build_saved(saved, saved.get("in_chans", pixels.RGB.in_chans))
    encoder = pretrained.start_from(model, origin, start)
    if encoder != contents["training"]["encoder"]:
        raise UserError(f"{path} is a probe of a different encoder than {origin}")
    weights = model.state_dict() | exporting.fold_probe(contents["model"])
    return {**contents, "model": weights}


def tell(line):
    """A line on stdout; a file's name can hold any bytes."""
    encoding = sys.stdout.encoding or "utf-8"
    say(line.encode(encoding, "backslashreplace").decode(encoding), sys.stdout)


def what(part, model):
    """A sentence on what a part is."""
    if part == "classifier":
        return (
            f"An image classifier of {len(model.head.weight)} classes: a vision transformer whose "
            f"encoder may have been pre-trained as a masked autoencoder, see {model_card.PAPER}."
        )
    if part == "encoder":
        return (
            "A vision transformer, the encoder of a masked autoencoder, pre-trained without labels "
            f"as in {model_card.PAPER}. It is to be fine-tuned, probed, or used for features."
        )
    return f"A masked autoencoder, encoder and decoder, pre-trained as in {model_card.PAPER}."


if __name__ == "__main__":
    cli.run(main, get_args_parser())

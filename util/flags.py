"""The flags that commands share, in groups; every command sets its own defaults.

Beside each stands whether a resumed training may change it. There are three kinds:

- freely, if `MayChange` adds it: it says where and how a training runs, not what it computes;
- with --accept_changes, if `MayBeAccepted` adds it: it says what the next steps do. The weights
  keep their shapes and their meaning;
- never, all other flags: the weights would not fit any more (model, sizes, channels, classes), or
  would mean something else (what is predicted, what a pixel or a class stands for).
"""

import argparse
import math
import os
from typing import Any

from util.cli import cores, integer, number, path
from util.errors import warn
from util.pixels import MAX_PIXELS


class MayChange:
    """Adds flags to a group that a resumed training may change."""

    def __init__(self, group: argparse._ActionsContainer) -> None:
        self.group = group

    def add_argument(self, *names: str, **options: Any) -> None:
        flag = self.group.add_argument(*names, **options)
        flag.may_change = True  # type: ignore[attr-defined]


class MayBeAccepted:
    """Adds flags to a group that a resumed training may change with --accept_changes."""

    def __init__(self, group: argparse._ActionsContainer) -> None:
        self.group = group

    def add_argument(self, *names: str, **options: Any) -> None:
        flag = self.group.add_argument(*names, **options)
        flag.may_be_accepted = True  # type: ignore[attr-defined]


# What defines a training and is no flag. The rest of it never changes: the encoder that it started
# from, and its classes.
_ACCEPTABLE_FACTS = {"processes", "images", "image_names", "dtype"}

# Where one of these changes, the steps of an epoch take other images than before, or other updates
# end in them: an epoch that was begun can't go on, it begins again.
CHANGES_STEPS = {"batch_size", "accum_iter", "seed", "processes", "images", "image_names"}


def acceptable(parser: argparse.ArgumentParser) -> set[str]:
    """What defines a training, but may change in a resumed one with --accept_changes."""
    marked = {a.dest for a in parser._actions if getattr(a, "may_be_accepted", False)}
    return marked | _ACCEPTABLE_FACTS


def fixed(parser: argparse.ArgumentParser, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that define a training, all but those of `MayChange`, with their values."""
    free = {action.dest for action in parser._actions if getattr(action, "may_change", False)}
    return {name: value for name, value in flags.items() if name not in free}


def fixed_by_default(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The defaults of `fixed` flags: those of a training that is older than a flag."""
    return fixed(parser, {action.dest: action.default for action in parser._actions})


class HeightWidth(argparse.Action):
    """Stores one number as it is, and two different ones as (height, width)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, "takes one number, or height and width")
        setattr(namespace, self.dest, values[0] if len(set(values)) == 1 else tuple(values))


class LowHigh(argparse.Action):
    """Stores two numbers as (LO, HI)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if values[0] > values[1]:
            raise argparse.ArgumentError(self, f"LO {values[0]:g} is above HI {values[1]:g}")
        setattr(namespace, self.dest, tuple(values))


class DistEval(argparse.Action):
    """Says that the flag is not needed."""

    def __call__(self, *_: Any) -> None:
        warn("--dist_eval is not needed: evaluation is always shared by all processes")


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--model and --input_size, in a group to which the command adds its own."""
    group = parser.add_argument_group("Model")
    group.add_argument("--model", metavar="NAME", help="name of the model")
    add_input_size_flag(group, default=224)
    return group


def add_input_size_flag(parser: argparse._ActionsContainer, default: int | None) -> None:
    parser.add_argument(
        "--input_size",
        type=integer(1),
        nargs="+",
        action=HeightWidth,
        metavar="PIXELS",
        default=default,
        help="size of the images the model sees: one number, or height and width",
    )


def add_unsaid_flags(parser: argparse.ArgumentParser, target: bool = True) -> None:
    """What a file of weights only doesn't say of its model, and, with `target`, what it predicts.

    None where a flag is not given, see `pretrained.settle`.
    """
    group = parser.add_argument_group(
        "For checkpoints that hold only weights", "this project's checkpoints store all of this"
    )
    group.add_argument("--model", metavar="NAME", help="name of the model, mae_vit_* or vit_*")
    add_input_size_flag(group, default=None)
    if target:
        group.add_argument(
            "--norm_pix_loss",
            action="store_true",
            default=None,
            help="it predicts normalised pixels",
        )
        group.add_argument("--no_norm_pix_loss", action="store_false", dest="norm_pix_loss")


def add_decoder_flags(group: argparse._ActionsContainer) -> None:
    """The decoder's sizes; None where a flag is not given."""
    for name, what in (
        ("depth", "blocks"),
        ("embed_dim", "width"),
        ("num_heads", "attention heads"),
    ):
        group.add_argument(
            f"--decoder_{name}",
            type=integer(1),
            metavar="N",
            help=f"the decoder's {what}; if not given, as the named model",
        )


def add_learning_flags(parser: argparse.ArgumentParser) -> None:
    """What a pre-training measures of its features, see `engine_pretrain.evaluate_features`."""
    free = MayChange(
        parser.add_argument_group(
            "Does it learn?", "features of unmasked images, the mean of their patch tokens"
        )
    )
    free.add_argument(
        "--knn_every",
        type=integer(0),
        default=0,
        metavar="E",
        help="every so many epochs, and after the last: how well the labels in DIR/train classify "
        "DIR/val by nearest neighbours, and how far features spread; 0 for never",
    )
    free.add_argument(
        "--knn_k", type=integer(1), default=20, help="neighbours that elect an image's class"
    )
    free.add_argument(
        "--knn_images",
        type=integer(1),
        default=50000,
        metavar="N",
        help="most images of each, evenly spread",
    )
    free.add_argument(
        "--knn_layer", type=int, default=-1, metavar="I", help="block to take features after"
    )


def add_classifier_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags of `add_model_flags` and those of a classifier."""
    group = add_model_flags(parser)
    group.add_argument("--nb_classes", type=integer(1), default=1000, help="number of classes")
    group.add_argument(
        "--global_pool",
        action="store_true",
        help="classify the mean of the patch tokens, not the class token",
    )
    group.add_argument(
        "--cls_token", action="store_false", dest="global_pool", help="classify the class token"
    )
    return group


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    """Evaluating a checkpoint instead of training."""
    free = MayChange(parser.add_argument_group("Evaluation"))
    free.add_argument(
        "--eval",
        action="store_true",
        help="evaluate the classifier in the file of --resume, don't train",
    )
    free.add_argument(
        "--predictions",
        type=path,
        metavar="FILE.csv",
        help="with --eval: write each image's label, predicted class and likeliest five classes "
        "with their probabilities, also of images without labels; 32 images are computed at a "
        "time, whatever --batch_size is",
    )
    free.add_argument(
        "--dist_eval",
        action=DistEval,
        nargs=0,
        default=False,
        help="accepted and ignored: all processes share the evaluation",
    )


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    MayChange(parser).add_argument(
        "--device", default="auto", help="auto (CUDA if there is any), cpu, cuda or cuda:INDEX"
    )


def add_source_flags(group: argparse._ActionsContainer, required: bool = True) -> None:
    """Where images come from, and how many processes read them."""
    free = MayChange(group)
    free.add_argument(
        "--data_path",
        type=path,
        metavar="PATH",
        required=required,
        help="folder of the images, or of tar shards, or a text file of paths",
    )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free.add_argument(
        "--num_workers",
        type=integer(0),
        default=max(1, min(10, cores() // processes)),
        help="processes that load images for each training process; results don't depend on it; "
        "the default shares out the machine's cores",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where images come from and how they are loaded."""
    group = parser.add_argument_group("Data")
    add_source_flags(group)
    accepted = MayBeAccepted(group)
    accepted.add_argument(
        "--crop_scale",
        type=number(0, 1, above=True),
        nargs=2,
        action=LowHigh,
        metavar=("LO", "HI"),
        help="the random crop's area, as a share of the image's",
    )
    accepted.add_argument(
        "--no_flip", action="store_true", help="don't flip images from left to right"
    )
    accepted.add_argument(
        "--decode",
        choices=["full", "scaled"],
        default="full",
        help="scaled is faster for large photographs: JPEGs are decoded at 1/2, 1/4 or 1/8 of "
        "their size, which leaves a crop at least twice as large as the model's image; pixels "
        "differ a little",
    )
    free = MayChange(group)
    free.add_argument(
        "--pin_mem", action="store_true", default=True, help="page-locked batches, for CUDA"
    )
    free.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="ordinary memory")


def add_pixel_flags(parser: argparse.ArgumentParser) -> None:
    """What the model sees of a file, see `pixels.PixelFormat`; None where a flag is not given."""
    group = parser.add_argument_group(
        "Pixels", "stored in the checkpoint, and read from there by later commands"
    )
    group.add_argument(
        "--in_chans",
        type=integer(1),
        metavar="N",
        help="bands of an image; if not given, those that --bands names, or 3",
    )
    group.add_argument(
        "--value_range",
        type=number(-math.inf),
        nargs=2,
        action=LowHigh,
        metavar=("LO", "HI"),
        help="samples that become 0 and 1, in the file's units; others are clipped; if not given, "
        "the range of the file's unsigned type",
    )
    group.add_argument(
        "--mean",
        type=number(-math.inf),
        nargs="+",
        metavar="X",
        help="of each band, on the scale from 0 to 1; if not given, ImageNet's for three bands",
    )
    group.add_argument("--std", type=number(above=True), nargs="+", metavar="X", help="likewise")
    add_reading_flags(group)


def add_reading_flags(group: argparse._ActionsContainer) -> None:
    """The flags of `pixels.PixelFormat` that concern the file itself."""
    group.add_argument(
        "--bands",
        type=integer(0),
        nargs="+",
        metavar="I",
        help="the file's bands to take, in this order, from 0; if not given, all",
    )
    group.add_argument(
        "--nodata",
        type=float,
        metavar="V",
        help="sample that stands for no data, in the file's units, or nan; it becomes 0 after "
        "normalisation",
    )
    group.add_argument(
        "--layout", choices=["hwc", "chw"], help="axes of a .npy file; if not given, hwc"
    )
    group.add_argument(
        "--exif_orientation",
        action="store_true",
        default=None,
        help="turn images as their EXIF tag says; if not given, they stay as they are stored",
    )
    MayChange(group).add_argument(
        "--max_pixels",
        type=integer(1),
        default=MAX_PIXELS,
        help="files that claim more pixels, or more than 8 bytes for each, are not decoded",
    )


def add_optimization_flags(parser: argparse.ArgumentParser) -> MayBeAccepted:
    """Batch size, length and learning rate of a training."""
    group = MayBeAccepted(parser.add_argument_group("Optimization"))
    group.add_argument("--batch_size", type=integer(1), help="images per process and step")
    group.add_argument("--epochs", type=integer(1), help="length of the training")
    group.add_argument(
        "--accum_iter",
        type=integer(1),
        default=1,
        help="steps per update; their gradients are averaged, and the effective batch is "
        "batch_size x accum_iter x processes",
    )
    group.add_argument(
        "--lr", type=number(), help="learning rate; if not given, blr x effective batch / 256"
    )
    group.add_argument("--blr", type=number(), help="base learning rate, for 256 images")
    group.add_argument("--min_lr", type=number(), help="learning rate at the end of the cosine")
    group.add_argument(
        "--warmup_epochs", type=number(), help="epochs in which the learning rate rises from 0"
    )
    group.add_argument(
        "--weight_decay", type=number(), help="weight decay; biases and 1-D tensors have none"
    )
    group.add_argument(
        "--clip_grad", type=number(above=True), help="clip the gradients to this norm"
    )
    return group


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """Augmentation and regularisation of images and labels, by timm."""
    group = MayBeAccepted(parser.add_argument_group("Augmentation"))
    group.add_argument(
        "--color_jitter", type=number(), help="strength of colour jitter, used without a policy"
    )
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm's name of an augmentation policy, or none",
    )
    group.add_argument(
        "--smoothing", type=number(0, 1, below=True), default=0.1, help="label smoothing"
    )
    group.add_argument(
        "--reprob", type=number(0, 1), default=0.25, help="probability of random erasing"
    )
    group.add_argument(
        "--remode",
        choices=["pixel", "rand", "const"],
        default="pixel",
        help="fill of erased rectangles",
    )
    group.add_argument(
        "--recount", type=integer(1), default=1, help="most rectangles erased from an image"
    )
    group.add_argument("--mixup", type=number(), default=0.0, help="mixup's alpha, 0 for none")
    group.add_argument("--cutmix", type=number(), default=0.0, help="cutmix's alpha, 0 for none")
    group.add_argument(
        "--cutmix_minmax",
        type=number(0, 1),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="sides of cutmix's rectangles as shares of the image's, instead of --cutmix",
    )
    group.add_argument(
        "--mixup_prob", type=number(0, 1), default=1.0, help="probability of mixup or cutmix"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=number(0, 1),
        default=0.5,
        help="probability of cutmix instead of mixup where both are on",
    )
    group.add_argument(
        "--mixup_mode",
        choices=["batch", "pair", "elem"],
        default="batch",
        help="draw mixup or cutmix per batch, pair or image",
    )


def add_runtime_flags(parser: argparse.ArgumentParser, grad_checkpointing: bool = False) -> None:
    """Outputs, device, precision, resuming."""
    group = parser.add_argument_group("Runtime")
    free = MayChange(group)
    free.add_argument(
        "--output_dir",
        type=path,
        default="./output_dir",
        metavar="DIR",
        help="folder of checkpoints and log.txt",
    )
    free.add_argument(
        "--log_dir", type=path, metavar="DIR", help="TensorBoard's folder, output_dir by default"
    )
    add_device_flag(group)
    MayBeAccepted(group).add_argument("--seed", type=integer(0), default=0, help="random seed")
    free.add_argument(
        "--resume",
        type=path,
        default="auto",
        metavar="{auto,none,PATH}",
        help="auto continues from output_dir's newest whole checkpoint, PATH from this file, "
        "none starts anew",
    )
    free.add_argument(
        "--accept_changes",
        action="store_true",
        help="resume under different settings, such as more epochs, another learning rate or "
        "other images; each change is said and recorded",
    )
    # The type that it chooses on a device does define a training.
    free.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="mixed precision; auto is bf16 where the device computes it natively (CUDA from "
        "Ampere on, CPUs with AVX512-BF16 or AMX), else fp16 on CUDA and float32 on a CPU; "
        "off is float32",
    )
    free.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    free.add_argument("--no_compile", action="store_false", dest="compile", help="don't compile")
    free.add_argument(
        "--save_every",
        type=integer(1),
        default=20,
        help="epochs between numbered checkpoints; checkpoint-last.pth is renewed every epoch",
    )
    free.add_argument(
        "--save_minutes",
        type=number(),
        default=5,
        help="minutes after which checkpoint-last.pth is renewed within an epoch",
    )
    free.add_argument(
        "--log_every", type=integer(1), default=20, help="steps between console lines"
    )
    free.add_argument(
        "--timeout_minutes",
        type=number(0, 1e6, above=True),
        default=30,
        help="after so long without progress of any process, or ten times as long in a save or an "
        "evaluation, the run says which one is stuck, and ends",
    )
    if grad_checkpointing:
        free.add_argument(
            "--grad_checkpointing",
            action="store_true",
            help="recompute activations in the backward pass: less memory, slower",
        )

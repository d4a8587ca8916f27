"""Train a linear classifier on the frozen features of a pre-trained encoder, or evaluate one.

    RUN="main_linprobe.py --finetune CKPT --data_path DIR --nb_classes 10 --model vit_base_patch16"
    python $RUN --output_dir probed
    torchrun --nproc_per_node 8 $RUN --output_dir probed
    python $RUN --output_dir probed --eval --resume probed/checkpoint-best.pth

Classes are the folders in DIR/train and DIR/val; CKPT is what main_finetune.py takes. The
probe's checkpoints hold only its head. The epoch loop is main_finetune.py's. Run the same command
again to continue after any interruption.
"""

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import torch
from torch import nn

import models_vit
from main_finetune import (
    evaluate_classifier,
    find_labelled_images,
    find_val_images,
    make_loaders,
    resolve_pixels,
    train_classifier,
    train_or_evaluate,
)
from util import checkpoint, cli, data, flags, memory, precision, pretrained, speed
from util.errors import UserError
from util.lars import LARS
from util.seeding import derive_seed


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = flags.add_classifier_flags(parser)
    flags.MayChange(model).add_argument(
        "--finetune",
        type=cli.path,
        metavar="CKPT",
        required=True,
        help="the encoder to probe, a file, a folder or an https:// address",
    )
    flags.add_data_flags(parser)
    flags.add_pixel_flags(parser)
    flags.add_optimization_flags(parser)
    flags.add_runtime_flags(parser)
    flags.add_eval_flags(parser)
    parser.set_defaults(
        model="vit_large_patch16",
        global_pool=False,
        batch_size=512,
        epochs=90,
        blr=0.1,
        min_lr=0.0,
        warmup_epochs=10,
        weight_decay=0.0,
        crop_scale=(0.08, 1.0),
    )
    return parser


def main(args):
    train_or_evaluate(args, probe, evaluate_checkpoint)


def probe(args, process, amp_dtype):
    with memory.explain_running_out(args.batch_size, trains=True):
        train_head(args, process, amp_dtype)


def train_head(args, process, amp_dtype):
    if args.batch_size < 2:
        raise UserError("batch_size 1 has no statistics for BatchNorm: take at least 2")
    # ---- data
    start = checkpoint.load_checkpoint(args.finetune)
    pixel_format = resolve_pixels(args, start, args.finetune, may_adapt=True)
    transform = data.probe_transform(args.input_size, args.crop_scale, not args.no_flip)
    paths = find_labelled_images(args, pixel_format)
    loaders = make_loaders(args, process, paths, transform, pixel_format)

    # ---- model
    model, head, encoder = build_model(args, start)
    model.to(process.device)
    speed.prepare(model, process.device, amp_dtype, args.compile)

    # ---- train
    parameters = sum(p.numel() for p in head.parameters())
    train_classifier(
        args,
        process,
        amp_dtype,
        loaders,
        model,
        LARS(head.parameters(), lr=0.0, weight_decay=args.weight_decay),
        precision.grad_scaler(process.device, None),  # the head computes in float32
        nn.CrossEntropyLoss(),
        command="main_linprobe.py",
        parser=get_args_parser(),
        encoder=encoder,
        trained=head,
        title=f"head of {parameters} parameters on the frozen {args.model} of {args.finetune}",
    )


def evaluate_checkpoint(args, process, amp_dtype):
    if args.resume in ("auto", "none"):
        raise UserError("--eval needs a probe's checkpoint: give it by --resume")
    contents = checkpoint.load_checkpoint(args.resume)
    if contents.get("command") != "main_linprobe.py":
        raise UserError(f"{args.resume} is not a checkpoint of main_linprobe.py")
    pixel_format = resolve_pixels(args, contents, args.resume)
    val_paths = find_val_images(args, contents, args.resume, pixel_format)
    model, head, encoder = build_model(args, checkpoint.load_checkpoint(args.finetune))
    if encoder != contents["training"]["encoder"]:
        raise UserError(f"{args.resume} is a probe of a different encoder than {args.finetune}")
    head.load_state_dict(contents["model"])
    classes = contents.get("classes")
    evaluate_classifier(
        args, process, amp_dtype, model, val_paths, pixel_format, args.resume, classes
    )


def build_model(args, start):
    """The classifier, its head under the classifier's keys, and the encoder's fingerprint.

    `start` is the contents of --finetune.
    """
    torch.manual_seed(derive_seed(args.seed, "init"))
    model = models_vit.build_model(
        args.model,
        img_size=args.input_size,
        in_chans=args.in_chans,
        num_classes=args.nb_classes,
        global_pool=args.global_pool,
    )
    encoder = pretrained.start_from(model, args.finetune, start)
    models_vit.add_probe_head(model)
    return model, nn.ModuleDict({"head": model.head}), encoder


if __name__ == "__main__":
    cli.run(main, get_args_parser())

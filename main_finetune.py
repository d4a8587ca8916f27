"""Fine-tune a pre-trained encoder as a classifier, train one from scratch, or evaluate one.

    RUN="main_finetune.py --data_path DIR --nb_classes 10 --model vit_base_patch16"
    python $RUN --finetune CKPT --output_dir finetuned
    torchrun --nproc_per_node 8 $RUN --finetune CKPT --output_dir finetuned --mixup 0.8
    python $RUN --eval --resume finetuned/checkpoint-best.pth --output_dir finetuned

Classes are the folders in DIR/train and DIR/val. CKPT is a checkpoint of main_pretrain.py, a
released one, bare weights (.pth, .bin or .safetensors), the https:// address of one of them, or a
folder that transformers or timm saved. Run the same command again to continue after any
interruption.
"""

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
from pathlib import Path

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

import models_vit
from engine_finetune import evaluate, predict, train_one_epoch
from util import (
    checkpoint,
    cli,
    data,
    distributed,
    flags,
    image_files,
    loading,
    locking,
    logs,
    memory,
    optim,
    pixels,
    precision,
    predictions,
    pretrained,
    speed,
    stopping,
    training,
)
from util.errors import UserError
from util.lr_sched import make_schedule
from util.seeding import derive_seed


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = flags.add_classifier_flags(parser)
    flags.MayChange(model).add_argument(
        "--finetune",
        type=cli.path,
        metavar="CKPT",
        help="the encoder to start from, a file, a folder or an https:// address; if not given, "
        "from scratch",
    )
    flags.MayBeAccepted(model).add_argument(
        "--drop_path", type=cli.number(0, 1, below=True), default=0.1, help="rate of drop path"
    )
    flags.add_data_flags(parser)
    flags.add_pixel_flags(parser)
    optimization = flags.add_optimization_flags(parser)
    optimization.add_argument(
        "--layer_decay",
        type=cli.number(0, 1, above=True),
        default=0.75,
        help="learning rate of a block as a share of the next one's",
    )
    flags.add_augmentation_flags(parser)
    flags.add_runtime_flags(parser, grad_checkpointing=True)
    flags.add_eval_flags(parser)
    parser.set_defaults(
        model="vit_large_patch16",
        global_pool=True,
        batch_size=64,
        epochs=50,
        blr=1e-3,
        min_lr=1e-6,
        warmup_epochs=5,
        weight_decay=0.05,
        crop_scale=(0.08, 1.0),
    )
    return parser


def main(args):
    train_or_evaluate(args, finetune, evaluate_checkpoint)


def train_or_evaluate(args, train, evaluate):
    """Call one of them with (args, process, amp_dtype)."""
    if args.predictions:
        if not args.eval:
            raise UserError("--predictions is for --eval: add it, or leave out --predictions")
        args.batch_size = predictions.BATCH
    with distributed.process_group(args.device, args.timeout_minutes) as process:
        if process.device.type == "cpu":
            speed.keep_freed_memory()
        amp_dtype = precision.resolve_amp(args.amp, process.device)
        cli.make_output_dirs(args.output_dir, args.log_dir, process)
        if args.predictions and process.is_main:
            cli.check_output_file(args.predictions, "--predictions")
        if args.eval:
            fixed_by = "--predictions" if args.predictions else ""
            with memory.explain_running_out(args.batch_size, fixed_by=fixed_by):
                evaluate(args, process, amp_dtype)
        else:
            with locking.lock(args.output_dir, process):
                train(args, process, amp_dtype)


def finetune(args, process, amp_dtype):
    with memory.explain_running_out(
        args.batch_size,
        args.model,
        args.input_size,
        amp_dtype,
        args.grad_checkpointing,
        trains=True,
    ):
        train_whole_model(args, process, amp_dtype)


def train_whole_model(args, process, amp_dtype):
    # ---- setup
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2:
        raise UserError(f"mixup and cutmix pair images: batch_size {args.batch_size} is not even")
    if args.cutmix_minmax:
        data.check_cutmix_sides(args.input_size, args.cutmix_minmax)

    # ---- data
    start = checkpoint.load_checkpoint(args.finetune) if args.finetune else {}
    pixel_format = resolve_pixels(args, start, args.finetune, may_adapt=True)
    paths = find_labelled_images(args, pixel_format)
    transform = data.finetune_transform(
        args.input_size,
        args.color_jitter,
        args.aa,
        args.crop_scale,
        flip=not args.no_flip,
        is_8_bit_rgb=pixel_format.is_8_bit_rgb and paths[0].has_8_bits,
    )
    loaders = make_loaders(args, process, paths, transform, pixel_format)

    # ---- model
    model = build_model(args)
    encoder = None
    if args.finetune:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        encoder = pretrained.start_from(model, args.finetune, start)
    model.to(process.device)
    speed.prepare(model, process.device, amp_dtype, args.compile, args.grad_checkpointing)

    # ---- augmentation of batches, loss
    random_erasing = mixup = None
    if args.reprob > 0:
        random_erasing = RandomErasing(
            args.reprob, mode=args.remode, max_count=args.recount, device=process.device
        )
    if mixes:
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.nb_classes,
        )
    criterion = nn.CrossEntropyLoss(label_smoothing=0 if mixes else args.smoothing)

    # ---- optimizer
    groups = optim.layer_decay_groups(model, args.weight_decay, args.layer_decay)
    optimizer = optim.adamw(groups, betas=(0.9, 0.999))
    scaler = precision.grad_scaler(process.device, amp_dtype)

    # ---- train
    parameters = sum(p.numel() for p in model.parameters())
    origin = f"from {args.finetune}" if args.finetune else "from scratch, without --finetune"
    train_classifier(
        args,
        process,
        amp_dtype,
        loaders,
        model,
        optimizer,
        scaler,
        criterion,
        command="main_finetune.py",
        parser=get_args_parser(),
        encoder=encoder,
        trained=model,
        title=f"{args.model}, {parameters / 1e6:.1f} M parameters, {origin}",
        random_erasing=random_erasing,
        mixup=mixup,
    )


def resolve_pixels(args, contents, path, may_adapt=False):
    """The pixel format of a checkpoint or of the flags, stored in args."""
    pixel_format = pixels.resolve(vars(args), contents, path, may_adapt=may_adapt)
    vars(args).update(pixel_format.stored())
    return pixel_format


def find_labelled_images(args, pixel_format):
    """The training and the held-out images, whose classes agree."""
    return image_files.find_labelled_images(args.data_path, args.nb_classes, pixels=pixel_format)


def make_loaders(args, process, paths, transform, pixel_format):
    """The loaders of training and of held-out images."""
    train_paths, val_paths = paths
    options = batching(args, pixel_format)
    train_loader = loading.train_loader(
        train_paths, transform, process, accum_iter=args.accum_iter, **options
    )
    return train_loader, loading.eval_loader(val_paths, args.input_size, process, **options)


def train_classifier(
    args,
    process,
    amp_dtype,
    loaders,
    model,
    optimizer,
    scaler,
    criterion,
    *,
    command,
    parser,
    encoder,
    trained,
    title,
    random_erasing=None,
    mixup=None,
):
    """Train a classifier to its end, as fine-tuning and the linear probe do.

    Args:
        loaders: as `make_loaders` makes them.
        encoder: fingerprint of the pre-trained encoder, or None.
        trained: the module to train and save: the model or its head.
        title: the start of the run's first line.
    """
    train_loader, val_loader = loaders
    train_paths = train_loader.dataset.paths
    dtype = precision.dtype_name(amp_dtype)

    # ---- schedule, resume
    effective_batch = args.batch_size * args.accum_iter * process.world_size
    schedule = make_schedule(
        effective_batch, args.lr, args.blr, args.min_lr, args.warmup_epochs, args.epochs
    )
    signals = stopping.StopSignals()
    state = training.TrainingState(trained, optimizer, scaler)
    checkpoints = training.Checkpoints(
        args.output_dir,
        process,
        signals=signals,
        settings=flags.fixed(parser, vars(args))
        | {
            "processes": process.world_size,
            "images": len(train_paths),
            "image_names": train_paths.fingerprint,
            "dtype": dtype,
            "encoder": encoder,
        },
        defaults=flags.fixed_by_default(parser) | pixels.RGB.stored(),
        contents={
            "command": command,
            "args": vars(args),
            "classes": train_paths.classes,
            "schedule": schedule,
            "steps": len(train_loader),
        },
        epochs=args.epochs,
        save_every=args.save_every,
        save_minutes=args.save_minutes,
    )
    checkpoints.restore(
        state,
        args.resume,
        acceptable=flags.acceptable(parser),
        accept_changes=args.accept_changes,
    )
    log = logs.RunLog(
        args.output_dir, args.log_dir, process, state, train_loader, args.epochs, tag="loss"
    )
    log.line(
        f"{title}, on {len(train_paths)} images of {len(train_paths.classes)} classes; "
        f"effective batch {effective_batch}, lr {schedule['lr']:.2e}; "
        f"{process.world_size} x {process.device}, computing in {dtype}"
    )

    # ---- train
    parameters = sum(p.numel() for p in trained.parameters())
    parallel_model = distributed.data_parallel(model, process)
    with log, signals, checkpoints:
        while state.epoch < args.epochs:
            meter = logs.Meter(log, state, train_loader, args.log_every)
            record = train_one_epoch(
                parallel_model,
                criterion,
                train_loader,
                optimizer,
                scaler,
                state=state,
                meter=meter,
                checkpoints=checkpoints,
                schedule=schedule,
                accum_iter=args.accum_iter,
                amp_dtype=amp_dtype,
                seed=args.seed,
                rank=process.rank,
                clip_grad=args.clip_grad,
                random_erasing=random_erasing,
                mixup=mixup,
            )
            checkpoints.save_last(state)  # the evaluation may fail
            figures = evaluate(model, val_loader, amp_dtype=amp_dtype)
            log.line(logs.accuracy_line(figures))
            accepted = checkpoints.accepted_in(state.epoch)
            log.epoch(record | figures | {"n_parameters": parameters} | accepted)
            checkpoints.save_epoch(state, score=figures["test_acc1"])
            # By epoch, and after the save: an epoch that runs again would be drawn twice.
            log.scalars(state.epoch + 1, {f"perf/{name}": v for name, v in figures.items()})
            checkpoints.stop_if_asked(state)
            state.begin_next_epoch()
        checkpoints.finish()
    log.line(f"done: {args.epochs} epochs, see {args.output_dir}")


def evaluate_checkpoint(args, process, amp_dtype):
    if args.resume not in ("auto", "none") and args.finetune:
        raise UserError("--eval needs one classifier: give it by --resume or by --finetune")
    path = args.finetune if args.resume in ("auto", "none") else args.resume
    if not path:
        raise UserError("--eval needs a classifier's checkpoint: give it by --resume")
    contents = checkpoint.load_checkpoint(path)
    pixel_format = resolve_pixels(args, contents, path)
    val_paths = find_val_images(args, contents, path, pixel_format)
    model = build_model(args)
    pretrained.check_heads(model, contents, path)
    pretrained.load_classifier(
        model, contents["model"], path, pretrained.saved_input_size(contents)
    )
    classes = contents.get("classes")
    evaluate_classifier(args, process, amp_dtype, model, val_paths, pixel_format, path, classes)


def find_val_images(args, contents, path, pixel_format):
    """The held-out images, labelled as the checkpoint's classes; an error if flags differ."""
    pretrained.check_flags(
        contents,
        path,
        {
            "model": args.model,
            "nb_classes": args.nb_classes,
            "global_pool": args.global_pool,
            "input_size": args.input_size,
        },
    )
    return image_files.find_images_to_evaluate(
        args.data_path,
        args.nb_classes,
        contents.get("classes"),
        path,
        pixels=pixel_format,
        may_lack_labels=bool(args.predictions),
    )


def evaluate_classifier(args, process, amp_dtype, model, val_paths, pixel_format, path, classes):
    """Evaluate a classifier, the checkpoint at `path`; print and write its accuracy.

    With --predictions, write what it says of each image, whose classes are named by `classes`.
    """
    options = batching(args, pixel_format)
    val_loader = loading.eval_loader(val_paths, args.input_size, process, **options)
    speed.prepare(model, process.device, amp_dtype)
    model.to(process.device)
    figures = {}
    predicted = predictions.Predictions() if args.predictions else None
    if val_paths.classes:
        figures = evaluate(model, val_loader, amp_dtype=amp_dtype, predictions=predicted)
    else:
        predict(model, val_loader, predicted, amp_dtype=amp_dtype)
    if predicted:
        file = Path(args.predictions)
        unreadable = predicted.write(file, process, val_paths, classes or [], args.nb_classes)
        logs.report_predictions(file, process, val_paths, unreadable)
    if not figures:
        return
    logs.report_evaluation(
        args.output_dir, process, figures, checkpoint=path, images=len(val_paths)
    )


def batching(args, pixel_format):
    """The keywords that loaders share."""
    return {
        "batch_size": args.batch_size,
        "seed": args.seed,
        "num_workers": args.num_workers,
        "pin_mem": args.pin_mem,
        "pixels": pixel_format,
        "decode": args.decode,
    }


def build_model(args):
    torch.manual_seed(derive_seed(args.seed, "init"))
    return models_vit.build_model(
        args.model,
        img_size=args.input_size,
        in_chans=args.in_chans,
        num_classes=args.nb_classes,
        drop_path_rate=args.drop_path,
        global_pool=args.global_pool,
    )


if __name__ == "__main__":
    cli.run(main, get_args_parser())

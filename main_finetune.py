"""Fine-tune a pre-trained encoder as a classifier, train one from scratch, or evaluate one.

    RUN="main_finetune.py --data_path DIR --nb_classes 10 --model vit_base_patch16"
    python $RUN --finetune CKPT --output_dir finetuned
    torchrun --nproc_per_node 8 $RUN --finetune CKPT --output_dir finetuned --mixup 0.8
    python $RUN --eval --resume finetuned/checkpoint-best.pth --output_dir finetuned

Classes are the folders in DIR/train and DIR/val. CKPT is a checkpoint of main_pretrain.py, a
released one, bare weights (.pth or .safetensors) or the https:// address of such a .pth. Run the
same command again to continue after any interruption.
"""

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import (
    checkpoint,
    cli,
    data,
    distributed,
    flags,
    image_files,
    loading,
    logs,
    optim,
    speed,
)
from util.accuracy import report_evaluation
from util.errors import UserError
from util.lr_sched import SCHEDULE_FLAGS, make_schedule
from util.precision import grad_scaler, resolve_amp
from util.run import ARCHITECTURE_FLAGS, RUN_FLAGS, Run
from util.seeding import derive_seed


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = flags.add_classifier_flags(parser)
    model.add_argument(
        "--finetune", metavar="CKPT", help="start from this encoder; if not given, from scratch"
    )
    model.add_argument(
        "--drop_path", type=cli.number(0, 1, below=True), default=0.1, help="rate of drop path"
    )
    flags.add_data_flags(parser)
    optimization = flags.add_optimization_flags(parser)
    optimization.add_argument(
        "--layer_decay",
        type=cli.number(0, 1, above=True),
        default=0.75,
        help="learning rate of a block as a share of the next one's",
    )
    flags.add_augmentation_flags(parser)
    runtime = flags.add_runtime_flags(parser)
    flags.add_grad_checkpointing_flag(runtime)
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
    )
    return parser


def main(args):
    with distributed.process_group(args.device) as process:
        (evaluate_checkpoint if args.eval else finetune)(args, process)


def finetune(args, process):
    # ---- setup
    amp_dtype = resolve_amp(args.amp, process.device)
    effective_batch = args.batch_size * args.accum_iter * process.world_size
    schedule = make_schedule(effective_batch, **cli.pick(args, SCHEDULE_FLAGS))
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2:
        raise UserError(f"mixup and cutmix pair images: batch_size {args.batch_size} is not even")
    if args.cutmix_minmax:
        data.check_cutmix_sides(args.input_size, args.cutmix_minmax)
    cli.make_output_dirs(args.output_dir, args.log_dir, process)

    # ---- data
    train_paths, val_paths = image_files.find_labelled_images(args.data_path, args.nb_classes)
    train_transform = data.finetune_transform(args.input_size, args.color_jitter, args.aa)
    batching = cli.pick(args, "batch_size seed num_workers pin_mem")
    train_loader = loading.train_loader(
        train_paths, train_transform, process, accum_iter=args.accum_iter, **batching
    )
    val_loader = loading.eval_loader(val_paths, args.input_size, process, **batching)

    # ---- model
    model = build_model(args)
    encoder = None
    if args.finetune:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        encoder = checkpoint.start_from(model, args.finetune)
    model.to(process.device)
    speed.prepare(model, process.device, amp_dtype, **cli.pick(args, "compile grad_checkpointing"))

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
    scaler = grad_scaler(process.device, amp_dtype)

    # ---- resume
    run = Run(
        "main_finetune.py",
        process,
        {"model": model, "optimizer": optimizer, "scaler": scaler},
        flags=vars(args),
        images=train_paths,
        steps=len(train_loader),
        settings={"encoder": encoder},
        contents={"classes": train_paths.classes},
        **cli.pick(args, RUN_FLAGS),
    )
    parameters = sum(p.numel() for p in model.parameters())
    origin = f"from {args.finetune}" if args.finetune else "from scratch, without --finetune"
    size = logs.describe_training(process, effective_batch, schedule["lr"], amp_dtype)
    run.log.line(
        f"{args.model}, {parameters / 1e6:.1f} M parameters, {origin}, on {len(train_paths)} "
        f"images of {len(train_paths.classes)} classes; {size}"
    )

    # ---- train
    parallel_model = distributed.data_parallel(model, process)
    with run:
        for epoch in run.epochs_left():
            record = train_one_epoch(
                parallel_model,
                criterion,
                train_loader,
                optimizer,
                scaler,
                run=run,
                epoch=epoch,
                schedule=schedule,
                random_erasing=random_erasing,
                mixup=mixup,
                amp_dtype=amp_dtype,
                **cli.pick(args, "seed accum_iter clip_grad"),
            )
            run.save_before_evaluation()
            figures = evaluate(model, val_loader, amp_dtype=amp_dtype)
            run.log.accuracy(epoch + 1, figures)
            record |= figures | {"n_parameters": parameters}
            run.end_epoch(record, figure=figures["test_acc1"])


def evaluate_checkpoint(args, process):
    if args.resume not in ("auto", "none") and args.finetune:
        raise UserError("--eval takes the classifier of --resume or of --finetune, not of both")
    path = args.finetune if args.resume in ("auto", "none") else args.resume
    if not path:
        raise UserError("--eval needs the checkpoint of a classifier: give it by --resume")
    amp_dtype = resolve_amp(args.amp, process.device)
    cli.make_output_dirs(args.output_dir, args.log_dir, process)
    contents = checkpoint.load_checkpoint(path)
    (val_paths,) = image_files.find_labelled_images(args.data_path, args.nb_classes, ["val"])
    if "classes" in contents:
        image_files.check_classes(val_paths, contents["classes"], path)
    checkpoint.check_flags(contents, path, cli.pick(args, ARCHITECTURE_FLAGS))
    model = build_model(args)
    checkpoint.load_classifier(model, contents["model"], path)
    batching = cli.pick(args, "batch_size seed num_workers pin_mem")
    val_loader = loading.eval_loader(val_paths, args.input_size, process, **batching)
    speed.prepare(model, process.device, amp_dtype)
    figures = evaluate(model.to(process.device), val_loader, amp_dtype=amp_dtype)
    report_evaluation(args.output_dir, process, figures, checkpoint=path, images=len(val_paths))


def build_model(args):
    torch.manual_seed(derive_seed(args.seed, "init"))
    return models_vit.build_model(
        args.model,
        img_size=args.input_size,
        num_classes=args.nb_classes,
        drop_path_rate=args.drop_path,
        global_pool=args.global_pool,
    )


if __name__ == "__main__":
    cli.run(main, get_args_parser())

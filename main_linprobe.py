"""Train a linear classifier on the frozen features of a pre-trained encoder, or evaluate one.

    RUN="main_linprobe.py --finetune CKPT --data_path DIR --nb_classes 10 --model vit_base_patch16"
    python $RUN --output_dir probed
    torchrun --nproc_per_node 8 $RUN --output_dir probed
    python $RUN --output_dir probed --eval --resume probed/checkpoint-best.pth

Classes are the folders in DIR/train and DIR/val; CKPT is what main_finetune.py takes. The
checkpoints of the probe hold its head alone. Run the same command again to continue after any
interruption.
"""

import torch
from torch import nn

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import checkpoint, cli, data, distributed, flags, image_files, loading, logs, speed
from util.accuracy import report_evaluation
from util.errors import UserError
from util.lars import LARS
from util.lr_sched import SCHEDULE_FLAGS, make_schedule
from util.precision import grad_scaler, resolve_amp
from util.run import ARCHITECTURE_FLAGS, RUN_FLAGS, Run
from util.seeding import derive_seed


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = flags.add_classifier_flags(parser)
    model.add_argument("--finetune", metavar="CKPT", required=True, help="the encoder to probe")
    flags.add_data_flags(parser)
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
    )
    return parser


def main(args):
    with distributed.process_group(args.device) as process:
        (evaluate_checkpoint if args.eval else probe)(args, process)


def probe(args, process):
    # ---- setup
    if args.batch_size < 2:
        raise UserError("batch_size 1 has no statistics for BatchNorm: take at least 2")
    cli.make_output_dirs(args.output_dir, args.log_dir, process)
    amp_dtype = resolve_amp(args.amp, process.device)
    effective_batch = args.batch_size * args.accum_iter * process.world_size
    schedule = make_schedule(effective_batch, **cli.pick(args, SCHEDULE_FLAGS))

    # ---- data
    train_paths, val_paths = image_files.find_labelled_images(args.data_path, args.nb_classes)
    batching = cli.pick(args, "batch_size seed num_workers pin_mem")
    train_loader = loading.train_loader(
        train_paths,
        data.probe_transform(args.input_size),
        process,
        accum_iter=args.accum_iter,
        **batching,
    )
    val_loader = loading.eval_loader(val_paths, args.input_size, process, **batching)

    # ---- model
    model, head, encoder = build_model(args)
    model.to(process.device)
    speed.prepare(model, process.device, amp_dtype, compile=args.compile)

    # ---- optimizer
    optimizer = LARS(head.parameters(), lr=0.0, weight_decay=args.weight_decay)
    scaler = grad_scaler(process.device, amp_dtype)

    # ---- resume
    run = Run(
        "main_linprobe.py",
        process,
        {"model": head, "optimizer": optimizer, "scaler": scaler},
        flags=vars(args),
        images=train_paths,
        steps=len(train_loader),
        settings={"encoder": encoder},
        contents={"classes": train_paths.classes},
        **cli.pick(args, RUN_FLAGS),
    )
    parameters = sum(p.numel() for p in head.parameters())
    size = logs.describe_training(process, effective_batch, schedule["lr"], amp_dtype)
    run.log.line(
        f"head of {parameters} parameters on the frozen {args.model} of {args.finetune}, "
        f"{len(train_paths)} images of {len(train_paths.classes)} classes; {size}"
    )

    # ---- train
    parallel_model = distributed.data_parallel(model, process)
    with run:
        for epoch in run.epochs_left():
            record = train_one_epoch(
                parallel_model,
                nn.CrossEntropyLoss(),
                train_loader,
                optimizer,
                scaler,
                run=run,
                epoch=epoch,
                amp_dtype=amp_dtype,
                schedule=schedule,
                **cli.pick(args, "seed accum_iter clip_grad"),
            )
            run.save_before_evaluation()
            figures = evaluate(model, val_loader, amp_dtype=amp_dtype)
            run.log.accuracy(epoch + 1, figures)
            record |= figures | {"n_parameters": parameters}
            run.end_epoch(record, figure=figures["test_acc1"])


def evaluate_checkpoint(args, process):
    if args.resume in ("auto", "none"):
        raise UserError("--eval needs the checkpoint of a probe: give it by --resume")
    amp_dtype = resolve_amp(args.amp, process.device)
    cli.make_output_dirs(args.output_dir, args.log_dir, process)
    contents = checkpoint.load_checkpoint(args.resume)
    if contents.get("command") != "main_linprobe.py":
        raise UserError(f"{args.resume} is not a checkpoint of main_linprobe.py")
    (val_paths,) = image_files.find_labelled_images(args.data_path, args.nb_classes, ["val"])
    image_files.check_classes(val_paths, contents["classes"], args.resume)
    checkpoint.check_flags(contents, args.resume, cli.pick(args, ARCHITECTURE_FLAGS))
    model, head, encoder = build_model(args)
    if encoder != contents["training"]["encoder"]:
        raise UserError(f"{args.resume} is a probe of another encoder than {args.finetune}")
    head.load_state_dict(contents["model"])
    batching = cli.pick(args, "batch_size seed num_workers pin_mem")
    val_loader = loading.eval_loader(val_paths, args.input_size, process, **batching)
    speed.prepare(model, process.device, amp_dtype)
    figures = evaluate(model.to(process.device), val_loader, amp_dtype=amp_dtype)
    report_evaluation(
        args.output_dir, process, figures, checkpoint=args.resume, images=len(val_paths)
    )


def build_model(args):
    """The classifier, its trainable head under the classifier's keys, the encoder's checksum."""
    torch.manual_seed(derive_seed(args.seed, "init"))
    model = models_vit.build_model(
        args.model,
        img_size=args.input_size,
        num_classes=args.nb_classes,
        global_pool=args.global_pool,
    )
    encoder = checkpoint.start_from(model, args.finetune)
    models_vit.add_probe_head(model)
    return model, nn.ModuleDict({"head": model.head}), encoder


if __name__ == "__main__":
    cli.run(main, get_args_parser())

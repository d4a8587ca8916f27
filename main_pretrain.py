"""Pre-train a masked autoencoder on a folder of images.

    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16
    torchrun --nproc_per_node 8 main_pretrain.py --data_path DIR --norm_pix_loss --blr 1.5e-4
    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16 --init WEIGHTS

DIR/train is searched for images, or DIR itself without it; labels are not needed. With DIR/val
the loss on those images, under fixed masks, is logged every epoch. Run the same command again to
continue after any interruption. WEIGHTS is a checkpoint of this project or a released one, with or
without its decoder, or a model that transformers or timm saved: a file, a folder or an https://
address.
"""

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import torch

import models_mae
from engine_pretrain import evaluate, evaluate_features, train_one_epoch
from util import (
    checkpoint,
    cli,
    data,
    distributed,
    exporting,
    features,
    flags,
    image_files,
    knn,
    loading,
    locking,
    logs,
    memory,
    optim,
    pixels,
    precision,
    pretrained,
    speed,
    stopping,
    training,
    visualize,
)
from util.errors import UserError, warn
from util.lr_sched import make_schedule
from util.seeding import derive_seed

PICTURED_IMAGES = 8


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = flags.add_model_flags(parser)
    flags.MayBeAccepted(model).add_argument(
        "--mask_ratio", type=cli.number(), default=0.75, help="share of the patches to remove"
    )
    model.add_argument(
        "--norm_pix_loss",
        action="store_true",
        help="predict pixels normalised by the mean and variance of their patch",
    )
    flags.add_decoder_flags(model)
    flags.MayChange(model).add_argument(
        "--init",
        type=cli.path,
        metavar="WEIGHTS",
        help="weights to start from, a file, a folder or an https:// address; if not given, random "
        "ones",
    )
    flags.add_data_flags(parser)
    flags.add_pixel_flags(parser)
    flags.add_optimization_flags(parser)
    flags.add_learning_flags(parser)
    flags.add_runtime_flags(parser, grad_checkpointing=True)
    parser.set_defaults(
        model="mae_vit_large_patch16",
        batch_size=64,
        epochs=400,
        blr=1e-3,
        min_lr=0.0,
        warmup_epochs=40,
        weight_decay=0.05,
        crop_scale=(0.2, 1.0),
    )
    return parser


def main(args):
    with distributed.process_group(args.device, args.timeout_minutes) as process:
        if process.device.type == "cpu":
            speed.keep_freed_memory()
        amp_dtype = precision.resolve_amp(args.amp, process.device)
        cli.make_output_dirs(args.output_dir, args.log_dir, process)
        with (
            locking.lock(args.output_dir, process),
            memory.explain_running_out(
                args.batch_size,
                args.model,
                args.input_size,
                amp_dtype,
                args.grad_checkpointing,
                trains=True,
            ),
        ):
            pretrain(args, process, amp_dtype)


def pretrain(args, process, amp_dtype):
    # ---- setup
    dtype = precision.dtype_name(amp_dtype)
    effective_batch = args.batch_size * args.accum_iter * process.world_size
    schedule = make_schedule(
        effective_batch, args.lr, args.blr, args.min_lr, args.warmup_epochs, args.epochs
    )

    # ---- data
    origin = checkpoint.load_checkpoint(args.init) if args.init else {}
    pixel_format = pixels.resolve(vars(args), origin, args.init, may_adapt=True)
    vars(args).update(pixel_format.stored())
    train_paths = image_files.find_images(args.data_path, "train", pixel_format)
    val_paths = image_files.find_images(args.data_path, "val", pixel_format)
    batching = dict(
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_mem=args.pin_mem,
        pixels=pixel_format,
        decode=args.decode,
    )
    transform = data.pretrain_transform(args.input_size, args.crop_scale, not args.no_flip)
    train_loader = loading.train_loader(
        train_paths, transform, process, accum_iter=args.accum_iter, **batching
    )
    val_loader = loading.eval_loader(val_paths or train_paths, args.input_size, process, **batching)

    # ---- model
    torch.manual_seed(derive_seed(args.seed, "init"))
    take_decoder_sizes(args, origin)
    model = models_mae.build_saved(vars(args), args.in_chans)
    model.check_mask_ratio(args.mask_ratio)
    start = None
    if args.init:
        heads = models_mae.decoder_sizes(origin.get("args", {})).get("decoder_num_heads")
        start = pretrained.start_autoencoder_from(model, args.init, origin, decoder_heads=heads)
    del origin  # it may hold an optimizer's state
    features.check_layer(model, args.knn_layer)
    model.to(process.device)
    speed.prepare(model, process.device, amp_dtype, args.compile, args.grad_checkpointing)
    parallel_model = distributed.data_parallel(model, process)

    # ---- optimizer
    groups = optim.weight_decay_groups(model, args.weight_decay)
    optimizer = optim.adamw(groups, betas=(0.9, 0.95))
    scaler = precision.grad_scaler(process.device, amp_dtype)

    # ---- resume
    signals = stopping.StopSignals()
    state = training.TrainingState(model, optimizer, scaler)
    about = {"command": "main_pretrain.py", "args": vars(args)}
    checkpoints = training.Checkpoints(
        args.output_dir,
        process,
        signals=signals,
        settings=flags.fixed(get_args_parser(), vars(args))
        | {
            "processes": process.world_size,
            "images": len(train_paths),
            "image_names": train_paths.fingerprint,
            "dtype": dtype,
            "init": start and start.fingerprint,
        },
        defaults=flags.fixed_by_default(get_args_parser()) | pixels.RGB.stored(),
        contents=about | {"schedule": schedule, "steps": len(train_loader)},
        epochs=args.epochs,
        save_every=args.save_every,
        save_minutes=args.save_minutes,
    )
    checkpoints.restore(
        state,
        args.resume,
        acceptable=flags.acceptable(get_args_parser()),
        accept_changes=args.accept_changes,
    )
    log = logs.RunLog(
        args.output_dir, args.log_dir, process, state, train_loader, args.epochs, tag="train_loss"
    )
    if start and state.epoch == state.step == 0:
        log.line(start.summary)
        for warning in start.warnings:
            warn(warning)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.line(
        f"{args.model}, {parameters / 1e6:.1f} M parameters, on {len(train_paths)} images; "
        f"effective batch {effective_batch}, lr {schedule['lr']:.2e}; "
        f"{process.world_size} x {process.device}, computing in {dtype}"
    )

    # ---- does it learn?
    if args.knn_every:
        unlabelled = image_files.why_unlabelled(train_paths, val_paths)
        sample_loader, bank_loader = (
            loading.eval_loader(paths, args.input_size, process, most=args.knn_images, **batching)
            for paths in (val_paths or train_paths, train_paths)
        )
        log.line(
            knn.describe(
                args.knn_every,
                args.knn_images,
                args.knn_k,
                val_paths or train_paths,
                train_paths,
                unlabelled,
            )
        )
        if unlabelled:
            bank_loader = None

    # ---- train
    with log, signals, checkpoints:
        while state.epoch < args.epochs:
            meter = logs.Meter(log, state, train_loader, args.log_every)
            record = train_one_epoch(
                parallel_model,
                train_loader,
                optimizer,
                scaler,
                state=state,
                meter=meter,
                checkpoints=checkpoints,
                schedule=schedule,
                mask_ratio=args.mask_ratio,
                accum_iter=args.accum_iter,
                clip_grad=args.clip_grad,
                amp_dtype=amp_dtype,
                seed=args.seed,
                rank=process.rank,
            )
            held_out, learned = {}, {}
            measures = args.knn_every and (
                (state.epoch + 1) % args.knn_every == 0 or state.epoch + 1 == args.epochs
            )
            if val_paths or measures:
                checkpoints.save_last(state)  # the evaluation may fail
            if val_paths:
                held_out = evaluate(
                    model,
                    val_loader,
                    mask_ratio=args.mask_ratio,
                    amp_dtype=amp_dtype,
                    seed=args.seed,
                )
            if measures:
                learned = evaluate_features(
                    model,
                    sample_loader,
                    bank_loader,
                    k=args.knn_k,
                    layer=args.knn_layer,
                    amp_dtype=amp_dtype,
                )
                log.line(logs.features_line(learned))
            log.epoch(record | held_out | learned | checkpoints.accepted_in(state.epoch))
            checkpoints.save_epoch(state)
            # After the save: an epoch that runs again would be drawn twice.
            curves = held_out | {f"perf/{name}": value for name, value in learned.items()}
            log.scalars(1000 * (state.epoch + 1), curves)
            if checkpoints.keeps(state.epoch) and process.is_main:
                imgs = pictured_images(val_loader.dataset).to(process.device)
                columns = visualize.reconstruct(
                    model,
                    imgs,
                    args.mask_ratio,
                    seed=args.seed,
                    pixels=pixel_format,
                    amp_dtype=amp_dtype,
                )
                log.picture(state.epoch + 1, "reconstruction", visualize.draw_grid(columns))
            checkpoints.stop_if_asked(state)
            state.begin_next_epoch()
        checkpoints.finish()
        saved = process.is_main and exporting.save_encoder(args.output_dir, model, about)
        saved = distributed.gather(saved)[0]  # no process leaves before the file is whole
        if not saved:
            raise UserError("the training is done and saved, but no encoder, see the warning")
    log.line(f"done: {args.epochs} epochs, see {args.output_dir}, encoder in {saved}")


def take_decoder_sizes(args, origin):
    """Give the decoder the size of the one in --init's contents, if no flag gives a size.

    A size that is the named model's becomes None, so that settings are equal where models are.
    """
    sizes = {name: getattr(args, name) for name in models_mae.DECODER_SIZES}
    has_decoder = "decoder_pred.weight" in origin.get("model", {})
    if has_decoder and not any(sizes.values()):
        sizes |= models_mae.decoder_sizes(origin.get("args", {}))
    named = models_mae.decoder_sizes({"model": args.model})
    vars(args).update({name: None if n == named.get(name) else n for name, n in sizes.items()})


def pictured_images(dataset):
    """Up to `PICTURED_IMAGES` images, evenly spread over the dataset, normalised."""
    indices = loading.evenly_spread(len(dataset), PICTURED_IMAGES)
    images = data.stack([dataset[0, index][0] for index in indices])
    return data.normalize(images, dataset.pixels.mean, dataset.pixels.std)


if __name__ == "__main__":
    cli.run(main, get_args_parser())

"""Pre-train a masked autoencoder on a folder of images.

    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16
    torchrun --nproc_per_node 8 main_pretrain.py --data_path DIR --norm_pix_loss --blr 1.5e-4

DIR/train is searched for images, or DIR itself without it; labels are not needed. With DIR/val
the loss on those images, under fixed masks, is logged every epoch. Run the same command again to
continue after any interruption.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

import models_mae
from engine_pretrain import evaluate, train_one_epoch
from util import cli, data, distributed, image_files, logs, optim, precision, seeding, visualize
from util.checkpoint import LAST, Checkpointer
from util.errors import UserError, warn

PICTURED_IMAGES = 8


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = cli.add_model_flags(parser)
    model.add_argument(
        "--mask_ratio", type=cli.number(), default=0.75, help="share of the patches to remove"
    )
    model.add_argument(
        "--norm_pix_loss",
        action="store_true",
        help="predict pixels normalised by the mean and variance of their patch",
    )
    cli.add_data_flags(parser)
    cli.add_optimization_flags(parser)
    cli.add_runtime_flags(parser)
    parser.set_defaults(
        model="mae_vit_large_patch16",
        batch_size=64,
        epochs=400,
        blr=1e-3,
        min_lr=0.0,
        warmup_epochs=40,
        weight_decay=0.05,
    )
    return parser


def main(args):
    with distributed.process_group(args.device) as process:
        pretrain(args, process)


def pretrain(args, process):
    # ---- setup
    amp_dtype = precision.resolve_amp(args.amp, process.device)
    effective_batch = args.batch_size * args.accum_iter * process.world_size
    lr = args.blr * effective_batch / 256 if args.lr is None else args.lr
    if args.warmup_epochs >= args.epochs:
        warn(f"warmup_epochs {args.warmup_epochs} is not below epochs {args.epochs}: no decay")
    output_dir, log_dir = Path(args.output_dir), Path(args.log_dir or args.output_dir)
    if process.is_main:
        cli.make_writable(output_dir, "--output_dir")
        cli.make_writable(log_dir, "--log_dir")

    # ---- data
    train_paths = image_files.find_images(args.data_path, "train")
    if len(train_paths) < effective_batch:
        raise UserError(
            f"{args.data_path} has {len(train_paths)} training images, fewer than one global batch "
            f"of {effective_batch} (batch_size x accum_iter x processes): lower --batch_size"
        )
    train_batches = data.ShuffledBatches(len(train_paths), args.batch_size, process, args.seed)
    train_transform = data.pretrain_transform(args.input_size)
    loading = {"num_workers": args.num_workers, "pin_mem": args.pin_mem}
    train_loader = data.ImageLoader(
        data.ImageDataset(train_paths, train_transform, args.seed),
        train_batches,
        process,
        **loading,
    )
    val_paths = image_files.find_images(args.data_path, "val")
    val_images = data.ImageDataset(
        val_paths or train_paths, data.eval_transform(args.input_size), args.seed
    )
    spread = np.linspace(0, len(val_images) - 1, PICTURED_IMAGES).round().astype(int)
    picture_indices = np.unique(spread).tolist()
    if val_paths:
        val_batches = data.OrderedBatches(len(val_paths), args.batch_size, process)
        val_loader = data.ImageLoader(val_images, val_batches, process, persistent=False, **loading)

    # ---- model
    torch.manual_seed(seeding.derive_seed(args.seed, "init"))
    model = models_mae.build_model(
        args.model, img_size=args.input_size, norm_pix_loss=args.norm_pix_loss
    )
    model.check_mask_ratio(args.mask_ratio)
    model.to(process.device)
    if args.compile:
        for block in (*model.blocks, *model.decoder_blocks):
            block.compile()

    # ---- optimizer
    groups = optim.weight_decay_groups(model, args.weight_decay)
    optimizer = optim.adamw(groups, betas=(0.9, 0.95))
    scaler = precision.grad_scaler(process.device, amp_dtype)
    schedule = {
        "lr": lr,
        "min_lr": args.min_lr,
        "warmup_epochs": args.warmup_epochs,
        "epochs": args.epochs,
    }

    # ---- resume
    checkpointer = Checkpointer(
        output_dir,
        process,
        command="main_pretrain.py",
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        flags=vars(args),
        training={
            **{flag: value for flag, value in vars(args).items() if flag not in cli.FREE_FLAGS},
            "processes": process.world_size,
            "images": len(train_paths),
            "image_names": train_paths.fingerprint,
        },
        save_minutes=args.save_minutes,
    )
    first_epoch, first_step, totals = checkpointer.resume(args.resume)
    run_log = logs.RunLog(
        output_dir,
        log_dir,
        process,
        epochs=args.epochs,
        log_every=args.log_every,
        start=first_epoch + first_step / len(train_loader),
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run_log.line(
        f"{args.model}, {parameters / 1e6:.1f} M parameters, on {len(train_paths)} images; "
        f"effective batch {effective_batch}, lr {lr:.2e}; {process.world_size} x {process.device}, "
        f"{amp_dtype or torch.float32}"
    )

    # ---- train
    saved = True
    parallel_model = distributed.data_parallel(model, process)
    with contextlib.closing(run_log), checkpointer.watch_signals():
        for epoch in range(first_epoch, args.epochs):
            record = train_one_epoch(
                parallel_model,
                train_loader,
                optimizer,
                scaler,
                epoch=epoch,
                first_step=first_step,
                totals=totals,
                schedule=schedule,
                mask_ratio=args.mask_ratio,
                accum_iter=args.accum_iter,
                clip_grad=args.clip_grad,
                amp_dtype=amp_dtype,
                seed=args.seed,
                process=process,
                run_log=run_log,
                checkpointer=checkpointer,
            )
            first_step, totals = 0, None
            numeric = {"mask_ratio": args.mask_ratio, "seed": args.seed, "amp_dtype": amp_dtype}
            if val_paths:
                held_out = evaluate(model, val_loader, **numeric)
                run_log.scalars(epoch + 1, **held_out)
                record |= held_out
            run_log.epoch_line(record)

            numbered = (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs
            if numbered and process.is_main:
                pictured = torch.stack([val_images[0, i][0] for i in picture_indices])
                imgs = data.normalize(pictured.to(process.device))
                grid = visualize.draw_grid(visualize.reconstruct(model, imgs, **numeric))
                run_log.picture(epoch + 1, "reconstruction", grid)
            for name in [f"checkpoint-{epoch}.pth"] * numbered + [LAST]:
                saved = checkpointer.save(name, epoch=epoch, step=len(train_loader))
    if not saved:
        raise UserError(
            f"the final checkpoint could not be written to {output_dir}: free some space"
        )
    run_log.line(f"done: {args.epochs} epochs, see {output_dir}")


if __name__ == "__main__":
    cli.run(main, get_args_parser())

"""Pre-train a masked autoencoder on a folder of images.

    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16
    torchrun --nproc_per_node 8 main_pretrain.py --data_path DIR --norm_pix_loss --blr 1.5e-4

DIR/train is searched for images, or DIR itself without it; labels are not needed. With DIR/val
the loss on those images, under fixed masks, is logged every epoch. Run the same command again to
continue after any interruption.
"""

import numpy as np
import torch

import models_mae
from engine_pretrain import evaluate, train_one_epoch
from util import cli, data, distributed, flags, image_files, loading, logs, optim, speed, visualize
from util.lr_sched import SCHEDULE_FLAGS, make_schedule
from util.precision import grad_scaler, resolve_amp
from util.run import RUN_FLAGS, Run
from util.seeding import derive_seed

PICTURED_IMAGES = 8


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    model = flags.add_model_flags(parser)
    model.add_argument(
        "--mask_ratio", type=cli.number(), default=0.75, help="share of the patches to remove"
    )
    model.add_argument(
        "--norm_pix_loss",
        action="store_true",
        help="predict pixels normalised by the mean and variance of their patch",
    )
    flags.add_data_flags(parser)
    flags.add_optimization_flags(parser)
    runtime = flags.add_runtime_flags(parser)
    flags.add_grad_checkpointing_flag(runtime)
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
    amp_dtype = resolve_amp(args.amp, process.device)
    effective_batch = args.batch_size * args.accum_iter * process.world_size
    schedule = make_schedule(effective_batch, **cli.pick(args, SCHEDULE_FLAGS))
    cli.make_output_dirs(args.output_dir, args.log_dir, process)

    # ---- data
    train_paths = image_files.find_images(args.data_path, "train")
    val_paths = image_files.find_images(args.data_path, "val")
    train_transform = data.pretrain_transform(args.input_size)
    batching = cli.pick(args, "batch_size seed num_workers pin_mem")
    train_loader = loading.train_loader(
        train_paths, train_transform, process, accum_iter=args.accum_iter, **batching
    )
    val_loader = loading.eval_loader(val_paths or train_paths, args.input_size, process, **batching)
    spread = np.linspace(0, len(val_loader.dataset) - 1, PICTURED_IMAGES).round().astype(int)
    picture_indices = np.unique(spread).tolist()

    # ---- model
    torch.manual_seed(derive_seed(args.seed, "init"))
    model = models_mae.build_model(
        args.model, img_size=args.input_size, norm_pix_loss=args.norm_pix_loss
    )
    model.check_mask_ratio(args.mask_ratio)
    model.to(process.device)
    speed.prepare(model, process.device, amp_dtype, **cli.pick(args, "compile grad_checkpointing"))

    # ---- optimizer
    groups = optim.weight_decay_groups(model, args.weight_decay)
    optimizer = optim.adamw(groups, betas=(0.9, 0.95))
    scaler = grad_scaler(process.device, amp_dtype)

    # ---- resume
    run = Run(
        "main_pretrain.py",
        process,
        {"model": model, "optimizer": optimizer, "scaler": scaler},
        flags=vars(args),
        images=train_paths,
        steps=len(train_loader),
        loss_tag="train_loss",
        **cli.pick(args, RUN_FLAGS),
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = logs.describe_training(process, effective_batch, schedule["lr"], amp_dtype)
    run.log.line(
        f"{args.model}, {parameters / 1e6:.1f} M parameters, on {len(train_paths)} images; {size}"
    )

    # ---- train
    parallel_model = distributed.data_parallel(model, process)
    with run:
        for epoch in run.epochs_left():
            record = train_one_epoch(
                parallel_model,
                train_loader,
                optimizer,
                scaler,
                run=run,
                epoch=epoch,
                schedule=schedule,
                mask_ratio=args.mask_ratio,
                accum_iter=args.accum_iter,
                clip_grad=args.clip_grad,
                amp_dtype=amp_dtype,
                seed=args.seed,
            )
            numeric = {"mask_ratio": args.mask_ratio, "seed": args.seed, "amp_dtype": amp_dtype}
            if val_paths:
                held_out = evaluate(model, val_loader, **numeric)
                run.log.scalars(epoch + 1, **held_out)
                record |= held_out
            if run.saves_numbered(epoch) and process.is_main:
                pictured = [val_loader.dataset[0, index][0] for index in picture_indices]
                imgs = data.normalize(torch.stack(pictured).to(process.device))
                grid = visualize.draw_grid(visualize.reconstruct(model, imgs, **numeric))
                run.log.picture(epoch + 1, "reconstruction", grid)
            run.end_epoch(record)


if __name__ == "__main__":
    cli.run(main, get_args_parser())

"""Train a small VAE on the frames of a data folder.

Use it where the published VAEs do not fit or can't be downloaded:

    torchrun --nproc_per_node=2 EqM/train_vae.py --data-path datasets/weizmann --image-size 64 \
        --downsample 4 --global-batch-size 16 --max-steps 4000 --results-dir results/EXP

    RUN/vae/        the EMA weights as a diffusers AutoencoderKL, for --vae RUN/vae of
                    cache_latents.py and train.py
    RUN/samples/    sheets: frames of validation videos above their reconstructions

Its scale and shift give latents of the training frames mean 0 and standard deviation 1. After an
interruption, run the same command with --resume: the result is the same bit for bit.
"""

import uncaught  # noqa: F401
import copy
import math

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import BatchSampler

import autoencoder
import checkpoint
import optim
import preflight
from optim import ema_decay, update_ema
from run import Run, add_loading_flags, note_changes
from runtime import cli, distributed
from runtime.cli import (
    COUNT,
    NON_NEGATIVE,
    SHARE,
    ArgumentParser,
    Bar,
    one_line_errors,
    plural,
    say,
)
from runtime.distributed import rank, world_size
from runtime.metrics import StepStats
from runtime.rng import normal
from runtime.signals import Interrupted
from schedule import is_due
from vae import VAE
from video.clips import Clips, rank_batches
from video.loader import batches_of, make_loader, on_device
from video.writers import write_sheet


def parse_args():
    parser = ArgumentParser(description="Train a small VAE on the frames of videos, for --vae.")
    parser.set_defaults(video=True)
    add = parser.add_argument_group("model").add_argument
    add(
        "--image-size",
        type=COUNT,
        default=256,
        metavar="PX",
        help="height and width of the frames, px",
    )
    add(
        "--downsample",
        type=int,
        choices=[4, 8],
        default=8,
        help="pixels per latent value along each side",
    )
    add("--latent-channels", type=COUNT, default=4, help="channels of a latent")
    add(
        "--widths",
        type=COUNT,
        nargs="+",
        help=(
            "channels per resolution, full size first, log2(--downsample) + 1 numbers; default: "
            "from 16 32 64 128"
        ),
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--data-path",
        required=True,
        metavar="DIR",
        help="folder of <class>/<video>, or of videos without classes",
    )
    add("--no-flip", action="store_true", help="never mirror frames")
    add(
        "--color-jitter",
        type=SHARE,
        default=0.8,
        help="fraction of frames with changed colors; 0 = off",
    )
    add_loading_flags(add, num_workers=2)

    optim.add_flags(
        parser,
        optimizer="muon",
        lr=2e-3,
        muon_lr=0.02,
        warmup_steps=50,
        lr_decay=0.5,
        weight_decay=0.0,
        clip_grad=1.0,
        ema_decay=0.995,
    )
    add = parser.add_argument_group("run").add_argument
    add("--max-steps", type=COUNT, default=20_000, help="step to end at")
    add("--global-batch-size", type=COUNT, default=32, help="frames per step, over all ranks")
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help=(
            "bf16 is mixed precision, tf32 rounds inside matrix products; default: bf16 on a GPU "
            "that has it"
        ),
    )

    add("--results-dir", default="results", metavar="DIR", help="parent folder of the run folder")
    add("--resume", action="store_true", help="continue the newest run of this VAE, if any")
    add("--log-every", type=COUNT, default=50, help="steps between two lines of metrics")
    add("--val-every", type=COUNT, default=500, help="steps between validations, and at the end")
    add("--num-val-frames", type=COUNT, default=256, help="frames of validation videos")
    add(
        "--save-minutes",
        type=NON_NEGATIVE,
        default=5.0,
        help="minutes between checkpoints, and at the end; 0 = off",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    with cli.wrong_input():
        args, start, data = preflight.check_vae_run(args)
    device = distributed.start(distributed.STEP_TIME)
    data = distributed.broadcast(data)
    progress = start.progress
    preflight.check_same_start(start)
    if args.cache_frames:
        distributed.call_and_wait(data.source.fill)
    if progress.step >= args.max_steps and not start.unlogged:
        say(f"{start.folder} is finished at step {progress.step}")
        distributed.stop()
        return

    # Everything that is trained
    torch.manual_seed(args.global_seed)
    distributed.set_precision(args.precision)
    model = autoencoder.make_autoencoder(args.widths, args.latent_channels, args.image_size).to(
        device
    )
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = optim.make_optimizers(model, args, autoencoder.hidden_matrices)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    # A resumed run may log before its first step
    optim.set_learning_rates(optimizers, args, progress.step, args.max_steps)
    if start.state is not None:
        checkpoint.load_run(start, model, ema, optimizers, scaler)
    network = distributed.parallel(autoencoder.Autoencoder(model))

    # The run folder and its files
    run_config = {"training": vars(args), "typed": sorted(args.typed)}
    run = Run(start, args, preflight.vae_run_name(args), run_config, data.source)
    log = run.log
    stop = run.stop
    run.write_config(run_config)
    note_changes(start, run_config, run)
    start.state = None  # or the file would stay open during the run
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    log(
        f"{run.folder}: {size:.2f} M parameters; {world_size()} x {device.type}, to step "
        f"{args.max_steps}; {plural(len(data.train[1]), 'training video')}, "
        f"{plural(len(data.val[1]), 'validation video')}"
    )
    run.report_corrupt(data.scan.unreadable, progress.step)
    batches, val_loader, train_loader = make_loaders(args, data, progress, device)

    def save():
        run.save(checkpoint.run_state(run_config, model, ema, optimizers, scaler, progress))

    bar = Bar(initial=progress.step, total=args.max_steps, desc=run.folder.name, unit="step")
    try:
        while True:
            # Periodically and at the end: log, validate
            if len(run.stats) and is_due(
                progress.step, args.max_steps, args.log_every, args.val_every
            ):
                row = run.stats.summary(progress.step, args.global_batch_size)
                row["frames_per_s"] = row.pop("clips_per_s")
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.4f}, {row['frames_per_s']:.0f} frames/s"
                )
                run.report_corrupt(run.stats.corrupt, progress.step)
                if is_due(progress.step, args.max_steps, args.val_every):
                    values, corrupt = validate(
                        ema=ema,
                        val_loader=val_loader,
                        train_loader=train_loader,
                        folder=run.folder,
                        step=progress.step,
                        device=device,
                    )
                    run.report_corrupt(corrupt, progress.step)
                    log(
                        f"step {progress.step}: PSNR {values['val_psnr']:.2f} dB on validation "
                        "videos"
                    )
                    row |= values
                run.metrics.log(progress.step, **row, **optim.learning_rates(optimizers))
                run.stats = StepStats()
            if progress.step >= args.max_steps:
                save()
                break

            # One optimization step
            run.writer.check()
            stop.vote(save=run.wants_to_save(args.save_minutes))
            optim.set_learning_rates(optimizers, args, progress.step + 1, args.max_steps)
            batch = run.stats.next_batch(batches)
            losses = training_losses(network, batch, args, device)
            loss = sum(losses.values())
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.count_step(args.global_batch_size, 0)
            run.stats.add(batch["videos"], train_loss=loss, **losses, grad_norm=norm)
            update_ema(ema, model, ema_decay(args, progress.step))
            bar.update()
            if stop.resolve():  # raises Interrupted
                save()
        bar.close()
        run.writer.wait()
        log(f"done: --vae {run.folder / 'vae'}")
    except Interrupted:
        bar.close()
        run.stop_early(progress.step, save)
    run.close()
    del network  # DDP holds the process group
    distributed.stop()


def make_loaders(args, data, progress, device):
    """(iterator over this rank's batches, loaders of its validation and its statistics frames)."""
    shared = {"source": data.source, "num_frames": 1}
    train = Clips(
        videos=data.train[1],
        flip=not args.no_flip,
        seed=args.global_seed,
        stream=0,
        **shared,
    )
    val = Clips(
        videos=data.val[1],
        spare=data.spare(1),
        flip=False,
        stream="validation",
        **shared,
    )
    typical = Clips(
        videos=data.train[1],
        flip=False,
        stream="statistics",
        **shared,
    )
    indices = rank_batches(
        first=progress.position,
        steps=args.max_steps - progress.step,
        global_batch=args.global_batch_size,
        rank=rank(),
        world_size=world_size(),
    )
    train_loader = make_loader(
        clips={1: train},
        batches=([(1, index) for index in batch] for batch in indices),
        num_workers=args.num_workers,
        timeout=args.loader_timeout,
        device=device,
    )
    keys = [(1, index) for index in range(args.num_val_frames)]
    chunks = list(BatchSampler(keys, autoencoder.CHUNK, drop_last=False))
    val_loader, typical_loader = [
        make_loader(
            clips={1: clips},
            batches=chunks[rank() :: world_size()],
            num_workers=0,
            timeout=0,
            device=device,
        )
        for clips in (val, typical)
    ]
    return on_device(batches_of(train_loader), device), val_loader, typical_loader


def training_losses(network, batch, args, device):
    """{name: loss} of a batch, to be added up.

    The latents' noise depends only on the seed and each frame's index.
    """
    indices = batch["indices"].tolist()
    side = args.image_size // args.downsample
    x = batch["clips"][:, :, 0].to(device).float() / 127.5 - 1  # (B, 3, H, W)
    x = autoencoder.jitter_colors(
        x=x,
        seed=args.global_seed,
        indices=indices,
        share=args.color_jitter,
    )
    shape = (args.latent_channels, side, side)
    noise = normal(args.global_seed, "posterior", 0, indices, shape)
    with distributed.autocast(device, args.precision):
        outputs = network(x, noise.to(device))
    return autoencoder.losses_of(x, *outputs)


def validate(ema, val_loader, train_loader, folder, step, device):
    """({"val_psnr", ...} of the EMA, on all ranks; this rank's corrupt videos).

    Writes a sheet and the VAE's folder.
    """
    values, corrupt_val = autoencoder.measure(ema, val_loader, device)
    statistics, corrupt_train = autoencoder.measure(ema, train_loader, device)
    if rank() == 0:
        vae = VAE("shown", ema)
        frames = next(batches_of(val_loader))["clips"][:8]  # (N, 3, 1, H, W)
        decoded = vae.decode(vae.encode(frames.to(device))).cpu()
        # (2, N, H, W, 3)
        rows = torch.cat([frames.permute(2, 0, 3, 4, 1), decoded.transpose(0, 1)])
        sheet = folder / "samples" / f"{step:07d}.png"
        with cli.writing(sheet):
            sheet.parent.mkdir(exist_ok=True)
            write_sheet(sheet, rows.numpy(), ["frames", "VAE"])
            autoencoder.export(ema, folder / "vae", statistics)
    statistics["train_psnr"] = statistics.pop("psnr")
    return {"val_psnr": values["psnr"]} | statistics, corrupt_val + corrupt_train


if __name__ == "__main__":
    main()

"""Train a small VAE on the frames of a data folder, for data that the published VAEs do not fit or can't be had for.

    torchrun --nproc_per_node=2 EqM/train_vae.py --data-path datasets/weizmann --image-size 64 --downsample 4 \
        --widths 8 32 128 --global-batch-size 16 --max-steps 4000 --results-dir results/EXP

    RUN/vae/        the EMA weights as a diffusers AutoencoderKL: cache_latents.py, train.py take it as --vae RUN/vae
    RUN/samples/    sheets: frames of validation videos, above what comes back

Its scale and shift give latents of the training frames mean 0 and standard deviation 1. After an interruption: the same
command and --resume, which ends bit for bit as if there had been none.
"""

import copy
import functools
import json
import math
import time

import torch
from torch.nn.utils import clip_grad_norm_

import checkpoint
import preflight
from autoencoder import Autoencoder, chunks_of, export, jitter_colors, losses_of, make_autoencoder, measure
from optim import ema_decay, lr_multiplier, update_ema
from runtime import cli, distributed, runs
from runtime.cli import COUNT, NATURAL, NON_NEGATIVE, POSITIVE, SHARE, ArgumentParser, Bar, UserError, fail, say
from runtime.distributed import rank, world_size
from runtime.metrics import Metrics, StepStats
from runtime.rng import normal
from runtime.signals import Interrupted, StopSignal
from schedule import is_due
from vae import VAE
from video.clips import Batches, Clips
from video.index import BadVideos, check_data_path, find_data, latents_settings, save_index
from video.loader import batches_of, end_children, make_loader, on_device
from video.writers import write_sheet


def parse_args():
    parser = ArgumentParser(description="Train a small VAE on the frames of videos, for --vae.")
    parser.set_defaults(video=True, optimizer="adamw")
    add = parser.add_argument_group("model").add_argument
    add("--image-size", type=COUNT, default=256, metavar="PX", help="height and width of the frames, px")
    add("--downsample", type=int, choices=[4, 8], default=8, help="pixels per latent value, along each side")
    add("--latent-channels", type=COUNT, default=4, metavar="N", help="values of a latent pixel")
    widths = "channels at each resolution, from full size down to that of the latents: log2 of --downsample + 1 numbers"
    add("--widths", type=COUNT, nargs="+", metavar="N", help=widths + "; default: 32 64 128 or 32 64 128 128")

    add = parser.add_argument_group("data").add_argument
    add("--data-path", required=True, metavar="DIR", help="folder with <class>/<video>, or videos without classes")
    fraction = "share of the videos that validate, where no split files are found"
    add("--val-fraction", type=SHARE, default=0.05, metavar="F", help=fraction)
    add("--max-bad-fraction", type=SHARE, default=0.1, metavar="F", help="share of the videos that may be bad")
    add("--no-flip", action="store_true", help="never mirror a frame")
    colors = "share of the frames that get other colors, for videos that show few of them; 0 = off"
    add("--color-jitter", type=SHARE, default=0.8, metavar="P", help=colors)
    add("--num-workers", type=NATURAL, default=2, metavar="N", help="loader processes per rank; 0 = load in-process")
    timeout = "seconds for loader processes to start and for a batch; 0 = no limit"
    add("--loader-timeout", type=NON_NEGATIVE, default=300.0, metavar="S", help=timeout)
    add("--cache-frames", action="store_true", help="decode each video once, into shared memory: for small data sets")

    add = parser.add_argument_group("optimisation").add_argument
    add("--max-steps", type=COUNT, default=20_000, metavar="N", help="step to end at")
    add("--global-batch-size", type=COUNT, default=32, metavar="N", help="frames per step, over all ranks")
    add("--lr", type=POSITIVE, default=2e-3, metavar="X", help="learning rate of AdamW")
    add("--warmup-steps", type=NATURAL, default=50, metavar="N", help="steps up to the full learning rate; 0 = off")
    decay = "share of the steps over which the learning rate falls to 0, at the end; 0 = off"
    add("--lr-decay", type=SHARE, default=0.5, metavar="F", help=decay)
    decay = "decay of the EMA weights; lower in the first steps"
    add("--ema-decay", type=SHARE, default=0.995, metavar="X", help=decay)
    add("--global-seed", type=NATURAL, default=0, metavar="N", help="seed of every random draw")
    precision = "bf16 is mixed precision, tf32 rounds inside matrix products; default: bf16 on a GPU that has it"
    add("--precision", choices=["fp32", "tf32", "bf16"], help=precision)

    add = parser.add_argument_group("run").add_argument
    add("--results-dir", default="results", metavar="DIR", help="the run folder is made in here")
    add("--resume", action="store_true", help="continue the newest run of this VAE, if any")
    add("--log-every", type=COUNT, default=50, metavar="N", help="steps between two lines of metrics")
    add("--val-every", type=COUNT, default=500, metavar="N", help="steps between validations; the last step validates")
    add("--num-val-frames", type=COUNT, default=256, metavar="N", help="frames of validation videos")
    minutes = "minutes between checkpoints; the last step saves; 0 = off"
    add("--save-minutes", type=NON_NEGATIVE, default=5.0, metavar="M", help=minutes)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# What the user can put right, before a run folder is made


def check_run(args):
    """(Start, Data) of the run that the flags ask for; the Data are rank 0's. Raises UserError."""
    cli.check_devices()
    runs.check_job()
    if args.image_size % args.downsample:
        raise UserError(f"--image-size {args.image_size} is not a multiple of --downsample {args.downsample}")
    count = int(math.log2(args.downsample)) + 1
    args.widths = args.widths or [32, 64, 128, 128][:count]
    if len(args.widths) != count:
        raise UserError(f"--widths: found {len(args.widths)}, --downsample {args.downsample} wants {count} numbers")
    if args.global_batch_size % world_size():
        raise UserError(f"--global-batch-size {args.global_batch_size} is not a multiple of {world_size()} ranks")
    cli.check_writable("--results-dir", args.results_dir)
    check_data_path(args.data_path)
    if latents_settings(args.data_path) is not None:
        raise UserError(f"--data-path {args.data_path}: a latent cache; name the folder of its videos")
    start, data = find_start(args), None
    cli.settle_precision(args, energy=False, kept=start.kept("precision"))
    if rank() == 0:
        data = find_data(args.data_path, False, args.val_fraction, [1], [], "--data-path", args.results_dir)
        if args.cache_frames:
            preflight.check_frame_cache(args, data)
    return start, data


def run_name(args):
    widths = "-".join(map(str, args.widths))
    return f"VAE-{args.image_size}px-f{args.downsample}-c{args.latent_channels}-{widths}"


def find_start(args):
    """The Start of a new run or, with --resume or restarted by torchrun, of the newest one. Raises UserError."""
    folder = runs.newest_run(args.results_dir, run_name(args))
    if folder is None or not (args.resume or runs.is_restarted(folder)):
        if args.resume:
            say(f"--resume: nothing to resume in {args.results_dir}/*-{run_name(args)}: starting from the beginning")
        return checkpoint.Start(checkpoint.Progress())
    if rank() == 0:
        runs.lock(folder)
        runs.remove_temporary_files(folder)
    path = folder / "checkpoints" / "latest.pt"
    try:
        stamp, state = checkpoint.stamp_of(path), checkpoint.read_file(path)
    except UserError as error:  # nothing was saved, or it is damaged
        say(f"note: {error}")
        return checkpoint.Start(checkpoint.Progress(), folder=folder)
    return checkpoint.Start(checkpoint.progress_of(state), path, stamp, state, folder)


# ----------------------------------------------------------------------------------------------------------------------
# The story


@cli.one_line_errors()
def main():
    args = parse_args()
    try:
        start, data = check_run(args)
    except UserError as error:
        fail(error)
    device = distributed.start(distributed.STEP_TIME)
    data, progress = distributed.broadcast(data), start.progress
    preflight.check_same_start(start)
    if progress.step >= args.max_steps and not start.unlogged:
        say(f"{start.folder} is finished: all {progress.step} steps are done")
        distributed.stop()
        return

    # Everything that is trained
    torch.manual_seed(args.global_seed)
    distributed.set_precision(args.precision)
    model = make_autoencoder(args.widths, args.latent_channels, args.image_size).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    lr = args.lr * lr_multiplier(args, progress.step, args.max_steps)  # for metrics that a resumed run has yet to log
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    if start.state is not None:
        checkpoint.load_run(start, model, ema, [optimizer], scaler)
    network, stop = distributed.parallel(Autoencoder(model)), StopSignal()

    # The run folder, and what is written there
    folder = start.folder or runs.start_run_folder(args.results_dir, run_name(args))
    run_config = {"training": vars(args)}
    logged_step = progress.step - 1 if start.unlogged else progress.step
    metrics = Metrics(folder, resume_step=logged_step, config=run_config)
    bad_videos = BadVideos(len(data.scan.videos) + len(data.scan.unreadable), args.max_bad_fraction, start.bad_videos)
    log = functools.partial(say, log=folder / "log.txt")
    writer, saved_at, stats = checkpoint.Writer(folder), time.monotonic(), StepStats(start.unlogged)
    if rank() == 0:
        save_index(data.scan, args.data_path, args.results_dir)
        (folder / "config.json").write_text(json.dumps(run_config, indent=2))

    def report_bad(paths):
        for path in bad_videos.add([path for part in distributed.gather(paths) for path in part]):
            log(f"step {progress.step}: {path} can't be decoded; other frames take its place ({bad_videos})")

    def save():
        """Save the run as it stands; all ranks call it, rank 0 writes."""
        nonlocal saved_at
        unlogged, saved_at = stats.averaged(progress.step) if len(stats) else None, time.monotonic()
        report_bad(stats.bad)
        trained = run_config, model, ema, [optimizer], scaler
        state = checkpoint.run_state(*trained, progress, unlogged, bad_videos.paths)
        writer.write(state, [], before=metrics.sync, after=lambda: None)

    preflight.note_changes(start, run_config, folder, log, metrics)
    start.state = None  # or the file would stay open during the whole run
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    log(f"{folder}: {size:.2f} M parameters; {world_size()} x {device.type}, to step {args.max_steps}; "
        f"{len(data.train[1])} videos train, {len(data.val[1])} validate")  # fmt: skip
    report_bad(data.scan.unreadable)
    batches, val_loader, train_loader = make_loaders(args, data, progress, device)
    bar = Bar(initial=progress.step, total=args.max_steps, desc=folder.name, unit="step", disable=rank() != 0)
    try:
        while True:
            # Periodically and at the end: log, validate
            if len(stats) and is_due(progress.step, args.max_steps, args.log_every, args.val_every):
                row = stats.summary(progress.step, args.global_batch_size)
                row["frames_per_s"] = row.pop("clips_per_s")
                bar.set_postfix_str(f"loss {row['train_loss']:.4f}, {row['frames_per_s']:.0f} frames/s")
                report_bad(stats.bad)
                if is_due(progress.step, args.max_steps, args.val_every):
                    values, bad = validate(args, ema, val_loader, train_loader, folder, progress.step, device)
                    report_bad(bad)
                    log(f"step {progress.step}: PSNR {values['val_psnr']:.2f} dB on validation videos")
                    row |= values
                metrics.log(progress.step, **row, lr=optimizer.param_groups[0]["lr"])
                stats = StepStats()
            if progress.step >= args.max_steps:
                save()
                break

            # One optimisation step
            writer.check()
            stop.ask(save=0 < 60 * args.save_minutes <= time.monotonic() - saved_at)
            optimizer.param_groups[0]["lr"] = args.lr * lr_multiplier(args, progress.step + 1, args.max_steps)
            batch = stats.next_batch(batches)
            losses = training_losses(network, batch, args, device)
            loss = sum(losses.values())
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.count_step(args.global_batch_size, 0)
            values = {name: value.detach() for name, value in ({"train_loss": loss} | losses).items()}
            stats.add(batch["videos"], **values, grad_norm=norm)
            update_ema(ema, model, ema_decay(args, progress.step))
            bar.update()
            if stop.settle():  # raises Interrupted
                save()
        bar.close()
        writer.wait()
        log(f"done: --vae {folder / 'vae'}")
    except Interrupted:
        bar.close()
        if len(stats):
            save()
        writer.wait()
        sender = stop.name or "a signal to another rank"
        log(f"stopped by {sender} and saved at step {progress.step}: the same command with --resume continues")
    stop.meet()
    end_children()
    metrics.close()
    del network  # DDP holds the process group
    distributed.stop()


def make_loaders(args, data, progress, device):
    """(iterator over this rank's batches, loader of its validation frames, loader of its frames for statistics)."""
    shared = {"root": args.data_path, "classes": data.scan.classes, "num_frames": 1, "image_size": args.image_size}
    shared["frames"] = preflight.share_frame_cache(args, data) if args.cache_frames else None
    train = Clips(videos=data.train[1], flip=not args.no_flip, seed=args.global_seed, stream=0, **shared)
    val = Clips(videos=data.val[1], spare=data.spare(1), flip=False, stream="validation", **shared)
    typical = Clips(videos=data.train[1], flip=False, stream="statistics", **shared)
    steps = args.max_steps - progress.step
    indices = Batches(progress.position, steps, args.global_batch_size, rank(), world_size())
    batches = ([(1, index) for index in batch] for batch in indices)
    chunks = chunks_of(args.num_val_frames)[rank() :: world_size()]
    train_loader = make_loader({1: train}, batches, args.num_workers, args.loader_timeout, device)
    others = [make_loader({1: clips}, chunks, 0, 0, device) for clips in (val, typical)]
    return on_device(batches_of(train_loader), device), *others


def training_losses(network, batch, args, device):
    """{name: loss} of a batch, to be added up; the noise of the latents depends on seed and index of a frame alone."""
    indices, side = batch["indices"].tolist(), args.image_size // args.downsample
    x = batch["clips"][:, :, 0].to(device).float() / 127.5 - 1  # (B, 3, H, W)
    x = jitter_colors(x, args.global_seed, indices, args.color_jitter)
    noise = normal(args.global_seed, "posterior", 0, indices, (args.latent_channels, side, side))
    with distributed.autocast(device, args.precision):
        found = network(x, noise.to(device))
    return losses_of(x, *found)


def validate(args, ema, val_loader, train_loader, folder, step, device):
    """({"val_psnr", ...} of the EMA, on all ranks; this rank's bad videos); writes a sheet and the VAE's folder."""
    (values, bad), (statistics, more) = (measure(ema, loader, device) for loader in (val_loader, train_loader))
    if rank() == 0:
        export(ema, folder / "vae", statistics)
        vae, frames = VAE("shown", ema), next(batches_of(val_loader))["clips"][:8]  # (N, 3, 1, H, W)
        found = vae.decode(vae.encode(frames.to(device))).cpu()
        rows = torch.cat([frames.permute(2, 0, 3, 4, 1), found.transpose(0, 1)])  # (2, N, H, W, 3)
        write_sheet(folder / "samples" / f"{step:07d}.png", rows.numpy(), ["frames", "VAE"])
    statistics["train_psnr"] = statistics.pop("psnr")
    return {"val_psnr": values["psnr"]} | statistics, bad + more


if __name__ == "__main__":
    main()

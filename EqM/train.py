"""Train Equilibrium Matching on videos, or without --video on images.

A first phase on 4 frames, then one that continues with 8; steps are counted over all phases:

    torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 4 --use-rope --model "EqM-S/4" \
        --data-path datasets/ucf-101 --results-dir results/EXP --max-steps 50000
    torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 8 --use-rope --model "EqM-S/4" \
        --data-path datasets/ucf-101 --results-dir results/EXP --max-steps 100000 \
        --global-batch-size 128 --ckpt results/EXP/*/checkpoints/0050000.pt

All phases in one run: --frames-schedule 4:50000:256,8:100000:128. After an interruption: the same
command and --resume.
"""

import uncaught  # noqa: F401
import functools
import io
import itertools
import math
import os
import time
from collections import Counter
from contextlib import nullcontext, suppress

import torch
from torch.nn.utils import clip_grad_norm_

import checkpoint
import generation
import models
import optim
import preflight
import schedule
import transport
from generation import Plan, generate, sampling_settings
from models import Condition
from optim import check_fp16, ema_decay, make_optimizers, set_learning_rates, update_ema
from run import Run, add_loading_flags
from runtime import cli, distributed, runs
from runtime.cli import COUNT, NATURAL, NON_NEGATIVE, ArgumentParser, plural, say
from runtime.distributed import rank, world_size
from runtime.metrics import StepStats, bar_text, device_stats
from runtime.rng import normal, uniform
from runtime.signals import Interrupted
from schedule import current_phase, frames_of_steps, is_due
from sharding import full_tensor, make_networks
from validation import validate, validation_chunks
from video.clips import Clips, rank_batches
from video.loader import batches_of, make_loader, on_device
from video.writers import tile, write_gif, write_mp4, write_sheet


def parse_args():
    parser = ArgumentParser(
        description="Train Equilibrium Matching on videos, or without --video on images."
    )
    models.add_flags(parser)
    transport.add_flags(parser)
    add_data_flags(parser)
    schedule.add_flags(parser)
    optim.add_flags(
        parser,
        optimizer="adamw",
        lr=1e-4,
        muon_lr=0.01,
        warmup_steps=0,
        lr_decay=0.0,
        clip_grad=1.0,
        ema_decay=0.9999,
    )
    add_speed_flags(parser)
    add_run_flags(parser)
    generation.add_flags(parser)
    return parser.parse_args()


def add_data_flags(parser):
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-path",
        required=True,
        metavar="DIR",
        help="folder of <class>/<video>, or a latent cache",
    )
    add(
        "--image-size",
        type=COUNT,
        metavar="PX",
        help=(
            "height and width in pixels; default: from the latent cache, else from --ckpt, else 256"
        ),
    )
    add(
        "--vae",
        metavar="VAE",
        help=(
            "ema, mse, an AutoencoderKL's folder, none: pixels; default: as in the latent cache, "
            "else --ckpt, else ema"
        ),
    )
    add(
        "--frame-interval",
        type=COUNT,
        nargs="+",
        default=[1],
        help=(
            "video frames from one frame of a clip to the next; two numbers: a random one per "
            "clip; default: 1"
        ),
    )
    add(
        "--no-flip", action="store_true", help="never mirror clips; use it if left and right differ"
    )
    add_loading_flags(add, num_workers=min(4, os.cpu_count()))


def add_speed_flags(parser):
    add = cli.add_speed_flags(parser)
    add(
        "--grad-checkpoint",
        nargs="?",
        choices=models.GRAD_CHECKPOINTS,
        const="full",
        help=(
            "recompute activations in the backward pass to save memory: all (full, or no value), "
            "or all but those of attention and of most products (selective); default: off"
        ),
    )
    add(
        "--shard",
        action="store_true",
        help="spread weights, optimizer states and EMA over the ranks (FSDP)",
    )


def add_run_flags(parser):
    add = parser.add_argument_group("run").add_argument
    add("--results-dir", default="results", metavar="DIR", help="parent folder of the run folder")
    checkpoint.add_flags(add)
    add("--dry-run", action="store_true", help="check flags, data and checkpoint, then exit")
    add("--log-every", type=COUNT, default=100, help="steps between two lines of metrics")
    add(
        "--ckpt-every", type=COUNT, default=50_000, help="steps between checkpoints, and at the end"
    )
    add(
        "--save-minutes",
        type=NON_NEGATIVE,
        default=15.0,
        help="minutes between checkpoints; 0 = off",
    )
    add(
        "--keep-last",
        type=COUNT,
        help="numbered checkpoints to keep, besides the last of each phase; default: all",
    )
    add("--val-every", type=COUNT, default=2_500, help="steps between validations, and at the end")
    add(
        "--val-frames",
        type=COUNT,
        nargs="+",
        default=[],
        help="additional clip lengths to validate; default: none",
    )
    add("--val-clips", type=COUNT, default=256, help="validation clips, at most 4 per video")
    add("--sample-every", type=NATURAL, default=10_000, help="steps between samples; 0 = off")
    add("--num-samples", type=COUNT, default=8, help="clips sampled each time")
    add("--wandb", action="store_true", help="log to Weights & Biases as well")


@cli.one_line_errors()
def main():
    args = parse_args()

    # User errors end here, with one line and status 2, before a run folder is made.
    with cli.wrong_input():
        found = preflight.check_run(args)
    if args.dry_run:
        say("--dry-run: no mistakes found")
        return
    device = distributed.start(distributed.STEP_TIME)
    args, start, vae, config, data, phases = preflight.share_run(found)
    progress = start.progress
    last_step = phases[-1].last_step
    lr_end = args.lr_decay_end or phases[-1].last_step
    checkpoint.complete_names(start, phases, args.ckpt_every)
    if progress.step >= last_step and not start.unlogged:
        say(f"{start.folder} is finished at step {progress.step}")
        distributed.stop()
        return

    # Everything that is trained
    torch.manual_seed(args.global_seed)
    distributed.set_precision(args.precision)
    model, ema = make_networks(config, device, args.shard, args.precision)
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        model.compile_blocks()
        ema.compile_blocks()
    optimizers = make_optimizers(model, args)
    # changes nothing unless enabled
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if start.state is not None:
        checkpoint.load_run(start, model, ema, optimizers, scaler)
    vae.to(device)

    # The run folder and its files
    run_config = preflight.make_run_config(
        args, config, current_phase(phases, progress.first_step), data, vae
    )
    run = Run(
        start,
        args,
        preflight.run_name(args),
        run_config,
        data.scan,
        args.wandb,
        together=args.shard,
    )
    log = run.log
    metrics = run.metrics
    stop = run.stop
    network = model if args.shard else distributed.parallel(model)
    remove_old = functools.partial(
        runs.keep_last, run.folder, args.keep_last, {phase.last_step for phase in phases}
    )
    preflight.note_changes(start, run_config, run)
    start.state = found = None  # or the file would stay open during the run
    began = time.monotonic() - progress.seconds  # as if the run had never been interrupted
    preflight.log_run(
        log, args, run.folder, config, model, data, (progress.step, last_step), device
    )
    run.report_corrupt(data.scan.unreadable, progress.step)

    def save(names=()):
        progress.seconds = time.monotonic() - began
        run.save(
            checkpoint.run_state(run_config, model, ema, optimizers, scaler, progress),
            names,
            after=remove_old,
        )

    bar = cli.Bar(initial=progress.step, total=last_step, desc=run.folder.name, unit="step")
    periods = args.log_every, args.val_every, args.ckpt_every, args.sample_every
    try:
        for phase in [phase for phase in phases if phase.last_step > progress.first_step]:
            stream = progress.first_step  # names the random draws of the phase's samples
            batches, val_loader = start_phase(args, data, phases, phase, progress, device)
            run_config = preflight.make_run_config(args, config, phase, data, vae)
            conditions = torch.arange(args.num_samples) % len(data.scan.classes)
            own = data.scan.classes, conditions, phase.num_frames, run_config["data"]["time_scale"]
            previews = Plan(ema, vae, *own, gamma_shift=args.gamma_shift)
            run.write_config(run_config)
            # A resumed run may log a step before it makes one
            set_learning_rates(optimizers, args, progress.step, lr_end)
            clips = plural(phase.batch_size, "clip")
            frames = plural(phase.num_frames, "frame")
            tokens = plural(math.prod(config.grid(phase.num_frames)), "token")
            log(f"to step {phase.last_step}: {clips} per step, {frames} = {tokens} each")

            with suppress(Interrupted):  # the loader processes take seconds to start
                batches = itertools.chain([stop.wait(batches)], batches)
            stop.resolve()
            while True:
                # After new steps: sample periodically; log, validate and save periodically and at
                # the end of a phase
                if len(run.stats) and is_due(progress.step, phase.last_step, *periods):
                    step = progress.step
                    videos = None
                    row = run.stats.summary(step, phase.batch_size)
                    row["train_loss_rel"] = row["train_loss"] / row.pop("target_square")
                    row |= device_stats(device, args.precision, row["tflops_per_s"])
                    bar.set_postfix_str(bar_text(row))
                    run.report_corrupt(run.stats.corrupt, step)
                    if is_due(step, phase.last_step, args.val_every):
                        val_began = time.monotonic()
                        settings = args.precision, device, stop, args.forcing > 0
                        val_metrics, corrupt = validate(
                            ema, model, vae, val_loader, phase.num_frames, *settings
                        )
                        run.report_corrupt(corrupt, step)
                        row |= val_metrics | {"val_seconds": time.monotonic() - val_began}
                    if is_due(step, math.inf, args.sample_every):
                        videos = sample_ema(previews, args, device, stop)
                    # A resumed run repeats what a signal interrupts up to here.
                    if "val_loss" in row:
                        note = (
                            ""
                            if math.isfinite(row["val_loss"])
                            else "; not finite: best.pt stays as it is"
                        )
                        log(f"step {step}: validation loss {row['val_loss']:.4f}{note}")
                        if row["val_loss"] < progress.best_loss:
                            progress.best_loss = row["val_loss"]
                            progress.best_step = step
                    if videos is not None:
                        write_previews(run.folder, step, metrics, previews, videos.numpy())
                    # Log before saving: a checkpoint must not be ahead of the metrics. Later rows
                    # are logged again.
                    progress.seconds = time.monotonic() - began
                    row |= optim.learning_rates(optimizers) | {
                        "bad_videos": len(run.bad_videos.paths)
                    }
                    row |= {
                        "num_frames": phase.num_frames,
                        "seconds": progress.seconds,
                        "flops": progress.flops,
                    }
                    metrics.log(step, **row)
                    run.stats = StepStats()
                    if names := checkpoint.names_at(progress, phase.last_step, args.ckpt_every):
                        save(names)
                if progress.step >= phase.last_step:
                    break

                # One optimization step
                run.writer.check()
                # All ranks vote about once per second to stop or to save; resolve() reads it.
                stop.vote(save=run.wants_to_save(args.save_minutes))
                set_learning_rates(optimizers, args, progress.step + 1, lr_end)
                sums = Counter()
                files = []
                for micro_batch in range(1, args.grad_accum + 1):
                    batch = run.stats.next_batch(batches)
                    files += batch["videos"]
                    # only DDP can delay it
                    sync = micro_batch == args.grad_accum or network is model
                    with nullcontext() if sync else network.no_sync():
                        losses, target_square = training_losses(
                            network, vae, batch, config, args, stream, device
                        )
                        scaler.scale(sum(losses.values()) / args.grad_accum).backward()
                    for name, value in (losses | {"target_square": target_square}).items():
                        sums[name] += value.detach() / args.grad_accum
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                skip = False
                loss_values = list(sums.values())
                sums["grad_norm"] = full_tensor(
                    clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
                )
                # this makes the CPU wait for the GPU
                if scaler.is_enabled():
                    skip, sums["skipped"] = check_fp16(sums["grad_norm"], loss_values)
                for optimizer in optimizers:
                    if not skip:
                        scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
                # of the phase or, with --mix, of an earlier one
                num_frames = batch["clips"].shape[-3]
                progress.count_step(
                    phase.batch_size, config.training_flops(num_frames, args.grad_checkpoint)
                )
                run.stats.add(files, phase.batch_size * config.training_flops(num_frames), **sums)
                update_ema(ema, model, ema_decay(args, progress.step - progress.ema_start))
                bar.update()
                if stop.resolve():  # True: a checkpoint is due; raises Interrupted
                    save()
            if phase.last_step < last_step:
                progress.begin_phase()
        bar.close()
        run.writer.wait()
        log(f"done: {run.folder / 'checkpoints'} holds {last_step:07d}.pt and best.pt")
    except Interrupted:
        bar.close()
        run.stop_early(progress.step, save)
    run.close()
    del network  # DDP holds the process group
    distributed.stop()


def training_losses(network, vae, batch, config, args, stream, device):
    """({name: loss} of a micro-batch, to be added up; the loss of a network that predicts zero)."""
    seed = args.global_seed
    indices = batch["indices"].tolist()
    clips = batch["clips"].to(device, non_blocking=True)
    x = vae.latents_of(clips, seed, stream, indices)  # (B, C, T, H, W)
    noise = normal(seed, "noise", stream, indices, x.shape[1:], device)
    gamma = transport.draw_gammas(  # (B,), (B, T) or (B, T, H, W)
        seed,
        stream,
        indices,
        num_frames=x.shape[2],
        patch=config.temporal_patch_size,
        shift=args.gamma_shift,
        share=args.forcing,
        level_frames=config.level_frames,
        region_share=args.forcing_regions,
        size=config.input_size,
    )
    dropout = transport.condition_dropout(gamma, config.class_dropout_prob)
    dropped = uniform(seed, "label drop", stream, indices) < dropout
    condition = Condition.of(batch["y"], config).null(dropped).to(device)
    if gamma.dim() == 4 and device.type != "cpu":
        gamma = gamma.pin_memory()  # megabytes; the CPU would wait for a copy from other memory
    with distributed.autocast(device, args.precision):
        errors, target_square, features = config.learns.losses(
            network,
            x,
            noise,
            gamma=gamma.to(device, non_blocking=True),
            y=condition.y,
            time_scale=batch["time_scales"].to(device, non_blocking=True),
            return_features=args.disp,
        )
        losses = {"train_loss": errors.mean()}
    if args.disp:
        losses["disp_loss"] = transport.dispersive_loss(features)
    return losses, target_square


def start_phase(args, data, phases, phase, progress, device):
    """(iterator over this rank's remaining micro-batches, loader of its validation clips)."""
    interval = args.frame_interval[0], args.frame_interval[-1]
    make = functools.partial(Clips, data.source, classes=data.scan.classes, frame_interval=interval)
    train = {"flip": not args.no_flip, "seed": args.global_seed, "stream": progress.first_step}
    train_clips = {n: make(videos, num_frames=n, **train) for n, videos in data.train.items()}
    val_lengths = sorted({phase.num_frames, *args.val_frames})
    val = {"flip": False, "stream": "validation"}
    val_clips = {
        n: make(data.val[n], num_frames=n, spare=data.spare(n), **val) for n in val_lengths
    }

    frames = frames_of_steps(
        phases, phase, progress.step, progress.first_step, args.mix, args.global_seed
    )
    split = rank(), world_size(), args.grad_accum
    indices = rank_batches(progress.position, len(frames), phase.batch_size, *split)
    batches = (
        [(frames[n // args.grad_accum], index) for index in batch]
        for n, batch in enumerate(indices)
    )
    chunks = validation_chunks(data.val, val_lengths, args.val_clips)
    chunks = chunks if args.shard else chunks[rank() :: world_size()]
    settings = args.num_workers, args.loader_timeout, device
    train_loader = make_loader(train_clips, batches, *settings)
    val_loader = make_loader(val_clips, chunks, min(1, args.num_workers), *settings[1:])
    return on_device(batches_of(train_loader), device), val_loader  # starts the loader processes


def sample_ema(plan, args, device, stop):
    """Sample uint8 (N, T, H, W, 3) from the EMA, on rank 0; with --shard all ranks make all.

    Raises Interrupted.
    """
    indices = (
        list(range(args.num_samples)) if args.shard else distributed.own_indices(args.num_samples)
    )
    videos = []
    settings = sampling_settings(args)
    seed = args.global_seed
    made = generate(
        plan, indices, seed, device, settings, strict=False, before_evaluation=stop.check
    )
    with suppress(Interrupted):
        videos = [clips.cpu() for _, _, clips, _, _ in made]
    stop.resolve()
    if args.shard and rank() != 0:
        indices = []
        videos = []
    return distributed.collect(indices, torch.cat(videos) if videos else torch.empty(0))


def write_previews(folder, step, metrics, plan, videos):
    """Write samples uint8 (N, T, H, W, 3) as a sheet, mp4 and GIF, also to TensorBoard.

    Raises UserError.
    """
    path = folder / "samples" / f"{step:07d}"
    fps = 1 / plan.time_scale
    gif = None
    mp4 = None
    with cli.writing(path.with_suffix(".png")):
        path.parent.mkdir(exist_ok=True)
        write_sheet(path.with_suffix(".png"), videos, plan.names, labels=plan.labels)
        if videos.shape[1] > 1:
            gif = io.BytesIO()
            mp4 = path.with_suffix(".mp4")
            write_mp4(mp4, tile(videos), fps)
            write_gif(gif, tile(videos), fps)
        metrics.video(step, "samples", videos, gif and gif.getvalue(), mp4)


if __name__ == "__main__":
    main()

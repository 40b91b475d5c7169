"""Train Equilibrium Matching on videos, or without --video on images.

Train on 4 frames, then continue on 8 and in the same way on 16; steps count over all phases:

    torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 4 --model "EqM-S/4" \
        --data-path datasets/ucf-101 --use-rope --results-dir results/EXP --max-steps 50000
    torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 8 --model "EqM-S/4" \
        --data-path datasets/ucf-101 --use-rope --results-dir results/EXP --max-steps 100000 \
        --global-batch-size 128 --ckpt results/EXP/*/checkpoints/0050000.pt

The rotary positions of --use-rope make one checkpoint fit all lengths, so sample_gd.py samples any
number of frames. The network is not told the noise level gamma. After an interruption, add
--resume. All phases in one run: --frames-schedule 4:50000:256,8:100000:128.
"""

import uncaught  # noqa: F401
import io
import itertools
import math
import os
import time
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_

import checkpoint
import models
import optim
import plans
import preflight
import schedule
import transport
from generation import generate, whole_videos
from models import Condition
from optim import check_fp16, ema_decay, make_optimizers, set_learning_rates, update_ema
from plans import Plan, sampling_settings
from run import Run, add_loading_flags, log_run, make_run_config, note_changes, run_name
from run import add_flags as add_run_flags
from runtime import cli, distributed, runs
from runtime.cli import COUNT, ArgumentParser, plural, say
from runtime.distributed import rank, world_size
from runtime.metrics import StepStats, bar_text, device_stats
from runtime.rng import uniform
from runtime.signals import Interrupted
from schedule import current_phase, frames_of_steps, is_due
from sharding import full_tensor, make_networks
from validation import validate, validation_chunks
from video import pairs
from video.clips import Clips, Mix, rank_batches
from video.loader import batches_of, make_loader, on_device
from video.writers import tile, write_gif, write_mp4, write_sheet


def parse_args():
    parser = ArgumentParser(
        description="Train Equilibrium Matching on videos, or without --video on images. @FILE "
        "stands for the flags in a file, such as @scripts/recipes/ours.txt.",
        fromfile_prefix_chars="@",
    )
    models.add_flags(parser)
    transport.add_flags(parser)
    add_data_flags(parser)
    pairs.add_flags(parser)
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
    plans.add_flags(parser)
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


@cli.one_line_errors()
def main():
    args = parse_args()

    # User errors end here, with one line and status 2, before a run folder is made.
    with cli.wrong_input():
        checked = preflight.check_run(args)
    if args.dry_run:
        say("--dry-run: no mistakes found")
        return
    device = distributed.start(distributed.STEP_TIME)
    args, start, vae, config, data, phases = preflight.share_run(checked)
    progress = start.progress
    last_step = phases[-1].last_step
    lr_end = args.lr_decay_end or last_step
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

    # The run folder and its files. run.stats begins with the steps that an interrupted run had made
    # but not logged.
    phase = current_phase(phases, progress.first_step)
    run_config = make_run_config(args, config, phase=phase, data=data, vae=vae)
    run = Run(
        start,
        args,
        name=run_name(args),
        run_config=run_config,
        source=data.files.source,
        wandb=args.wandb,
        together=args.shard,
    )
    log = run.log
    stop = run.stop
    network = model if args.shard else distributed.parallel(model)
    note_changes(start, run_config, run)
    start.state = None  # it maps the checkpoint's file, which would stay open during the run
    began = time.monotonic() - progress.seconds  # as if the run had never been interrupted
    log_run(
        run,
        args,
        config=config,
        model=model,
        data=data,
        first_step=progress.step,
        last_step=last_step,
        device=device,
    )
    run.report_corrupt(data.files.scan.unreadable, progress.step)

    phase_ends = {phase.last_step for phase in phases}

    def save(names=()):
        progress.seconds = time.monotonic() - began
        state = checkpoint.run_state(
            run_config,
            model=model,
            ema=ema,
            optimizers=optimizers,
            scaler=scaler,
            progress=progress,
        )
        # a thread calls it later
        remove_old = partial(runs.keep_last, run.folder, args.keep_last, progress.step, phase_ends)
        run.save(state, names, after=remove_old)

    bar = cli.Bar(initial=progress.step, total=last_step, desc=run.folder.name, unit="step")
    try:
        for phase in phases:
            if phase.last_step <= progress.first_step:
                continue
            stream = progress.first_step  # names the random draws for the phase's training clips
            batches, val_loader = start_phase(args, data, phases, phase, progress, device)
            run_config = make_run_config(args, config, phase=phase, data=data, vae=vae)
            previews = preview_plan(args, ema, vae, data.scan.classes, run_config)
            run.write_config(run_config)
            # A resumed run may log a step before it makes one
            set_learning_rates(optimizers, args, progress.step, lr_end)
            clips = plural(phase.batch_size, "clip")
            frames = plural(phase.num_frames, "frame")
            tokens = plural(config.num_tokens(phase.num_frames), "token")
            log(f"to step {phase.last_step}: {clips} per step, {frames} = {tokens} each")

            # wait() returns the first batch. The loader processes take seconds to start, and a
            # signal may reach one rank only: resolve() raises Interrupted again, on all ranks.
            with suppress(Interrupted):
                batches = itertools.chain([stop.wait(batches)], batches)
            stop.resolve()
            while True:
                # After new steps: sample periodically; log, validate and save periodically and at
                # the end of a phase
                if len(run.stats) and is_due(
                    progress.step,
                    phase.last_step,
                    args.log_every,
                    args.val_every,
                    args.ckpt_every,
                    args.sample_every,
                ):
                    step = progress.step
                    videos = None
                    row = run.stats.summary(step, phase.batch_size)
                    row["train_loss_rel"] = row["train_loss"] / row.pop("target_square")
                    row |= device_stats(device, args.precision, row["tflops_per_s"])
                    bar.set_postfix_str(bar_text(row))
                    run.report_corrupt(run.stats.corrupt, step)
                    if is_due(step, phase.last_step, args.val_every):
                        val_began = time.monotonic()
                        val_metrics, corrupt = validate(
                            ema,
                            model,
                            vae,
                            loader=val_loader,
                            num_frames=phase.num_frames,
                            precision=args.precision,
                            device=device,
                            stop=stop,
                            given=args.forcing > 0 and not args.pairs,
                        )
                        run.report_corrupt(corrupt, step)
                        row |= val_metrics | {"val_seconds": time.monotonic() - val_began}
                    if is_due(step, math.inf, args.sample_every):  # not at the end of a phase
                        videos = sample_ema(previews, args, device, stop)
                    # A signal may interrupt what is above: a resumed run does it again.
                    if "val_loss" in row:
                        note = ""
                        if "val_action_psnr" in row:
                            note = f"; actions bring {row['val_action_psnr']:.1f} dB"
                        if not math.isfinite(row["val_loss"]):
                            note += "; not finite: best.pt stays as it is"
                        log(f"step {step}: validation loss {row['val_loss']:.4f}{note}")
                        if row["val_loss"] < progress.best_loss:
                            progress.best_loss = row["val_loss"]
                            progress.best_step = step
                    if videos is not None:
                        write_previews(run, step, previews, videos.numpy())
                    # Log before saving: a checkpoint must not be ahead of the metrics. A resumed
                    # run drops rows after its checkpoint, and logs them again.
                    progress.seconds = time.monotonic() - began
                    row |= optim.learning_rates(optimizers)
                    row |= {
                        "bad_videos": len(run.bad_videos.paths),
                        "num_frames": phase.num_frames,
                        "seconds": progress.seconds,
                        "flops": progress.flops,
                    }
                    run.metrics.log(step, **row)
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
                            network,
                            vae,
                            batch,
                            config=config,
                            args=args,
                            stream=stream,
                            device=device,
                        )
                        scaler.scale(sum(losses.values()) / args.grad_accum).backward()
                    for name, value in (losses | {"target_square": target_square}).items():
                        sums[name] += value.detach() / args.grad_accum
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                averages = list(sums.values())  # before the norm of the gradient joins them
                grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
                sums["grad_norm"] = full_tensor(grad_norm)
                skip = False
                if scaler.is_enabled():  # the CPU waits for the GPU
                    skip, is_overflow = check_fp16(sums["grad_norm"], averages)
                    # 1 if the step is skipped although all losses are finite. Only with such
                    # steps may a row of the log have values that are not finite.
                    sums["skipped"] = is_overflow
                for optimizer in optimizers:
                    if not skip:
                        scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
                # of the phase or, with --mix, of an earlier one
                num_frames = batch["clips"].shape[-3]
                flops_of = partial(config.training_flops, num_frames, own_context=args.own_context)
                progress.count_step(phase.batch_size, flops_of(args.grad_checkpoint))
                run.stats.add(files, phase.batch_size * flops_of(), **sums)
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
    noise = transport.draw_noise(seed, stream, indices, x.shape[1:], device, pairs=batch["pairs"])
    gamma = transport.draw_gammas(  # (B,), (B, T) or (B, T, H, W)
        seed,
        stream,
        indices,
        num_frames=x.shape[2],
        patch=config.temporal_patch_size,
        shift=args.gamma_shift,
        draw=args.gamma_draw,
        share=args.forcing,
        level_frames=config.level_frames,
        region_share=args.forcing_regions,
        size=config.input_size,
        causal=config.causal,
        is_sample=batch["is_sample"],
        pure_noise=args.pure_noise,
    )
    # more for clips with clean frames, which tell part of the condition
    dropout = transport.condition_dropout(gamma, config.class_dropout_prob)
    dropped = uniform(seed, "label drop", stream, indices) < dropout
    dropped &= ~batch["is_sample"]  # a student needs no guidance
    condition = Condition.of(batch["y"], config).null(dropped).to(device)
    if gamma.dim() == 4 and device.type != "cpu":
        gamma = gamma.pin_memory()  # megabytes; the CPU would wait for a copy from other memory
    time_scale = batch["time_scales"].to(device, non_blocking=True)
    clean = None
    with distributed.autocast(device, args.precision):
        if config.causal:
            clean = transport.noisy_context(x, args.context_noise, seed, stream, indices)
            clean = transport.own_context(
                network,
                clean,
                share=args.own_context,
                objective=config.learns,
                seed=seed,
                stream=stream,
                indices=indices,
                y=condition.y,
                time_scale=time_scale,
            )
        errors, target_square, features = config.learns.losses(
            network,
            x,
            noise,
            gamma=gamma.to(device, non_blocking=True),
            y=condition.y,
            time_scale=time_scale,
            return_features=args.disp,
            clean=clean,
        )
        losses = {"train_loss": errors.mean()}
    if args.disp:
        losses["disp_loss"] = transport.dispersive_loss(features)
    return losses, target_square


def start_phase(args, data, phases, phase, progress, device):
    """(iterator over this rank's remaining micro-batches, loader of its validation clips)."""
    train_clips = training_clips(args, data, progress.first_step)
    val_lengths = sorted({phase.num_frames, *args.val_frames})
    val_clips = {
        num_frames: Clips(
            data.source,
            data.val[num_frames],
            num_frames=num_frames,
            frame_interval=args.frame_interval,
            flip=False,
            stream="validation",
            spare=data.spare(num_frames),
        )
        for num_frames in val_lengths
    }
    clip_lengths = frames_of_steps(
        phases,
        phase,
        step=progress.step,
        first_step=progress.first_step,
        mix=args.mix,
        seed=args.global_seed,
    )
    micro_batches = rank_batches(
        progress.position,
        phase.last_step - progress.step,
        global_batch=phase.batch_size,
        rank=rank(),
        world_size=world_size(),
        micro_batches=args.grad_accum,
    )
    batches = (  # the loader takes pairs (number of frames, index)
        [(num_frames, index) for index in next(micro_batches)]
        for num_frames in clip_lengths
        for _ in range(args.grad_accum)
    )
    chunks = validation_chunks(data.val, val_lengths, args.val_clips)
    if not args.shard:  # with it, all ranks must call the network equally often
        chunks = chunks[rank() :: world_size()]
    train_loader = make_loader(
        train_clips,
        batches,
        num_workers=args.num_workers,
        timeout=args.loader_timeout,
        device=device,
    )
    val_loader = make_loader(
        val_clips,
        chunks,
        num_workers=min(1, args.num_workers),
        timeout=args.loader_timeout,
        device=device,
    )
    return on_device(batches_of(train_loader), device), val_loader  # starts the loader processes


def training_clips(args, data, stream):
    """{num_frames: the stream of training clips}, with --real-data of both kinds."""
    clips = {}
    for num_frames, videos in data.train.items():
        clips[num_frames] = Clips(
            data.source,
            videos,
            num_frames=num_frames,
            frame_interval=args.frame_interval,
            flip=not (args.no_flip or data.source.has_samples),  # noise can't be mirrored
            seed=args.global_seed,
            stream=stream,
        )
    if data.real:
        real = training_clips(args, data.real, stream)
        for num_frames, pairs_of_length in clips.items():
            clips[num_frames] = Mix(pairs_of_length, real[num_frames], share=args.pairs_share)
    return clips


def preview_plan(args, ema, vae, classes, run_config):
    """The Plan of the samples that a phase makes now and then."""
    return Plan(
        ema,
        vae=vae,
        classes=classes,
        conditions=torch.arange(args.num_samples) % len(classes),
        num_frames=run_config["model"]["num_frames"],
        time_scale=run_config["data"]["time_scale"],
        gamma_shift=args.gamma_shift,
    )


def sample_ema(plan, args, device, stop):
    """Sample from the EMA: each rank its share, with --shard all ranks all.

    Rank 0 gets the samples, uint8 (N, T, H, W, 3).
    Raises Interrupted.
    """
    indices = distributed.own_indices(args.num_samples)
    if args.shard:
        indices = list(range(args.num_samples))
    batches = generate(
        plan,
        indices,
        seed=args.global_seed,
        device=device,
        settings=sampling_settings(args),
        strict=False,
        before_evaluation=stop.check,
    )
    videos = torch.empty(0)
    with suppress(Interrupted):
        videos = whole_videos(plan, indices, batches)
    stop.resolve()
    if args.shard and rank() != 0:
        indices = []
    return distributed.collect(indices, videos)


def write_previews(run, step, plan, videos):
    """Write samples uint8 (N, T, H, W, 3) as a sheet, mp4 and GIF, also to TensorBoard.

    Raises UserError.
    """
    sheet = run.folder / "samples" / f"{step:07d}.png"
    fps = 1 / plan.time_scale
    gif = None
    mp4 = None
    with cli.writing(sheet):
        sheet.parent.mkdir(exist_ok=True)
        write_sheet(sheet, videos, plan.names, labels=plan.conditions)
        if videos.shape[1] > 1:
            gif = io.BytesIO()
            mp4 = sheet.with_suffix(".mp4")
            write_mp4(mp4, tile(videos), fps)
            write_gif(gif, tile(videos), fps)
        run.metrics.video(step, "samples", videos, gif and gif.getvalue(), mp4)


if __name__ == "__main__":
    main()

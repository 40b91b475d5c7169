"""All that can be wrong with a training run before a GPU is used or a run folder is made.

Flags, data, checkpoint and model are checked in this order. What a user can put right raises UserError. The first rank
of each machine checks for the others there.
"""

import functools
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import checkpoint
from generation import settle_sampler
from models import model_config, model_name, model_shape
from optim import MUON_DECAY
from runtime import distributed
from runtime.cli import (
    UserError,
    check_devices,
    check_precision,
    check_speed_flags,
    check_writable,
    say,
    settle_precision,
)
from runtime.distributed import local_rank, rank, world_size
from runtime.memory import free_bytes
from runtime.metrics import import_wandb
from runtime.runs import check_job
from runtime.untrusted import is_text
from schedule import Phase, fill_batches
from vae import check_same, load_vae
from video.frame_cache import FrameCache
from video.index import check_data_path, find_data, fitting_interval, latents_settings

DEFAULT_MODEL = "EqM-S/4"
LARGEST = {"num_workers": 1024, "global_batch_size": 2**20, "num_samples": 4096}  # larger values are typing errors
MODEL_FLAGS = (
    "depth", "hidden_size", "num_heads", "temporal_patch_size", "rope_theta", "rope_split", "rope_speed",
    "position_table", "qk_norm", "ebm",
)  # fmt: skip
NO_CHANGE = {  # flags that may differ in a resumed run: they change nothing, or are checked against the checkpoint
    "resume", "ckpt", "new_classes", "num_classes", "results_dir", "vae", "num_workers", "loader_timeout", "wandb",
    "save_minutes", "keep_last", "shard", "guidance_chosen", *MODEL_FLAGS,
}  # fmt: skip


def check_run(args):
    """(start, vae, config, data, phases) of the run that the flags of train.py ask for; None but on a first rank.

    data, and the number of classes in config, are known on rank 0 only: see `share_run`. phases is empty without
    --frames-schedule. Flags that were left out are filled in. Raises UserError.
    """
    check_devices()
    if local_rank() != 0:
        return None
    check_flags(args)
    check_data_path(args.data_path, images=not args.video)
    start = checkpoint.find_start(args, run_name(args))
    try:
        return settle_run(args, start)
    except UserError as error:
        if not start.resumes:
            raise
        raise UserError(str(error).replace(f"--ckpt {start.path}", f"--resume, {start.path}")) from error


def settle_run(args, start):
    """What `check_run` returns, for a run from a Start."""
    vae = load_run_vae(args, start)
    args.model = args.model or (None if start.state else DEFAULT_MODEL)
    config, data = make_config(args, vae, start), None
    settle_precision(args, config.ebm != "none", kept=start.kept("precision"))
    settle_sampler(args, start.path, start.state["config"]["training"] if start.state else {})
    if args.weight_decay is None:
        kept, usual = start.kept("weight_decay"), MUON_DECAY if args.optimizer == "muon" else 0.0
        args.weight_decay = usual if kept is None else kept
    if args.skip_nonfinite and args.precision == "fp16":
        raise UserError("--skip-nonfinite: --precision fp16 skips steps that overflow by itself: leave it out")
    before = start.state["config"]["training"].get("forcing") if start.state and not start.resumes else None
    if before and not args.forcing:
        say(f"note: --ckpt was trained with --forcing {before}, this phase is without: it may forget given frames")
    phases = plan_phases(args, config)
    lengths = [phase.num_frames for phase in phases] or [args.num_frames]
    if args.forcing and (short := min(lengths)) <= config.temporal_patch_size:
        say(f"note: --forcing {args.forcing}: clips of {short} frames are one temporal patch and are not forced")
    args.model = args.model or start.state["config"]["training"]["model"]
    if rank() == 0:
        flag = "--frames-schedule" if phases else "--num-frames"
        data = find_data(
            args.data_path, not args.video, args.val_fraction, lengths, args.val_frames, flag, args.results_dir
        )
        config = fit_classes(args, config, start, data.scan.classes)
        if args.cache_frames:
            check_frame_cache(args, data)
    return start, vae, config, data, phases


def share_run(args, run):
    """(args, start, vae, config, data, phases) as `check_run` found them on rank 0, for all ranks of a started group.

    Raises UserError unless all machines start from the same checkpoint, in the same folder, and have the --precision.
    """
    start, vae, config, data, phases = run or [None] * 5
    check_same_start(start)
    own = start and (start.stamp, start.state)
    shared = args, start and replace(start, state=None), config, data, phases
    args, start, config, data, phases = distributed.broadcast(shared)
    check_precision(args.precision)
    if run is None:
        vae = load_vae(args.vae)
        asked = checkpoint.asked_shape(args)
        own = checkpoint.load_stamped(start.path, **asked) if start.path else (None, None)
    start.stamp, start.state = own
    if args.new_classes and not start.resumes:
        start.state = checkpoint.with_classes(start.state, data.scan.classes, config.num_classes)
    if args.cache_frames:
        data = replace(data, frames=share_frame_cache(args, data))
    return args, start, vae, config, data, phases


def check_same_start(start):
    """Raise UserError, on all ranks, unless their Starts are the same; None, of a rank that has none, is left out."""
    starts = {found for found in distributed.gather(start and start.describe()) if found}
    if len(starts) > 1:
        found = ", ".join(f"{path} (step {step})" for path, step, _ in sorted(starts))
        raise UserError(
            f"the ranks start from different checkpoints, {found}: if an earlier run was still saving, start again; "
            "otherwise all machines need the same files"
        )


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system; fill in those of images."""
    settle_frames(args)
    if args.shard and world_size() == 1:
        say("note: --shard: there is one rank, so nothing is sharded")
        args.shard = False
    check_job()
    check_speed_flags(args)
    if args.forcing and {phase.num_frames for phase in args.frames_schedule or []} | {args.num_frames} == {1}:
        advice = "leave it out" if args.video else "add --video, or leave it out"
        raise UserError(f"--forcing {args.forcing}: clips of one frame leave nothing to complete: {advice}")
    for name in ("rope_theta", "rope_split", "rope_speed", "position_table"):
        if (value := getattr(args, name)) is not None and not args.use_rope:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag} needs rotary positions: add --use-rope, or leave it out")
    if len(args.frame_interval) > 2 or args.frame_interval[0] > args.frame_interval[-1]:
        found = " ".join(map(str, args.frame_interval))
        raise UserError(f"--frame-interval {found}: wanted one number, or two of which the second is not smaller")
    for name, most in LARGEST.items():
        if (value := getattr(args, name)) > most:
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted at most {most}")
    if args.lr_decay_end and not args.max_steps:
        raise UserError(f"--lr-decay-end {args.lr_decay_end}: needs --max-steps or --frames-schedule; add one of them")
    if args.lr_decay_end and args.lr_decay_end < args.max_steps:
        found = f"--lr-decay-end {args.lr_decay_end}: ends before the run"
        raise UserError(f"{found}; expected at least its last step, {args.max_steps}; raise it")
    if args.new_classes and args.ckpt is None:
        raise UserError("--new-classes is for a checkpoint of other classes: give --ckpt, too, or leave it out")
    if args.ckpt == "":
        raise UserError("--ckpt '': an empty name; name a checkpoint, or leave the flag out to start from scratch")
    parts = world_size() * args.grad_accum
    if args.global_batch_size % parts and not args.frames_schedule:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of {world_size()} ranks x "
            f"--grad-accum {args.grad_accum}: use a multiple of {parts}"
        )
    if args.disp and args.global_batch_size == parts:
        raise UserError(f"--disp compares clips, --global-batch-size {parts} leaves each rank one at a time: raise it")
    check_writable("--results-dir", args.results_dir)
    if not is_text(args.results_dir):
        raise UserError(f"--results-dir {args.results_dir}: not UTF-8, which TensorBoard needs; name another")
    if args.wandb:
        import_wandb()


def settle_frames(args):
    """Fill in --num-frames: 1 for images; with a schedule that of its first phase, and --max-steps of its last."""
    if not args.video:
        if args.frames_schedule:
            raise UserError("--frames-schedule without --video: images have one frame; add --video or leave it out")
        for name in ("num_frames", "temporal_patch_size", "frame_interval"):
            if (value := getattr(args, name)) not in (None, 1, [1]):
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag} without --video: images have one frame; add --video or leave it out")
        args.num_frames = args.temporal_patch_size = 1
    if args.frames_schedule:
        for name in ("num_frames", "max_steps", "epochs"):
            if (value := getattr(args, name)) is not None:
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(
                    f"{flag} contradicts --frames-schedule, which gives it per phase: leave one of them out"
                )
        args.num_frames, args.max_steps = args.frames_schedule[0].num_frames, args.frames_schedule[-1].last_step
    elif args.mix:
        raise UserError(f"--mix {args.mix} needs the earlier phases of --frames-schedule: add that, or leave it out")
    args.num_frames = args.num_frames or 16


def load_run_vae(args, start):
    """The VAE of --vae, else of the latent cache or the checkpoint; settles --vae, --image-size and --no-flip."""
    cache, asked = latents_settings(args.data_path, images=not args.video), args.vae
    kept = start.state["config"]["data"] if start.state else {"vae": "ema", "image_size": 256}
    if cache is None:
        args.vae = args.vae or kept["vae"]
        vae = load_vae(args.vae, None if asked else "the checkpoint")
        size = kept["image_size"] or start.state["config"]["model"]["input_size"] * vae.downsample  # published models
        args.image_size = args.image_size or size
        check_same(vae, kept.get("vae_sha256"), f"--ckpt {start.path}")
        return vae
    if start.state and kept["image_size"] not in (None, cache["image_size"]):
        found = f"--data-path {args.data_path}: a latent cache of {cache['image_size']} px"
        raise UserError(f"{found}, --ckpt {start.path} has {kept['image_size']} px: make a cache of that size")
    if args.image_size not in (None, cache["image_size"]):
        found = cache["image_size"]
        raise UserError(f"--image-size {args.image_size}: the cache --data-path has {found}: leave it out")
    if args.vae not in (None, cache["vae"]) and not os.path.isdir(args.vae):
        raise UserError(f"--vae {args.vae}: the cache --data-path was made with {cache['vae']}: leave it out")
    args.vae, args.image_size = args.vae or cache["vae"], cache["image_size"]
    vae = load_vae(args.vae, None if asked else "the latent cache")  # samples are decoded with it
    for name in ("channels", "downsample", "scale", "shift"):
        if getattr(vae, name) != cache[name]:
            raise UserError(
                f"--vae {args.vae}: has {name} {getattr(vae, name)}, the cache --data-path, made with {cache['vae']}, "
                f"{cache[name]}: give the path of that VAE"
            )
    check_same(vae, cache.get("vae_sha256"), f"--data-path {args.data_path}")
    check_same(vae, kept.get("vae_sha256"), f"--ckpt {start.path}")
    if not (args.no_flip or cache["flips"]):
        say("note: the cache has no mirrored latents (--with-flips), so no clip is mirrored")
        args.no_flip = True
    return vae


def check_frame_cache(args, data):
    """Raise UserError unless this machine, and others as large, can hold the frames of all videos."""
    if sys.platform != "linux":
        raise UserError(f"--cache-frames: needs Linux, this is {sys.platform}: leave it out")
    if latents_settings(args.data_path, images=not args.video):
        raise UserError("--cache-frames: --data-path is a latent cache, which needs no decoding: leave it out")
    count, side, free = sum(video.num_frames for video in data.used), args.image_size, free_bytes()
    needed = 3 * side**2 * count
    numbers = f"{count:,} frames of {side} x {side} px take {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
    if needed > free:
        raise UserError(f"--cache-frames: {numbers}: leave it out")
    say(f"--cache-frames: {numbers}")


def share_frame_cache(args, data):
    """The FrameCache of this machine, which its first rank makes."""
    make = functools.partial(FrameCache, data.used, args.image_size)
    own = make() if local_rank() == 0 else None
    places = distributed.gather(own and own.place)
    return own or make(places[rank() - local_rank()])


def make_config(args, vae, start):
    """The EqMConfig of this run, except for its classes: from the flags, or from a checkpoint that they agree with."""
    unit = vae.downsample * int(args.model.split("/")[1]) if args.model else vae.downsample
    if args.image_size % unit:
        raise UserError(f"--image-size {args.image_size} is not a multiple of {unit} (VAE's downsampling x patch)")
    settings = {
        "input_size": args.image_size // vae.downsample,
        "in_channels": vae.channels,
        "num_frames": args.num_frames,
        "use_rope": args.use_rope,
    }
    given = {name: getattr(args, name) for name in (*MODEL_FLAGS, "num_classes") if getattr(args, name) is not None}
    settings |= given
    try:
        if start.state is None:
            config = model_config(args.model, **settings)
        else:
            checkpoint.check_kind(start.path, start.state, args.video)
            saved = checkpoint.config_of(start.path, start.state)
            if args.new_classes and not start.resumes:
                settings.pop("num_classes", None)
            checkpoint.check(start.path, saved, **(model_shape(args.model) | settings))
            config = replace(saved, num_frames=args.num_frames)
        config.check_num_frames(args.num_frames)
        for num_frames in args.val_frames:
            check_frames(config, "--val-frames", num_frames)
        if args.compile and config.ebm != "none":
            raise UserError(f"--compile can't train --ebm {config.ebm}: it has no second derivative; leave it out")
    except ValueError as error:
        flag = f"{'--frames-schedule' if args.frames_schedule else '--num-frames'} {args.num_frames}"
        field = str(error).split()[0]  # EqMConfig names the field that is wrong first
        if field in given:
            flag = f"--{field.replace('_', '-')} {given[field]}"
        raise UserError(f"{flag}, model {args.model or start.path}: {error}") from error
    return config


def plan_phases(args, config):
    """The phases of --frames-schedule with their batch sizes; an empty list without one."""
    if not args.frames_schedule:
        return []
    for phase in args.frames_schedule:
        check_frames(config, "--frames-schedule", phase.num_frames)

    def tokens(num_frames):
        return math.prod(config.grid(num_frames))

    return fill_batches(args.frames_schedule, args.global_batch_size, tokens, world_size() * args.grad_accum)


def only_phase(args, progress, data):
    """The phase of a run without --frames-schedule."""
    num_videos = len(data.train[args.num_frames])
    last_step = progress.last_step(args.max_steps, args.epochs, num_videos, args.global_batch_size)
    return Phase(args.num_frames, last_step, args.global_batch_size)


def check_frames(config, flag, num_frames):
    try:
        config.check_num_frames(num_frames)
    except ValueError as error:
        raise UserError(f"{flag} {num_frames}: {error}") from error


def fit_classes(args, config, start, classes):
    """The config with the classes of the data, which a checkpoint must have had as well."""
    num_classes = args.num_classes or len(classes)
    if num_classes < len(classes):
        raise UserError(f"--num-classes {num_classes}: wanted at least the {len(classes)} of --data-path")
    before = start.state["config"]["data"]["classes"] if start.state else classes
    if args.new_classes and not start.resumes:
        known = len(set(before) & set(classes))
        say(f"--new-classes: {known} of {len(classes)} are known to {start.path}, which has {len(before)}")
    elif start.state is not None:
        if before != classes and before != [str(label) for label in range(len(before))]:  # published: no names
            found, wanted = (f"{', '.join(names[:3])} ({len(names)})" for names in (classes, before))
            advice = "a run keeps its classes" if start.resumes else "--new-classes trains on with those of the data"
            place = f"--data-path {args.data_path}"
            raise UserError(f"{place}: has the classes {found}, --ckpt {start.path} has {wanted}: {advice}")
        checkpoint.check(start.path, config, num_classes=num_classes)
    return replace(config, num_classes=num_classes)


def note_changes(start, run_config, folder, log, metrics):
    """Say in log and metrics which flags of a resumed run are not as they were, and keep its config up to here."""
    if not start.resumes:
        return
    before, now = start.state["config"]["training"], run_config["training"]
    names = [name for name in now if name not in NO_CHANGE and before.get(name, now[name]) != now[name]]
    if names and rank() == 0:
        text = "resumed with other flags: " + ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names)
        log(text)
        metrics.note(start.progress.step, text)
        old = folder / f"config-until-{start.progress.step:07d}.json"
        old.write_text(json.dumps(start.state["config"], indent=2))


def log_run(log, args, folder, config, model, data, steps, device):
    """Say what is trained on what; steps are the first and the last one."""
    size, num_frames = sum(parameter.numel() for parameter in model.parameters()), max(data.train)
    log(
        f"{folder}: {model_name(**asdict(config))}, {size / 1e6:.1f} M parameters, "
        f"{config.positions}; {world_size()} x {device.type}, steps {steps[0]} to {steps[1]}"
    )
    log(
        f"{len(data.train[num_frames])} {'videos' if args.video else 'images'} of {len(data.scan.classes)} classes "
        f"train, {len(data.val[num_frames])} validate; {data.num_short} have fewer than {num_frames} frames, "
        f"{len(data.scan.unreadable)} can't be opened"
    )
    for num_frames, videos in data.train.items():
        fits = [fitting_interval(video, num_frames, args.frame_interval[-1]) for video in videos]
        if short := sum(fit < args.frame_interval[-1] for fit in fits):
            found = f"{short} of {len(videos)} training videos are too short for {num_frames} frames that are"
            log(f"note: {found} {args.frame_interval[-1]} apart: theirs are as far apart as fits, from {min(fits)} on")


def run_name(args):
    """EqM-S-4-f4-rope, with a schedule EqM-S-4-f4-8-16-rope; a glob pattern if the model is not known yet."""
    lengths = [phase.num_frames for phase in args.frames_schedule or []] or [args.num_frames]
    positions = "-rope" if args.use_rope else ""
    return f"{args.model or 'EqM-*'}-f{'-'.join(map(str, lengths))}{positions}".replace("/", "-")


def make_run_config(args, config, phase, data, vae):
    """The `config` of the checkpoints of a phase: plain values that say how it was trained."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if args.frames_schedule:
        flags["frames_schedule"] = ",".join(map(str, args.frames_schedule))
    num_frames = phase.num_frames
    videos = data.train[num_frames]
    nearest, farthest = (
        statistics.median_low(fitting_interval(video, num_frames, interval) / video.fps for video in videos)
        for interval in (args.frame_interval[0], args.frame_interval[-1])
    )
    return {
        "model": asdict(config) | {"num_frames": num_frames},
        "data": {
            "vae": vae.place,
            "vae_sha256": vae.sha256,
            "image_size": args.image_size,
            "fps": statistics.median(video.fps for video in videos),
            "frame_interval": args.frame_interval,
            "time_scale": nearest,  # seconds between frames of the clips that were seen
            "longest_time_scale": farthest,
            "classes": data.scan.classes,
        },
        "training": flags | {"num_frames": num_frames, "global_batch_size": phase.batch_size},
    }

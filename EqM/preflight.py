"""Resolves all flags once, and checks everything a user can get wrong before a GPU is used or a folder is made.

The flags of a command line become a complete, frozen namespace; nothing after this module changes one. Whatever the
user can put right raises UserError. For training, flags, data, checkpoint and model are checked in this order, by the
first rank of each machine for the others there.
"""

import json
import math
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import checkpoint
import generation
from models import model_config, model_name, model_shape, with_classes
from optim import MUON_DECAY
from runtime import cli, distributed
from runtime.cli import UserError, flag_text, say
from runtime.distributed import local_rank, rank, world_size
from runtime.metrics import import_wandb
from runtime.runs import check_job
from runtime.untrusted import is_text, read_json
from samplers import SOLVERS
from schedule import Phase, fill_batches
from vae import check_same, load_vae
from video.index import find_data, fitting_interval
from video.source import CachedFiles, check_data_path, latents_settings, open_source

DEFAULT_MODEL = "EqM-S/4"
LARGEST = {"num_workers": 1024, "global_batch_size": 2**20, "num_samples": 4096}  # larger values are typing errors
MODEL_FLAGS = (
    "depth", "hidden_size", "num_heads", "temporal_patch_size", "rope_theta", "rope_split", "rope_speed",
    "position_table", "qk_norm", "ebm",
)  # fmt: skip
NO_CHANGE = {  # flags that may differ in a resumed run: they change nothing, or are checked against the checkpoint
    "resume", "ckpt", "new_classes", "num_classes", "results_dir", "vae", "num_workers", "loader_timeout", "wandb",
    "save_minutes", "keep_last", "shard", "model", "guidance_chosen", *MODEL_FLAGS,
}  # fmt: skip


def check_run(args):
    """(flags, Start, VAE, EqMConfig, Data, phases) of the run that the flags of train.py ask for.

    None but on the first rank of each machine; the Data, and the number of classes in the config, are known on rank 0
    only: see `share_run`. phases is empty without --frames-schedule. Raises UserError.
    """
    cli.check_devices()
    if local_rank() != 0:
        return None
    args = resolve_frames(args)
    check_flags(args)
    check_data_path(args.data_path, images=not args.video)
    start = checkpoint.find_start(args, run_name(args))
    args, vae = resolve_latents(args, start)
    if start.resumes:
        args = args.resolve(ckpt=start.kept("ckpt"))  # where the phase started, for the record
    elif start.state is None:
        args = args.resolve(model=args.model or DEFAULT_MODEL)
    config, data = make_config(args, vae, start), None
    args = resolve_settings(args, start, config)
    phases = plan_phases(args, config)
    lengths = [phase.num_frames for phase in phases] or [args.num_frames]
    note_forcing(args, start, config, min(lengths))
    if rank() == 0:
        flag = "--frames-schedule" if phases else "--num-frames"
        data = open_data(args, not args.video, lengths, args.val_frames, flag)
        config = fit_classes(args, config, start, data.scan.classes)
    return args, start, vae, config, data, phases


def share_run(run):
    """(flags, Start, VAE, EqMConfig, Data, phases) as `check_run` found them on rank 0, for all ranks of a group.

    Raises UserError unless all machines start from the same checkpoint, in the same folder, and have the --precision.
    """
    args, start, vae, config, data, phases = run or [None] * 6
    check_same_start(start)
    own = start and start.state
    shared = args, start and replace(start, state=None), config, data, phases
    args, start, config, data, phases = distributed.broadcast(shared)
    cli.check_precision(args.precision)
    if run is None:
        vae = load_vae(args.vae)
        own = checkpoint.load(start.path, **checkpoint.asked_shape(args)) if start.path else None
    start.state = own
    if args.new_classes and not start.resumes:
        start.state = with_new_classes(start.state, data.scan.classes, config.num_classes)
    if args.cache_frames:
        fill_cache(data.source)
    return args, start, vae, config, data, phases


def check_same_start(start):
    """Raise UserError, on all ranks, unless their Starts are the same; None, of a rank that has none, is left out."""
    own = start and (str(start.path), start.progress.step, str(start.folder))
    starts = {found for found in distributed.gather(own) if found}
    if len(starts) > 1:
        found = ", ".join(f"{path} (step {step})" for path, step, _ in sorted(starts))
        raise UserError(
            f"the ranks start from different checkpoints, {found}: if an earlier run was still saving, start again; "
            "otherwise all machines need the same files"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def resolve_frames(args):
    """Flags with --num-frames: 1 for images; with a schedule that of its first phase, and --max-steps of its last."""
    if not args.video:
        for name in ("num_frames", "temporal_patch_size", "frame_interval", "frames_schedule"):
            if getattr(args, name) not in (None, 1, [1]):
                raise UserError(
                    f"{flag_text(args, name)} without --video: images have one frame; add --video or leave it out"
                )
        args = args.resolve(num_frames=1, temporal_patch_size=1)
    if not args.frames_schedule:
        return args.resolve(num_frames=args.num_frames or 16)
    for name in ("num_frames", "max_steps", "epochs"):
        if getattr(args, name) is not None:
            found = f"{flag_text(args, name)} contradicts --frames-schedule"
            raise UserError(f"{found}, which gives it per phase: leave one of them out")
    first, last = args.frames_schedule[0], args.frames_schedule[-1]
    return args.resolve(num_frames=first.num_frames, max_steps=last.last_step)


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system."""
    check_job()
    cli.check_speed_flags(args)
    if args.mix and not args.frames_schedule:
        raise UserError(f"--mix {args.mix} needs the earlier phases of --frames-schedule: add that, or leave it out")
    if args.forcing and {phase.num_frames for phase in args.frames_schedule or []} | {args.num_frames} == {1}:
        advice = "leave it out" if args.video else "add --video, or leave it out"
        raise UserError(f"--forcing {args.forcing}: clips of one frame leave nothing to complete: {advice}")
    for name in ("rope_theta", "rope_split", "rope_speed", "position_table"):
        if getattr(args, name) is not None and not args.use_rope:
            raise UserError(f"{flag_text(args, name)} needs rotary positions: add --use-rope, or leave it out")
    if len(args.frame_interval) > 2 or args.frame_interval[0] > args.frame_interval[-1]:
        found = " ".join(map(str, args.frame_interval))
        raise UserError(f"--frame-interval {found}: expected one number, or two of which the second is not smaller")
    for name, most in LARGEST.items():
        if getattr(args, name) > most:
            raise UserError(f"{flag_text(args, name)}: expected at most {most}")
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
    cli.check_writable("--results-dir", args.results_dir)
    if not is_text(args.results_dir):
        raise UserError(f"--results-dir {args.results_dir}: not UTF-8, which TensorBoard needs; name another")
    if args.wandb:
        import_wandb()


def resolve_settings(args, start, config):
    """Flags with what depends on the checkpoint, the model and the machine. Raises UserError."""
    kept, usual = start.kept("weight_decay"), MUON_DECAY if args.optimizer == "muon" else 0.0
    if args.shard and world_size() == 1:
        say("note: --shard: there is one rank, so nothing is sharded")
    args = args.resolve(
        shard=args.shard and world_size() > 1,
        model=args.model or start.config["training"]["model"],
        precision=cli.resolve_precision(args.precision, config.ebm != "none", start.kept("precision")),
        weight_decay=(usual if kept is None else kept) if args.weight_decay is None else args.weight_decay,
        **generation.resolve_sampler(args, start.config["training"]),
    )
    if args.skip_nonfinite and args.precision == "fp16":
        raise UserError("--skip-nonfinite: --precision fp16 skips steps that overflow by itself: leave it out")
    return args


def note_forcing(args, start, config, shortest):
    before = 0 if start.resumes else start.config["training"].get("forcing")
    if before and not args.forcing:
        say(f"note: --ckpt was trained with --forcing {before}, this phase is without: it may forget given frames")
    if args.forcing and shortest <= config.temporal_patch_size:
        say(f"note: --forcing {args.forcing}: clips of {shortest} frames are one temporal patch and are not forced")


def resolve_latents(args, start):
    """(flags with --vae, --image-size and --no-flip, the VAE): of the flags, the latent cache or the checkpoint."""
    cache, typed, kept = latents_settings(args.data_path, images=not args.video), args.vae, start.config["data"]
    if cache is None:
        vae = load_vae(args.vae or kept.get("vae", "ema"), None if typed else "the checkpoint")
        size = kept.get("image_size", 256) or start.config["model"]["input_size"] * vae.downsample  # published models
        check_same(vae, kept.get("vae_sha256"), start.flag)
        return args.resolve(vae=vae.name, image_size=args.image_size or size), vae
    size = cache["image_size"]
    if kept.get("image_size") not in (None, size):
        found = f"--data-path {args.data_path}: a latent cache of {size} px"
        raise UserError(f"{found}, {start.flag} has {kept['image_size']} px: make a cache of that size")
    if args.image_size not in (None, size):
        raise UserError(f"--image-size {args.image_size}: the cache --data-path has {size}: leave it out")
    if args.vae not in (None, cache["vae"]) and not os.path.isdir(args.vae):
        raise UserError(f"--vae {args.vae}: the cache --data-path was made with {cache['vae']}: leave it out")
    vae = load_vae(args.vae or cache["vae"], None if typed else "the latent cache")  # samples are decoded with it
    for name in ("channels", "downsample", "scale", "shift"):
        if getattr(vae, name) != cache[name]:
            raise UserError(
                f"--vae {vae.name}: has {name} {getattr(vae, name)}, the cache --data-path, made with {cache['vae']}, "
                f"{cache[name]}: give the path of that VAE"
            )
    check_same(vae, cache.get("vae_sha256"), f"--data-path {args.data_path}")
    check_same(vae, kept.get("vae_sha256"), start.flag)
    if not (args.no_flip or cache["flips"]):
        say("note: the cache has no mirrored latents (--with-flips), so no clip is mirrored")
    return args.resolve(vae=vae.name, image_size=size, no_flip=args.no_flip or not cache["flips"]), vae


def open_data(args, images, lengths, val_lengths, flag):
    """The Data of --data-path, as `find_data` says; with --cache-frames its source is one of cached pixels."""
    source = open_source(args.data_path, args.image_size, images, args.results_dir)
    data = find_data(source, args.val_fraction, lengths, val_lengths, flag)
    if args.cache_frames:
        data = replace(data, source=CachedFiles(source, args.results_dir, args.cache_frames_force))
    return data


def fill_cache(source):
    """Have the first rank of each machine decode the videos of a CachedFiles; the others wait, for an hour at most."""
    barrier = distributed.patient_barrier()
    source.fill()
    barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Model, phases, classes


def make_config(args, vae, start):
    """The EqMConfig of this run, except for its classes: from the flags, or from a checkpoint that they agree with."""
    unit = vae.downsample * int(args.model.split("/")[1]) if args.model else vae.downsample
    if args.image_size % unit:
        raise UserError(f"--image-size {args.image_size} is not a multiple of {unit} (VAE's downsampling x patch)")
    typed = [name for name in (*MODEL_FLAGS, "num_classes") if getattr(args, name) is not None]
    settings = {name: getattr(args, name) for name in ("num_frames", "use_rope", *typed)}
    settings |= {"input_size": args.image_size // vae.downsample, "in_channels": vae.channels}
    try:
        if start.state is None:
            config = model_config(args.model, **settings)
        else:
            checkpoint.check_kind(start.flag, start.state, video=args.video)
            saved = checkpoint.config_of(start.flag, start.state)
            if args.new_classes and not start.resumes:
                settings.pop("num_classes", None)
            checkpoint.check(start.flag, saved, **(model_shape(args.model) | settings))
            config = replace(saved, num_frames=args.num_frames)
        config.check_num_frames(args.num_frames)
    except ValueError as error:
        frames = f"{'--frames-schedule' if args.frames_schedule else '--num-frames'} {args.num_frames}"
        words = " ".join([*(flag_text(args, name) for name in typed), frames])
        raise UserError(f"{words}, model {args.model or start.path}: {error}") from error
    for num_frames in args.val_frames:
        check_frames(config, "--val-frames", num_frames)
    if args.compile and config.ebm != "none":
        raise UserError(f"--compile can't train --ebm {config.ebm}: it has no second derivative; leave it out")
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
    """The phase of a run without --frames-schedule; it ends at --max-steps or --epochs, whichever comes first."""
    last_step = args.max_steps or math.inf
    if args.epochs or not args.max_steps:
        clips = (args.epochs or 1400) * len(data.train[args.num_frames])
        last_step = min(last_step, progress.first_step + math.ceil(clips / args.global_batch_size))
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
        raise UserError(f"--num-classes {num_classes}: expected at least the {len(classes)} of --data-path")
    before = start.config["data"].get("classes", classes)
    if args.new_classes and not start.resumes:
        known = len(set(before) & set(classes))
        say(f"--new-classes: {known} of {len(classes)} are known to {start.path}, which has {len(before)}")
    elif start.state is not None:
        if before != classes and before != [str(label) for label in range(len(before))]:  # published: no names
            got, expected = (f"{', '.join(names[:3])} ({len(names)})" for names in (classes, before))
            advice = "a run keeps its classes" if start.resumes else "--new-classes trains on with those of the data"
            place = f"--data-path {args.data_path}"
            raise UserError(f"{place}: has the classes {got}, {start.flag} has {expected}: {advice}")
        checkpoint.check(start.flag, config, num_classes=num_classes)
    return replace(config, num_classes=num_classes)


def with_new_classes(state, classes, num_classes):
    """The dict of a checkpoint for other classes, for --new-classes. The optimizer starts afresh."""
    before = state["config"]["data"]["classes"]
    rows = [before.index(name) if name in before else -1 for name in classes]
    rows += [-1] * (num_classes + 1 - len(rows))
    return state | {part: with_classes(state[part], rows) for part in ("model", "ema")} | {"optimizer": None}


# ----------------------------------------------------------------------------------------------------------------------
# What a run says of itself


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
    nearest, farthest = (
        statistics.median_low(
            fitting_interval(video, phase.num_frames, interval) / video.fps for video in data.train[phase.num_frames]
        )
        for interval in (args.frame_interval[0], args.frame_interval[-1])
    )
    return {
        "model": asdict(config) | {"num_frames": phase.num_frames},
        "data": {
            "vae": vae.place,
            "vae_sha256": vae.sha256,
            "image_size": args.image_size,
            "fps": statistics.median(video.fps for video in data.train[phase.num_frames]),
            "frame_interval": args.frame_interval,
            "time_scale": nearest,  # seconds between frames of the clips that were seen
            "longest_time_scale": farthest,
            "classes": data.scan.classes,
        },
        "training": flags | {"num_frames": phase.num_frames, "global_batch_size": phase.batch_size},
        "typed": sorted(args.typed),
    }


def note_changes(start, run_config, folder, log, metrics):
    """Say in log and metrics which typed flags of a resumed run have changed, and keep its config up to here."""
    if not start.resumes:
        return
    before, now = start.config["training"], run_config["training"]
    typed = {*start.config.get("typed", before), *run_config["typed"]} & before.keys() & now.keys()
    names = [name for name in now if name in typed - NO_CHANGE and before[name] != now[name]]
    if names and rank() == 0:
        text = "resumed with other flags: " + ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names)
        log(text)
        metrics.note(start.progress.step, text)
        old = folder / f"config-until-{start.progress.step:07d}.json"
        old.write_text(json.dumps(start.config, indent=2))


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


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def resolve_sampling(args):
    """[(flags, Plan)] of sample_gd.py, one for each of --num-frames; several have folders of their own.

    Raises UserError.
    """
    check_sampling(args)
    if args.init_gamma is None:
        args = args.resolve(init_gamma=0.0 if args.init is None else 0.5)
    lengths, found = list(dict.fromkeys(args.num_frames or [None])), []
    for num_frames in lengths:
        folder = args.folder if len(lengths) == 1 else f"{os.path.normpath(args.folder)}-f{num_frames}"
        own = args.resolve(num_frames=num_frames, folder=folder)
        cli.check_writable("--folder", folder)
        check_not_of_another(own)
        values, plan = generation.open_checkpoint(own)
        found.append((own.resolve(**values), plan))
        generation.say_plan(*found[-1])
        check_plan(*found[-1])
    return found


def check_sampling(args):
    """Raise UserError for flags of sample_gd.py that contradict each other or the machine."""
    cli.check_devices()
    cli.check_speed_flags(args)
    for name in ("num_frames", "fps", "time_scale", "given"):
        if getattr(args, name) not in (None, [1]) and not args.video:
            raise UserError(f"{flag_text(args, name)} without --video: images have no frames; add --video or remove it")
    off = {"given_frames": None, "given_split": None, "samples_per_clip": 1, "keep_background": True}
    for name, value in off.items():
        if getattr(args, name) != value and args.given is None:
            raise UserError(f"--{name.replace('_', '-')} is about the clips of --given: give that, too")
    if args.given is not None and args.init is not None:
        raise UserError("--given and --init: frames to keep or a start from which all change: give one of them")
    if args.init_gamma is not None and args.init is None:
        raise UserError(f"--init-gamma {args.init_gamma} is the share of --init in the start: give that, too")


def check_plan(args, plan):
    """Raise UserError for flags of sample_gd.py that the model or the windows rule out."""
    if args.init_gamma == 1 and args.sampler in SOLVERS:
        raise UserError(f"--init-gamma 1 leaves --sampler {args.sampler} nothing to do: it integrates from there to 1")
    if args.report_energy and plan.model.config.ebm == "none":
        raise UserError(f"--report-energy: {args.ckpt} was trained without an energy (--ebm dot or l2): leave it out")
    for name in ("init", "report_energy"):
        if getattr(args, name) and len(plan.window_starts) > 1:
            several = f"the {plan.num_frames} frames come in windows of {plan.window}"
            raise UserError(f"{flag_text(args, name)}: {several}: leave it out, or give --window {plan.num_frames}")


def check_not_of_another(args):
    """Raise UserError if --folder holds samples of another run, unless --overwrite allows to replace them."""

    def run_of(ckpt):
        place = Path(ckpt).resolve()
        return place.parent.parent if place.parent.name == "checkpoints" else place

    place = Path(args.folder, "samples.json")
    if args.overwrite or not place.exists():
        return
    try:
        other = str(read_json(place)["flags"]["ckpt"])
    except (OSError, ValueError, KeyError, TypeError):
        other = "another model"
    if run_of(other) != run_of(args.ckpt):
        raise UserError(f"--folder {args.folder}: holds samples of {other}: name another folder, or add --overwrite")


# ----------------------------------------------------------------------------------------------------------------------
# Training a VAE


def check_vae_run(args):
    """(flags, Start, Data) of the run that the flags of train_vae.py ask for; the Data are rank 0's.

    Raises UserError.
    """
    cli.check_devices()
    check_job()
    if args.image_size % args.downsample:
        raise UserError(f"--image-size {args.image_size} is not a multiple of --downsample {args.downsample}")
    count = int(math.log2(args.downsample)) + 1
    args = args.resolve(widths=args.widths or [32, 64, 128, 128][:count])
    if len(args.widths) != count:
        raise UserError(
            f"{flag_text(args, 'widths')}: got {len(args.widths)} numbers, --downsample {args.downsample} needs {count}"
        )
    if args.global_batch_size % world_size():
        raise UserError(f"--global-batch-size {args.global_batch_size} is not a multiple of {world_size()} ranks")
    cli.check_writable("--results-dir", args.results_dir)
    check_data_path(args.data_path, cached=False)
    start, data = find_vae_start(args), None
    args = args.resolve(precision=cli.resolve_precision(args.precision, energy=False, kept=start.kept("precision")))
    if rank() == 0:
        data = open_data(args, False, [1], [], "--data-path")
    return args, start, data


def find_vae_start(args):
    """The Start of a new run or, with --resume or restarted by torchrun, of the newest one. Raises UserError."""
    folder = checkpoint.folder_to_resume(args, vae_run_name(args), "the beginning")
    if folder is None:
        return checkpoint.Start(checkpoint.Progress())
    path, state = checkpoint.newest_checkpoint(folder, read=checkpoint.read_file)
    if state is None:  # nothing was saved, or it is damaged
        return checkpoint.Start(checkpoint.Progress(), folder=folder)
    progress = checkpoint.Progress(state["step"], best_loss=state["best_loss"], **state["phase"])
    return checkpoint.Start(progress, path, state, folder)


def vae_run_name(args):
    widths = "-".join(map(str, args.widths))
    return f"VAE-{args.image_size}px-f{args.downsample}-c{args.latent_channels}-{widths}"

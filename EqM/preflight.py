"""Resolves all flags once, and checks what a user can get wrong before a GPU or folder is used."""

import json
import math
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

import checkpoint
import generation
import models
import optim
import schedule
import transport
from models import USUAL_NAME, model_config, model_name, model_shape
from optim import MUON_DECAY
from published import is_published
from runtime import cli, distributed
from runtime.cli import UserError, flag_text, plural, say
from runtime.distributed import local_rank, rank, world_size
from runtime.metrics import import_wandb
from runtime.runs import check_job
from runtime.untrusted import is_text, read_json
from samplers import SOLVERS
from schedule import Phase, clip_lengths, fill_batches, frames_flag
from vae import check_same, load_vae, must_differ
from video.index import CorruptVideos, find_data, fitting_interval, name_some
from video.inputs import find_clips
from video.samples import foreign_files
from video.source import CachedFiles, check_data_path, latents_settings, open_source

# flags that `note_changes` does not report: harmless, or checked against the checkpoint
UNREPORTED = {
    "resume",
    "ckpt",
    "inflate",
    "new_classes",
    "num_classes",
    "results_dir",
    "vae",
    "num_workers",
    "loader_timeout",
    "wandb",
    "save_minutes",
    "keep_last",
    "shard",
    "grad_checkpoint",
    "model",
    "guidance_chosen",
    *models.FLAGS,
}


# Training -----------------------------------------------------------------------------------------


def check_run(args):
    """(flags, Start, VAE, EqMConfig, Data, phases) of a run of train.py with these flags.

    Raises UserError.
    """
    cli.check_devices()
    if local_rank() != 0:  # the first rank of each machine checks; see `share_run`
        return None
    args = schedule.resolve_flags(args)
    check_flags(args)
    check_data_path(args.data_path, images=not args.video)
    start = checkpoint.find_start(args, run_name(args))
    args, vae = resolve_latents(args, start)
    config = make_config(args, vae, start)
    data = None
    phases = args.frames_schedule
    args = resolve_settings(args, start, config)
    if phases:
        batch = args.global_batch_size
        parts = world_size() * args.grad_accum
        phases = fill_batches(
            phases, batch, lambda num_frames: math.prod(config.grid(num_frames)), parts
        )
    # only rank 0 opens the data, so only it knows Data, phases and the number of classes
    if rank() == 0:
        data = open_data(args, start, clip_lengths(args), args.val_frames, frames_flag(args))
        config = fit_classes(args, config, start, data.scan.classes)
        phases = phases or [only_phase(args, start.progress, data)]
        step = start.progress.step
        last_step = phases[-1].last_step
        # with the same --epochs, videos were removed since: the run is finished
        if args.epochs and args.epochs != start.kept("epochs") and step > last_step:
            raise UserError(
                f"--epochs {args.epochs}: the checkpoint is at step {step}, these epochs end at "
                f"step {last_step}; give more"
            )
    return args, start, vae, config, data, phases


def share_run(run):
    """What `check_run` found on rank 0, on all ranks.

    Raises UserError if machines have other checkpoints or GPUs.
    """
    args, start, vae, config, data, phases = run or [None] * 6
    check_same_start(start)
    own = start and start.state
    shared = args, start and replace(start, state=None), config, data, phases
    args, start, config, data, phases = distributed.broadcast(shared)
    cli.check_precision(args.precision)
    if run is None:
        vae = load_vae(args.vae)
        own = start.read(args) if start.path else None
    start.state = own
    if args.new_classes and not start.resumes:
        start.state = with_new_classes(start.state, data.scan.classes, config.num_classes)
    if args.cache_frames:
        distributed.call_and_wait(data.source.fill)
    return args, start, vae, config, data, phases


def check_same_start(start):
    """Raise UserError on all ranks unless they have the same Start.

    Ranks that have None do not count.
    """
    starts = distributed.gather(start and (str(start.path), start.progress.step, str(start.folder)))
    if len(different := sorted(set(starts) - {None})) > 1:
        found = ", ".join(f"{path} (step {step})" for path, step, _ in different)
        advice = (
            "start again if an earlier run was still saving; otherwise give all machines the same "
            "files"
        )
        raise UserError(f"the ranks start from different checkpoints, {found}; {advice}")


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system."""
    check_job()
    cli.check_speed_flags(args)
    transport.check_flags(args, clip_lengths(args))
    schedule.check_flags(args)
    optim.check_flags(args)
    checkpoint.check_flags(args)
    cli.check_writable("--results-dir", args.results_dir)
    if not is_text(args.results_dir):
        raise UserError(
            f"--results-dir {args.results_dir}: not UTF-8, which TensorBoard needs; name another"
        )
    if args.wandb:
        import_wandb()
    if args.frame_interval != sorted(args.frame_interval)[:2]:
        raise UserError(
            f"{flag_text(args, 'frame_interval')}: expected one number, or two in ascending order"
        )


def resolve_latents(args, start):
    """(flags with --vae, --image-size and --no-flip, the VAE).

    The latent cache or the checkpoint gives defaults.
    """
    cache = latents_settings(args.data_path, images=not args.video)
    kept = start.config["data"]
    owner, made = ("the latent cache", cache) if cache else ("the checkpoint", kept)
    if cache:
        if args.image_size not in (None, cache["image_size"]):
            raise UserError(
                f"--image-size {args.image_size}: the cache --data-path has "
                f"{cache['image_size']}; remove it"
            )
        others = f"made with the VAE {cache.get('vae')}, {start.flag} with {kept.get('vae')}"
        if must_differ(cache.get("vae"), kept.get("vae")):
            raise UserError(
                f"--data-path {args.data_path}: {others}; pass the videos, or a cache of that VAE"
            )
        if not (args.no_flip or cache["flips"]):
            say("note: the cache was made without --with-flips, so no clip is mirrored")
            args = args.resolve(no_flip=True)
    vae = load_vae(args.vae, made.get("vae"), owner)  # a cache needs it for samples
    if cache:
        check_same(vae, cache.get("vae_sha256"), f"--data-path {args.data_path}")
        differs = any(
            getattr(vae, name) != cache[name]
            for name in ("channels", "downsample", "scale", "shift")
        )
        if differs:
            raise UserError(
                f"--data-path {args.data_path}: its VAE differs from {vae.name}; pass its own VAE "
                "with --vae"
            )
    check_same(vae, kept.get("vae_sha256"), start.flag)
    size = (
        args.image_size
        or made.get("image_size", 256)
        or start.config["model"]["input_size"] * vae.downsample
    )
    return args.resolve(vae=vae.name, image_size=size), vae


def make_config(args, vae, start):
    """The EqMConfig of this run without its classes, from the flags or from a checkpoint that
    agrees with them.
    """
    model = args.model or USUAL_NAME
    size = args.image_size
    unit = vae.downsample * (1 if start.state else model_shape(model)["patch_size"])
    near = size // unit * unit or unit
    if size % unit:
        raise UserError(
            f"--image-size {args.image_size}: not a multiple of {unit} (VAE and patch); use {near}"
        )
    names = [name for name in (*models.FLAGS, "num_classes") if getattr(args, name) is not None]
    settings = {name: getattr(args, name) for name in ("num_frames", "use_rope", *names)}
    settings |= {"input_size": args.image_size // vae.downsample, "in_channels": vae.channels}
    try:
        if start.state is None:
            config = model_config(model, **settings)
        else:
            model = start.path
            if args.new_classes and not start.resumes:
                settings.pop("num_classes", None)
            asked = model_shape(args.model) | settings
            saved = checkpoint.config_of(start.flag, start.state, video=args.video, **asked)
            config = replace(saved, num_frames=args.num_frames)
        for num_frames in (*clip_lengths(args), *args.val_frames):
            config.check_num_frames(num_frames)
    except ValueError as error:
        flags = [
            flag_text(args, name)
            for name in sorted(args.typed & {*names, "image_size", "val_frames"})
        ]
        flags += [f"{frames_flag(args)} {args.num_frames}", f"model {model}"]
        raise UserError(f"{' '.join(flags)}: {error}") from error
    config.warn_if_narrow()
    return config


def resolve_settings(args, start, config):
    """Flags with the values that depend on the checkpoint, the model and the machine.

    Raises UserError.
    """
    trained = start.config["training"]
    usual = MUON_DECAY if args.optimizer == "muon" else 0.0
    decays = args.weight_decay, start.kept("weight_decay"), usual
    if args.shard and world_size() == 1:
        say("note: --shard: with one rank, nothing is sharded")
    args = args.resolve(
        # Where the phase started, only as a record
        **{
            name: start.kept(name) if start.resumes else getattr(args, name)
            for name in ("ckpt", "inflate")
        },
        start_sha256=start.kept("start_sha256") if start.resumes else start.sha256,
        shard=args.shard and world_size() > 1,
        model=args.model or trained.get("model", USUAL_NAME),
        precision=cli.resolve_precision(
            args.precision, config.ebm != "none", start.kept("precision")
        ),
        weight_decay=next(decay for decay in decays if decay is not None),
        **generation.resolve_sampler(args, trained, config.learns),
    )
    has_energy = config.ebm != "none"
    if args.compile and has_energy:
        raise UserError(f"--compile: no second derivative for --ebm {config.ebm}; remove it")
    if args.grad_checkpoint == "selective" and has_energy:
        raise UserError(
            f"--grad-checkpoint {args.grad_checkpoint}: no second derivative for --ebm "
            f"{config.ebm}; use full, or remove the flag"
        )
    for name, skill in (("forcing", "given frames"), ("forcing_regions", "how to heal regions")):
        before = 0 if start.resumes else trained.get(name)
        now = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if before and not now:
            say(
                f"note: --ckpt was trained with {flag} {before}, this phase is not, so it may "
                f"forget {skill}"
            )
        if now and (shortest := min(clip_lengths(args))) <= config.temporal_patch_size:
            say(
                f"note: {flag} {now}: clips of {plural(shortest, 'frame')} are one patch long, so "
                "not forced"
            )
    if args.forcing_regions and not config.learns.has_equilibria:
        raise UserError(
            f"--forcing-regions {args.forcing_regions}: needs --objective eqm, not "
            f"{config.objective}; remove it"
        )
    return args


def open_data(args, start, lengths, val_lengths, flag):
    """The Data of --data-path, as in `find_data`.

    With --cache-frames, its source caches pixels. Raises UserError.
    """
    source = open_source(args.data_path, args.image_size, not args.video, args.results_dir)
    CorruptVideos(source.scan, args.max_bad_fraction, start.bad_videos).add(source.scan.unreadable)
    data = find_data(source, args.val_fraction, lengths, val_lengths, flag)
    if args.cache_frames:
        data = replace(data, source=CachedFiles(source, args.results_dir, args.cache_frames_force))
    return data


def only_phase(args, progress, data):
    """The only phase of a run without --frames-schedule.

    It ends at --max-steps or --epochs, whichever comes first.
    """
    last_step = args.max_steps or math.inf
    if args.epochs or not args.max_steps:
        clips = (args.epochs or 1400) * len(data.train[args.num_frames])
        last_step = min(last_step, progress.first_step + math.ceil(clips / args.global_batch_size))
    return Phase(args.num_frames, last_step, args.global_batch_size)


def fit_classes(args, config, start, classes):
    """The config with the classes of the data. Raises UserError if the checkpoint has others."""
    num_classes = args.num_classes or len(classes)
    before = start.config["data"].get("classes", classes)
    if num_classes < len(classes):
        raise UserError(
            f"--num-classes {args.num_classes}: expected at least the {len(classes)} of --data-path"
        )
    if args.new_classes and not start.resumes:
        known = len(set(before) & set(classes))
        count = plural(len(classes), "class")
        say(
            f"--new-classes: {start.path} has {known} of your {count}; others start from the "
            "embedding of 'no class'"
        )
    elif start.state is not None:
        got, expected = (f"{', '.join(names[:3])} ({len(names)})" for names in (classes, before))
        advice = (
            "pass its data, or remove --resume"
            if start.resumes
            else "add --new-classes to train on these"
        )
        numbers = [str(label) for label in range(len(before))]
        # A published model only numbers its classes, so it takes the names of the data
        is_unnamed = not start.inflates and is_published(start.config) and before == numbers
        if before != classes and not is_unnamed:
            raise UserError(
                f"--data-path {args.data_path}: has the classes {got}, {start.flag} has "
                f"{expected}; {advice}"
            )
        checkpoint.check(start.flag, config, num_classes=num_classes)
    return replace(config, num_classes=num_classes)


def with_new_classes(state, classes, num_classes):
    """The dict of a checkpoint with other classes, for --new-classes.

    The optimizer starts from scratch.
    """
    before = state["config"]["data"]["classes"]
    table = "y_embedder.embedding_table.weight"  # its last row: no class
    rows = [before.index(name) if name in before else -1 for name in classes] + [-1] * (
        num_classes + 1 - len(classes)
    )
    networks = {part: state[part] | {table: state[part][table][rows]} for part in ("model", "ema")}
    return state | networks | {"optimizer": None}


# The record of a run ------------------------------------------------------------------------------


def run_name(args):
    """EqM-S-4-f4-rope, or EqM-S-4-f4-8-16-rope with a schedule.

    A glob pattern if the model is not known yet.
    """
    positions = "-rope" if args.use_rope else ""
    return f"{args.model or 'EqM-*'}-f{'-'.join(map(str, clip_lengths(args)))}{positions}".replace(
        "/", "-"
    )


def make_run_config(args, config, phase, data, vae):
    """The `config` in the checkpoints of a phase: plain values that record how it was trained."""
    training = vars(args) | {"num_frames": phase.num_frames, "global_batch_size": phase.batch_size}
    if args.frames_schedule:
        training["frames_schedule"] = ",".join(map(str, args.frames_schedule))
    count = phase.num_frames
    videos = data.train[phase.num_frames]
    shortest, longest = (  # median seconds between two frames of a clip
        statistics.median_low(
            fitting_interval(video, count, interval) / video.fps for video in videos
        )
        for interval in (args.frame_interval[0], args.frame_interval[-1])
    )
    about_data = {
        "vae": vae.name,
        "vae_sha256": vae.sha256,
        "image_size": args.image_size,
        "fps": statistics.median(video.fps for video in videos),
        "frame_interval": args.frame_interval,
        "time_scale": shortest,
        "longest_time_scale": longest,
        "classes": data.scan.classes,
    }
    model = asdict(config) | {"num_frames": count}
    return {"model": model, "data": about_data, "training": training, "typed": sorted(args.typed)}


def note_changes(start, run_config, run):
    """Log the typed flags that changed in a resumed run, and keep its previous config.

    The metrics get them, too.
    """
    before = start.config["training"]
    now = run_config["training"]
    typed = {*start.config.get("typed", before), *run_config["typed"]} & before.keys() - UNREPORTED
    changes = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in typed and before[name] != now[name]
    ]
    if start.resumes and changes and rank() == 0:
        text = f"resumed with other flags: {', '.join(changes)}"
        run.log(text)
        run.metrics.note(start.progress.step, text)
        (run.folder / f"config-until-{start.progress.step:07d}.json").write_text(
            json.dumps(start.config, indent=2)
        )


def log_run(log, args, folder, config, model, data, steps, device):
    """Log the model, the data and the machine. steps: the first and the last step."""
    size = sum(map(torch.numel, model.parameters())) / 1e6
    ranks = f"{world_size()} x {device.type}"
    name = (
        f"{model_name(**asdict(config))}, {size:.1f} M parameters, {config.positions}, objective "
        f"{config.objective}"
    )
    log(f"{folder}: {name}; {ranks}, steps {steps[0]} to {steps[1]}")
    log_data(log, args, data)
    log_skipped(log, data)


def log_skipped(log, data):
    """Log how many files are too short for the longest clips, or can't be opened."""
    longest = max(data.train)
    short = f"{plural(data.num_too_short, 'file')} with fewer than {plural(longest, 'frame')}"
    if data.val_too_short[longest]:
        short += f" ({data.val_too_short[longest]} for validation)"
    log(f"skipped: {short}, {plural(len(data.scan.unreadable), 'file')} that can't be opened")
    for num_frames, count in data.val_too_short.items():
        if num_frames > longest and count:
            files = plural(count, "validation file")
            log(f"skipped: {files} with fewer than the {num_frames} frames of --val-frames")


def log_data(log, args, data):
    """Log the number of training files, the validation files, and notes.

    datasets/check.py prints the same.
    """
    most = max(data.train)
    interval = args.frame_interval[-1]
    kind = "video" if args.video else "image"
    train = plural(len(data.train[most]), kind)
    val = [video.path for video in data.val[most]]
    classes = plural(len(data.scan.classes), "class")
    named = name_some(val, 6)
    log(f"training: {train} in {classes}; validation: {plural(len(val), kind)}, {named}")
    for num_frames, videos in data.train.items():
        clips = f"clips of {plural(num_frames, 'frame')}"
        count = plural(len(videos), f"training {kind}")
        if missing := sorted({*data.scan.classes} - {video.class_name for video in videos}):
            log(
                f"note: class {name_some(missing)}: no training {kind} for {clips}, so it can't "
                "be learned; add some"
            )
        fits = [fitting_interval(video, num_frames, interval) for video in videos]
        if short := sum(fit < interval for fit in fits):
            advice = f"these use the largest interval that fits, {min(fits)} or more"
            log(
                f"note: --frame-interval {interval}: {clips} don't fit into {short} of {count}; "
                f"{advice}"
            )


# Sampling -----------------------------------------------------------------------------------------


def resolve_sampling(args):
    """[(flags, Plan)] of sample_gd.py: one per value of --num-frames, each with its own folder.

    Raises UserError.
    """
    check_sampling(args)
    if args.init_gamma is None:
        args = args.resolve(init_gamma=0.0 if args.init is None else 0.5)
    frames = list(dict.fromkeys(args.num_frames or [None]))
    runs = []
    found = []
    for num_frames in frames:
        folder = (
            args.folder if len(frames) == 1 else f"{os.path.normpath(args.folder)}-f{num_frames}"
        )
        own = args.resolve(num_frames=num_frames, folder=folder)
        check_folder(own)
        check_clips(own)
        runs.append(own)
    for own in runs:  # loading a model takes long, so it comes after all that needs none
        values, plan = generation.open_checkpoint(own)
        found.append((own.resolve(**values), plan))
        generation.say_plan(*found[-1])
        check_plan(*found[-1])
    unused = args.overlap is not None and all(len(plan.window_starts) == 1 for _, plan in found)
    alone = f"applies to several windows, but the {found[0][1].num_frames} frames are made in one"
    if unused:
        raise UserError(f"--overlap {args.overlap}: {alone}; add --window, or remove it")
    return found


def check_sampling(args):
    """Raise UserError for flags of sample_gd.py that contradict each other or the machine."""
    cli.check_devices()
    cli.check_speed_flags(args)
    for name in () if args.video else ("num_frames", "fps", "time_scale", "given"):
        if getattr(args, name) not in (None, [1]):
            raise UserError(f"{flag_text(args, name)}: needs videos; add --video, or remove it")
    if args.given is None:
        off = {
            "given_frames": None,
            "given_split": None,
            "samples_per_clip": 1,
            "keep_background": True,
        }
        for name, value in off.items():
            if getattr(args, name) != value:
                raise UserError(
                    f"{flag_text(args, name)}: applies to clips of --given; add that, or remove it"
                )
    if None not in (args.given, args.init):
        raise UserError(
            f"{flag_text(args, 'given')}: keeps its frames, but --init changes all of them; "
            "remove one of the two flags"
        )
    if args.init_gamma is not None and args.init is None:
        raise UserError(
            f"--init-gamma {args.init_gamma}: sets the share of --init in the initial latents; "
            "add --init, or remove it"
        )


def check_clips(args):
    """Raise UserError if there are no clips where --given and --init say. Opens no video."""
    if args.given_split is not None:
        if rank() == 0:  # the others wait for rank 0 in start()
            check_data_path(args.given, cached=False)
    elif args.given is not None:
        find_clips("--given", args.given, ("video", "image"), args.folder)
    if args.init is not None:
        kind = "video" if args.video else "image"
        find_clips("--init", args.init, (kind,), args.folder)


def check_plan(args, plan):
    """Raise UserError for flags of sample_gd.py that don't fit this model or these windows."""
    if args.init_gamma == 1 and args.sampler in SOLVERS:
        raise UserError(
            f"--init-gamma {args.init_gamma}: --sampler {args.sampler} integrates from there to "
            "1; use a lower value"
        )
    if args.report_energy and plan.model.config.ebm == "none":
        raise UserError(
            f"--report-energy: {args.ckpt} was trained without an energy (--ebm); remove it"
        )
    for name in ("init", "report_energy") if len(plan.window_starts) > 1 else ():
        several = f"the {plan.num_frames} frames are made in windows of {plan.window}"
        if getattr(args, name):
            raise UserError(
                f"{flag_text(args, name)}: {several}; remove it, or add --window {plan.num_frames}"
            )


def check_folder(args):
    """Raise UserError if --folder can't be written, or holds files that must stay.

    These are other files than samples and, without --overwrite, samples of another run.
    """
    cli.check_writable("--folder", args.folder)
    place = Path(args.folder, "samples.json")
    if others := foreign_files(place.parent):
        found = f"{others[0].relative_to(place.parent)} was not made by sample_gd.py"
        raise UserError(f"--folder {args.folder}: {found}; name a new folder")
    if place.exists() and not args.overwrite:
        try:
            other = str(read_json(place)["flags"]["ckpt"])
        except (OSError, ValueError, KeyError, TypeError):
            other = "another program"
        files = [Path(ckpt).resolve() for ckpt in (other, args.ckpt)]
        own, others = (
            file.parents[1] if file.parent.name == "checkpoints" else file for file in files
        )
        if own != others:
            raise UserError(
                f"--folder {args.folder}: has samples of {other}; name another folder, or add "
                "--overwrite"
            )


# Training a VAE -----------------------------------------------------------------------------------


def check_vae_run(args):
    """(flags, Start, Data) of a run of train_vae.py with these flags.

    Only rank 0 knows the Data. Raises UserError.
    """
    cli.check_devices()
    check_job()
    optim.check_flags(args)
    count = int(math.log2(args.downsample)) + 1
    args = args.resolve(widths=args.widths or [16, 32, 64, 128][:count])
    unit = args.downsample
    ranks = world_size()
    if args.image_size % unit:
        raise UserError(f"--image-size {args.image_size}: not a multiple of --downsample {unit}")
    if len(args.widths) != count:
        raise UserError(
            f"{flag_text(args, 'widths')}: expected {count} numbers for --downsample {unit}"
        )
    if args.global_batch_size % ranks:
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: not a multiple of "
            f"{plural(ranks, 'rank')}"
        )
    cli.check_writable("--results-dir", args.results_dir)
    check_data_path(args.data_path, cached=False)
    start = checkpoint.find_resumed(args, vae_run_name(args), read=checkpoint.read_file)
    args = args.resolve(
        precision=cli.resolve_precision(args.precision, energy=False, kept=start.kept("precision"))
    )
    data = open_data(args, start, [1], [], "--data-path") if rank() == 0 else None
    return args, start, data


def vae_run_name(args):
    widths = "-".join(map(str, args.widths))
    return f"VAE-{args.image_size}px-f{args.downsample}-c{args.latent_channels}-{widths}"

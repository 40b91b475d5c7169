"""Resolves all flags once, and checks what a user can get wrong before a GPU or folder is used.

Flags (`cli.Flags`) are frozen: args.resolve(...) returns a copy with other values, and args.typed
names the flags that the user gave.
"""

import math
import os
from contextlib import contextmanager, suppress
from dataclasses import replace

import checkpoint
import given
import models
import optim
import plans
import run
import schedule
import transport
from models import USUAL_NAME, model_config, model_shape
from optim import MUON_DECAY
from published import is_published
from runtime import cli, distributed
from runtime.cli import UserError, flag_text, plural, say
from runtime.distributed import local_rank, rank, world_size
from runtime.runs import check_job, newest_run
from samplers import SOLVERS
from schedule import Phase, clip_lengths, fill_batches, frames_flag
from vae import check_same, load_vae, surely_differ
from video import pairs, samples
from video.actions import ACTIONS_FILE, open_actions
from video.index import CorruptVideos, find_data, name_some
from video.pairs import Pairs
from video.source import CachedFiles, check_data_path, latents_settings, open_source

USUAL_EPOCHS = 1400  # of a run without --max-steps and --epochs

# Training -----------------------------------------------------------------------------------------


def check_run(args):
    """(flags, Start, VAE, EqMConfig, Data, phases) of a run of train.py with these flags.

    Raises UserError.
    """
    cli.check_devices()
    if local_rank() != 0:  # the first rank of each machine checks; see `share_run`
        return None
    source = None
    if args.pairs:
        source = Pairs(args.data_path, args.pairs)
        args = resolve_pairs(args, source)
    args = resolve_causal(resolve_frames(args))
    lengths = clip_lengths(args)
    check_flags(args, lengths)
    check_sources(args, source, lengths)
    start = checkpoint.find_start(args, run.run_name(args))
    args, vae = resolve_vae(args, start, source)
    config = make_config(args, vae, start, lengths)
    args = resolve_settings(args, start, config, lengths)
    data = None
    phases = args.frames_schedule
    if phases:
        phases = fill_batches(
            phases,
            args.global_batch_size,
            tokens=config.num_tokens,
            parts=world_size() * args.grad_accum,
        )
        schedule.check_disp(args, min(phase.batch_size for phase in phases))
    # only rank 0 opens the data, which tells the classes and, without a schedule, the phase
    if rank() == 0:
        data = open_all_data(args, start, source, lengths)
        config = fit_classes(args, config, start, data.scan.classes)
        config = fit_actions(args, config, start, data.files.source)
        phases = phases or [only_phase(args, start, data)]
    return args, start, vae, config, data, phases


def share_run(checked):
    """What `check_run` found on rank 0, on all ranks.

    Raises UserError if machines have other checkpoints or GPUs.
    """
    args, start, vae, config, data, phases = checked or [None] * 6
    check_same_start(start)
    # Rank 0 decides all but the VAE and the content of the checkpoint. The first rank of each
    # machine has loaded its own in `check_run`; the others load them here.
    own_state = None
    if checked is not None:
        own_state = start.state
        start.state = None  # megabytes or gigabytes, which are not broadcast
    args, start, config, data, phases = distributed.broadcast((args, start, config, data, phases))
    cli.check_precision(args.precision)
    if checked is None:
        vae = load_vae(args.vae)
        own_state = start.read(args) if start.path else None
    start.state = own_state
    if args.new_classes and not start.resumes:
        start.state = with_new_classes(start.state, data.scan.classes, config.num_classes)
    if args.cache_frames:
        distributed.call_and_wait(data.files.source.fill)
    return args, start, vae, config, data, phases


def check_same_start(start):
    """Raise UserError on all ranks unless they have the same Start.

    Ranks that have None do not count.
    """
    starts = distributed.gather(start and (str(start.path), start.progress.step, str(start.folder)))
    different = sorted(set(starts) - {None})
    if len(different) > 1:
        files = ", ".join(f"{path} (step {step})" for path, step, _ in different)
        raise UserError(
            f"the ranks start from different checkpoints, {files}; start again if an earlier run "
            "was still saving; otherwise give all machines the same files"
        )


def resolve_frames(args):
    """Flags with --num-frames: 1 for images, else 16 by default.

    A schedule sets --num-frames and --max-steps. Raises UserError.
    """
    if not args.video:
        for name in ("num_frames", "temporal_patch_size", "frame_interval", "frames_schedule"):
            if getattr(args, name) not in (None, 1, [1]):
                raise UserError(
                    f"{flag_text(args, name)}: needs videos, because images have one frame; add "
                    "--video, or remove it"
                )
        return args.resolve(num_frames=1, temporal_patch_size=1)
    if not args.frames_schedule:
        return args.resolve(num_frames=args.num_frames or 16)
    for name in ("num_frames", "max_steps", "epochs"):
        if getattr(args, name) is not None:
            raise UserError(
                f"{flag_text(args, name)}: contradicts --frames-schedule; remove one of them"
            )
    phases = args.frames_schedule
    return args.resolve(num_frames=phases[0].num_frames, max_steps=phases[-1].last_step)


def resolve_pairs(args, source):
    """Flags with what the samples of --pairs, a source, say: their frames and their teacher."""
    values = {"teacher": source.teacher}
    if args.num_frames is None and not args.frames_schedule and args.video:
        values["num_frames"] = source.num_frames
    if args.real_data:
        values["pairs_share"] = args.pairs_share or pairs.USUAL_SHARE
    else:
        values["no_flip"] = True  # a flip would mirror the clip, not its noise
    return args.resolve(**values)


def check_sources(args, source, lengths):
    """Check the data folders without opening a video. source: of --pairs, or None.

    Raises UserError.
    """
    if source is None:
        check_data_path(args.data_path, images=not args.video)
        return
    for num_frames in (*lengths, *args.val_frames):
        if num_frames != source.num_frames:
            flag = "--val-frames" if num_frames in args.val_frames else frames_flag(args)
            raise UserError(
                f"{flag} {num_frames}: the samples in --data-path {args.data_path} have "
                f"{plural(source.num_frames, 'frame')}; expected the same, because pairs are whole "
                "clips; change or remove the flag, or sample again"
            )
    if args.causal and not pairs.is_causal(source.made):
        raise UserError(
            f"--causal: the samples in --data-path {args.data_path} were made at once, so their "
            "noise does not fit patch by patch; expected samples of a causal model; remove one of "
            "the two"
        )
    if args.real_data:
        with naming_real_data(args):
            check_data_path(args.real_data, images=not args.video)


@contextmanager
def naming_real_data(args):
    """Errors about the folder of --real-data name this flag, not --data-path."""
    try:
        yield
    except UserError as error:
        root = args.real_data
        text = str(error).replace(f"--data-path {root}", f"--real-data {root}")
        raise type(error)(text) from error


def resolve_causal(args):
    """Flags with --causal as the model of --ckpt has it, unless it is given.

    Without that model, a run to resume may tell it. Only with --use-rope, which causal models need:
    `checkpoint.check` asks for it.
    """
    if args.causal is not None or not args.use_rope:
        return args
    if args.ckpt:
        with suppress(UserError):  # `find_start` reports a checkpoint that can't be read
            state = checkpoint.load(args.ckpt, [], args.model, args.ebm)
            return args.resolve(causal=state["config"]["model"].get("causal", False))
    if args.resume and not newest_run(args.results_dir, run.run_name(args)):
        causal = args.resolve(causal=True)
        if newest_run(args.results_dir, run.run_name(causal)):
            return causal
    return args


def check_flags(args, lengths):
    """Raise UserError for flags that contradict each other, the machine or the file system."""
    check_job()
    cli.check_speed_flags(args)
    pairs.check_flags(args)
    models.check_flags(args)
    transport.check_flags(args, lengths)
    schedule.check_flags(args)
    optim.check_flags(args)
    checkpoint.check_flags(args)
    run.check_flags(args)
    interval = args.frame_interval
    if len(interval) > 2 or interval != sorted(interval):
        raise UserError(
            f"{flag_text(args, 'frame_interval')}: expected one number, or two in ascending order"
        )


def resolve_vae(args, start, source=None):
    """(flags with --vae, --image-size and --no-flip, the VAE), also without a latent cache.

    The samples of --pairs (a source), the latent cache or the checkpoint give defaults.
    """
    root = args.real_data if source else args.data_path
    with naming_real_data(args):
        cache = latents_settings(root, images=not args.video) if root else None
    saved = start.config["data"]
    owner = "the latent cache" if cache else "the checkpoint"
    defaults = cache or saved
    places = {}
    if cache:
        places[f"--real-data {root}" if source else f"--data-path {root}"] = cache
    if source:
        owner = f"--data-path {args.data_path}"
        defaults = source.made
        places[owner] = source.made
    for place, made in places.items():
        check_made(args, start, place, made)
    if cache and not (args.no_flip or cache["flips"]):
        say("note: the cache was made without --with-flips, so no clip is mirrored")
        args = args.resolve(no_flip=True)
    vae = load_vae(args.vae, defaults.get("vae"), owner)  # a cache needs it for samples
    for place, made in places.items():
        check_same(vae, made.get("vae_sha256"), place)
    if cache:
        for name in ("channels", "downsample", "scale", "shift"):
            if getattr(vae, name) != cache[name]:
                raise UserError(
                    f"--data-path {root}: its VAE differs from {vae.name}; pass its own VAE with "
                    "--vae"
                )
    check_same(vae, saved.get("vae_sha256"), start.origin)
    image_size = args.image_size or defaults.get("image_size", 256)
    if not image_size:  # published models record None
        image_size = start.config["model"]["input_size"] * vae.downsample
    return args.resolve(vae=vae.name, image_size=image_size), vae


def check_made(args, start, place, made):
    """Raise UserError unless latents or samples, at `place`, fit the flags and the checkpoint.

    made: their size and VAE.
    """
    if args.image_size not in (None, made["image_size"]):
        raise UserError(
            f"--image-size {args.image_size}: {place} has {made['image_size']}; remove the flag"
        )
    saved = start.config["data"]
    if saved.get("image_size", made["image_size"]) not in (None, made["image_size"]):
        raise UserError(
            f"{place}: has frames of {made['image_size']} px, {start.origin} has "
            f"{saved['image_size']} px; expected the same"
        )
    if surely_differ(made.get("vae"), saved.get("vae")):
        raise UserError(
            f"{place}: made with the VAE {made.get('vae')}, {start.origin} with {saved['vae']}; "
            "pass the videos, or a cache of that VAE"
        )


def with_attention(config, args, start, lengths):
    """The EqMConfig with the fields that say which patches see each other. Raises ValueError.

    No weight depends on them, so a checkpoint may have others.
    """
    if not args.causal:
        return replace(config, causal=False, context=None)
    usual = start.config["model"].get("context") or 0
    if not start.resumes:
        # the last patch of a clip sees all others; one more would be new to the model in sampling
        patch = config.temporal_patch_size
        others = (math.ceil(max(lengths) / patch) - 1) * patch
        usual = max(usual, others, patch)
    return replace(config, causal=True, context=args.context or usual)


def make_config(args, vae, start, lengths):
    """The EqMConfig of this run without its classes, from the flags or from a checkpoint that
    agrees with them. lengths: of the training clips, in frames.
    """
    model = args.model or USUAL_NAME
    unit = vae.downsample
    if not start.state:  # with a checkpoint, its input size is compared below
        unit *= model_shape(model)["patch_size"]
    if args.image_size % unit:
        near = args.image_size // unit * unit or unit
        raise UserError(
            f"--image-size {args.image_size}: not a multiple of {unit} (VAE and patch); use {near}"
        )
    flags = {*models.FLAGS, "num_classes"} - {"causal", "context"}
    names = sorted(name for name in flags if getattr(args, name) is not None)
    settings = {name: getattr(args, name) for name in ("num_frames", "use_rope", *names)}
    settings["input_size"] = args.image_size // vae.downsample
    settings["in_channels"] = vae.channels
    try:
        if start.state is None:
            name_in_error = model
            config = model_config(model, **settings)
        else:
            name_in_error = start.path
            if args.new_classes and not start.resumes:
                settings.pop("num_classes", None)
            asked = model_shape(args.model) | settings  # no shape without --model
            saved = checkpoint.config_of(start.origin, start.state, video=args.video, **asked)
            config = replace(saved, num_frames=args.num_frames)
        config = with_attention(config, args, start, lengths)
        for num_frames in (*lengths, *args.val_frames):
            config.check_num_frames(num_frames)
    except ValueError as error:
        typed = args.typed & {*names, "causal", "context", "image_size", "val_frames"}
        flags = " ".join(flag_text(args, name) for name in sorted(typed))
        length = f"{frames_flag(args)} {args.num_frames}"
        raise UserError(f"{flags} {length} model {name_in_error}: {error}".strip()) from error
    config.warn_if_narrow()
    return config


def resolve_settings(args, start, config, lengths):
    """Flags with the values that depend on the checkpoint, the model and the machine.

    Raises UserError.
    """
    trained = start.config["training"]
    sampler = trained
    if args.pairs and not trained.get("teacher"):
        sampler = trained | plans.STUDENT_SAMPLER
    has_energy = config.ebm != "none"
    weight_decay = args.weight_decay
    if weight_decay is None:
        weight_decay = start.resumed_flag("weight_decay")
    if weight_decay is None:
        weight_decay = MUON_DECAY if args.optimizer == "muon" else 0.0
    if args.shard and world_size() == 1:
        say("note: --shard: with one rank, nothing is sharded")
    if start.resumes:  # where the phase started, only as a record
        args = args.resolve(ckpt=start.resumed_flag("ckpt"), inflate=start.resumed_flag("inflate"))
    args = args.resolve(
        start_sha256=start.sha256 or start.resumed_flag("start_sha256"),
        shard=args.shard and world_size() > 1,
        model=args.model or trained.get("model", USUAL_NAME),
        precision=cli.resolve_precision(
            args.precision, has_energy, start.resumed_flag("precision")
        ),
        weight_decay=weight_decay,
        **plans.resolve_sampler(args, sampler, config.learns),
    )
    if args.compile and has_energy:
        raise UserError(f"--compile: no second derivative for --ebm {config.ebm}; use --no-compile")
    if args.grad_checkpoint == "selective" and has_energy:
        raise UserError(
            f"--grad-checkpoint {args.grad_checkpoint}: no second derivative for --ebm "
            f"{config.ebm}; use full, or remove the flag"
        )
    for name, skill in (("forcing", "given frames"), ("forcing_regions", "how to heal regions")):
        before = 0 if start.resumes else trained.get(name)
        if before and not getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            say(
                f"note: --ckpt was trained with {flag} {before}, this phase is not, so it may "
                f"forget {skill}"
            )
        shortest = min(lengths)
        if getattr(args, name) and shortest <= config.temporal_patch_size:
            say(
                f"note: {flag_text(args, name)}: clips of {plural(shortest, 'frame')} are one "
                "patch long, so not forced"
            )
    if args.forcing_regions and not config.learns.has_equilibria:
        raise UserError(
            f"--forcing-regions {args.forcing_regions}: needs --objective eqm, not "
            f"{config.objective}; remove it"
        )
    return args


def open_all_data(args, start, source, lengths):
    """The Data of train.py; source: of --pairs, or None. Raises UserError."""
    settings = {"lengths": lengths, "val_lengths": args.val_frames, "flag": frames_flag(args)}
    if source is None:
        return open_data(args, start, args.data_path, **settings)
    data = find_data(source, args.val_fraction, **settings)
    if not args.real_data:
        return data
    with naming_real_data(args):
        real = open_data(args, start, args.real_data, **settings)
    if real.scan.classes != data.scan.classes:
        raise UserError(
            f"--real-data {args.real_data}: has the classes {name_some(real.scan.classes)}, "
            f"--data-path {args.data_path} has {name_some(data.scan.classes)}; expected the same"
        )
    if real.source.has_latents != source.has_latents:
        advice = "sample again with --save-latents"
        if source.has_latents:
            advice = "name a latent cache of these videos, see EqM/cache_latents.py"
        raise UserError(
            f"--real-data {args.real_data}: only one of it and --data-path {args.data_path} holds "
            f"latents; expected both or none; {advice}"
        )
    return replace(data, real=real)


def open_data(args, start, root, lengths, val_lengths, flag):
    """The Data of the folder `root`, as in `find_data`.

    With --cache-frames, its source caches pixels. Raises UserError.
    """
    source = open_source(root, args.image_size, not args.video, args.results_dir)
    corrupt = CorruptVideos(source.scan, args.max_bad_fraction, start.bad_videos)
    corrupt.add(source.scan.unreadable)  # raises UserError if there are too many
    data = find_data(source, args.val_fraction, lengths, val_lengths, flag)
    if args.cache_frames:
        data = replace(data, source=CachedFiles(source, args.results_dir))
    return data


def only_phase(args, start, data):
    """The only phase of a run without --frames-schedule.

    It ends at --max-steps or --epochs, whichever comes first. Raises UserError.
    """
    last_step = args.max_steps or math.inf
    if args.epochs or not args.max_steps:
        clips = (args.epochs or USUAL_EPOCHS) * len(data.train[args.num_frames])
        if args.real_data:  # which takes part of each batch
            clips = math.ceil(clips / args.pairs_share)
        # a resumed run may have another batch size than before
        left = math.ceil((clips - start.progress.position) / args.global_batch_size)
        # If videos were removed, the same --epochs end earlier: the resumed run is then finished,
        # which is no error
        if left < 0 and args.epochs not in (None, start.resumed_flag("epochs")):
            raise UserError(
                f"--epochs {args.epochs}: {plural(clips, 'clip')}, but the checkpoint has trained "
                f"on {start.progress.position} in this phase; give more"
            )
        last_step = min(last_step, start.progress.step + max(left, 0))
    return Phase(args.num_frames, last_step, args.global_batch_size)


def fit_classes(args, config, start, classes):
    """The config with the classes of the data. Raises UserError if the checkpoint has others."""
    before = start.config["data"].get("classes", classes)
    usual = config.num_classes if start.state and before == classes else len(classes)
    num_classes = args.num_classes or usual
    if num_classes < len(classes):
        raise UserError(
            f"--num-classes {args.num_classes}: expected at least the {len(classes)} of --data-path"
        )
    if args.new_classes and not start.resumes:
        known = len(set(before) & set(classes))
        say(
            f"--new-classes: {start.path} has {known} of your {plural(len(classes), 'class')}; "
            "others start from the embedding of 'no class'"
        )
    elif start.state is not None:
        # A published model only numbers its classes, so it takes the names of the data. With
        # --inflate, the data differ from those of the image model, so classes are compared.
        numbers = [str(label) for label in range(len(before))]
        is_unnamed = not start.inflates and is_published(start.config) and before == numbers
        if before != classes and not is_unnamed:
            advice = "add --new-classes to train on these"
            if start.resumes:
                advice = "pass its data, or remove --resume"
            raise UserError(
                f"--data-path {args.data_path}: has the classes {name_some(classes)}, "
                f"{start.origin} has {name_some(before)}; {advice}"
            )
        checkpoint.check(start.origin, config, num_classes=num_classes)
    return replace(config, num_classes=num_classes)


def fit_actions(args, config, start, source):
    """The config with the actions of the videos, which the source then knows, too.

    Raises UserError if they don't fit the flags, or if the checkpoint has others.
    """
    if source.has_samples:
        source.actions = source.open_actions(config.action_names)
    elif args.video:
        source.actions = open_actions(source.root, source.videos())
    names = source.actions.names if source.actions else []
    prefix = f"--data-path {args.data_path}"
    if start.state is not None and config.action_names != names:
        raise UserError(
            f"{prefix}: has {describe_actions(names)}, {start.origin} has "
            f"{describe_actions(config.action_names)}; pass data with the same actions, or start "
            "from scratch"
        )
    if not names:
        return config
    if args.pairs and args.real_data:
        raise UserError(
            f"--pairs: {describe_actions(names)} of --real-data {args.real_data} do not apply to "
            "samples; remove one of the two"
        )
    has = f"{prefix} has actions, which belong to frames"
    if config.temporal_patch_size != 1:
        raise UserError(
            f"{has}; expected temporal patches of 1 frame, got {config.temporal_patch_size}; add "
            "--temporal-patch-size 1"
        )
    if args.frame_interval[-1] > 1:
        raise UserError(
            f"{flag_text(args, 'frame_interval')}: {has}, so no frame may be skipped; remove it"
        )
    if source.actions.mirrored is None and not args.no_flip:
        raise UserError(
            f"{prefix}: its actions have no mirror rule, so clips can't be mirrored; add "
            f'--no-flip, or "mirror" to {ACTIONS_FILE}'
        )
    return replace(config, actions=",".join(names))


def describe_actions(names):
    return f"the actions {', '.join(names)}" if names else "no actions"


def with_new_classes(state, classes, num_classes):
    """The dict of a checkpoint with other classes, for --new-classes.

    The optimizer starts from scratch.
    """
    before = state["config"]["data"]["classes"]
    table = "y_embedder.embedding_table.weight"
    # rows of the old table; -1, its last row, is for no class, and for classes that are new
    rows = [-1] * (num_classes + 1)
    for label, name in enumerate(classes):
        if name in before:
            rows[label] = before.index(name)
    state = state | {"optimizer": None}
    for part in ("model", "ema"):
        state[part] = state[part] | {table: state[part][table][rows]}
    return state


# Sampling -----------------------------------------------------------------------------------------


def resolve_sampling(args):
    """[(flags, Plan)] of sample_gd.py: one per value of --num-frames, each with its own folder.

    Raises UserError.
    """
    cli.check_devices()
    cli.check_speed_flags(args)
    for name in ("num_frames", "fps", "time_scale", "given"):
        if not args.video and getattr(args, name) not in (None, [1]):
            raise UserError(f"{flag_text(args, name)}: needs videos; add --video, or remove it")
    given.check_flags(args)
    if args.init_gamma is None:
        args = args.resolve(init_gamma=0.0 if args.init is None else 0.5)
    lengths = list(dict.fromkeys(args.num_frames or [None]))
    flags_of_runs = []
    for num_frames in lengths:
        folder = args.folder
        if len(lengths) > 1:
            folder = f"{os.path.normpath(args.folder)}-f{num_frames}"
        flags = args.resolve(num_frames=num_frames, folder=folder)
        samples.check_folder(flags)
        given.check_clips(flags)
        flags_of_runs.append(flags)
    runs = []
    for flags in flags_of_runs:  # loading a model takes long, so it comes after all that needs none
        values, plan = plans.open_checkpoint(flags)
        flags = flags.resolve(**values)
        plans.say_plan(flags, plan)
        check_plan(flags, plan)
        runs.append((flags, plan))
    check_overlap(args, [plan for _, plan in runs])
    return runs


def check_overlap(args, all_plans):
    """Raise UserError for an overlap where none of the Plans has several windows."""
    if args.overlap is not None and all(len(plan.window_starts) == 1 for plan in all_plans):
        raise UserError(
            f"--overlap {args.overlap}: applies to several windows, but the "
            f"{all_plans[0].num_frames} frames are made in one; add --window, or remove it"
        )


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
    if args.save_latents and plan.vae.name == "none":
        say(f"note: --save-latents: {args.ckpt} works on pixels, which samples.npz has")
    for name in ("init", "report_energy", "save_latents"):
        if getattr(args, name) and len(plan.window_starts) > 1:
            raise UserError(
                f"{flag_text(args, name)}: the {plan.num_frames} frames are made in windows of "
                f"{plan.window}; remove it, or add --window {plan.num_frames}"
            )


# Training a VAE -----------------------------------------------------------------------------------


def check_vae_run(args):
    """(flags, Start, Data) of a run of train_vae.py with these flags.

    Only rank 0 knows the Data. Raises UserError.
    """
    cli.check_devices()
    check_job()
    optim.check_flags(args)
    num_levels = int(math.log2(args.downsample)) + 1
    args = args.resolve(widths=args.widths or [16, 32, 64, 128][:num_levels])
    if args.image_size % args.downsample:
        raise UserError(
            f"--image-size {args.image_size}: not a multiple of --downsample {args.downsample}"
        )
    if len(args.widths) != num_levels:
        raise UserError(
            f"{flag_text(args, 'widths')}: expected {num_levels} numbers for --downsample "
            f"{args.downsample}"
        )
    if args.global_batch_size % world_size():
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: not a multiple of "
            f"{plural(world_size(), 'rank')}"
        )
    cli.check_writable("--results-dir", args.results_dir)
    check_data_path(args.data_path, cached=False)
    # `read_file`, as `load` expects the content of train.py's checkpoints
    start = checkpoint.find_resumed(args, vae_run_name(args), read=checkpoint.read_file)
    args = args.resolve(
        precision=cli.resolve_precision(
            args.precision, energy=False, kept=start.resumed_flag("precision")
        )
    )
    data = None
    if rank() == 0:
        data = open_data(
            args, start, args.data_path, lengths=[1], val_lengths=[], flag="--data-path"
        )
    return args, start, data


def vae_run_name(args):
    widths = "-".join(map(str, args.widths))
    return f"VAE-{args.image_size}px-f{args.downsample}-c{args.latent_channels}-{widths}"

"""Train Equilibrium Matching on videos, or without --video on images.

A first phase on 4 frames, then one that goes on with 8; steps are counted over all phases:

    torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 4 --use-rope --model "EqM-S/4" \
        --data-path datasets/ucf-101 --results-dir results/EXP --max-steps 50000
    torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 8 --use-rope --model "EqM-S/4" \
        --data-path datasets/ucf-101 --results-dir results/EXP --max-steps 100000 --global-batch-size 128 \
        --ckpt results/EXP/*/checkpoints/0050000.pt
"""

import functools
import io
import json
import math
import os
import statistics
import time
from collections import Counter
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import samplers
import transport
from checkpoint_parts import Progress, trained_time_scale
from models import EBMS, NAMES, EqM, EqMConfig, model_config
from runtime import distributed, runs, signals
from runtime.distributed import (
    COUNT,
    NATURAL,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    normal,
    rank,
    say,
    uniform,
    world_size,
)
from runtime.metrics import Metrics, Window, import_wandb
from runtime.signals import Interrupted, LoaderWatch, StopSignal
from runtime.untrusted import is_text
from schedule import Phase, current_phase, fill_batches, parse_schedule
from vae import load_vae
from video.index import (
    BadVideos,
    Batches,
    Clips,
    ClipsByFrames,
    Scan,
    batches_of,
    check_data_path,
    collate,
    latents_settings,
    long_enough,
    save_index,
    scan_videos,
    split_videos,
)
from video.writers import tile, write_gif, write_mp4, write_sheet

VAL_CHUNK = 8  # clips that are validated together; fixed, so that the sums do not depend on the ranks
MOST = {"num_workers": 1024, "global_batch_size": 2**20, "num_samples": 4096}  # more would fill any machine
KINDS = "training ", "validation "  # of videos
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def parse_args():
    parser = ArgumentParser(description="Train Equilibrium Matching on videos, or without --video on images.")
    add_model_and_data_flags(parser)
    add_optimisation_flags(parser)
    add = distributed.add_speed_flags(parser)
    add("--grad-checkpoint", action="store_true", help="compute activations twice instead of keeping them; off = keep")
    add = parser.add_argument_group("run").add_argument
    add("--results-dir", default="results", metavar="DIR", help="the run folder is made in here")
    start = "start a new phase from this checkpoint, exported folder or published image model; none = from scratch"
    add("--ckpt", metavar="FILE", help=start)
    resume = "go on with the newest run of this model, frames and positions, if there is one; off = start a new one"
    add("--resume", action="store_true", help=resume)
    add("--log-every", type=COUNT, default=100, metavar="N", help="steps")
    add("--ckpt-every", type=COUNT, default=50_000, metavar="N", help="steps; the last step always saves")
    keep = "numbered checkpoints that stay, the last ones; best.pt always does; none = all stay"
    add("--keep-last", type=COUNT, metavar="N", help=keep)
    add("--val-every", type=COUNT, default=2_500, metavar="N", help="steps; the last step always validates")
    lengths = "frames of the clips that validate; their own number always does; none = only that"
    add("--val-frames", type=COUNT, nargs="+", default=[], metavar="N", help=lengths)
    add("--val-clips", type=COUNT, default=256, metavar="N", help="clips that validate, at most 4 per video")
    add("--sample-every", type=NATURAL, default=10_000, metavar="N", help="steps; 0 = off")
    add("--num-samples", type=COUNT, default=8, metavar="N", help="clips sampled while training")
    add("--wandb", action="store_true", help="log to Weights & Biases, too")
    distributed.add_sampling_flags(parser)
    return parser.parse_args()


def add_model_and_data_flags(parser):
    add = parser.add_argument_group("model").add_argument
    add("--video", action="store_true", help="train on videos; off = on images")
    add("--model", choices=NAMES, metavar="NAME", help="EqM-S/4 ...; none = that of --ckpt, else EqM-S/4")
    add("--depth", type=COUNT, metavar="N", help="blocks; none = those of --model")
    add("--hidden-size", type=COUNT, metavar="N", help="width; none = that of --model")
    add("--num-heads", type=COUNT, metavar="N", help="attention heads; none = those of --model")
    add("--num-frames", type=COUNT, metavar="N", help="frames per clip; none = 16, images have 1")
    schedule = "4:20000:256,8:30000:128: frames, global step of the end, batch (none = as many tokens); off = one phase"
    add("--frames-schedule", type=parse_schedule, metavar="F:STEP[:BATCH],...", help=schedule)
    mix = "share of the steps of a schedule's later phases with the frames of an earlier one; 0 = off"
    add("--mix", type=SHARE, default=0.0, metavar="P", help=mix)
    add("--use-rope", action="store_true", help="3D rotary positions, for any number of frames; off = fixed positions")
    patch = "frames per patch; none = like the spatial patch, images have 1"
    add("--temporal-patch-size", type=COUNT, metavar="N", help=patch)
    add("--rope-theta", type=POSITIVE, metavar="X", help="base of the frequencies; none = 10000")
    split = "channels of a head for time, height and width, such as 16,8,8; none = as many for each"
    add("--rope-split", metavar="T,H,W", help=split)
    add("--qk-norm", action="store_true", default=None, help="normalise queries and keys; none = off")
    energy = "energy that the field descends (EqM-E); not given = that of --ckpt, else none"
    add("--ebm", choices=EBMS, help=energy)
    add("--num-classes", type=COUNT, metavar="N", help="none = the class folders found")

    add = parser.add_argument_group("data").add_argument
    add("--data-path", required=True, metavar="DIR", help="holds <class>/<video or image>; or a latent cache")
    add("--image-size", type=COUNT, metavar="PX", help="height and width; not given = that of the cache, else 256")
    vae = "ema, mse or a directory of an AutoencoderKL, none = pixels; not given = that of the cache, else ema"
    add("--vae", metavar="VAE", help=vae)
    add("--frame-interval", type=COUNT, nargs="+", default=[1], metavar="N", help="between frames; two: drawn per clip")
    add("--no-flip", action="store_true", help="never mirror a clip (for classes that have a left and a right)")
    add("--val-fraction", type=SHARE, default=0.05, metavar="F", help="of the videos, where no split files are found")
    add("--max-bad-fraction", type=SHARE, default=0.01, metavar="F", help="of the videos that may be broken")
    workers = min(4, os.cpu_count())
    add("--num-workers", type=NATURAL, default=workers, metavar="N", help="loader processes per rank; 0 = none")
    hang = "seconds a batch of the loader processes may take before the run ends; 0 = any number"
    add("--loader-timeout", type=NON_NEGATIVE, default=600.0, metavar="S", help=hang)


def add_optimisation_flags(parser):
    add = parser.add_argument_group("optimisation").add_argument
    add("--max-steps", type=COUNT, metavar="N", help="global step to end at, over all phases; none = see --epochs")
    add("--epochs", type=COUNT, metavar="N", help="epochs of this phase; none = 1400 if no --max-steps")
    add("--global-batch-size", type=COUNT, default=256, metavar="N", help="clips per step, over all ranks")
    add("--grad-accum", type=COUNT, default=1, metavar="N", help="micro-batches per step; 1 = off")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon is for the blocks' matrices only")
    add("--lr", type=POSITIVE, default=1e-4, metavar="X", help="learning rate of AdamW")
    add("--muon-lr", type=POSITIVE, default=0.01, metavar="X", help="learning rate of Muon")
    add("--lr-decay", type=SHARE, default=0.0, metavar="F", help="share of the global steps that decays to 0; 0 = off")
    add("--warmup-steps", type=NATURAL, default=0, metavar="N", help="global steps up to the full rate; 0 = off")
    rewarmup = "steps up to the full rate after the start of a phase from a checkpoint or in a schedule; 0 = off"
    add("--rewarmup", type=NATURAL, default=0, metavar="N", help=rewarmup)
    add("--weight-decay", type=NON_NEGATIVE, default=0.0, metavar="X", help="0 = off")
    add("--clip-grad", type=NON_NEGATIVE, default=1.0, metavar="X", help="largest norm of the gradient; 0 = off")
    nonfinite = "steps in a row that may be left out for a gradient that is not finite; 0 = off, the first ends the run"
    add("--skip-nonfinite", type=NATURAL, default=0, metavar="N", help=nonfinite)
    add("--ema-decay", type=SHARE, default=0.9999, metavar="X", help="of the averaged weights; less at first")
    add("--gamma-shift", type=POSITIVE, default=1.0, metavar="S", help="above 1 trains nearer to noise; 1 = uniform")
    add("--disp", action="store_true", help="add the dispersive loss of the last activations; off = do not")
    add("--global-seed", type=NATURAL, default=0, metavar="N", help="decides every random draw")


# ----------------------------------------------------------------------------------------------------------------------
# Before anything is touched: what can be wrong


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system; settle those of images."""
    if not args.video:
        for name in ("num_frames", "temporal_patch_size", "frame_interval"):
            if (value := getattr(args, name)) not in (None, 1, [1]):
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag} without --video: images have one frame; add --video or leave it out")
        args.num_frames = args.temporal_patch_size = 1
    for name in ("rope_theta", "rope_split"):
        if (value := getattr(args, name)) is not None and not args.use_rope:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag} is of rotary positions: add --use-rope, or leave it out")
    if args.frames_schedule:
        settle_schedule(args)
    elif args.mix:
        raise UserError(f"--mix {args.mix} is of the earlier phases of --frames-schedule: give that, or leave it out")
    args.num_frames = args.num_frames or 16
    distributed.check_devices()
    signals.check_job()
    distributed.check_speed_flags(args)
    distributed.check_sampling_flags(args)
    if args.skip_nonfinite and args.precision == "fp16":
        raise UserError("--skip-nonfinite: --precision fp16 leaves out steps that overflow by itself: leave it out")
    if len(args.frame_interval) > 2 or args.frame_interval[0] > args.frame_interval[-1]:
        found = " ".join(map(str, args.frame_interval))
        raise UserError(f"--frame-interval {found}: wanted one number, or two of which the second is not smaller")
    for name, most in MOST.items():
        if (value := getattr(args, name)) > most:
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted at most {most}")
    if args.ckpt == "":
        raise UserError("--ckpt '': an empty name; name a checkpoint, or leave the flag out to start from scratch")
    parts = world_size() * args.grad_accum
    if args.global_batch_size % parts and not args.frames_schedule:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of {world_size()} ranks x "
            f"--grad-accum {args.grad_accum}: take one of {parts}"
        )
    if args.disp and args.global_batch_size == parts:
        raise UserError(f"--disp compares clips, --global-batch-size {parts} leaves each rank one at a time: raise it")
    check_writable("--results-dir", args.results_dir)
    if not is_text(args.results_dir):
        raise UserError(f"--results-dir {args.results_dir}: is no UTF-8, which TensorBoard can't take; name another")
    if args.wandb:
        import_wandb()


def settle_schedule(args):
    """--num-frames and --max-steps are those of the schedule: of its first phase, and of its last."""
    if not args.video:
        raise UserError("--frames-schedule without --video: images have one frame; add --video or leave it out")
    for name in ("num_frames", "max_steps", "epochs"):
        if (value := getattr(args, name)) is not None:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag} beside --frames-schedule, which says that for each phase: leave one of them out")
    args.num_frames, args.max_steps = args.frames_schedule[0].num_frames, args.frames_schedule[-1].last_step


def plan_phases(args, config):
    """The phases of --frames-schedule with their batches; of a run without one, nothing. Raises UserError."""
    if not args.frames_schedule:
        return []
    for phase in args.frames_schedule:
        check_frames(config, "--frames-schedule", phase.num_frames)

    def tokens(num_frames):
        return math.prod(config.grid(num_frames))

    return fill_batches(args.frames_schedule, args.global_batch_size, tokens, world_size() * args.grad_accum)


@dataclass(frozen=True)
class Data:
    """What rank 0 found in --data-path, all that the other ranks need; an image is a video of one frame.

    The videos with enough frames for a clip, by number of frames.
    """

    scan: Scan
    train: dict
    val: dict
    num_short: int  # videos left out of the longest clips


def find_data(args, phases, index_folder):
    """Open every video once (or read the index) and split them; for one rank only."""
    scan = scan_videos(args.data_path, index_folder, images=not args.video)
    parts = split_videos(args.data_path, scan.videos, args.val_fraction)
    flag, lengths = "--num-frames", {args.num_frames}
    if phases:
        flag, lengths = "--frames-schedule", {phase.num_frames for phase in phases}
    kept = [{n: long_enough(part, n, kind, flag) for n in lengths} for part, kind in zip(parts, KINDS, strict=True)]
    num_short = sum(lists[max(lengths)][1] for lists in kept)
    train, val = ({n: videos for n, (videos, _) in lists.items()} for lists in kept)
    val |= {n: long_enough(parts[1], n, KINDS[1], "--val-frames")[0] for n in args.val_frames}
    return Data(scan, train, dict(sorted(val.items())), num_short)


def load_latents_vae(args):
    """The VAE of --vae or, for a latent cache, of the cache; settles --vae, --image-size and --no-flip."""
    cache = latents_settings(args.data_path, images=not args.video)
    if cache is None:
        args.vae, args.image_size = args.vae or "ema", args.image_size or 256
        return load_vae(args.vae)
    if args.image_size not in (None, cache["image_size"]):
        found = cache["image_size"]
        raise UserError(f"--image-size {args.image_size}: the cache --data-path has {found}: leave it out")
    if args.vae not in (None, cache["vae"]) and not os.path.isdir(args.vae):
        raise UserError(f"--vae {args.vae}: the cache --data-path was made with {cache['vae']}: leave it out")
    args.vae, args.image_size = args.vae or cache["vae"], cache["image_size"]
    vae = load_vae(args.vae)  # samples are decoded with it
    for name in ("channels", "downsample", "scale", "shift"):
        if getattr(vae, name) != cache[name]:
            raise UserError(
                f"--vae {args.vae}: has {name} {getattr(vae, name)}, the cache --data-path, made with {cache['vae']}, "
                f"{cache[name]}: name a place of that VAE"
            )
    if not (args.no_flip or cache["flips"]):
        say("note: the cache has no mirrored latents (--with-flips), so no clip is mirrored")
        args.no_flip = True
    return vae


def make_config(args, vae, start):
    """The EqMConfig of this run, its classes apart: from the flags, or from a checkpoint that they agree with."""
    cell = vae.downsample * int(args.model.split("/")[1]) if args.model else vae.downsample
    if args.image_size % cell:
        raise UserError(f"--image-size {args.image_size} is not a multiple of {cell} (VAE's downsampling x patch)")
    settings = {
        "input_size": args.image_size // vae.downsample,
        "in_channels": vae.channels,
        "num_frames": args.num_frames,
        "use_rope": args.use_rope,
    }
    optional = ("depth", "hidden_size", "num_heads", "temporal_patch_size")
    optional += ("rope_theta", "rope_split", "qk_norm", "ebm")
    settings |= {name: getattr(args, name) for name in (*optional, "num_classes") if getattr(args, name) is not None}
    try:
        if start.state is None:
            config = model_config(args.model, **settings)
        else:
            checkpoint.check_kind(start.path, start.state, args.video)
            saved = checkpoint.config_of(start.path, start.state)
            checkpoint.check(start.path, saved, **(checkpoint.shape_of(args.model) | settings))
            config = replace(saved, num_frames=args.num_frames)
        config.check_num_frames(args.num_frames)
        for frames in args.val_frames:
            check_frames(config, "--val-frames", frames)
        if args.compile and config.ebm != "none":
            raise UserError(f"--compile can't train --ebm {config.ebm}: it has no second derivative; leave it out")
    except ValueError as error:
        asked = f"{'--frames-schedule' if args.frames_schedule else '--num-frames'} {args.num_frames}"
        if str(error).startswith("rope_split"):
            asked = f"--rope-split {args.rope_split}"
        raise UserError(f"{asked}, model {args.model or start.path}: {error}") from error
    return config


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
    if start.state is not None:
        checkpoint.check(start.path, config, num_classes=num_classes)
        before = start.state["config"]["data"]["classes"]
        if before != classes:
            say(f"note: the classes were {', '.join(before[:3])} ...; now they are {', '.join(classes[:3])} ...")
    return replace(config, num_classes=num_classes)


def run_name(args):
    """EqM-S-4-f4-rope, with a schedule EqM-S-4-f4-8-16-rope; a pattern if the model is not known yet."""
    frames = [phase.num_frames for phase in args.frames_schedule or []] or [args.num_frames]
    positions = "-rope" if args.use_rope else ""
    return f"{args.model or 'EqM-*'}-f{'-'.join(map(str, frames))}{positions}".replace("/", "-")


def describe(args, config, phase, data, vae):
    """The `config` of the checkpoint: plain values that say all about how it was trained."""
    fps = statistics.median(video.fps for video in data.train[phase.num_frames])
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if args.frames_schedule:
        flags["frames_schedule"] = ",".join(map(str, args.frames_schedule))
    return {
        "model": asdict(config) | {"num_frames": phase.num_frames},
        "data": {
            "vae": vae.place,
            "image_size": args.image_size,
            "fps": fps,
            "frame_interval": args.frame_interval,
            "classes": data.scan.classes,
        },
        "training": flags | {"num_frames": phase.num_frames, "global_batch_size": phase.batch_size},
    }


# ----------------------------------------------------------------------------------------------------------------------
# The story


def main():
    args = parse_args()
    try:
        check_flags(args)
        check_data_path(args.data_path, images=not args.video)
        vae = load_latents_vae(args)
        start = runs.find_start(args, run_name(args))
        args.model = args.model or (None if start.state else "EqM-S/4")
        config, data = make_config(args, vae, start), None
        phases = plan_phases(args, config)
        args.model = args.model or start.state["config"]["training"]["model"]
        if rank() == 0:  # the others wait for it in start()
            data = find_data(args, phases, start.folder)
            config = fit_classes(args, config, start, data.scan.classes)
    except UserError as error:
        fail(error)
    device = distributed.start()
    with signals.one_line_errors():
        data, config = distributed.broadcast((data, config))
        check_alike(start)
        phases = phases or [only_phase(args, start.progress, data)]
        if start.progress.step >= phases[-1].last_step and not start.window:
            name_checkpoint(args, start, phases)
            say(f"{start.folder} is finished: it has its {start.progress.step} steps")
        else:
            train(set_up(args, device, config, data, vae, start, phases))
    distributed.stop()


def only_phase(args, progress, data):
    num_videos = len(data.train[args.num_frames])
    last_step = progress.last_step(args.max_steps, args.epochs, num_videos, args.global_batch_size)
    return Phase(args.num_frames, last_step, args.global_batch_size)


def check_alike(start):
    """Raise UserError unless all ranks start from the same checkpoint, and in the same folder."""
    starts = set(distributed.gather((str(start.path), start.progress.step, str(start.folder))))
    if len(starts) > 1:
        found = ", ".join(f"{path} (step {step})" for path, step, _ in sorted(starts))
        raise UserError(
            f"the ranks start from different checkpoints, {found}: if an earlier run was still saving, start again; "
            "else all machines need the same files"
        )


@dataclass
class Run:
    """All there is while training; the functions below take from it what they need."""

    args: object
    device: torch.device
    config: EqMConfig
    data: Data
    vae: object
    model: EqM
    network: torch.nn.Module  # the model, or DDP around it
    ema: EqM
    optimizers: list
    scaler: torch.amp.GradScaler  # does nothing unless --precision is fp16
    progress: Progress
    phases: list
    folder: Path
    metrics: Metrics
    bad_videos: BadVideos
    window: Window
    stop: StopSignal
    since: float = field(default_factory=time.monotonic)  # until then, progress.seconds is complete
    # Of the phase, set by `enter`:
    phase: Phase = None
    described: dict = None  # what checkpoints say of the run
    batches: object = None  # iterator over this rank's micro-batches
    val_loader: object = None  # of this rank's chunks of clips, for all of --val-frames

    @property
    def last_step(self):
        return self.phases[-1].last_step

    def say(self, message):
        say(message, self.folder / "log.txt")


def set_up(args, device, config, data, vae, start, phases):
    """From here on the run folder and the device are in use."""
    torch.manual_seed(args.global_seed)
    distributed.set_precision(args.precision)
    model = EqM(config).to(device)
    ema = deepcopy(model).eval().requires_grad_(False)
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        model.compile_blocks()
        ema.compile_blocks()
    optimizers = make_optimizers(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if start.state is not None:
        load_state(args, start, model, ema, optimizers, scaler)
    folder, progress = start.folder or new_folder(args), start.progress
    if rank() == 0:
        save_index(data.scan, folder)
        name_checkpoint(args, start, phases)
    described = describe(args, config, current_phase(phases, progress.first_step), data, vae)
    logged = progress.step - 1 if start.window else progress.step
    metrics = Metrics(folder, resume_step=logged, wandb=args.wandb, config=described)
    num_videos = len(data.scan.videos) + len(data.scan.unreadable)
    bad_videos = BadVideos(num_videos, args.max_bad_fraction, start.bad_videos)
    run = Run(
        args, device, config, data, vae.to(device), model, distributed.parallel(model), ema, optimizers, scaler,
        progress, phases, folder, metrics, bad_videos, Window(start.window), StopSignal(),
    )  # fmt: skip
    start.state = None  # or it would stay in memory for as long as we train
    tell_start(run, data)
    return run


def new_folder(args):
    """The run folder that rank 0 makes and locks, on all ranks."""
    folder = runs.make_run_folder(args.results_dir, run_name(args)) if rank() == 0 else None
    if folder:
        signals.lock(folder)
    return distributed.broadcast(folder)


def load_state(args, start, model, ema, optimizers, scaler):
    """Fill all that is trained from the checkpoint."""
    state = start.state
    checkpoint.load_weights(start.path, model, state["model"])
    checkpoint.load_weights(start.path, ema, state["ema"])
    if state["optimizer"]:  # exported and published models come without
        checkpoint.load_optimizers(start.path, optimizers, state["optimizer"]["states"])
        if scaler.is_enabled() and state["optimizer"].get("scaler"):  # the last phase may have been in bf16
            scaler.load_state_dict(state["optimizer"]["scaler"])


def tell_start(run, data):
    args, config, frames = run.args, run.config, max(data.train)
    size = sum(parameter.numel() for parameter in run.model.parameters())
    run.say(
        f"{run.folder}: {checkpoint.model_name(**asdict(config))}, {size / 1e6:.1f} M parameters, "
        f"{'rotary' if config.use_rope else 'fixed'} positions; {world_size()} x {run.device.type}, steps "
        f"{run.progress.step} to {run.last_step}"
    )
    run.say(
        f"{len(data.train[frames])} {'videos' if args.video else 'images'} of {len(data.scan.classes)} classes train, "
        f"{len(data.val[frames])} validate; {data.num_short} have fewer than {frames} frames, "
        f"{len(data.scan.unreadable)} can't be opened"
    )
    note_bad(run, data.scan.unreadable)


def enter(run, phase):
    """Begin or go on with a phase."""
    run.phase = phase
    run.described = describe(run.args, run.config, phase, run.data, run.vae)
    run.batches, run.val_loader = make_loaders(run)
    if rank() == 0:
        (run.folder / "config.json").write_text(json.dumps(run.described, indent=2))
    set_learning_rates(run, run.progress.step)  # as the metrics of that step have them
    tokens = math.prod(run.config.grid(phase.num_frames))
    run.say(f"to step {phase.last_step}: {phase.batch_size} clips a step of {phase.num_frames} frames, {tokens} tokens")


def make_loaders(run):
    """(iterator over this rank's micro-batches from where the run stands, loader of its validation chunks)."""
    args, data, phase = run.args, run.data, run.phase
    shared = {"root": args.data_path, "classes": data.scan.classes, "image_size": args.image_size}
    shared["frame_interval"] = args.frame_interval[0], args.frame_interval[-1]
    drawn = {"flip": not args.no_flip, "seed": args.global_seed, "stream": run.progress.first_step}
    fixed = {"flip": False, "seed": 0, "stream": "validation"}
    train = {n: Clips(videos=videos, num_frames=n, **shared, **drawn) for n, videos in data.train.items()}
    lengths = sorted({phase.num_frames, *args.val_frames})
    val = {n: Clips(videos=data.val[n], num_frames=n, **shared, **fixed) for n in lengths}
    chunks = []
    for frames in lengths:
        keys = [(frames, number) for number in range(min(args.val_clips, 4 * len(data.val[frames])))]
        chunks += [keys[first : first + VAL_CHUNK] for first in range(0, len(keys), VAL_CHUNK)]
    frames = frames_of_steps(args, run.phases, phase, run.progress)
    place = rank(), world_size(), args.grad_accum
    numbers = Batches(run.progress.position, len(frames), phase.batch_size, *place)
    batches = ([(frames[n // args.grad_accum], number) for number in batch] for n, batch in enumerate(numbers))
    settings = {"num_workers": args.num_workers, "collate_fn": collate, "pin_memory": run.device.type == "cuda"}
    if args.num_workers:
        start = functools.partial(signals.start_worker, os.getpid())
        settings |= {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": start}
        settings |= {"timeout": args.loader_timeout}
    train, val = (ClipsByFrames(clips, LoaderWatch(args.num_workers)) for clips in (train, val))
    train_loader = DataLoader(train, batch_sampler=batches, **settings)
    val_loader = DataLoader(val, batch_sampler=chunks[rank() :: world_size()], **settings)
    return on_device(batches_of(train_loader), run.device), val_loader  # before anything is sent between the ranks


def frames_of_steps(args, phases, phase, progress):
    """The number of frames of each step that is left of the phase: its own or, for a share --mix of them, an earlier
    phase's; which, follows from the seed and the step."""
    steps = range(progress.step + 1, phase.last_step + 1)
    earlier = [one.num_frames for one in phases if one.last_step <= progress.first_step]
    if not (args.mix and earlier):
        return [phase.num_frames] * len(steps)
    chances = (uniform(args.global_seed, "mix", progress.first_step, [step]).item() / args.mix for step in steps)
    return [earlier[int(chance * len(earlier))] if chance < 1 else phase.num_frames for chance in chances]


def on_device(batches, device):
    """The batches with their clips on the device. A GPU copies them while it still computes the step before."""
    if device.type != "cuda":
        yield from batches
        return
    copies, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    for batch in batches:
        with torch.cuda.stream(copies):
            clips = batch["clips"].to(device, non_blocking=True)
        compute.wait_stream(copies)
        clips.record_stream(compute)  # or its memory could be given away while it is in use
        yield batch | {"clips": clips}


def train(run):
    """Phase by phase, up to the last step or until a signal asks to stop."""
    progress, stopped = run.progress, False
    bar = tqdm(initial=progress.step, total=run.last_step, desc=run.folder.name, unit="step", disable=rank() != 0)
    for phase in run.phases:
        if phase.last_step > progress.first_step and not stopped:
            enter(run, phase)
            stopped = not train_phase(run, bar)
            if not stopped and phase.last_step < run.last_step:
                progress.begin_phase()
    bar.close()
    if stopped:
        save(run, [])
        sender = run.stop.name or "a signal to another rank"
        run.say(f"stopped by {sender} and saved at step {progress.step}: the same command with --resume goes on")
    else:
        run.say(f"done: {run.folder / 'checkpoints'} holds {run.last_step:07d}.pt and best.pt")
    run.metrics.close()


def train_phase(run, bar):
    """The loop: a step, and now and then a look. Returns False if a signal asked to stop."""
    while run.progress.step < run.phase.last_step or len(run.window):
        if len(run.window) and is_time_to_look(run):
            if not look(run, bar):
                return False
        else:
            run.stop.ask()
            step(run)
            bar.update()
            if run.stop.agreed():
                return False
    return True


def is_due(step, last_step, period):
    """Whether something is to be done at a step: every `period` steps, and at the last one of a phase; 0 = never."""
    return step == last_step or (period > 0 and step % period == 0)


def is_time_to_look(run):
    args = run.args
    periods = args.log_every, args.val_every, args.ckpt_every, args.sample_every
    return any(is_due(run.progress.step, run.phase.last_step, period) for period in periods)


def look(run, bar):
    """Log, and where it is time validate, sample and save. Returns False, nothing done, if a signal came before."""
    args, progress, step, videos = run.args, run.progress, run.progress.step, None
    numbers = run.window.summary(step, run.phase.batch_size)
    numbers["train_loss_rel"] = numbers["train_loss"] / transport.zero_loss(numbers.pop("mean_square"))
    bar.set_postfix_str(f"loss {numbers['train_loss']:.3f}, {numbers['clips_per_s']:.1f} clips/s")
    note_bad(run, run.window.bad)
    try:
        if is_due(step, run.phase.last_step, args.val_every):
            began = time.monotonic()
            numbers |= validate(run)
            numbers["val_seconds"] = time.monotonic() - began
        if args.sample_every and step % args.sample_every == 0:
            videos = draw_samples(run)
    except Interrupted:
        return False
    if "val_loss" in numbers:
        run.say(f"step {step}: validation loss {numbers['val_loss']:.4f}")
        if not math.isfinite(numbers["val_loss"]):
            run.say(f"step {step}: note: a validation loss that is not finite is never the best, so best.pt stays")
    if numbers.get("val_loss", math.inf) < progress.best_loss:
        progress.best_loss, progress.best_step = numbers["val_loss"], step
    if videos is not None:
        show_samples(run, videos.numpy())
    # Logged first: what a checkpoint goes on from has to be in the metrics, what comes after it is logged again.
    numbers |= {"lr": run.optimizers[0].param_groups[0]["lr"], "bad_videos": run.bad_videos.count}
    numbers |= {"num_frames": run.phase.num_frames, "seconds": seconds_spent(run), "flops": progress.flops}
    run.metrics.log(step, **numbers)
    run.window = Window()
    if names := checkpoint_names(args, progress, run.phase.last_step):
        save(run, names)
    return True


def seconds_spent(run):
    """On the run so far, interruptions left out."""
    now = time.monotonic()
    run.progress.seconds += now - run.since
    run.since = now
    return run.progress.seconds


def checkpoint_names(args, progress, last_step):
    """What the checkpoint of this step is called beside latest.pt."""
    names = [f"{progress.step:07d}.pt"] if is_due(progress.step, last_step, args.ckpt_every) else []
    return names + (["best.pt"] if progress.best_step == progress.step else [])


def name_checkpoint(args, start, phases):
    """Give the checkpoint that a run goes on from all its names: it may have been killed while it did that."""
    if rank() == 0 and start.goes_on and not start.window:
        last_step = current_phase(phases, start.progress.first_step).last_step
        for name in ["latest.pt", *checkpoint_names(args, start.progress, last_step)]:
            checkpoint.link(start.path, name)


def save(run, names):
    """Write the checkpoint as latest.pt and give it its other names."""
    progress, path = run.progress, run.folder / "checkpoints" / "latest.pt"
    window = run.window.averaged(progress.step) if len(run.window) else None
    note_bad(run, run.window.bad)
    if rank() != 0:
        return
    seconds_spent(run)
    run.metrics.sync()
    state = {
        "version": checkpoint.VERSION,
        "config": run.described,
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict(),
        "optimizer": {
            "kind": run.args.optimizer,
            "states": [optimizer.state_dict() for optimizer in run.optimizers],
            "scaler": run.scaler.state_dict(),
        },
        "step": progress.step,
        "phase": progress.phase(),
        "best_loss": progress.best_loss,
        "run": {"window": window, "bad_videos": list(run.bad_videos.paths)},
    }
    checkpoint.save(path, state)
    for name in names:
        checkpoint.link(path, name)
    if run.args.keep_last:
        runs.keep_last(run.folder, run.args.keep_last, {phase.last_step for phase in run.phases})


def note_bad(run, paths):
    """Name the broken videos that any rank has met, each once; raises UserError, on all ranks, if they are too many."""
    for path in run.bad_videos.add([path for part in distributed.gather(paths) for path in part]):
        run.say(f"step {run.progress.step}: {path} can't be decoded; other clips take its place")


# ----------------------------------------------------------------------------------------------------------------------
# A step


def make_optimizers(args, model):
    """[AdamW], or with --optimizer muon [AdamW, Muon]: Muon for the matrices of attention and MLP."""
    matrices = []
    if args.optimizer == "muon":
        for block in model.blocks:
            matrices += [block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=args.lr, weight_decay=args.weight_decay, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay))
    return optimizers


def rate_factor(args, step, first_step, last_step):
    """The share of the full learning rate that a step of the phase from first_step on has, in a run up to last_step.

    It rises over the first steps of all and, with --rewarmup, of later phases, and falls to zero over the last share.
    """
    factor = min(1, step / max(args.warmup_steps, 1))
    if first_step:
        factor *= min(1, (step - first_step) / max(args.rewarmup, 1))
    if args.lr_decay:
        factor *= min(1, (last_step - step + 1) / (args.lr_decay * last_step))
    return factor


def set_learning_rates(run, step):
    args = run.args
    factor = rate_factor(args, step, run.progress.first_step, run.last_step)
    for optimizer, rate in zip(run.optimizers, (args.lr, args.muon_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def step(run):
    """One step of the run: of the optimizers, of the average and of the books."""
    args, progress = run.args, run.progress
    set_learning_rates(run, progress.step + 1)
    sums, files, num_frames = gradients(run)
    update_weights(run, sums)
    run.window.add(files, **sums)
    progress.step, progress.position = progress.step + 1, progress.position + run.phase.batch_size
    progress.flops += run.phase.batch_size * run.config.training_flops(num_frames, args.grad_checkpoint)
    if progress.skipped > args.skip_nonfinite:
        run.window.complain(progress.step, -1)
    update_ema(run.ema, run.model, ema_decay(args, progress))


def gradients(run):
    """Those of one step, over all micro-batches: ({name: number on the device}, files that were read, num_frames)."""
    args, network, sums, files = run.args, run.network, Counter(), []
    for micro in range(args.grad_accum):
        asked = time.monotonic()
        batch = next(run.batches)
        run.window.waited += time.monotonic() - asked
        run.window.bad += batch["bad"]
        files += batch["videos"]
        is_last = micro == args.grad_accum - 1
        with network.no_sync() if distributed.is_started() and not is_last else nullcontext():
            parts, mean_square = train_losses(run, batch)
            run.scaler.scale(sum(parts.values()) / args.grad_accum).backward()
        for name, value in (parts | {"mean_square": mean_square}).items():
            sums[name] += value.detach() / args.grad_accum
    return sums, files, batch["clips"].shape[-3]


def update_weights(run, sums):
    """Clip and step, unless the gradient is not finite and that is tolerated; adds to the numbers of the step.

    The ranks have the same gradient, so they decide alike. To look at it costs the CPU the lead it has over a GPU,
    hence only in fp16 and where --skip-nonfinite asks for that.
    """
    args, optimizers = run.args, run.optimizers
    for optimizer in optimizers:
        run.scaler.unscale_(optimizer)
    norm = sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad or math.inf)
    skip, by_scaler = False, run.scaler.is_enabled()  # fp16: gradients that overflow are usual, and scaled by less then
    if by_scaler or args.skip_nonfinite:
        skip = not norm.isfinite()
        losses = [value for name, value in sums.items() if name != "grad_norm"]
        tolerated = skip and (not by_scaler or all(value.isfinite() for value in losses))
        sums["skipped"] = torch.tensor(float(tolerated), device=norm.device)
    run.progress.skipped = run.progress.skipped + 1 if skip and not by_scaler else 0
    for optimizer in optimizers:
        if not skip:
            run.scaler.step(optimizer)
        optimizer.zero_grad()
    run.scaler.update()


def train_losses(run, batch):
    """({name: loss} of a micro-batch with drawn gammas and some labels dropped, to be added; E[x^2] of its clips)."""
    args, stream, numbers = run.args, run.progress.first_step, batch["numbers"].tolist()
    gamma = transport.shift_gamma(uniform(args.global_seed, "gamma", stream, numbers), args.gamma_shift)
    dropped = uniform(args.global_seed, "label drop", stream, numbers) < run.config.class_dropout_prob
    labels = torch.where(dropped, run.config.num_classes, batch["labels"])
    x, noise = draw(run, batch, args.global_seed, stream)
    losses, features = clip_losses(run, run.network, x, noise, labels, batch["time_scales"], gamma)
    parts = {"train_loss": losses.mean()}
    if args.disp:
        parts["disp_loss"] = transport.dispersive_loss(features)
    return parts, x.square().mean()


def draw(run, batch, seed, stream):
    """The clips of a batch as latents and their noise, (B, C, T, H, W) each, a function of (seed, stream, number)."""
    vae, clips, numbers = run.vae, batch["clips"].to(run.device, non_blocking=True), batch["numbers"].tolist()
    mean, std = vae.posterior(clips) if clips.dtype == torch.uint8 else clips.float().unbind(1)  # from a cache
    shape = mean.shape[1:]  # (C, T, H, W)
    z = None if std is None else normal(seed, "posterior", stream, numbers, shape, run.device)
    return vae.sample(mean, std, z), normal(seed, "noise", stream, numbers, shape, run.device)


def clip_losses(run, network, x, noise, labels, time_scales, gamma):
    """Losses (B,) and features (B, N, D) of clips x (B, C, T, H, W) with their noise, at their gammas (B,)."""
    labels, time_scales, gamma = (part.to(run.device, non_blocking=True) for part in (labels, time_scales, gamma))
    with samplers.autocast(run.device, run.args.precision):
        x_gamma = transport.interpolate(x, noise, gamma)
        f, features = network(x_gamma, labels, time_scales, return_features=True)
        return transport.loss(f, x, noise, gamma), features


def ema_decay(args, progress):
    """--ema-decay; in the first steps of a fresh model, which is not worth remembering, less."""
    step = progress.step
    return args.ema_decay if progress.pretrained else min(args.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ----------------------------------------------------------------------------------------------------------------------
# Looking at the model


@torch.no_grad()
def validate(run):
    """{name: number}, equal on all ranks, of clips that did not train. Raises Interrupted.

    Clips, noise and gammas (uniform: multiples of the golden ratio) are the same each time, and so is what is
    computed together; so the numbers depend on the weights alone, not on how many ranks share the work.
    """
    rows, bad = [], []
    with suppress(Interrupted):
        for batch in batches_of(run.val_loader):
            run.stop.check()
            bad += batch["bad"]
            gamma = (batch["numbers"].double() * GOLDEN_RATIO % 1).float()
            x, noise = draw(run, batch, seed=0, stream="validation")
            shared = x, noise, batch["labels"], batch["time_scales"], gamma
            losses = [clip_losses(run, network, *shared)[0] for network in (run.ema, run.model)]
            frames = torch.full_like(gamma, batch["clips"].shape[-3])
            columns = frames, batch["numbers"], gamma, *losses, x.square().flatten(1).mean(1)
            rows.append(torch.stack([column.double().cpu() for column in columns], dim=1))
    run.stop.settle()
    note_bad(run, bad)
    rows = torch.cat([row for part in distributed.gather(rows) for row in part])
    rows = torch.tensor(sorted(rows.tolist()), dtype=torch.float64)  # in the order of frames and numbers
    return summarize_validation(rows, run.phase.num_frames)


def summarize_validation(rows, num_frames):
    """{name: number} of float64 rows: frames, number, gamma, loss of the averaged and of the raw weights, E[x^2].

    val_loss is that of the averaged weights at num_frames, val_loss_raw that of the raw ones, val_loss_gamma_0.2 that
    of gammas from 0.2 on (in fifths), val_loss_f8 that of 8 frames; "rel": as a share of a zero predictor's.
    """

    def relative(part):
        _, _, _, loss, _, square = part.mean(dim=0)
        return loss.item(), (loss / transport.zero_loss(square)).item()

    own, numbers = rows[rows[:, 0] == num_frames], {}
    numbers["val_loss"], numbers["val_loss_rel"] = relative(own)
    numbers["val_loss_raw"] = own[:, 4].mean().item()
    for fifth in range(5):
        part = own[(own[:, 2] * 5).long() == fifth]
        if len(part):
            numbers[f"val_loss_gamma_{fifth / 5}"] = part[:, 3].mean().item()
    all_frames = rows[:, 0].unique().int().tolist()
    for frames in all_frames if len(all_frames) > 1 else []:
        numbers[f"val_loss_f{frames}"], numbers[f"val_loss_rel_f{frames}"] = relative(rows[rows[:, 0] == frames])
    return numbers


def draw_samples(run):
    """uint8 (N, T, H, W, 3) of the averaged weights, on rank 0, the classes in turn; the ranks share the work.

    Raises Interrupted.
    """

    def network(*inputs):
        run.stop.check()
        return run.ema(*inputs)

    args, config, data, device = run.args, run.config, run.described["data"], run.device
    numbers = distributed.share(args.num_samples)
    shape = (config.in_channels, run.phase.num_frames, config.input_size, config.input_size)
    videos = None
    with suppress(Interrupted):
        latents, _, _ = samplers.generate(
            network,
            normal(args.global_seed, "sample", 0, numbers, shape).to(device),
            torch.tensor(numbers, dtype=torch.int64, device=device) % len(data["classes"]),
            torch.full((len(numbers),), trained_time_scale(data), device=device),
            null_label=config.num_classes,
            show=rank() == 0,
            **distributed.sampling_settings(args),
        )
        videos = run.vae.decode(latents)
    run.stop.settle()
    return distributed.collect(numbers, videos)


def show_samples(run, videos):
    """Samples uint8 (N, T, H, W, 3) as files of the run and on its boards: a picture of all frames, and moving."""
    data, path = run.described["data"], run.folder / "samples" / f"{run.progress.step:07d}"
    fps, gif, mp4 = 1 / trained_time_scale(data), None, None
    names = [data["classes"][number % len(data["classes"])] for number in range(len(videos))]
    write_sheet(path.with_suffix(".png"), videos, names)
    if videos.shape[1] > 1:
        gif, mp4 = io.BytesIO(), path.with_suffix(".mp4")
        write_mp4(mp4, tile(videos), fps)
        write_gif(gif, tile(videos), fps)
    run.metrics.video(run.progress.step, "samples", videos, gif and gif.getvalue(), mp4)


if __name__ == "__main__":
    main()

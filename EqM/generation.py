"""From a model to samples: flags, checks and steps that train.py, sample_gd.py and evaluate.py share."""

import argparse
import itertools
import math
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

import checkpoint
import transport
from given import NOT_FORCED, Details, paste_given
from models import EBMS, NAMES, EqM, model_name
from rope import REFERENCE_FPS
from runtime import distributed
from runtime.cli import COUNT, NATURAL, NON_NEGATIVE, POSITIVE, Bar, UserError, number, say, settle_precision
from runtime.distributed import rank
from runtime.rng import normal
from runtime.untrusted import FPS, check_types
from samplers import DESCENTS, SOLVERS, guided, sample
from sharding import is_sharded
from vae import VAE, check_same, load_vae
from video.samples import NO_LABEL, class_name

MOST_FRAMES, MOST_SAMPLES, MOST_EVALUATIONS = 2**16, 2**24, 100_000  # more is a typing error
SAMPLER = {  # flags of the sampler: their defaults for a checkpoint that has none
    "sampler": "gd", "num_sampling_steps": 250, "stepsize": 0.0017, "mu": 0.3, "stop_below": None, "cfg_scale": 4.0,
}  # fmt: skip
STOP_BELOW = 1.0  # as accurate as 250 points with 57% of their evaluations: scripts/adaptive_compute.py


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def add_sample_flags(
    add, num_samples, num_samples_help="number of samples", several=False, keep_background=True
):  # fmt: skip
    """What is sampled; `add` is the add_argument of a group. several: --num-frames takes several numbers, as a list."""
    frames = number(int, least=1, most=MOST_FRAMES)
    rate, scale = number(float, least=FPS[0], most=FPS[1]), number(float, least=1 / FPS[1], most=1 / FPS[0])
    trained = "default: as trained"
    length = "frames per video, any number with rotary positions; " + trained
    length += "; several numbers: samples of each, in folders DIR-fN" if several else ""
    add("--num-frames", type=frames, nargs="+" if several else None, metavar="N", help=length)
    window = "longer videos are sampled in windows of N frames, each given the last ones of the one before; default: "
    window += "as long as the longest training clip, or all frames if the model was trained without --forcing"
    add("--window", type=frames, metavar="N", help=window)
    add("--overlap", type=COUNT, metavar="N", help="frames that a window has from the one before; default: half of it")
    add("--fps", type=rate, metavar="X", help="frames per second of the samples; " + trained)
    add("--time-scale", type=scale, metavar="X", help="the same as seconds per frame; give one of the two")
    classes = "names or indices of classes, taken in turn; none: no label, so no guidance; default: all"
    add("--classes", nargs="+", metavar="C", help=classes)
    count = number(int, least=1, most=MOST_SAMPLES)
    add("--num-samples", "--num-fid-samples", type=count, default=num_samples, metavar="N", help=num_samples_help)
    add("--seed", "--global-seed", type=NATURAL, default=0, metavar="N", help="seed of the noise")
    # results/study-first-edition.md (C): linear had 93% of the directions right at twice the 8 trained frames, 84% at
    # four times (none: 78% and 0%), 54% and 49% at 1.5 and 2 times 16 (none: 1% and 0%), all of them slower in
    # proportion. NTK-aware scaling and RIFLEx were no better than none.
    beyond = "positions in time of more frames than were trained: as they are, or squeezed into the trained span: "
    beyond += "whole but slower motion"
    add("--rope-scale", type=rope_scale, choices=["none", "linear"], default="none", help=beyond)
    add("--no-ema", action="store_true", help="use the raw weights instead of the EMA weights")
    background = "with given frames and a VAE, add the detail that it lost of the last given frame wherever nothing "
    background += "moves: looks better, but is not made by the model"
    add("--keep-background", action=argparse.BooleanOptionalAction, default=keep_background, help=background)


def rope_scale(text):
    """A `type=` for argparse, which refuses what earlier versions had."""
    if text in ("ntk", "riflex"):
        raise argparse.ArgumentTypeError(f"{text}: removed, because it made no clip better in the study: use linear")
    return text


def add_checked_flags(parser):
    """Flags whose values are in the checkpoint; returns the add_argument of their group."""
    add = parser.add_argument_group("checked against the checkpoint, if given").add_argument
    add("--model", choices=NAMES, metavar="NAME", help="EqM-{Ti,S,B,L,XL}/{2,4,8}; published models need it")
    add("--use-rope", action="store_true", default=None, help="the model has 3D rotary positions")
    add("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    add("--temporal-patch-size", type=COUNT, metavar="N", help="frames per patch")
    add("--image-size", type=COUNT, metavar="PX", help="height and width of the samples in pixels")
    add("--num-classes", type=COUNT, metavar="N", help="number of classes of the model")
    add("--vae", metavar="VAE", help="may name another place of the checkpoint's VAE")
    return add


def add_sampling_flags(parser):
    """The flags of every script that samples; `settle_sampler` fills in those that are left out."""
    title = "sampling (default: the settings of the checkpoint, else those named below)"
    add = parser.add_argument_group(title).add_argument
    usual = {name: "" if value is None else f"; default: {value}" for name, value in SAMPLER.items()}
    samplers = "gd: gradient descent; ngd: with Nesterov momentum; euler, heun: the ODE in gamma, for comparison"
    add("--sampler", choices=[*DESCENTS, *SOLVERS], help=samplers + usual["sampler"])
    points = "points of the path: gd, ngd and euler take N - 1 evaluations, heun 2 N - 3" + usual["num_sampling_steps"]
    add("--num-sampling-steps", type=number(int, least=2), metavar="N", help=points)
    size = "step size eta of gd and ngd; if you give only one of N and X, the other follows so that evaluations x step "
    size += "size stays" + usual["stepsize"]
    add("--stepsize", type=POSITIVE, metavar="X", help=size)
    add("--mu", type=NON_NEGATIVE, metavar="X", help="momentum of ngd" + usual["mu"])
    adaptive = "gd and ngd: stop a sample when the root mean square of its field falls below R; without a number R is "
    adaptive += f"{STOP_BELOW}; 0: off"
    add("--stop-below", type=NON_NEGATIVE, nargs="?", const=STOP_BELOW, metavar="R", help=adaptive + "; default: off")
    guidance = "classifier-free guidance scale; 1 = off" + usual["cfg_scale"]
    add("--cfg-scale", type=NON_NEGATIVE, metavar="X", help=guidance)
    parser.set_defaults(guidance_chosen=None)  # whether somebody gave --cfg-scale, here or in training: settle_sampler


def settle_sampler(args, path, training):
    """Fill in the sampler's flags that were left out: from config["training"] of the checkpoint at path, else SAMPLER.

    Raises UserError for flags that contradict each other, and for a checkpoint with settings that are none.
    """
    try:
        kept = SAMPLER | {name: training[name] for name in SAMPLER if name in training}
        check_sampler(kept)
    except ValueError as error:
        raise UserError(f"--ckpt {path}: no settings of a sampler ({error}): name another checkpoint") from error
    asked = args.stop_below
    if args.guidance_chosen is None:  # a repeated score knows it
        args.guidance_chosen = args.cfg_scale is not None or is_guidance_chosen(training)
    if kept["sampler"] in SOLVERS and args.sampler in DESCENTS:  # a solver has no length of a path to keep
        kept |= {name: SAMPLER[name] for name in ("num_sampling_steps", "stepsize")}
    keep_path_length(args, kept)
    for name, value in kept.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if asked and args.sampler in SOLVERS:
        raise UserError(f"--stop-below {asked}: {args.sampler} has a fixed number of steps; use gd or ngd")
    if args.sampler in SOLVERS or args.stop_below == 0:
        args.stop_below = None


def is_guidance_chosen(flags):
    """Whether somebody gave --cfg-scale. Older flags do not say it; then a default does not count as chosen."""
    usual = SAMPLER["cfg_scale"]
    return bool(flags.get("guidance_chosen", flags.get("cfg_scale", usual) != usual))


def keep_path_length(args, kept):
    """Fill in --num-sampling-steps or --stepsize if only the other one is given.

    evaluations x step size stays that of the settings that are kept. Raises UserError.
    """
    length, count, size = (kept["num_sampling_steps"] - 1) * kept["stepsize"], args.num_sampling_steps, args.stepsize
    if (count is None) == (size is None) or (args.sampler or kept["sampler"]) in SOLVERS:
        return
    if size is None:
        args.stepsize = length / (count - 1)
    elif length / size < MOST_EVALUATIONS:
        args.num_sampling_steps = max(1, round(length / size)) + 1
    else:
        found = f"--stepsize {size:g}: a path of length {length:g} takes {length / size:.3g} evaluations"
        raise UserError(f"{found}; expected fewer than {MOST_EVALUATIONS}; take larger steps")


def check_sampler(values):
    """Raise ValueError unless these are values that the flags of SAMPLER can have."""
    kinds = {name: float | int | None if value is None else type(value) for name, value in SAMPLER.items()}
    check_types(values, kinds)
    if values["sampler"] not in (*DESCENTS, *SOLVERS):
        raise ValueError(f"sampler is {values['sampler'][:50]}")
    numbers = {name: value for name, value in values.items() if name != "sampler" and value is not None}
    for name, value in numbers.items():
        least = {"num_sampling_steps": 2, "stepsize": math.ulp(0.0)}.get(name, 0)
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}")


def sampling_settings(args):
    return {
        "method": args.sampler,
        "num_steps": args.num_sampling_steps,
        "step_size": args.stepsize,
        "momentum": args.mu,
        "stop_below": args.stop_below,
        "guidance": args.cfg_scale,
        "precision": args.precision,
    }


# ----------------------------------------------------------------------------------------------------------------------
# A model that is ready to sample


@dataclass
class Source:
    """A model and what is sampled from it."""

    model: EqM
    vae: VAE
    classes: list  # their names
    labels: torch.Tensor  # (num_samples,) int64; NO_LABEL: no label
    num_frames: int
    time_scale: float  # seconds per frame; a tensor (n,) if the samples of a batch differ
    video: bool = True  # False: images
    step: int = 0  # of training
    forcing: float = 0.0  # --forcing of training
    window: int | None = None  # frames that are sampled at a time; None: all
    overlap: int = 0  # of them, first ones that a window gets from the one before
    weights_sha256: str = ""  # of the model as loaded, whatever its file

    def __post_init__(self):
        self.window = self.window or self.num_frames

    @property
    def window_starts(self):
        return window_starts(self.num_frames, self.window, self.overlap)

    @property
    def names(self):
        """The name of the class of each sample, "none" without one."""
        return [class_name(self.classes, label) or "none" for label in self.labels.tolist()]

    @property
    def image_size(self):
        return self.model.config.input_size * self.vae.downsample

    def to(self, device, args):
        """Move the networks to the device, and do what --precision and --compile ask for."""
        self.vae.to(device)
        distributed.set_precision(args.precision)
        self.model = cast_products(self.model.to(device).requires_grad_(False), args.precision)
        if args.compile:
            self.model.compile_blocks()


def cast_products(model, precision):
    """The model to sample from in that --precision; nothing is copied unless it is mixed, nor of a sharded model.

    Autocast casts a weight that needs no gradient anew in each call of the network. So this returns a copy in which the
    weights of all matrix products are cast once; it shares the other weights with the model. Its outputs under autocast
    are those of the model, bit for bit. It is compiled if the model is.
    """
    if precision not in distributed.MIXED or any(map(is_sharded, model.parameters())):
        return model
    copies = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):  # the convolution of PatchEmbed is a matrix product, too
            for weight in module.parameters():
                cast = weight.detach().to(distributed.MIXED[precision])
                copies[id(weight)] = nn.Parameter(cast, requires_grad=False)
    copy = deepcopy(model, copies)  # takes the tensors from `copies`
    if model.is_compiled:  # which deepcopy forgets
        copy.compile_blocks()
    return copy


def open_checkpoint(args):
    """The Source of --ckpt, after all the checks that need no GPU; raises UserError."""
    model, config, step = checkpoint.load_model(
        args.ckpt,
        use_ema=not args.no_ema,
        model=args.model,
        video=args.video,
        use_rope=args.use_rope,
        ebm=args.ebm,
        temporal_patch_size=args.temporal_patch_size,
        num_classes=args.num_classes,
    )
    settle_precision(args, energy=model.config.ebm != "none")
    checkpoint.say_if_old(args.ckpt, step)
    data, training = config["data"], config["training"]
    settle_sampler(args, args.ckpt, training)
    vae = open_vae(args, model.config, data)
    trained_frames, time_scale = training["num_frames"], seconds_per_frame(args, data)
    num_frames, forcing = args.num_frames or trained_frames, training.get("forcing", 0.0)  # older files: none
    if trained_frames <= model.config.temporal_patch_size:
        forcing = 0.0  # clips of one temporal patch are not forced
    by_windows = forcing and args.rope_scale == "none"  # which squeezes all frames into the trained span
    stretch = checkpoint.longest_time_scale(data) / time_scale
    usual = longest_window(model.config, trained_frames, stretch) if by_windows else num_frames
    window, overlap = choose_windows(args, model.config, num_frames, usual)
    if not training["video"] and num_frames != 1:
        raise UserError(f"--num-frames {num_frames}: --ckpt {args.ckpt} holds an image model: leave the flag out")
    labels = choose_labels(args, data["classes"])
    scale_rope(args, model, data, trained_frames, window, time_scale)
    name = model_name(**asdict(model.config))
    evaluations = (args.num_sampling_steps - 1) * (1 + (args.sampler == "heun")) - (args.sampler == "heun")
    steps = f" of step size {args.stepsize:.3g}" if args.sampler in DESCENTS else ""
    sampler = f"{args.sampler}, {evaluations} evaluations{steps}, guidance {args.cfg_scale:g}"
    windows = f" in windows of {window}" if window < num_frames else ""
    trained = f"trained on {trained_frames} frames"
    say(f"{args.ckpt}: {name}, step {step}, {trained}; samples of {num_frames}{windows} by {sampler}")
    if window < num_frames and not forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: windows may not continue smoothly")
    digest = checkpoint.weights_sha256(model.state_dict()) if rank() == 0 else ""  # which writes it
    about = training["video"], step, forcing, window, overlap, digest
    return Source(model, vae, data["classes"], labels, num_frames, time_scale, *about)


def window_starts(num_frames, window, overlap):
    """The first frame of each window of a video."""
    return list(range(0, max(1, num_frames - overlap), window - overlap))


def longest_window(config, num_frames, stretch):
    """The number of frames that last as long as the longest training clip, at least as many as it had.

    num_frames: of the clips that trained last; stretch: the longest time between two of their frames, relative to that
    between two frames of the sample. More frames than were trained fill whole temporal patches. Fixed positions are
    tied to num_frames.
    """
    patch = config.temporal_patch_size
    longest = math.floor(num_frames * stretch / patch + 1e-6) * patch if config.use_rope else num_frames
    return max(num_frames, longest)


def choose_windows(args, config, num_frames, usual):
    """(frames of a window, overlap of two) of videos of num_frames frames; without --window it has the usual length.

    Raises UserError.
    """
    window = min(num_frames, args.window or usual)
    try:
        config.check_num_frames(window)
    except ValueError as error:
        flag = f"--window {window}" if args.window else f"--num-frames {num_frames}"
        raise UserError(f"{flag}: {error}") from error
    if window == num_frames:
        return window, 0
    overlap = max(1, window // 2) if args.overlap is None else args.overlap
    if overlap >= window:
        raise UserError(f"--overlap {overlap}: leaves no new frame in a window of {window}: give fewer")
    return window, overlap


def open_vae(args, config, data):
    """The VAE that a checkpoint was trained with, at its place or at that of --vae. Raises UserError."""
    vae = load_vae(args.vae or data["vae"], None if args.vae else "the checkpoint")
    size = config.input_size * vae.downsample
    same_kind = (vae.name == "none") == (data["vae"] == "none")
    if not same_kind or (vae.channels, size) != (config.in_channels, data["image_size"] or size):
        found = f"--vae {args.vae}" if args.vae else f"the checkpoint's VAE {vae.name} is another one by now"
        raise UserError(f"{found}: the checkpoint was trained with {data['vae']}: name a place of that one with --vae")
    check_same(vae, data.get("vae_sha256"), f"--ckpt {args.ckpt}")
    if args.image_size not in (None, size):
        raise UserError(f"--image-size {args.image_size}: the checkpoint has {size}: leave the flag out")
    return vae


def scale_rope(args, model, data, trained_frames, num_frames, time_scale):
    """Fit the rotary time positions of a model to longer clips, as --rope-scale says. Raises UserError."""
    if args.rope_scale == "none":
        return
    if not model.config.use_rope:
        raise UserError(f"--rope-scale {args.rope_scale}: {args.ckpt} has fixed positions: leave the flag out")
    seconds = checkpoint.trained_time_scale(data), time_scale  # per frame, in training and now
    trained, wanted = (
        model.config.grid(frames)[0] * REFERENCE_FPS * scale
        for frames, scale in zip((trained_frames, num_frames), seconds, strict=True)
    )
    model.rope.stretch = max(1.0, wanted / trained)


def seconds_per_frame(args, data):
    if args.fps and args.time_scale:
        raise UserError("--fps and --time-scale set the same thing: give one of them")
    return args.time_scale or (1 / args.fps if args.fps else checkpoint.trained_time_scale(data))


def choose_labels(args, names):
    """The label of each sample, (num_samples,) int64: the classes in turn."""
    labels = []
    for word in args.classes or range(len(names)):
        if word == "none":  # also for a model with a class of that name
            labels.append(NO_LABEL)
        elif word in names:
            labels.append(names.index(word))
        elif str(word).isdecimal() and int(word) < len(names):
            labels.append(int(word))
        else:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            wanted = f"wanted one of {known} or an index below {len(names)}, or none"
            raise UserError(f"--classes {word}: no such class; {wanted}")
    return torch.tensor(labels)[torch.arange(args.num_samples) % len(labels)]


def provenance(source, args):
    """Everything that determines the samples of a checkpoint: plain values for JSON."""
    return {
        "checkpoint": str(args.ckpt),
        "weights_sha256": source.weights_sha256,
        "step": source.step,
        "averaged_weights": not args.no_ema,
        "model": model_name(**asdict(source.model.config)),
        "temporal_patch_size": source.model.config.temporal_patch_size,
        "vae": source.vae.place,
        "image_size": source.image_size,
        "num_frames": source.num_frames,
        "window": source.window,
        "overlap": source.overlap,
        "time_scale": source.time_scale,
        "rope_scale": args.rope_scale,
        "keep_background": args.keep_background,
        "guidance_chosen": args.guidance_chosen,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "compile": args.compile,
        **sampling_settings(args),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Noise -> latents -> videos


def generate_clips(source, indices, *args, **settings):
    """Generate the samples `indices` of a Source: the parts of `generate_parts`, put together.

    Yields of each batch: videos uint8 (n, T, H, W, 3), evaluations (n,), summed over the windows, and energies
    (n, num_steps), None without `energy` or with several windows.
    """
    parts, count = generate_parts(source, indices, *args, **settings), len(source.window_starts)
    while batch := list(itertools.islice(parts, count)):
        _, _, videos, evaluations, energies = zip(*batch, strict=True)
        if count == 1:
            yield videos[0], evaluations[0], energies[0]
        else:
            yield torch.cat(videos, dim=1), sum(evaluations), None


def generate_parts(
    source, indices, seed, device, settings, batch_size=16, init=None, init_gamma=0.0, given=None,
    keep_background=True, energy=False, show=True, before_evaluation=None,
):  # fmt: skip
    """Generate the samples `indices` of a Source, batch by batch and window by window, with one progress bar.

    The noise of a sample depends on seed, index and window alone. Each window is given the last frames of the one
    before. Clips are uint8 (n, 3, T, H, W). init(indices), if not None, returns those that have the share init_gamma in
    the start; the rest is noise. given(indices) returns clips and a mask (n, T): where it is true, frames are kept as
    they are; with keep_background the others get their `Details`. before_evaluation(), if it is there, is called before
    each evaluation of the network, and may raise.
    A batch in which no sample has a label has no guidance.
    Yields of each window of each batch: the samples' indices, the number of its first new frame, its new frames uint8
    (n, k, H, W, 3), evaluations (n,) and energies (n, num_steps), None without `energy`.
    """

    def network(*inputs):
        if before_evaluation is not None:
            before_evaluation()
        return source.model(*inputs)

    null_label, starts = source.model.config.num_classes, source.window_starts
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    with sampling_bar(len(batches) * len(starts), settings["num_steps"], show) as progress:
        for batch in batches:
            labels, tail = source.labels[batch], None
            changes = {} if (labels != NO_LABEL).any() else {"guidance": 1.0}
            clips, mask = (part.to(device) for part in given(batch)) if given else (None, None)
            show_given = given and (Details(clips, mask).add if keep_background else partial(paste_given, clips, mask))
            for number, start in enumerate(starts):
                latents, evaluations, energies = generate_batch(
                    network,
                    start_points(source, batch, seed, device, init, init_gamma, number),
                    torch.where(labels == NO_LABEL, null_label, labels).to(device),
                    torch.as_tensor(source.time_scale, dtype=torch.float32, device=device).expand(len(batch)),
                    progress,
                    null_label=null_label,
                    energy=source.model.energy if energy else None,
                    start_gamma=init_gamma,
                    **known_part(source, start, clips, mask, tail),
                    **settings | changes,
                )
                tail, first = latents[:, :, -source.overlap :], source.overlap if number else 0
                videos = source.vae.decode(latents[:, :, first : source.num_frames - start])
                videos = show_given(videos, start + first) if given else videos
                yield batch, start + first, videos, evaluations, energies


def known_part(source, start, clips, mask, tail):
    """The arguments `given` and `mask` of `samplers.sample` for the window that begins at a frame; {} for nothing.

    Known are the frames of clips uint8 (n, 3, T, H, W) where mask (n, T) is true, and the first ones of the window:
    tail, latents of the window before, None in the first one.
    """
    if mask is None and tail is None:
        return {}
    n, W, config = len(mask if tail is None else tail), source.window, source.model.config
    device = (mask if tail is None else tail).device
    given = torch.zeros(n, config.in_channels, W, config.input_size, config.input_size, device=device)
    known = torch.zeros(n, W, dtype=torch.bool, device=device)
    if mask is not None:
        part = mask[:, start : start + W]
        used = part.any(dim=0).nonzero()[:, 0]  # frames that no sample is given are not encoded
        if len(used):
            given[:, :, used] = source.vae.encode(clips[:, :, start + used])
        known[:, : part.shape[1]] = part
    if tail is not None:
        given[:, :, : source.overlap], known[:, : source.overlap] = tail, True
    return {"given": given, "mask": known[:, None, :, None, None]}


def start_points(source, indices, seed, device, init, init_gamma, window=0):
    """Where a window of the samples `indices` starts, (n, C, T, h, w): noise, or as `generate_parts` says of init."""
    config = source.model.config
    shape = (config.in_channels, source.window, config.input_size, config.input_size)
    noise = normal(seed, "sample", window, indices, shape).to(device)
    if init is None:
        return noise
    encoded = source.vae.encode(init(indices).to(device))
    return transport.interpolate(encoded, noise, torch.full((len(indices),), init_gamma, device=device))


def generate(network, start, labels, time_scale, null_label, batch_size=16, show=True, energy=None, **settings):
    """Turn noise into samples, batch by batch, with one progress bar for all of them.

    start (N, C, T, H, W) float32, labels (N,), time_scale (N,); the rest is as in `generate_batch`.
    Returns samples (N, C, T, H, W), evaluations (N,) and energies (N, num_steps), None without `energy`.
    """
    results = []
    batches = list(zip(*(part.split(batch_size) for part in (start, labels, time_scale)), strict=True))
    with sampling_bar(len(batches), settings["num_steps"], show) as progress:
        for batch in batches:
            results.append(generate_batch(network, *batch, progress, null_label, energy=energy, **settings))
    samples, evaluations, energies = zip(*results, strict=True)
    return torch.cat(samples), torch.cat(evaluations), None if energy is None else torch.cat(energies)


def sampling_bar(num_batches, num_steps, show):
    return Bar(total=num_batches * num_steps, desc="sampling", unit="point", leave=False, disable=not show)


@torch.no_grad()
def generate_batch(
    network, x, labels, time_scale, progress, null_label, guidance, precision="fp32", energy=None, strict=True,
    **settings,
):  # fmt: skip
    """Turn the noise x (B, C, T, H, W) float32 into samples, and move the progress bar by num_steps.

    labels (B,), time_scale (B,); settings are those of `samplers.sample`. precision is that of the network only: the
    samples stay float32. energy(x, y, time_scale) -> (B,), if there is one, is evaluated at every point. Samples that
    are not finite raise UserError or, unless `strict`, are noted.
    Returns samples (B, C, T, H, W), evaluations (B,) and energies (B, num_steps): NaN after the point where a sample
    stopped, None without `energy`.
    """
    num_steps = settings["num_steps"]
    end = progress.n + num_steps
    if energy is None and settings.get("mask") is not None and settings["mask"].all():  # a window that is given whole
        progress.update(num_steps)
        return settings["given"], torch.zeros(len(x), dtype=torch.int64, device=x.device), None
    with distributed.autocast(x.device, precision):
        field = guided(network, labels, time_scale, guidance, null_label)
        guided_energy = energy and guided(energy, labels, time_scale, guidance, null_label)
        observer = Observer(guided_energy, len(x), num_steps, x.device, progress)
        samples, evaluations = sample(field, x, observe=observer, **settings)
    observer.check(strict, settings)
    progress.update(end - progress.n)  # if all stopped early
    return samples, evaluations, None if energy is None else observer.energies


class Observer:
    """Called by `sample` at each point: moves the bar and, given a guided energy, records it, (B, num_steps)."""

    def __init__(self, energy, batch_size, num_steps, device, progress):
        self.energy, self.progress, self.point = energy, progress, 0
        self.energies = torch.full((batch_size, num_steps), torch.nan, device=device)
        self.finite = []  # of each point: whether all samples are, on the device

    def __call__(self, x, keep):
        if self.energy is not None:
            self.energies[keep, self.point] = self.energy(x, keep)
        self.finite.append(x.isfinite().all())
        self.point += 1
        self.progress.set_postfix_str(f"{len(keep)} running", refresh=False)
        self.progress.update()

    def check(self, strict, settings):
        """Raise UserError, or unless `strict` say so, if samples are not finite: at which step that began."""
        finite = torch.stack(self.finite).cpu()  # the only wait for a GPU, after the last step
        if finite.all():
            return
        size = settings["method"] if settings.get("method") in SOLVERS else f"--stepsize {settings['step_size']:g}"
        step, steps = finite.tolist().index(False), settings["num_steps"] - 1
        text = f"step {step} of {steps} made samples that are not finite ({size})"
        if strict:
            raise UserError(f"{text}: take smaller steps, or another checkpoint")
        say(f"note: {text}")

"""From a checkpoint to clips: settings of the sampler, what is sampled, and the loop over batches and windows."""

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
from models import Condition, EqM, model_name
from rope import REFERENCE_FPS
from runtime import distributed
from runtime.cli import NON_NEGATIVE, POSITIVE, Bar, UserError, number, resolve_precision, say
from runtime.distributed import rank
from runtime.rng import normal
from samplers import DESCENTS, SOLVERS, guided, sample
from sharding import is_sharded
from vae import VAE, check_same, load_vae
from video.samples import NO_LABEL, class_name

MOST_EVALUATIONS = 100_000  # more is a typing error
SAMPLER = {  # flags of the sampler: their defaults for a checkpoint that has none
    "sampler": "gd", "num_sampling_steps": 250, "stepsize": 0.0017, "mu": 0.3, "stop_below": None, "cfg_scale": 4.0,
}  # fmt: skip
STOP_BELOW = 1.0  # as accurate as 249 evaluations with 57% of them: see docs/results.md


# ----------------------------------------------------------------------------------------------------------------------
# Settings of the sampler


def add_sampling_flags(parser):
    """The flags of every script that samples; `resolve_sampler` says what they are by default."""
    title = "sampling (default: the settings of the checkpoint, else those named below)"
    add = parser.add_argument_group(title).add_argument
    usual = {name: "" if value is None else f"; default: {value}" for name, value in SAMPLER.items()}
    samplers = "gd: gradient descent; ngd: with Nesterov momentum; euler, heun: the ODE in gamma, for comparison"
    add("--sampler", choices=[*DESCENTS, *SOLVERS], help=samplers + usual["sampler"])
    steps = "points of the path: gd, ngd and euler take N - 1 evaluations, heun 2 N - 3" + usual["num_sampling_steps"]
    add("--num-sampling-steps", type=number(int, least=2), metavar="N", help=steps)
    size = "step size eta of gd and ngd; if you give only one of N and X, the other follows so that evaluations x step "
    size += "size stays" + usual["stepsize"]
    add("--stepsize", type=POSITIVE, metavar="X", help=size)
    add("--mu", type=NON_NEGATIVE, metavar="X", help="momentum of ngd" + usual["mu"])
    adaptive = "gd and ngd: stop a sample when the root mean square of its field falls below R; without a number R is "
    adaptive += f"{STOP_BELOW}; 0: off"
    add("--stop-below", type=NON_NEGATIVE, nargs="?", const=STOP_BELOW, metavar="R", help=adaptive + "; default: off")
    guidance = "classifier-free guidance scale; 1 = off" + usual["cfg_scale"]
    add("--cfg-scale", type=NON_NEGATIVE, metavar="X", help=guidance)


def resolve_sampler(args, training):
    """{name: value} of the flags of the sampler: those of the user, else of config["training"], else SAMPLER.

    guidance_chosen says whether somebody chose the guidance, here or in training. If only one of --num-sampling-steps
    and --stepsize is given, the other keeps evaluations x step size. Raises UserError.
    """
    kept = {name: training.get(name, value) for name, value in SAMPLER.items()}
    if kept["sampler"] in SOLVERS and args.sampler in DESCENTS:  # a solver has no length of a path to keep
        kept |= {name: SAMPLER[name] for name in ("num_sampling_steps", "stepsize")}
    typed = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    values = kept | typed
    if values["sampler"] in DESCENTS and len(typed.keys() & {"num_sampling_steps", "stepsize"}) == 1:
        length = (kept["num_sampling_steps"] - 1) * kept["stepsize"]
        if "num_sampling_steps" in typed:
            values["stepsize"] = length / (args.num_sampling_steps - 1)
        elif length / args.stepsize < MOST_EVALUATIONS:
            values["num_sampling_steps"] = max(1, round(length / args.stepsize)) + 1
        else:
            got = f"a path of length {length:g} takes {length / args.stepsize:.3g} evaluations"
            raise UserError(
                f"--stepsize {args.stepsize:g}: {got}; expected fewer than {MOST_EVALUATIONS}; take larger steps"
            )
    if args.stop_below and values["sampler"] in SOLVERS:
        got = f"--stop-below {args.stop_below}: {values['sampler']}"
        raise UserError(f"{got} has a fixed number of steps; use gd or ngd")
    if values["sampler"] in SOLVERS or values["stop_below"] == 0:
        values["stop_below"] = None
    return values | {"guidance_chosen": "cfg_scale" in typed or bool(training.get("guidance_chosen"))}


def sampling_settings(args):
    """The arguments of `samplers.sample`, the guidance and the precision, as samples.json has them."""
    return {
        "method": args.sampler, "num_steps": args.num_sampling_steps, "step_size": args.stepsize, "momentum": args.mu,
        "stop_below": args.stop_below, "guidance": args.cfg_scale, "precision": args.precision,
    }  # fmt: skip


def count_evaluations(settings):
    """The most evaluations of the field that a sample takes."""
    steps = settings["num_steps"] - 1
    return 2 * steps - 1 if settings["method"] == "heun" else steps


# ----------------------------------------------------------------------------------------------------------------------
# What is sampled


@dataclass
class Plan:
    """A model and what to sample from it."""

    model: EqM
    vae: VAE
    classes: list  # their names
    labels: torch.Tensor  # (num_samples,) int64: the class of each sample; NO_LABEL: none
    num_frames: int
    time_scale: float  # seconds per frame
    video: bool = True  # False: images
    step: int = 0  # of training
    trained_frames: int = 0  # per clip, at the end of training
    forcing: float = 0.0  # --forcing of training
    window: int | None = None  # frames that are sampled at a time; None: all
    overlap: int = 0  # of them, first ones that a window gets from the previous one
    weights_sha256: str = ""  # of the model as loaded, whatever its file
    time_scales: torch.Tensor | None = None  # (num_samples,) float32: of each sample, if they differ

    def __post_init__(self):
        self.window = self.window or self.num_frames

    @property
    def window_starts(self):
        """The first frame of each window."""
        return window_starts(self.num_frames, self.window, self.overlap)

    @property
    def names(self):
        """The name of the class of each sample, "none" without one."""
        return [class_name(self.classes, label) or "none" for label in self.labels.tolist()]

    @property
    def image_size(self):
        return self.model.config.input_size * self.vae.downsample

    def condition(self, indices):
        return Condition.of(self.labels[indices], self.model.config)

    def seconds(self, indices):
        """Seconds per frame of some samples, (n,) float32."""
        return torch.full((len(indices),), self.time_scale) if self.time_scales is None else self.time_scales[indices]

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
    """({name: value} of the flags that follow from --ckpt, the Plan), after all the checks that need no GPU.

    Raises UserError.
    """
    names = ("model", "video", "use_rope", "ebm", "temporal_patch_size", "num_classes")
    checks = {name: getattr(args, name) for name in names}
    model, config, step = checkpoint.load_model(args.ckpt, use_ema=not args.no_ema, **checks)
    data, training = config["data"], config["training"]
    values = {"precision": resolve_precision(args.precision, energy=model.config.ebm != "none")}
    values |= resolve_sampler(args, training)
    vae = open_vae(args, model.config, data)
    trained, time_scale = training["num_frames"], seconds_per_frame(args, data)
    num_frames, forcing = args.num_frames or trained, training.get("forcing", 0.0)  # published models: none
    if trained <= model.config.temporal_patch_size:
        forcing = 0.0  # clips of one temporal patch are not forced
    window, overlap = choose_windows(args, model.config, num_frames, trained, data, time_scale, forcing)
    if not training["video"] and num_frames != 1:
        raise UserError(f"--num-frames {num_frames}: --ckpt {args.ckpt} holds an image model: leave the flag out")
    labels = choose_labels(args, data["classes"])
    scale_rope(args, model, data, trained, window, time_scale)
    digest = checkpoint.weights_sha256(model.state_dict()) if rank() == 0 else ""  # which writes it
    about = training["video"], step, trained, forcing, window, overlap, digest
    plan = Plan(model, vae, data["classes"], labels, num_frames, time_scale, *about)
    return values | {"num_frames": num_frames}, plan


def preview_plan(model, vae, config, count):
    """What a model that is in training is to sample: `count` clips like those it trains on, the classes in turn.

    config is that of its checkpoints.
    """
    data = config["data"]
    labels = torch.arange(count) % len(data["classes"])
    return Plan(model, vae, data["classes"], labels, config["training"]["num_frames"], data["time_scale"])


def say_plan(args, plan):
    """Say what is sampled, and how."""
    size = f" of step size {args.stepsize:.3g}" if args.sampler in DESCENTS else ""
    sampler = f"{args.sampler}, {count_evaluations(sampling_settings(args))} evaluations{size}"
    windows = f" in windows of {plan.window}" if plan.window < plan.num_frames else ""
    model = f"{model_name(**asdict(plan.model.config))}, step {plan.step}, trained on {plan.trained_frames} frames"
    say(f"{args.ckpt}: {model}; samples of {plan.num_frames}{windows} by {sampler}, guidance {args.cfg_scale:g}")
    if windows and not plan.forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: windows may not continue smoothly")


def window_starts(num_frames, window, overlap):
    """The first frame of each window of a video."""
    return list(range(0, max(1, num_frames - overlap), window - overlap))


def choose_windows(args, config, num_frames, trained, data, time_scale, forcing):
    """(frames of a window, overlap of two) of videos of num_frames frames. Raises UserError.

    By default a window lasts as long as the longest training clip, and has at least as many frames. All frames are
    sampled at once without forcing, or with --rope-scale, which squeezes them into the trained span.
    """
    usual, patch = num_frames, config.temporal_patch_size
    if forcing and args.rope_scale == "none":
        stretch = data["longest_time_scale"] / time_scale  # more frames than were trained fill whole temporal patches
        usual = math.floor(trained * stretch / patch + 1e-6) * patch if config.use_rope else trained
        usual = max(trained, usual)
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
        got = f"--vae {args.vae}" if args.vae else f"the checkpoint's VAE {vae.name} has changed since training"
        raise UserError(f"{got}: the checkpoint was trained with {data['vae']}: name a place of that one with --vae")
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
    clips = (trained_frames, data["time_scale"]), (num_frames, time_scale)
    trained, wanted = (model.config.grid(frames)[0] * REFERENCE_FPS * seconds for frames, seconds in clips)
    model.rope.stretch = max(1.0, wanted / trained)


def seconds_per_frame(args, data):
    if args.fps and args.time_scale:
        raise UserError("--fps and --time-scale set the same thing: give one of them")
    return args.time_scale or (1 / args.fps if args.fps else data["time_scale"])


def choose_labels(args, names):
    """The class of each sample, (num_samples,) int64: those of --classes in turn."""
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
            raise UserError(
                f"--classes {word}: no such class; expected one of {known}, an index below {len(names)}, or none"
            )
    return torch.tensor(labels)[torch.arange(args.num_samples) % len(labels)]


def provenance(plan, args):
    """Everything that determines the samples of a checkpoint: plain values for JSON."""
    of_flags = ("rope_scale", "keep_background", "guidance_chosen", "seed", "batch_size", "compile")
    of_plan = ("weights_sha256", "step", "image_size", "num_frames", "window", "overlap", "time_scale")
    return {
        "checkpoint": str(args.ckpt), "averaged_weights": not args.no_ema, "vae": plan.vae.place,
        "model": model_name(**asdict(plan.model.config)),
        "temporal_patch_size": plan.model.config.temporal_patch_size,
        **{name: getattr(plan, name) for name in of_plan},
        **{name: getattr(args, name) for name in of_flags},
        **sampling_settings(args),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Noise -> latents -> videos


@torch.no_grad()
def generate(
    plan, indices, seed, device, settings, batch_size=16, given=None, init=None, init_gamma=0.0, keep_background=True,
    energy=False, strict=True, show=True, before_evaluation=None,
):  # fmt: skip
    """Generate the samples `indices` of a Plan, batch by batch and window by window, with one progress bar.

    The noise of a sample depends on seed, index and window alone. Each window is given the last frames of the previous
    one. A batch in which no sample has a condition has no guidance.

    Args:
        settings: those of `sampling_settings`.
        given: given(indices) returns clips uint8 (n, 3, T, H, W) and a mask (n, T): where it is true, frames stay as
            they are. With keep_background the others get their `Details`.
        init: as `given`, but its clips have the share init_gamma in the start.
        energy: also record the (guided) energy at every point.
        strict: samples that are not finite raise UserError; otherwise they are noted.
        before_evaluation: called before each evaluation of the network; may raise.

    Yields of each window of each batch: the samples' indices, the number of its first new frame, its new frames uint8
    (n, k, H, W, 3), evaluations (n,) and energies (n, num_steps), None without `energy`.
    """
    starts, most = plan.window_starts, count_evaluations(settings)
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    total = len(batches) * len(starts) * most
    with Bar(total=total, desc="sampling", unit="evaluation", leave=False, disable=not show) as bar:

        def step(running):
            bar.set_postfix_str(f"{running} running", refresh=False)
            bar.update()
            if before_evaluation is not None:
                before_evaluation()

        for batch in batches:
            inputs, tail = (plan.condition(batch).to(device), plan.seconds(batch).to(device)), None
            clips, mask = (part.to(device) for part in given(batch)) if given else (None, None)
            add_given = Details(clips, mask).add if given and keep_background else partial(paste_given, clips, mask)
            for number, start in enumerate(starts):
                end, x = bar.n + most, initial_latents(plan, batch, seed, device, init, init_gamma, number)
                known = known_part(plan, start, clips, mask, tail)
                options = settings | {"start_gamma": init_gamma}, known, energy, strict, step
                latents, *counts = sample_window(plan.model, x, *inputs, *options)
                bar.update(end - bar.n)  # if all stopped early
                tail, first = latents[:, :, -plan.overlap :], plan.overlap if number else 0
                videos = plan.vae.decode(latents[:, :, first : plan.num_frames - start])
                yield batch, start + first, add_given(videos, start + first) if given else videos, *counts


def sample_window(model, x, condition, time_scale, settings, known, energy, strict, step):
    """Follow the guided field of a model from x (B, C, T, H, W) float32: (samples, evaluations (B,), energies or None).

    The precision is that of the network only: the samples stay float32. known holds `given` and `mask` of
    `samplers.sample`, or nothing. step(number of running samples) is called before each evaluation. Energies are
    (B, num_steps), NaN after the point where a sample stopped.
    """
    if known and known["mask"].all() and not energy:  # a window that is given in full
        return known["given"], torch.zeros(len(x), dtype=torch.int64, device=x.device), None
    settings = dict(settings)
    precision, guidance = settings.pop("precision"), settings.pop("guidance")
    guided_by = condition, time_scale, 1.0 if condition.is_null() else guidance
    field, energies, finite = guided(model, *guided_by), None, []  # finite: of each point, whether all samples are
    if energy:
        energy_of = guided(model.energy, *guided_by)
        energies = torch.full((len(x), settings["num_steps"]), torch.nan, device=x.device)

    def counted(x, keep, *level):
        step(len(keep))
        return field(x, keep, *level)

    def observe(x, keep):
        if energy:
            energies[keep, len(finite)] = energy_of(x, keep)
        finite.append(x.isfinite().all())

    with distributed.autocast(x.device, precision):
        samples, evaluations = sample(counted, x, observe=observe, **known, **settings)
    finite = torch.stack(finite).cpu().tolist()  # the only wait for a GPU, after the last step
    if not all(finite):
        size = settings["method"] if settings["method"] in SOLVERS else f"--stepsize {settings['step_size']:g}"
        text = f"step {finite.index(False)} of {len(finite) - 1} made samples that are not finite ({size})"
        if strict:
            raise UserError(f"{text}: take smaller steps, or another checkpoint")
        say(f"note: {text}")
    return samples, evaluations, energies


def known_part(plan, start, clips, mask, tail):
    """The arguments `given` and `mask` of `samplers.sample` for the window that begins at a frame; {} for nothing.

    Known are the frames of clips uint8 (n, 3, T, H, W) where mask (n, T) is true, and the first ones of the window:
    tail, latents of the previous window, None in the first one.
    """
    if mask is None and tail is None:
        return {}
    n, W, config = len(mask if tail is None else tail), plan.window, plan.model.config
    device = (mask if tail is None else tail).device
    latents = torch.zeros(n, config.in_channels, W, config.input_size, config.input_size, device=device)
    known = torch.zeros(n, W, dtype=torch.bool, device=device)
    if mask is not None:
        part = mask[:, start : start + W]
        used = part.any(dim=0).nonzero()[:, 0]  # frames that no sample is given are not encoded
        if len(used):
            latents[:, :, used] = plan.vae.encode(clips[:, :, start + used])
        known[:, : part.shape[1]] = part
    if tail is not None:
        latents[:, :, : plan.overlap], known[:, : plan.overlap] = tail, True
    return {"given": latents, "mask": known[:, None, :, None, None]}


def initial_latents(plan, indices, seed, device, init, init_gamma, window=0):
    """Where a window of the samples `indices` starts, (n, C, T, h, w): noise, or as `generate` says of init."""
    config = plan.model.config
    shape = (config.in_channels, plan.window, config.input_size, config.input_size)
    noise = normal(seed, "sample", window, indices, shape).to(device)
    if init is None:
        return noise
    encoded = plan.vae.encode(init(indices)[0].to(device))
    return transport.interpolate(encoded, noise, torch.full((len(indices),), init_gamma, device=device))

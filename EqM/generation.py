"""Generate clips from a checkpoint: sampler settings, what to sample, batches and windows."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

import checkpoint
import transport
from given import NOT_FORCED, Details
from models import Condition, EqM, model_name
from rope import REFERENCE_FPS
from runtime import distributed
from runtime.cli import (
    NON_NEGATIVE,
    POSITIVE,
    Bar,
    UserError,
    number,
    plural,
    resolve_precision,
    say,
)
from runtime.distributed import rank
from runtime.rng import normal
from samplers import DESCENTS, SOLVERS, guided, sample
from vae import VAE, check_same, load_vae
from video.samples import NO_LABEL, class_name

SAMPLER = {  # flags of the sampler, and their defaults if the checkpoint has no settings
    "sampler": "gd",
    "num_sampling_steps": 250,
    "stepsize": 0.0017,
    "mu": 0.3,
    "stop_below": None,
    "cfg_scale": 4.0,
}
# names in samples.json (most are also arguments of `samplers.sample`), and their flags
SETTINGS = {
    "method": "sampler",
    "num_steps": "num_sampling_steps",
    "step_size": "stepsize",
    "momentum": "mu",
    "stop_below": "stop_below",
    "guidance": "cfg_scale",
    "precision": "precision",
}
MOST_EVALUATIONS = 100_000  # more is a typing error
STOP_BELOW = 1.0  # as accurate as 249 evaluations, with 57% of them (docs/results.md)


# Settings of the sampler --------------------------------------------------------------------------


def add_flags(parser):
    """Add the flags of the sampler to a parser. `resolve_sampler` fills in their defaults."""
    add = parser.add_argument_group(
        "sampling (default: settings of the checkpoint, else as below)"
    ).add_argument
    add(
        "--sampler",
        choices=[*DESCENTS, *SOLVERS],
        help=(
            "gd: gradient descent; ngd: with Nesterov momentum; euler, heun: the ODE in gamma; "
            "default: gd, or euler if --objective is not eqm"
        ),
    )
    add(
        "--num-sampling-steps",
        type=number(int, least=2),
        metavar="N",
        help=(
            "points of the path: gd, ngd and euler take N - 1 evaluations, heun 2 N - 3; default: "
            f"{SAMPLER['num_sampling_steps']}"
        ),
    )
    add(
        "--stepsize",
        type=POSITIVE,
        metavar="X",
        help=(
            "step size eta of gd and ngd; if you set only one of N and X, the other keeps "
            f"evaluations x step size; default: {SAMPLER['stepsize']}"
        ),
    )
    add("--mu", type=NON_NEGATIVE, help=f"momentum of ngd; default: {SAMPLER['mu']}")
    add(
        "--stop-below",
        type=NON_NEGATIVE,
        nargs="?",
        const=STOP_BELOW,
        metavar="R",
        help=(
            "gd and ngd: stop a sample when the root mean square of its field is below R (0: off; "
            f"no R: {STOP_BELOW}); default: off"
        ),
    )
    add(
        "--cfg-scale",
        type=NON_NEGATIVE,
        help=f"scale of classifier-free guidance; 1 = off; default: {SAMPLER['cfg_scale']}",
    )


def resolve_sampler(args, training, objective):
    """Return {flag: value} from the command line, else config["training"], else SAMPLER.

    Raises UserError.
    """
    usual = SAMPLER | {"sampler": objective.usual_sampler}
    kept = {name: training.get(name, value) for name, value in usual.items()}
    typed = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    path = ("num_sampling_steps", "stepsize")
    # solvers have no path length to keep
    if kept["sampler"] in SOLVERS and args.sampler in DESCENTS:
        kept |= {name: SAMPLER[name] for name in path}
    values = kept | typed
    if values["sampler"] in DESCENTS and not objective.has_equilibria:
        raise UserError(
            f"--sampler {args.sampler}: a model of --objective {objective.name} has no equilibria "
            "to descend to; expected euler or heun; change or remove --sampler"
        )
    if values["sampler"] in SOLVERS:
        why = f"{values['sampler']} has a fixed number of steps"
        advice = (
            "expected gd or ngd; change --sampler, or remove --stop-below"
            if objective.has_equilibria
            else "remove it"
        )
        if args.stop_below:
            raise UserError(f"--stop-below {args.stop_below}: {why}; {advice}")
        values["stop_below"] = 0
    elif len(typed.keys() & path) == 1:
        length = (kept["num_sampling_steps"] - 1) * kept["stepsize"]
        if "stepsize" in typed:
            why = (
                f"a path of length {length:g} takes too many evaluations; expected fewer than "
                f"{MOST_EVALUATIONS:,}"
            )
            if args.stepsize * MOST_EVALUATIONS <= length:
                raise UserError(f"--stepsize {args.stepsize}: {why}; take larger steps")
            values["num_sampling_steps"] = max(1, round(length / args.stepsize)) + 1
        else:
            values["stepsize"] = length / (args.num_sampling_steps - 1)
    chosen = "cfg_scale" in typed or bool(training.get("guidance_chosen"))
    return values | {"stop_below": values["stop_below"] or None, "guidance_chosen": chosen}


def sampling_settings(args):
    """Return {name: value} of SETTINGS from resolved flags."""
    return {name: getattr(args, flag) for name, flag in SETTINGS.items()}


def count_evaluations(settings):
    """Return the maximum number of evaluations of the field per sample."""
    steps = settings["num_steps"] - 1
    return 2 * steps - 1 if settings["method"] == "heun" else steps


# What is sampled ----------------------------------------------------------------------------------


@dataclass
class Plan:
    """A model and which samples to generate with it."""

    model: EqM
    vae: VAE
    classes: list  # names of the model's classes
    labels: torch.Tensor  # (num_samples,) int64: class of each sample, or NO_LABEL
    num_frames: int
    time_scale: float  # seconds per frame
    time_scales: list | None = None  # of each sample; None = time_scale
    step: int = 0  # of training
    trained_frames: int = 0  # frames per clip at the end of training
    forcing: float = 0.0  # --forcing of training
    gamma_shift: float = 1.0  # --gamma-shift of training
    window: int | None = None  # frames sampled at a time; None = all
    overlap: int = 0  # first frames of a window, copied from the previous window
    weights_sha256: str = ""  # of the loaded weights, not of their file
    weak: EqM | None = None  # the model of --weak-ckpt
    weak_sha256: str | None = None

    def __post_init__(self):
        self.window = self.window or self.num_frames
        self.time_scales = self.time_scales or [self.time_scale] * len(self.labels)

    @property
    def window_starts(self):
        return window_starts(self.num_frames, self.window, self.overlap)

    @property
    def names(self):
        """The class name of each sample, or "none"."""
        return [class_name(self.classes, label) or "none" for label in self.labels.tolist()]

    @property
    def image_size(self):
        return self.model.config.input_size * self.vae.downsample


def window_starts(num_frames, window, overlap):
    """Return the first frame of each window of a video."""
    return list(range(0, max(1, num_frames - overlap), window - overlap))


def cast_products(model, precision):
    """In mixed precision, cast the weights of a model's matrix products, which autocast would cast
    in every call.

    Outputs under autocast are bit-equal.
    """
    for module in model.modules() if precision in distributed.MIXED else ():
        # PatchEmbed's convolution is a matrix product, too
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.to(distributed.MIXED[precision])


def open_checkpoint(args):
    """Check what needs no GPU.

    Returns ({name: value} of flags that follow from --ckpt, Plan). Raises UserError.
    """
    names = ("model", "video", "use_rope", "ebm", "objective", "temporal_patch_size", "num_classes")
    checks = {name: getattr(args, name) for name in names}
    model, config, step = checkpoint.load_model(args.ckpt, use_ema=not args.no_ema, **checks)
    data = config["data"]
    training = config["training"]
    trained = training["num_frames"]
    forcing = training.get("forcing", 0.0)  # published models: none
    if trained <= model.config.temporal_patch_size:
        forcing = 0.0  # training never forces clips of one temporal patch
    num_frames = args.num_frames or trained
    time_scale = args.time_scale or data["time_scale"]
    if args.fps:
        time_scale = 1 / args.fps
    values = {"precision": resolve_precision(args.precision, energy=model.config.ebm != "none")}
    values |= resolve_sampler(args, training, model.config.learns) | {"num_frames": num_frames}
    window, overlap = choose_windows(
        args, model.config, num_frames, trained, data, time_scale, forcing
    )
    weak = open_weak(args, model.config, data, window)
    for own in filter(None, (model, weak)):
        scale_rope(args, own, data, trained, window, time_scale)
    hashes = (
        [own and checkpoint.weights_sha256(own.state_dict()) for own in (model, weak)]
        if rank() == 0
        else ("", "")
    )
    plan = Plan(
        model,
        open_vae(args, model.config, data),
        data["classes"],
        choose_labels(args, data["classes"]),
        num_frames,
        time_scale,
        step=step,
        trained_frames=trained,
        forcing=forcing,
        gamma_shift=training.get("gamma_shift", 1.0),
        window=window,
        overlap=overlap,
        weak=weak,
        weights_sha256=hashes[0],
        weak_sha256=hashes[1],  # only rank 0 writes hashes
    )
    return values, plan


def open_weak(args, strong, data, window):
    """The model of --weak-ckpt, or None.

    Raises UserError unless it has the classes and latents of --ckpt.
    """
    if args.weak_ckpt is None:
        return None

    def inputs(config, data):
        told = config.objective, config.level_frames
        return *told, config.input_size, config.in_channels, data["classes"], data.get("vae_sha256")

    try:
        model, config, _ = checkpoint.load_model(args.weak_ckpt, not args.no_ema, video=args.video)
        model.config.check_num_frames(window)
        if inputs(model.config, config["data"]) != inputs(strong, data):
            expected = (
                "expected a weaker model of the same data; use an earlier checkpoint of the run"
            )
            raise ValueError(
                f"has another objective, other classes or latents than --ckpt {args.ckpt}; "
                f"{expected}"
            )
    except (UserError, ValueError) as error:
        text = str(error).removeprefix(f"--ckpt {args.weak_ckpt}: ")
        raise UserError(f"--weak-ckpt {args.weak_ckpt}: {text}") from error
    return model


def say_plan(args, plan):
    """Print one line that says what is sampled and how."""
    size = f" of step size {args.stepsize:.3g}" if args.sampler in DESCENTS else ""
    sampler = (
        f"{args.sampler}, {plural(count_evaluations(sampling_settings(args)), 'evaluation')}{size}"
    )
    windows = f" in windows of {plan.window}" if plan.window < plan.num_frames else ""
    model = model_name(**asdict(plan.model.config))
    frames = plural(plan.trained_frames, "frame")
    model = f"{model}, step {plan.step}, trained on {frames}"
    guidance = f"guidance {args.cfg_scale:g}" + (f" by {args.weak_ckpt}" if plan.weak else "")
    say(f"{args.ckpt}: {model}; samples of {plan.num_frames}{windows} by {sampler}, {guidance}")
    if windows and not plan.forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: windows may not continue smoothly")


def choose_windows(args, config, num_frames, trained, data, time_scale, forcing):
    """Return (frames per window, overlap of two windows) for videos of num_frames frames.

    Raises UserError. By default a window has at least the frames and the duration of the longest
    training clip. Without forcing, or with --rope-scale, which squeezes all frames into the trained
    span, one window covers the video.
    """
    usual = num_frames
    patch = config.temporal_patch_size
    if forcing and args.rope_scale == "none":
        stretch = data["longest_time_scale"] / time_scale if config.use_rope else 1
        # whole temporal patches
        usual = max(trained, math.floor(trained * stretch / patch + 1e-6) * patch)
    window = min(num_frames, args.window or usual)
    if window < num_frames and not args.window:
        window = config.whole_levels(window)
    try:
        config.check_num_frames(window)
    except ValueError as error:
        raise UserError(
            f"--{'window' if args.window else 'num-frames'} {window}: {error}"
        ) from error
    if window == num_frames:
        return window, 0
    overlap = config.whole_levels(window // 2) if args.overlap is None else args.overlap
    if overlap >= window:
        wrong = (
            f"--overlap {overlap}: leaves no new frames in a window of {window}; expected a "
            "smaller number"
        )
        raise UserError(
            f"--window {window}: expected two temporal patches" if args.overlap is None else wrong
        )
    unit = config.level_frames
    for name, frames in (("window", window), ("overlap", overlap)):
        if frames % unit:
            why = (
                "splits a temporal patch, which has one noise level in --objective "
                f"{config.objective}"
            )
            raise UserError(f"--{name} {frames}: {why}; expected a multiple of {unit}")
    return window, overlap


def open_vae(args, config, data):
    """Load the VAE of a checkpoint, from --vae or else from where it was in training.

    Raises UserError.
    """
    vae = load_vae(args.vae, data["vae"], "the checkpoint")
    size = config.input_size * vae.downsample
    if (vae.channels, size) != (config.in_channels, data["image_size"] or size):
        raise UserError(
            f"--vae {vae.name}: not the VAE of --ckpt {args.ckpt}; expected {data['vae']}; pass "
            "its path"
        )
    check_same(vae, data.get("vae_sha256"), f"--ckpt {args.ckpt}")
    if args.image_size not in (None, size):
        raise UserError(
            f"--image-size {args.image_size}: the checkpoint has {size}; remove the flag"
        )
    return vae


def scale_rope(args, model, data, trained_frames, num_frames, time_scale):
    """Squeeze the rotary time positions of longer clips into the trained span for --rope-scale.

    Raises UserError.
    """
    if args.rope_scale == "none":
        return
    if not model.config.use_rope:
        raise UserError(
            f"--rope-scale {args.rope_scale}: {args.ckpt} has fixed positions; remove the flag"
        )
    clips = (trained_frames, data["time_scale"]), (num_frames, time_scale)
    trained, sampled = (
        model.config.grid(frames)[0] * REFERENCE_FPS * seconds for frames, seconds in clips
    )
    model.rope.stretch = max(1.0, sampled / trained)


def choose_labels(args, names):
    """Return the class of each sample, (num_samples,) int64: --classes in turn.

    Raises UserError.
    """
    known = {str(label): label for label in range(len(names))} | {
        name: label for label, name in enumerate(names)
    }
    known["none"] = NO_LABEL  # even if the model has a class of this name
    if unknown := [word for word in args.classes or [] if word not in known]:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        expected = f"expected one of {some}, an index below {len(names)}, or none"
        raise UserError(f"--classes {unknown[0]}: no such class; {expected}")
    labels = [known[word] for word in args.classes] if args.classes else list(range(len(names)))
    return torch.tensor(labels)[torch.arange(args.num_samples) % len(labels)]


def provenance(plan, args):
    """Return everything that determines the samples of a checkpoint, as plain values for JSON."""
    of_flags = ("rope_scale", "keep_background", "guidance_chosen", "seed", "batch_size", "compile")
    of_plan = (
        "weights_sha256",
        "weak_sha256",
        "step",
        "image_size",
        "num_frames",
        "window",
        "overlap",
        "time_scale",
        "gamma_shift",
    )
    return {
        "checkpoint": str(args.ckpt),
        "averaged_weights": not args.no_ema,
        "vae": plan.vae.name,
        "vae_sha256": plan.vae.sha256,
        "model": model_name(**asdict(plan.model.config)),
        "objective": plan.model.config.objective,
        "temporal_patch_size": plan.model.config.temporal_patch_size,
        **{name: getattr(plan, name) for name in of_plan},
        **{name: getattr(args, name) for name in of_flags},
        **sampling_settings(args),
    }


# Noise -> latents -> videos -----------------------------------------------------------------------


@torch.no_grad()
def generate(
    plan,
    indices,
    seed,
    device,
    settings,
    batch_size=16,
    given=None,
    init=None,
    init_gamma=0.0,
    keep_background=True,
    energy=False,
    strict=True,
    before_evaluation=lambda: None,
):
    """Generate the samples `indices` of a Plan by batch and window, with one progress bar.

    The noise of a sample depends only on seed, index and window. Each window starts with the last
    frames of the previous one. A batch without any condition has no guidance by class.

    Args:
        settings: from `sampling_settings`.
        given: given(indices) returns clips uint8 (n, 3, T, H, W) and a mask (n, T), which is true
            for given frames. Samples keep these; for keep_background see `Details`.
        init: init(indices) returns clips as `given` does. They replace a share init_gamma of the
            noise at the start.
        energy: also record the (guided) energy at every point.
        strict: raise UserError if samples are not finite; otherwise print a note.
        before_evaluation: called before each evaluation of the network; may raise.

    Yields for each window of each batch: the samples' indices, the number of the first new frame,
    the new frames uint8 (n, k, H, W, 3), evaluations (n,) and energies (n, num_steps), None without
    `energy`.
    """
    starts = plan.window_starts
    most = count_evaluations(settings)
    settings = settings | {"start_gamma": init_gamma}
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    total = len(batches) * len(starts) * most
    with Bar(
        total=total, desc="sampling", unit="evaluation", leave=False, disable=rank() != 0
    ) as bar:

        def step(running):
            bar.set_postfix_str(f"{running} running", refresh=False)
            bar.update()
            before_evaluation()

        for batch in batches:
            condition = Condition.of(plan.labels[batch], plan.model.config).to(device)
            time_scale = torch.tensor([plan.time_scales[index] for index in batch], device=device)
            clips, mask = (part.to(device) for part in given(batch)) if given else (None, None)
            details = given and Details(clips, mask, keep_background)
            tail = None
            for number, start in enumerate(starts):
                end = bar.n + most
                x = initial_latents(plan, batch, seed, device, init, init_gamma, number)
                masked = masked_part(plan, x, start, clips, mask, tail)
                latents, *counts = sample_window(
                    plan, x, condition, time_scale, masked, settings, energy, strict, step
                )
                bar.update(end - bar.n)  # samples may all stop early
                tail = latents[:, :, -plan.overlap :]
                first = plan.overlap if number else 0
                videos = plan.vae.decode(latents[:, :, first : plan.num_frames - start])
                if given:
                    videos = details.add(videos, start + first)
                yield batch, start + first, videos, *counts


def sample_window(plan, x, condition, time_scale, masked, settings, energy, strict, step):
    """Follow the guided field of a Plan from x (B, C, T, H, W).

    Returns (samples, evaluations (B,), energies or None). Samples are float32;
    settings["precision"] applies to the network only. masked: from `masked_part`. step(number of
    running samples) is called before each evaluation. Energies are (B, num_steps), NaN after a
    sample has stopped.
    """
    if masked and masked["mask"].all():  # nothing to sample
        return masked["given"], torch.zeros(len(x), dtype=torch.int64, device=x.device), None
    settings = dict(settings)
    precision = settings.pop("precision")
    guidance = settings.pop("guidance")
    model = plan.model
    weak = plan.weak
    by = condition, time_scale, 1.0 if condition.is_null() and weak is None else guidance
    field = guided(model, *by, weak)
    energy_of = energy and guided(model.energy, *by, weak and weak.energy)
    energies = (
        torch.full((len(x), settings["num_steps"]), torch.nan, device=x.device) if energy else None
    )
    points = iter(range(settings["num_steps"]))

    def counted(x, keep, *gamma):
        step(len(keep))
        return field(x, keep, *gamma)

    def observe(x, keep):
        if energy:
            energies[keep, next(points)] = energy_of(x, keep)

    with distributed.autocast(x.device, precision):
        samples, evaluations = sample(
            counted,
            x,
            objective=model.config.learns,
            shift=model.config.learns.solver_shift(plan.gamma_shift),
            observe=observe,
            **masked,
            **settings,
        )
    if not samples.isfinite().all():
        text = f"--sampler {settings['method']}: samples are not finite"
        if strict:
            raise UserError(f"{text}; use smaller steps, more steps or another checkpoint")
        say(f"note: {text}")
    return samples, evaluations, energies


def masked_part(plan, x, start, clips, mask, tail):
    """Return the arguments `given` and `mask` of `samplers.sample` for the window x from `start`.

    They hold the given frames, where mask (n, T) of clips uint8 (n, 3, T, H, W) is true, and
    `tail`, the last latents of the previous window. Returns {} if both are None.
    """
    if mask is None and tail is None:
        return {}
    latents = torch.zeros_like(x)
    masked = torch.zeros(len(x), plan.window, dtype=torch.bool, device=x.device)
    if mask is not None:
        masked[:, : plan.num_frames - start] = mask[:, start : start + plan.window]
        # encoding takes long, so only given frames
        if len(used := masked.any(dim=0).nonzero()[:, 0]):
            latents[:, :, used] = plan.vae.encode(clips[:, :, start + used])
    if tail is not None:
        latents[:, :, : plan.overlap] = tail
        masked[:, : plan.overlap] = True
    return {"given": latents, "mask": masked[:, None, :, None, None]}


def initial_latents(plan, indices, seed, device, init, init_gamma, window):
    """Return the initial latents of a window, (n, C, T, h, w): noise, or with `init` an
    interpolation with clips.
    """
    config = plan.model.config
    shape = (config.in_channels, plan.window, config.input_size, config.input_size)
    noise = normal(seed, "sample", window, indices, shape).to(device)
    if init is None:
        return noise
    encoded = plan.vae.encode(init(indices)[0].to(device))
    return transport.interpolate(
        encoded, noise, torch.full((len(indices),), init_gamma, device=device)
    )

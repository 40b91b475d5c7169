"""What to sample from a checkpoint, and how: settings of the sampler, windows, labels."""

import math
from dataclasses import dataclass

import torch

import checkpoint
from given import NOT_FORCED
from models import Condition, EqM
from rope import REFERENCE_FPS
from runtime.cli import (
    NON_NEGATIVE,
    POSITIVE,
    UserError,
    flag_text,
    number,
    plural,
    resolve_precision,
    say,
)
from runtime.distributed import rank
from samplers import DESCENTS, SOLVERS
from vae import VAE, check_same, load_vae
from video.actions import NO_ACTION, find_sequences
from video.index import name_some
from video.samples import NO_LABEL, class_names

SAMPLER = {  # flags of the sampler, and their defaults if the checkpoint has no settings
    "sampler": "gd",
    "num_sampling_steps": 250,
    "stepsize": 0.0017,
    "mu": 0.3,
    "solver_shift": None,
    "stop_below": None,
    "cfg_scale": 4.0,
}
STUDENT_SAMPLER = {  # defaults of a student (video/pairs.py), whose teacher was guided
    "sampler": "euler",
    "num_sampling_steps": 5,
    "solver_shift": None,
    "stop_below": None,
    "cfg_scale": 1.0,
    "guidance_chosen": True,
}
# names in samples.json (most are also arguments of `samplers.sample`), and their flags
FLAG_OF_SETTING = {
    "method": "sampler",
    "num_steps": "num_sampling_steps",
    "step_size": "stepsize",
    "momentum": "mu",
    "shift": "solver_shift",
    "stop_below": "stop_below",
    "guidance": "cfg_scale",
    "precision": "precision",
}
MOST_EVALUATIONS = 100_000  # more is a typing error
STOP_BELOW = 1.0  # stops after 10 evaluations on Moving Shapes (results/studies/objectives)


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
        "--solver-shift",
        type=POSITIVE,
        metavar="S",
        help=(
            "euler and heun: above 1, more steps are near the noise; default: --gamma-shift of "
            "training, eqm: 1"
        ),
    )
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

    "guidance_chosen" is True if somebody gave --cfg-scale, here or in training. Raises UserError.
    """
    usual = SAMPLER | {"sampler": "gd" if objective.has_equilibria else "euler"}
    kept = {name: training.get(name, value) for name, value in usual.items()}
    typed = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    if kept["sampler"] in SOLVERS and args.sampler in DESCENTS:
        # solvers have no path length to keep
        kept["num_sampling_steps"] = SAMPLER["num_sampling_steps"]
        kept["stepsize"] = SAMPLER["stepsize"]
    values = kept | typed
    if values["sampler"] in DESCENTS and not objective.has_equilibria:
        raise UserError(
            f"--sampler {args.sampler}: a model of --objective {objective.name} has no equilibria "
            "to descend to; expected euler or heun; change or remove --sampler"
        )
    if values["sampler"] in DESCENTS and args.solver_shift:
        raise UserError(
            f"--solver-shift {args.solver_shift}: applies to euler and heun, not to "
            f"{values['sampler']}; change --sampler, or remove it"
        )
    if values["sampler"] in SOLVERS:
        if args.stop_below:
            advice = "remove it"
            if objective.has_equilibria:
                advice = "expected gd or ngd; change --sampler, or remove --stop-below"
            raise UserError(
                f"--stop-below {args.stop_below}: {values['sampler']} has a fixed number of "
                f"steps; {advice}"
            )
        values["stop_below"] = None
    elif len(typed.keys() & {"num_sampling_steps", "stepsize"}) == 1:
        # The descent keeps its length, evaluations x step size, and so ends equally far
        length = (kept["num_sampling_steps"] - 1) * kept["stepsize"]
        if "num_sampling_steps" in typed:
            values["stepsize"] = length / (args.num_sampling_steps - 1)
        elif args.stepsize * MOST_EVALUATIONS <= length:
            raise UserError(
                f"--stepsize {args.stepsize}: a path of length {length:g} takes too many "
                f"evaluations; expected fewer than {MOST_EVALUATIONS:,}; take larger steps"
            )
        else:
            values["num_sampling_steps"] = max(1, round(length / args.stepsize)) + 1
    for name, samplers in {"stepsize": DESCENTS, "mu": ["ngd"]}.items():
        if name in typed and values["sampler"] not in samplers:
            # no error: it may be of a recipe, in which only --sampler was replaced
            say(
                f"note: --{name} {typed[name]:g}: applies to {' and '.join(samplers)}, not to "
                f"{values['sampler']}"
            )
    values["stop_below"] = values["stop_below"] or None
    values["guidance_chosen"] = "cfg_scale" in typed or bool(training.get("guidance_chosen"))
    return values


def sampling_settings(args):
    """Return {setting: value}, of FLAG_OF_SETTING, from resolved flags."""
    return {name: getattr(args, flag) for name, flag in FLAG_OF_SETTING.items()}


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
    conditions: torch.Tensor  # (num_samples,) int64, what Condition.of takes: here classes
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
    teacher: dict | None = None  # of a student: what made the samples that it was trained on
    spans: torch.Tensor | None = None  # (num_samples, patches): a condition for each, if causal
    # (num_samples, num_frames) int64, if the model has actions; None = each sample repeats one
    actions: torch.Tensor | None = None

    def __post_init__(self):
        config = self.model.config
        usual = config.temporal_patch_size if config.causal else self.num_frames
        self.window = self.window or usual
        self.time_scales = self.time_scales or [self.time_scale] * len(self.conditions)
        if config.actions and self.actions is None:
            repeated = torch.arange(len(self.conditions)) % len(config.action_names)
            self.actions = repeated[:, None].repeat(1, self.num_frames)

    @property
    def names(self):
        """The name of the class of each sample, or "none"."""
        return class_names(self.classes, self.conditions)

    @property
    def window_starts(self):
        return window_starts(self.num_frames, self.window, self.overlap)

    def time_scale_of(self, indices):
        """The seconds per frame of the samples `indices`, (n,)."""
        return torch.tensor([self.time_scales[index] for index in indices])

    def condition_at(self, indices, frame, action=None, labels=None):
        """The Condition of the samples `indices` in the window from a frame on.

        action: what they do, in place of the plan's actions: the numbers (n,). The first frame of a
        clip has none, as it leads from a frame that nobody sees. labels: their classes (n,), in
        place of the plan's.
        """
        config = self.model.config
        if labels is not None:
            y = labels
        elif self.spans is not None:
            y = self.spans[indices, frame // config.temporal_patch_size]
        else:
            y = self.conditions[indices]
        if config.actions:
            actions = torch.full((len(indices), self.window), NO_ACTION)
            planned = self.actions[indices, frame : frame + self.window]
            actions[:, : planned.shape[1]] = planned  # the last window may reach beyond them
            if action is not None:
                actions[:] = action[:, None]
            if frame == 0 or not config.causal:
                actions[:, 0] = NO_ACTION
            y = torch.cat([y[:, None], actions], dim=1)  # (n, 1 + T)
        return Condition.of(y, config)

    @property
    def image_size(self):
        return self.model.config.input_size * self.vae.downsample


def window_starts(num_frames, window, overlap):
    """Return the first frame of each window. The last window may reach beyond the video."""
    return list(range(0, max(1, num_frames - overlap), window - overlap))


def open_checkpoint(args):
    """Load the model of --ckpt, and return what `make_plan` does. Raises UserError."""
    model, config, step = checkpoint.load_model(
        args.ckpt,
        use_ema=not args.no_ema,
        model=args.model,
        video=args.video,
        use_rope=args.use_rope,
        ebm=args.ebm,
        objective=args.objective,
        temporal_patch_size=args.temporal_patch_size,
        num_classes=args.num_classes,
    )
    values, plan = make_plan(args, model, config=config, step=step)
    if rank() == 0:  # which writes samples.json
        plan.weights_sha256 = checkpoint.weights_sha256(model.state_dict())
        plan.weak_sha256 = plan.weak and checkpoint.weights_sha256(plan.weak.state_dict())
    return values, plan


def make_plan(args, model, config, step, vae=None):
    """({name: value} of flags that follow from the checkpoint, Plan).

    model, config, step: from `checkpoint.load_model`. vae: the checkpoint's, if it is loaded
    already. Raises UserError; needs no GPU.
    """
    data = config["data"]
    training = config["training"]
    trained_frames = training["num_frames"]
    forcing = training.get("forcing", 0.0)  # published models: none
    if trained_frames <= model.config.temporal_patch_size:
        forcing = 0.0  # training never forces clips of one temporal patch
    if model.config.causal:
        check_causal(args, model.config)
        forcing = 1.0  # of all clips: each patch continues clean ones
    num_frames, spans, actions = choose_course(args, data["classes"], model.config, trained_frames)
    time_scale = args.time_scale or data["time_scale"]
    if args.fps:
        time_scale = 1 / args.fps
    values = resolve_sampler(args, training, model.config.learns)
    values["precision"] = resolve_precision(args.precision, energy=model.config.ebm != "none")
    values["num_frames"] = num_frames
    window = model.config.temporal_patch_size
    overlap = 0
    if not model.config.causal:
        window, overlap = choose_windows(
            args,
            model.config,
            num_frames=num_frames,
            trained_frames=trained_frames,
            data=data,
            time_scale=time_scale,
            forcing=forcing,
        )
    weak = open_weak(args, model.config, data, window)
    if weak is not None and values["cfg_scale"] == 1:
        raise UserError(
            f"--weak-ckpt {args.weak_ckpt}: does nothing with --cfg-scale 1; expected guidance; "
            "set --cfg-scale, such as 1.5, or remove --weak-ckpt"
        )
    stretch = rope_stretch(
        args,
        model.config,
        trained=(trained_frames, data["time_scale"]),
        sampled=(window, time_scale),
    )
    for network in filter(None, (model, weak)):
        if network.config.use_rope:
            network.rope.stretch = stretch
    conditions = choose_labels(args, data["classes"]) if spans is None else spans[:, 0]
    return values, Plan(
        model,
        vae=vae or open_vae(args, model.config, data),
        classes=data["classes"],
        conditions=conditions,
        num_frames=num_frames,
        time_scale=time_scale,
        step=step,
        trained_frames=trained_frames,
        forcing=forcing,
        gamma_shift=training.get("gamma_shift", 1.0),
        window=window,
        overlap=overlap,
        weak=weak,
        teacher=training.get("teacher"),
        spans=spans,
        actions=actions,
    )


def open_weak(args, strong, data, window):
    """The model of --weak-ckpt, for autoguidance, or None.

    Raises UserError unless it has the conditions and latents of --ckpt.
    """
    if args.weak_ckpt is None:
        return None

    def inputs(config, data):  # what both models must have in common
        return (
            config.objective,
            config.causal,
            config.actions,
            args.report_energy and config.ebm != "none",
            config.level_frames,
            config.input_size,
            config.in_channels,
            data["classes"],
            data.get("vae_sha256"),
        )

    try:
        model, config, _ = checkpoint.load_model(args.weak_ckpt, not args.no_ema, video=args.video)
        model.config.check_num_frames(window)
        if inputs(model.config, config["data"]) != inputs(strong, data):
            raise ValueError(
                "has another objective, energy or kind of attention, other classes, actions or "
                f"latents than --ckpt {args.ckpt}; expected a weaker model of the same data; use "
                "an earlier checkpoint of the run"
            )
    except (UserError, ValueError) as error:
        text = str(error).removeprefix(f"--ckpt {args.weak_ckpt}: ")
        raise UserError(f"--weak-ckpt {args.weak_ckpt}: {text}") from error
    return model


def say_plan(args, plan):
    """Print one line that says what is sampled and how."""
    trained = f"step {plan.step}, trained on {plural(plan.trained_frames, 'frame')}"
    if plan.teacher:
        trained += f", student of a teacher with guidance {plan.teacher['guidance']:g}"
    windows = f" in windows of {plan.window}" if plan.window < plan.num_frames else ""
    evaluations = plural(count_evaluations(sampling_settings(args)), "evaluation")
    size = f" of step size {args.stepsize:.3g}" if args.sampler in DESCENTS else ""
    weak = f" by {args.weak_ckpt}" if plan.weak else ""
    say(
        f"{args.ckpt}: {plan.model.config.name}, {trained}; samples of {plan.num_frames}{windows} "
        f"by {args.sampler}, {evaluations}{size}, guidance {args.cfg_scale:g}{weak}"
    )
    if windows and not plan.forcing:
        say(f"note: {args.ckpt} {NOT_FORCED}: windows may not continue smoothly")


def choose_windows(args, config, num_frames, trained_frames, data, time_scale, forcing):
    """Return (frames per window, overlap of two windows) for videos of num_frames frames.

    Raises UserError. By default a window has at least the frames and the duration of the longest
    training clip. Without forcing, or with --rope-scale, which squeezes all frames into the trained
    span, one window covers the video.
    """
    usual = num_frames
    if forcing and args.rope_scale == "none":
        patch = config.temporal_patch_size
        # So many frames of these samples last as long as the longest training clip
        as_long = trained_frames
        if config.use_rope:
            as_long *= data["longest_time_scale"] / time_scale
        whole_patches = math.floor(as_long / patch + 1e-6)
        usual = max(trained_frames, whole_patches * patch)
    window = min(num_frames, args.window or usual)
    if window < num_frames and not args.window:
        window = config.whole_levels(window)
    try:
        config.check_num_frames(window)
    except ValueError as error:
        flag = "--window" if args.window else "--num-frames"
        raise UserError(f"{flag} {window}: {error}") from error
    if window == num_frames:
        return window, 0
    overlap = args.overlap
    if overlap is None:
        overlap = config.whole_levels(window // 2)  # at least a patch, perhaps the whole window
        if overlap >= window:
            raise UserError(f"--window {window}: expected two temporal patches")
    elif overlap >= window:
        raise UserError(
            f"--overlap {overlap}: leaves no new frames in a window of {window}; expected a "
            "smaller number"
        )
    unit = config.level_frames
    for name, frames in (("window", window), ("overlap", overlap)):
        if frames % unit:
            raise UserError(
                f"--{name} {frames}: splits a temporal patch, which has one noise level in "
                f"--objective {config.objective}; expected a multiple of {unit}"
            )
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


def rope_stretch(args, config, trained, sampled):
    """The factor by which --rope-scale divides rotary time positions, at least 1: that squeezes
    longer clips into the trained span.

    trained, sampled: (frames, seconds per frame) of a clip. Raises UserError.
    """
    if args.rope_scale == "none":
        return 1.0
    if not config.use_rope:
        raise UserError(
            f"--rope-scale {args.rope_scale}: {args.ckpt} has fixed positions; remove the flag"
        )

    def span(num_frames, seconds):
        return config.grid(num_frames)[0] * REFERENCE_FPS * seconds

    return max(1.0, span(*sampled) / span(*trained))


def label_of(word, names):
    """The class that a word of --classes names. Raises UserError."""
    known = {str(label): label for label in range(len(names))}
    known |= {name: label for label, name in enumerate(names)}
    known["none"] = NO_LABEL  # even if the model has a class of this name
    if word not in known:
        raise UserError(
            f"--classes {word}: no such class; expected one of {name_some(names, 8)}, an index "
            f"below {len(names)}, or none"
        )
    return known[word]


def choose_course(args, names, config, trained_frames):
    """(num_frames, spans, actions) of a Plan: what happens in its samples, and for how long.

    names: of the classes. Raises UserError.
    """
    spans = choose_spans(args, names, config)
    num_frames = args.num_frames
    if spans is not None:
        num_frames = spans.shape[1] * config.temporal_patch_size
    actions = choose_actions(args, config, asked=num_frames, usual=trained_frames)
    if actions is not None:
        num_frames = actions.shape[1]
    return num_frames or trained_frames, spans, actions


def choose_spans(args, names, config):
    """The class of each temporal patch of each sample, (num_samples, patches) int64, from words of
    --classes such as "CircleUp*8,CircleLeft*8", in turn. None if no word has spans.

    Raises UserError.
    """
    words = args.classes or []
    if not any("*" in word for word in words):
        return None
    if not config.causal:
        raise UserError(
            f"--classes {words[0]}: only a causal model changes its class; name one class"
        )
    patch = config.temporal_patch_size
    rows = []
    for word in words:
        row = []
        for span in word.split(","):
            name, _, frames = span.rpartition("*")
            if not frames.isdecimal() or int(frames) % patch or not int(frames):
                raise UserError(
                    f"--classes {word}: expected spans such as {names[0]}*{4 * patch}, of a "
                    f"multiple of {patch} frames, a temporal patch"
                )
            row += [label_of(name, names)] * (int(frames) // patch)
        rows.append(row)
    lengths = sorted({len(row) * patch for row in rows})
    if len(lengths) > 1 or args.num_frames not in (None, *lengths):
        asked = f" for --num-frames {args.num_frames}" if args.num_frames else ""
        raise UserError(
            f"--classes: spans of {' and '.join(map(str, lengths))} frames{asked}; expected the "
            "same number; change a span, or remove --num-frames"
        )
    return in_turn(rows, args.num_samples)


def choose_actions(args, config, asked, usual):
    """The actions of each sample, (num_samples, T) int64: --actions in turn, after the given frames
    or the first one. None for a model without actions.

    asked: T of other flags, at most as long, or None; usual: T without any. Raises UserError.
    """
    names = config.action_names
    if not names:
        if args.actions:
            raise UserError(
                f"{flag_text(args, 'actions')}: {args.ckpt} was trained without actions; remove it"
            )
        return None
    if not args.actions:
        say(f"note: {args.ckpt} has actions ({', '.join(names)}); without --actions all are none")
        return torch.full((args.num_samples, asked or usual), NO_ACTION)
    given = args.given_frames or ()
    if args.given and given != tuple(range(max(1, len(given)))):
        raise UserError(
            f"{flag_text(args, 'actions')}: they start after the given frames; expected "
            "--given-frames from 0 on, such as 0-3"
        )
    sequences = find_sequences(args.actions, names)
    first = max(1, len(given))
    length = first + sequences.shape[1]
    if asked is not None and asked > length:
        raise UserError(
            f"--actions: {plural(sequences.shape[1], 'action')} after {plural(first, 'frame')} "
            f"make {length} frames, other flags ask for {asked}; add actions, or remove "
            "--num-frames"
        )
    actions = torch.full((args.num_samples, length), NO_ACTION)
    actions[:, first:] = in_turn(sequences, args.num_samples)
    return actions[:, :asked]


def check_causal(args, config):
    """Raise UserError for flags of sample_gd.py that a causal model does not have."""
    for name in ("window", "overlap", "init", "report_energy", "save_latents", "weak_ckpt"):
        if getattr(args, name):
            raise UserError(
                f"{flag_text(args, name)}: does not apply to a causal model, which makes one "
                f"temporal patch of {config.temporal_patch_size} frames after the other; remove it"
            )
    if args.rope_scale != "none":
        raise UserError(
            f"--rope-scale {args.rope_scale}: does not apply to a causal model, whose context "
            "never grows; remove it"
        )


def choose_labels(args, names):
    """Return the class of each sample, (num_samples,) int64: --classes in turn.

    Raises UserError.
    """
    labels = [label_of(word, names) for word in args.classes or []]
    labels = labels or list(range(len(names)))
    return in_turn(labels, args.num_samples)


def in_turn(values, count):
    """`count` of the values, one after the other, and after the last the first again: (count, ...)
    int64.
    """
    return torch.as_tensor(values)[torch.arange(count) % len(values)]


def provenance(plan, args):
    """Return everything that determines the samples of a checkpoint, as plain values for JSON."""
    config = plan.model.config
    return {
        "checkpoint": str(args.ckpt),
        "averaged_weights": not args.no_ema,
        "vae": plan.vae.name,
        "vae_sha256": plan.vae.sha256,
        "model": config.name,
        "objective": config.objective,
        "temporal_patch_size": config.temporal_patch_size,
        "context": config.context,  # frames that a causal model sees; else None
        "weights_sha256": plan.weights_sha256,
        "weak_sha256": plan.weak_sha256,
        "step": plan.step,
        "image_size": plan.image_size,
        "num_frames": plan.num_frames,
        "window": plan.window,
        "overlap": plan.overlap,
        "time_scale": plan.time_scale,
        "gamma_shift": plan.gamma_shift,
        "rope_scale": args.rope_scale,
        "keep_background": args.keep_background,
        "guidance_chosen": args.guidance_chosen,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "compile": args.compile,
        **sampling_settings(args),
    }

"""From a checkpoint to videos or images: flags, checks and steps that sample_gd.py and evaluate.py share."""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import checkpoint
import samplers
import transport
from checkpoint_parts import trained_time_scale
from models import EBMS, NAMES, EqM
from rope import REFERENCE_FPS, ROPE_SCALES
from runtime import distributed
from runtime.distributed import COUNT, NATURAL, UserError, normal, number, say
from runtime.untrusted import FPS
from vae import VAE, load_vae

MOST_FRAMES, MOST_SAMPLES = 2**16, 2**24  # more is a slip of the pen


def add_what_flags(add, num_samples, default_samples="number of samples"):
    """What is sampled; `add` is the add_argument of a group."""
    frames = number(int, least=1, most=MOST_FRAMES)
    rate, scale = number(float, least=FPS[0], most=FPS[1]), number(float, least=1 / FPS[1], most=1 / FPS[0])
    add("--num-frames", type=frames, metavar="N", help="any number with rotary positions; none = as trained last")
    add("--fps", type=rate, metavar="X", help="frames per second that the clips show; none = as trained")
    add("--time-scale", type=scale, metavar="X", help="the same in seconds per frame")
    add("--classes", nargs="+", metavar="C", help="names or numbers, taken in turn; none = all")
    count = number(int, least=1, most=MOST_SAMPLES)
    add("--num-samples", "--num-fid-samples", type=count, default=num_samples, metavar="N", help=default_samples)
    add("--seed", "--global-seed", type=NATURAL, default=0, metavar="N", help="decides the noise")
    scale = "rotary time positions beyond the trained length: position interpolation, NTK or RIFLEx; none = as trained"
    add("--rope-scale", choices=ROPE_SCALES, default="none", help=scale)
    add("--no-ema", action="store_true", help="use the weights as trained, not their average")


def add_checked_flags(parser):
    """What the checkpoint knows; returns the add_argument of the group."""
    add = parser.add_argument_group("checked against the checkpoint, if given").add_argument
    add("--model", choices=NAMES, metavar="NAME", help="EqM-S/4 ...; published models need it")
    add("--use-rope", action="store_true", default=None, help="the checkpoint has 3D rotary positions")
    add("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    add("--temporal-patch-size", type=COUNT, metavar="N", help="frames per patch")
    add("--image-size", type=COUNT, metavar="PX", help="height and width of the samples")
    add("--num-classes", type=COUNT, metavar="N", help="classes of the model")
    add("--vae", metavar="VAE", help="may name another place for the checkpoint's VAE")
    return add


@dataclass
class Source:
    """A checkpoint, ready to sample."""

    model: EqM
    vae: VAE
    data: dict  # that part of the checkpoint's config
    video: bool  # or images
    step: int
    num_frames: int
    time_scale: float  # seconds per frame
    labels: torch.Tensor  # (num_samples,) int64: the classes in turn

    @property
    def image_size(self):
        return self.model.config.input_size * self.vae.downsample


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
    data, training = config["data"], config["training"]
    vae = load_vae(args.vae or data["vae"])
    size = model.config.input_size * vae.downsample
    same_kind = (vae.name == "none") == (data["vae"] == "none")
    if not same_kind or (vae.channels, size) != (model.config.in_channels, data["image_size"] or size):
        raise UserError(f"--vae {vae.name}: the checkpoint was trained with {data['vae']}: name a place of that one")
    if args.image_size not in (None, size):
        raise UserError(f"--image-size {args.image_size}: the checkpoint has {size}: leave the flag out")
    num_frames = args.num_frames or training["num_frames"]
    try:
        model.config.check_num_frames(num_frames)
    except ValueError as error:
        raise UserError(f"--num-frames {num_frames}: {error}") from error
    if not training["video"] and num_frames != 1:
        raise UserError(f"--num-frames {num_frames}: --ckpt {args.ckpt} holds an image model: leave the flag out")
    time_scale, labels = seconds_per_frame(args, data), choose_labels(args, data["classes"])
    scale_rope(args, model, data, training["num_frames"], num_frames, time_scale)
    name = checkpoint.model_name(**asdict(model.config))
    say(f"{args.ckpt}: {name}, step {step}, trained on {training['num_frames']} frames")
    return Source(model, vae, data, training["video"], step, num_frames, time_scale, labels)


def scale_rope(args, model, data, trained_frames, num_frames, time_scale):
    """Fit the rotary time positions of a model to longer clips, as --rope-scale says. Raises UserError."""
    if args.rope_scale == "none":
        return
    if not model.config.use_rope:
        raise UserError(f"--rope-scale {args.rope_scale}: {args.ckpt} has fixed positions: leave the flag out")
    seconds = trained_time_scale(data), time_scale  # per frame, in training and now
    trained, wanted = (
        model.config.grid(frames)[0] * REFERENCE_FPS * scale
        for frames, scale in zip((trained_frames, num_frames), seconds, strict=True)
    )
    model.rope.scale = args.rope_scale, trained, wanted


def seconds_per_frame(args, data):
    if args.fps and args.time_scale:
        raise UserError("--fps and --time-scale say the same: give one of them")
    return args.time_scale or (1 / args.fps if args.fps else trained_time_scale(data))


def choose_labels(args, names):
    """The label of each sample, (num_samples,) int64: the classes in turn."""
    labels = []
    for word in args.classes or range(len(names)):
        if word in names:
            labels.append(names.index(word))
        elif str(word).isdecimal() and int(word) < len(names):
            labels.append(int(word))
        else:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"--classes {word}: no such class; wanted one of {known} or a number below {len(names)}")
    return torch.tensor(labels)[torch.arange(args.num_samples) % len(labels)]


def prepare(source, args, device):
    """Move the networks of a Source to the device and into the precision that the flags ask for."""
    source.model.to(device).requires_grad_(False)
    source.vae.to(device)
    distributed.set_precision(args.precision)
    if args.compile:
        source.model.compile_blocks()


def draw(source, args, numbers, device, starts=None, start_gamma=0.0, energy=False, show=True):
    """The samples `numbers`; each is a function of its number, --seed and the network, whoever else is in its batch.

    starts, if given, are clips uint8 (n, 3, T, H, W), of which the start has the share start_gamma; the rest is noise.
    Returns videos uint8 (n, T, H, W, 3), evaluations (n,) and, with `energy`, energies (n, num_steps), else None.
    """
    config, n = source.model.config, len(numbers)
    shape = (config.in_channels, source.num_frames, config.input_size, config.input_size)
    start = normal(args.seed, "sample", 0, numbers, shape).to(device)
    if starts is not None:
        encoded = torch.cat([source.vae.encode(clips.to(device)) for clips in starts.split(args.batch_size)])
        start = transport.interpolate(encoded, start, torch.full((n,), start_gamma, device=device))
    latents, evaluations, energies = samplers.generate(
        source.model,
        start,
        source.labels[numbers].to(device),
        torch.full((n,), source.time_scale, device=device),
        null_label=config.num_classes,
        batch_size=args.batch_size,
        show=show,
        energy=source.model.energy if energy else None,
        start_gamma=start_gamma,
        **distributed.sampling_settings(args),
    )
    return source.vae.decode(latents), evaluations, energies


def describe(source, args):
    """All that decides the samples of a Source, plain values for JSON."""
    return {
        "checkpoint": str(args.ckpt),
        "checkpoint_sha256": sha256(args.ckpt),
        "step": source.step,
        "averaged_weights": not args.no_ema,
        "model": checkpoint.model_name(**asdict(source.model.config)),
        "temporal_patch_size": source.model.config.temporal_patch_size,
        "vae": source.vae.place,
        "image_size": source.image_size,
        "num_frames": source.num_frames,
        "time_scale": source.time_scale,
        "rope_scale": args.rope_scale,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "compile": args.compile,
        **distributed.sampling_settings(args),
    }


def sha256(path):
    """Of the bytes of a file; of a folder: of the exported model in it, whatever else may lie there."""
    if os.path.isdir(path):
        parts = [sha256(Path(path, name)) for name in checkpoint.EXPORT]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Sample videos or images from a checkpoint by gradient descent.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --video --num-frames 16 \
        --ckpt results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt --num-samples 16 --folder samples

The checkpoint knows its architecture, latents, classes and frame rate. A flag that says them again is checked.
Published image models do not know which --model they are.
"""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import torch

import checkpoint
import distributed
import samplers
import transport
from distributed import (
    COUNT,
    NATURAL,
    POSITIVE,
    SHARE,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    normal,
    rank,
    say,
)
from models import EBMS, NAMES
from vae import load_vae
from video_dataset import read_start, start_files
from video_io import write_samples


def parse_args():
    parser = ArgumentParser(description="Sample videos or images from a checkpoint by gradient descent.")
    add = parser.add_argument_group("what").add_argument
    ckpt = "a checkpoint of train.py, a folder of scripts/export.py or a published image model"
    add("--ckpt", required=True, metavar="FILE", help=ckpt)
    add("--video", action="store_true", help="sample videos; off = images")
    add("--num-frames", type=COUNT, metavar="N", help="any number with rotary positions; none = as trained last")
    add("--fps", type=POSITIVE, metavar="X", help="frames per second that the clips show; none = as trained")
    add("--time-scale", type=POSITIVE, metavar="X", help="the same in seconds per frame")
    add("--classes", nargs="+", metavar="C", help="names or numbers, taken in turn; none = all")
    add("--num-samples", "--num-fid-samples", type=COUNT, default=16, metavar="N", help="number of samples")
    add("--seed", "--global-seed", type=NATURAL, default=0, metavar="N", help="decides the noise")
    add("--no-ema", action="store_true", help="use the weights as trained, not their average")
    init = "start from this video or image, or from those of a folder in turn; none = from noise"
    add("--init", metavar="FILE_OR_FOLDER", help=init)
    add("--init-gamma", type=SHARE, metavar="G", help="share of --init in the start, the rest is noise; none = 0.5")

    add = parser.add_argument_group("how").add_argument
    add("--folder", default="samples", metavar="DIR", help="where the samples go")
    add("--batch-size", type=COUNT, default=16, metavar="N", help="samples per rank at a time")
    add("--report-energy", action="store_true", help="write how the (guided) energy of each sample fell")

    add = parser.add_argument_group("checked against the checkpoint, if given").add_argument
    add("--model", choices=NAMES, metavar="NAME", help="EqM-S/4 ...; published models need it")
    add("--use-rope", action="store_true", default=None, help="the checkpoint has 3D rotary positions")
    add("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    add("--temporal-patch-size", type=COUNT, metavar="N", help="frames per patch")
    add("--image-size", type=COUNT, metavar="PX", help="height and width of the samples")
    add("--num-classes", type=COUNT, metavar="N", help="classes of the model")
    add("--vae", metavar="VAE", help="may name another place for the checkpoint's VAE")
    distributed.add_speed_flags(parser)
    distributed.add_sampling_flags(parser)
    return parser.parse_args()


def load_checkpoint(args):
    """(network, data part of the checkpoint's config, VAE), after all the checks that need no GPU."""
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
    if args.report_energy and model.config.ebm == "none":
        raise UserError(f"--report-energy: {args.ckpt} was trained without an energy (--ebm dot or l2): leave it out")
    vae = load_vae(args.vae or data["vae"])
    size = model.config.input_size * vae.downsample
    same_kind = (vae.name == "none") == (data["vae"] == "none")
    if not same_kind or (vae.channels, size) != (model.config.in_channels, data["image_size"] or size):
        raise UserError(f"--vae {vae.name}: the checkpoint was trained with {data['vae']}: name a place of that one")
    if args.image_size not in (None, size):
        raise UserError(f"--image-size {args.image_size}: the checkpoint has {size}: leave the flag out")
    args.num_frames = args.num_frames or training["num_frames"]
    try:
        model.config.check_num_frames(args.num_frames)
    except ValueError as error:
        raise UserError(f"--num-frames {args.num_frames}: {error}") from error
    name = checkpoint.model_name(**asdict(model.config))
    say(f"{args.ckpt}: {name}, step {step}, trained on {training['num_frames']} frames")
    return model, data, vae


def seconds_per_frame(args, data):
    if args.fps and args.time_scale:
        raise UserError("--fps and --time-scale say the same: give one of them")
    return args.time_scale or (1 / args.fps if args.fps else data["frame_interval"][0] / data["fps"])


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


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system."""
    distributed.check_devices()
    distributed.check_speed_flags(args)
    distributed.check_sampling_flags(args)
    frames = args.num_frames if args.num_frames != 1 else None
    for flag, value in (("--num-frames", frames), ("--fps", args.fps), ("--time-scale", args.time_scale)):
        if value is not None and not args.video:
            raise UserError(f"{flag} {value} without --video: images have no frames; add --video or leave it out")
    check_writable("--folder", args.folder)
    if args.init_gamma is None:
        args.init_gamma = 0.5 if args.init else 0.0
    elif args.init is None:
        raise UserError(f"--init-gamma {args.init_gamma} says how much of --init is in the start: name that, too")
    if args.init_gamma == 1 and args.sampler in samplers.SOLVERS:
        raise UserError(f"--init-gamma 1 leaves --sampler {args.sampler} nothing to do: it integrates from there to 1")


def read_starts(args, numbers, size, time_scale):
    """The --init of the samples `numbers`, uint8 (n, 3, T, size, size); None without. Raises UserError."""
    if args.init is None:
        return None
    files = start_files(args.init, images=not args.video)
    chosen = {number % len(files) for number in numbers}
    clips = {i: read_start(files[i], args.num_frames, time_scale, size, images=not args.video) for i in chosen}
    clips = [torch.from_numpy(clips[number % len(files)]).permute(3, 0, 1, 2) for number in numbers]
    return torch.stack(clips) if clips else None


def main():
    args = parse_args()
    try:
        check_flags(args)
        model, data, vae = load_checkpoint(args)
        time_scale = seconds_per_frame(args, data)
        labels = choose_labels(args, data["classes"])
        numbers = distributed.share(args.num_samples)
        starts = read_starts(args, numbers, model.config.input_size * vae.downsample, time_scale)
    except UserError as error:
        fail(error)
    try:
        sample(args, model, data, vae, time_scale, labels, numbers, starts)
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # a disk that is full, memory that is not enough
        fail(error, status=1)
    distributed.stop()


def sample(args, model, data, vae, time_scale, labels, numbers, starts):
    """The ranks share the samples; rank 0 writes them."""
    device = distributed.start()
    model, vae, config = model.to(device).requires_grad_(False), vae.to(device), model.config
    distributed.set_precision(args.precision)
    if args.compile:
        model.compile_blocks()
    shape = (config.in_channels, args.num_frames, config.input_size, config.input_size)
    start = normal(args.seed, "sample", 0, numbers, shape).to(device)
    if starts is not None:
        encoded = torch.cat([vae.encode(clips.to(device)) for clips in starts.split(args.batch_size)])
        start = transport.interpolate(encoded, start, torch.full((len(start),), args.init_gamma, device=device))
    latents, evaluations, energies = samplers.generate(
        model,
        start,
        labels[numbers].to(device),
        torch.full((len(numbers),), time_scale, device=device),
        null_label=config.num_classes,
        batch_size=args.batch_size,
        show=rank() == 0,
        energy=model.energy if args.report_energy else None,
        start_gamma=args.init_gamma,
        **distributed.sampling_settings(args),
    )
    results = [distributed.collect(numbers, part) for part in (vae.decode(latents), evaluations)]
    energies = distributed.collect(numbers, energies) if args.report_energy else None
    if rank() == 0:
        write(args, data, time_scale, labels, *results, energies)


def write(args, data, time_scale, labels, videos, evaluations, energies):
    """Everything that --folder gets."""
    folder, names = Path(args.folder), [data["classes"][label] for label in labels.tolist()]
    forget(folder)
    write_samples(folder, videos.numpy(), labels, 1 / time_scale, names)
    spent = evaluations.double()
    about = {"classes": data["classes"], "time_scale": time_scale, "mean_evaluations": spent.mean().item()}
    (folder / "samples.json").write_text(json.dumps(about | {"flags": vars(args)}, indent=2))
    what = f"videos of {args.num_frames} frames" if args.video else "images"
    say(f"{folder}: {len(videos)} {what}, pictures for the eye and samples.npz")
    if args.stop_below is not None or energies is not None:
        import plots  # matplotlib takes a while to load

    if args.stop_below is not None:
        write_csv(folder / "evaluations.csv", ["sample", "class", "evaluations"],
                  zip(range(len(names)), names, evaluations.tolist(), strict=True))
        plots.plot_evaluations(folder / "evaluations.png", evaluations.numpy(), args.num_sampling_steps - 1)
        say(f"evaluations per sample: mean {spent.mean():.1f} of {args.num_sampling_steps - 1}, "
            f"{evaluations.min()} to {evaluations.max()}; each in evaluations.csv, histogram in evaluations.png")
    if energies is not None:
        known = (~energies.isnan()).nonzero().tolist()
        rows = ((sample, step, energies[sample, step].item()) for sample, step in known)
        write_csv(folder / "energy.csv", ["sample", "step", "energy"], rows)
        plots.plot_energies(folder / "energy.png", energies.numpy(), args.sampler)
        say(f"energy of each sample over the steps: {folder / 'energy.csv'}, energy.png")


def forget(folder):
    """Remove what an earlier run has sampled into a folder, so that all that lies there is of one run."""
    if (folder / "samples.json").exists():
        numbered = [path for path in folder.glob("[0-9]" * 6 + ".*") if path.suffix in (".mp4", ".gif", ".png")]
        reports = [folder / f"{name}.{kind}" for name in ("evaluations", "energy") for kind in ("csv", "png")]
        for path in (*numbered, *reports, folder / "grid.gif", folder / "grid.png", folder / "sheet.png"):
            path.unlink(missing_ok=True)


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()

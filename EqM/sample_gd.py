"""Sample videos or images from a checkpoint by gradient descent.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --video --num-frames 16 \
        --ckpt results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt --num-samples 16 --folder samples

The checkpoint knows its architecture, latents, classes and frame rate. A flag that says them again is checked.
Published image models do not know which --model they are.
"""

import csv
import json
from pathlib import Path

import torch

import generation
import samplers
from runtime import distributed
from runtime.distributed import COUNT, SHARE, ArgumentParser, UserError, check_writable, fail, rank, say
from runtime.signals import one_line_errors
from video.index import read_start, start_files
from video.writers import write_samples


def parse_args():
    parser = ArgumentParser(description="Sample videos or images from a checkpoint by gradient descent.")
    add = parser.add_argument_group("what").add_argument
    ckpt = "a checkpoint of train.py, a folder of scripts/export.py or a published image model"
    add("--ckpt", required=True, metavar="FILE", help=ckpt)
    add("--video", action="store_true", help="sample videos; off = images")
    generation.add_what_flags(add, num_samples=16)
    init = "start from this video or image, or from those of a folder in turn; none = from noise"
    add("--init", metavar="FILE_OR_FOLDER", help=init)
    add("--init-gamma", type=SHARE, metavar="G", help="share of --init in the start, the rest is noise; none = 0.5")

    add = parser.add_argument_group("how").add_argument
    add("--folder", default="samples", metavar="DIR", help="where the samples go")
    add("--batch-size", type=COUNT, default=16, metavar="N", help="samples per rank at a time")
    add("--report-energy", action="store_true", help="write how the (guided) energy of each sample fell")

    generation.add_checked_flags(parser)
    distributed.add_speed_flags(parser)
    distributed.add_sampling_flags(parser)
    return parser.parse_args()


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


def read_starts(args, source, numbers):
    """The --init of the samples `numbers`, uint8 (n, 3, T, H, W); None without. Raises UserError."""
    if args.init is None:
        return None
    images, files = not args.video, start_files(args.init, images=not args.video)

    def read(file):
        return read_start(file, source.num_frames, source.time_scale, source.image_size, images)

    clips = {number: read(files[number]) for number in {number % len(files) for number in numbers}}
    clips = [torch.from_numpy(clips[number % len(files)]).permute(3, 0, 1, 2) for number in numbers]
    return torch.stack(clips) if clips else None


def main():
    args = parse_args()
    try:
        check_flags(args)
        source = generation.open_checkpoint(args)
        if args.report_energy and source.model.config.ebm == "none":
            wanted = "trained without an energy (--ebm dot or l2)"
            raise UserError(f"--report-energy: {args.ckpt} was {wanted}: leave it out")
        args.num_frames = source.num_frames
        numbers = distributed.share(args.num_samples)
        starts = read_starts(args, source, numbers)
    except UserError as error:
        fail(error)
    with one_line_errors():
        sample(args, source, numbers, starts)
    distributed.stop()


def sample(args, source, numbers, starts):
    """The ranks share the samples; rank 0 writes them."""
    device = distributed.start()
    generation.prepare(source, args, device)
    videos, evaluations, energies = generation.draw(
        source, args, numbers, device, starts, args.init_gamma, energy=args.report_energy, show=rank() == 0
    )
    results = [distributed.collect(numbers, part) for part in (videos, evaluations)]
    energies = distributed.collect(numbers, energies) if args.report_energy else None
    if rank() == 0:
        write(args, source, *results, energies)


def write(args, source, videos, evaluations, energies):
    """Everything that --folder gets."""
    folder, classes = Path(args.folder), source.data["classes"]
    names, spent = [classes[label] for label in source.labels.tolist()], evaluations.double()
    forget(folder)
    write_samples(folder, videos.numpy(), source.labels, 1 / source.time_scale, names)
    about = {"classes": classes, "time_scale": source.time_scale, "mean_evaluations": spent.mean().item()}
    about |= {"source": generation.describe(source, args), "flags": vars(args)}
    (folder / "samples.json").write_text(json.dumps(about, indent=2))
    what = f"videos of {args.num_frames} frames" if args.video else "images"
    say(f"{folder}: {len(videos)} {what}, pictures for the eye and samples.npz")
    if args.stop_below is not None or energies is not None:
        from scoring import plots  # matplotlib takes a while to load

    if args.stop_below is not None:
        write_csv(
            folder / "evaluations.csv",
            ["sample", "class", "evaluations"],
            zip(range(len(names)), names, evaluations.tolist(), strict=True),
        )
        plots.plot_evaluations(folder / "evaluations.png", evaluations.numpy(), args.num_sampling_steps - 1)
        say(
            f"evaluations per sample: mean {spent.mean():.1f} of {args.num_sampling_steps - 1}, "
            f"{evaluations.min()} to {evaluations.max()}; each in evaluations.csv, histogram in evaluations.png"
        )
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
        pages = [folder / name for name in ("grid.gif", "grid.png", "sheet.png", "gallery.html")]
        for path in (*numbered, *reports, *pages):
            path.unlink(missing_ok=True)


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()

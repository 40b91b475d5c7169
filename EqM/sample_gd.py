"""Sample videos or images from a checkpoint by gradient descent.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --video --num-frames 16 \
        --ckpt results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt --num-samples 16 --folder samples
    python EqM/sample_gd.py --video --num-frames 16 --ckpt FILE --given clip.mp4 --given-frames 0-7

Architecture, latents, classes and frame rate come from the checkpoint; flags that repeat them are checked. So do the
settings of the sampler, unless flags say otherwise.
Published image models need --model.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import os
from argparse import Namespace
from pathlib import Path

import torch

import generation
from given import KEPT_CLIPS, Given, as_ranges, frame_ranges
from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import (
    COUNT,
    SHARE,
    ArgumentParser,
    UserError,
    add_speed_flags,
    check_devices,
    check_speed_flags,
    check_writable,
    fail,
    one_line_errors,
    say,
)
from runtime.distributed import own_indices, rank, world_size
from runtime.untrusted import read_json
from samplers import SOLVERS
from scoring.manifest import is_of_samples
from video.inputs import check_apart, find_clips
from video.samples import UNFINISHED
from video.writers import write_samples


def parse_args():
    parser = ArgumentParser(description="Sample videos or images from a checkpoint by gradient descent.")
    add = parser.add_argument_group("samples").add_argument
    ckpt = "a checkpoint of train.py, a folder of scripts/export.py or a published image model"
    add("--ckpt", required=True, metavar="FILE", help=ckpt)
    add("--video", action="store_true", help="sample videos; without it images")
    generation.add_sample_flags(add, num_samples=16, several=True)
    given = "complete this video or picture, those of a folder in turn, or the samples of an earlier run"
    add("--given", metavar="FILE_OR_FOLDER", help=given)
    frames = "the frames of --given that are kept, such as 0-3,12-15; default: all it has, at most half of the sample"
    add("--given-frames", type=frame_ranges, metavar="RANGES", help=frames)
    init = "start from this video (image models: picture), from those of a folder in turn, or from the samples of an "
    init += "earlier run; default: from noise"
    add("--init", metavar="FILE_OR_FOLDER", help=init)
    share = "share of --init in the start, the rest is noise; default: 0.5 with --init"
    add("--init-gamma", type=SHARE, metavar="G", help=share)

    add = parser.add_argument_group("output").add_argument
    add("--folder", default="samples", metavar="DIR", help="folder for the samples")
    overwrite = "whether to replace the samples of another run (another training run or model) in --folder"
    add("--overwrite", action=argparse.BooleanOptionalAction, default=True, help=overwrite)
    previews = "skip the previews (GIFs, sheet.png, grid.gif, grid.png of images), which take time on rank 0"
    add("--no-previews", action="store_true", help=previews)
    add("--batch-size", type=COUNT, default=16, metavar="N", help="samples per rank at a time")
    add("--report-energy", action="store_true", help="write the (guided) energy of each sample at each step")

    generation.add_checked_flags(parser)
    add_speed_flags(parser)
    generation.add_sampling_flags(parser)
    return parser.parse_args()


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system."""
    check_devices()
    check_speed_flags(args)
    lengths = None if args.num_frames in (None, [1]) else " ".join(map(str, args.num_frames))
    for flag, value in (("--num-frames", lengths), ("--fps", args.fps), ("--time-scale", args.time_scale)):
        if value is not None and not args.video:
            raise UserError(f"{flag} {value} without --video: images have no frames; add --video or leave it out")
    if args.given_frames and args.given is None:
        raise UserError(f"--given-frames {as_ranges(args.given_frames)} are frames of --given: give that, too")
    if args.given is None and not args.keep_background:
        raise UserError("--no-keep-background is about frames after those of --given: give that, too")
    if args.given is not None and args.init is not None:
        raise UserError("--given and --init: frames to keep or a start from which all change: give one of them")
    if args.given is not None and not args.video:
        raise UserError(f"--given {args.given} without --video: images have no frames; add --video or leave it out")
    if args.init_gamma is None:
        args.init_gamma = 0.0 if args.init is None else 0.5
    elif args.init is None:
        raise UserError(f"--init-gamma {args.init_gamma} is the share of --init in the start: give that, too")


def init_reader(args, source, indices):
    """A function that returns the --init clips of some samples, uint8 (n, 3, T, H, W); None without --init.

    The files of the samples `indices` are read here once, to raise UserError if one is not as it should be.
    """
    if args.init is None:
        return None
    clips, frames = find_clips("--init", args.init, ("video" if args.video else "image",)), range(source.num_frames)
    check_apart(clips, args.folder)

    @functools.lru_cache(KEPT_CLIPS)
    def read(number):
        return clips[number].read(frames, source.time_scale, source.image_size)

    for number in sorted({index % len(clips) for index in indices}):
        read(number)
    return lambda indices: torch.stack([read(index % len(clips)) for index in indices])


def check_one_window(args, source):
    """Raise UserError for flags that need all frames at once."""
    for flag, is_given in (("--init", args.init is not None), ("--report-energy", args.report_energy)):
        if is_given:
            several = f"the {source.num_frames} frames come in windows of {source.window}"
            raise UserError(f"{flag}: {several}: leave it out, or give --window {source.num_frames}")


@one_line_errors()
def main():
    args = parse_args()
    try:
        check_flags(args)
        runs = [prepare(own) for own in each_length(args)]
    except UserError as error:
        fail(error)
    device = distributed.start()
    while runs:
        sample_run(*runs.pop(0), device)  # a source is freed before the next is moved to the device
    distributed.stop()


def each_length(args):
    """The flags for each of --num-frames; where there are several, each has a folder of its own."""
    lengths = list(dict.fromkeys(args.num_frames or [None]))
    for num_frames in lengths:
        folder = args.folder if len(lengths) == 1 else f"{os.path.normpath(args.folder)}-f{num_frames}"
        yield Namespace(**vars(args) | {"num_frames": num_frames, "folder": folder})


def prepare(args):
    """(flags, Source, indices of this rank's samples, --init reader, Given) of samples of one length.

    Raises UserError.
    """
    check_writable("--folder", args.folder)
    check_not_of_another(args)
    source = generation.open_checkpoint(args)
    if args.init_gamma == 1 and args.sampler in SOLVERS:
        raise UserError(f"--init-gamma 1 leaves --sampler {args.sampler} nothing to do: it integrates from there to 1")
    if args.report_energy and source.model.config.ebm == "none":
        wanted = "trained without an energy (--ebm dot or l2)"
        raise UserError(f"--report-energy: {args.ckpt} was {wanted}: leave it out")
    args.num_frames = source.num_frames
    if len(source.window_starts) > 1:
        check_one_window(args, source)
    indices = own_indices(args.num_samples, block=args.batch_size)
    given = None if args.given is None else Given(args, source, indices)
    return args, source, indices, init_reader(args, source, indices), given


def check_not_of_another(args):
    """Raise UserError if --folder holds samples of another run, unless --overwrite allows to replace them."""

    def run_of(ckpt):
        place = Path(ckpt).resolve()
        return place.parent.parent if place.parent.name == "checkpoints" else place

    place = Path(args.folder, "samples.json")
    if args.overwrite or not place.exists():
        return
    try:
        other = str(read_json(place)["flags"]["ckpt"])
    except (OSError, ValueError, KeyError, TypeError):
        other = "another model"
    if run_of(other) != run_of(args.ckpt):
        raise UserError(f"--folder {args.folder}: holds samples of {other}: name another folder, or add --overwrite")


def sample_run(args, source, indices, init, given, device):
    """Sample what `prepare` has found, on all ranks, and write the folder."""
    source.to(device, args)
    idle = world_size() - math.ceil(args.num_samples / args.batch_size)
    if idle > 0:
        say(f"note: {idle} of {world_size()} ranks have nothing to do: a smaller --batch-size shares the work")
    made = generation.generate_parts(
        source, indices, args.seed, device, generation.sampling_settings(args), args.batch_size, init, args.init_gamma,
        given, args.keep_background, energy=args.report_energy, show=rank() == 0,
    )  # fmt: skip
    rounds = math.ceil(args.num_samples / (args.batch_size * world_size()))
    parts = in_order(made, rounds * len(source.window_starts))
    if rank() == 0:
        write_folder(args, source, parts, given)
    else:
        list(parts)  # nothing comes out of it, but the ranks meet in each round


def in_order(made, rounds):
    """The parts of `generate_parts` of all ranks, in order and on the CPU, on rank 0.

    made: iterator over those of this rank. All ranks run through this: each gives one part per round, if it has one
    left. A batch has the same samples on any number of ranks, so the samples have the same bytes.
    """
    for _ in range(rounds):
        part = next(made, None)
        part = part and [value.cpu() if isinstance(value, torch.Tensor) else value for value in part]
        yield from filter(None, distributed.gather_on_first(part) or [])


def write_folder(args, source, parts, given):
    """The videos or images, previews of them, samples.npz, reports, and last samples.json: how they were made.

    parts: iterator over those of `generate_parts`. given: a Given or None. A folder without samples.json is
    not complete.
    """
    folder, names = Path(args.folder), source.names
    evaluations, energies = torch.zeros(len(names), dtype=torch.int64), []

    def videos_of(parts):
        for indices, first, videos, spent, energy in parts:
            evaluations[list(indices)] += spent
            energies.append(energy)
            yield list(indices), first, videos.numpy()

    videos = videos_of(parts)
    videos = itertools.chain([next(videos)], videos)  # if that fails, the samples of an earlier call stay
    begin_folder(folder)
    marked = given and [given.frames_of(index) for index in range(len(names))]
    previews, fps = not args.no_previews, 1 / source.time_scale
    write_samples(folder, videos, source.num_frames, source.labels, fps, names, marked, previews)
    if args.stop_below is not None:
        most = (args.num_sampling_steps - 1) * len(source.window_starts)
        write_evaluations(args, names, evaluations, most)
    if args.report_energy:
        write_energies(args, torch.cat(energies))
    about = {"classes": source.classes, "time_scale": source.time_scale}
    about |= {"mean_evaluations": evaluations.double().mean().item()}
    flags = vars(args) | {"given_frames": args.given_frames and as_ranges(args.given_frames)}
    about |= {"source": generation.provenance(source, args), "flags": flags}
    about |= {"given": given.about()} if given else {}
    with atomic_write(folder / "samples.json") as file:
        file.write(json.dumps(about, indent=2).encode())
    (folder / UNFINISHED).unlink()
    what = f"videos of {args.num_frames} frames" if args.video else "images"
    say(f"{folder}: {len(names)} {what}{', previews' if previews else ''} and samples.npz")


def begin_folder(folder):
    """Make the folder, or remove the samples of an earlier call and their scores, so that all in it is from one call.

    They are removed only where samples.json, or UNFINISHED of a call that did not end, says that they are samples.
    """
    is_old = (folder / "samples.json").exists() or (folder / UNFINISHED).exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    if is_old:
        (folder / "samples.json").unlink(missing_ok=True)  # first: without it, the rest is not taken for complete
        numbered = [path for path in folder.glob("[0-9]" * 6 + ".*") if path.suffix in (".mp4", ".gif", ".png", ".tmp")]
        reports = [folder / f"{name}.{kind}" for name in ("evaluations", "energy") for kind in ("csv", "png")]
        names = ("grid.gif", "grid.png", "sheet.png", "gallery.html", "samples.npz", "samples.npz.tmp")
        scores = [path for path in folder.glob("*.json") if is_of_samples(path, folder)]
        pictures = [path.with_suffix(suffix) for path in scores for suffix in (".png", ".sheet.png")]
        for path in (*numbered, *reports, *(folder / name for name in names), *scores, *pictures):
            path.unlink(missing_ok=True)


def write_evaluations(args, names, evaluations, most):
    """How many evaluations each sample took until it fell below --stop-below: a table and a histogram."""
    from scoring import plots  # matplotlib takes a while to load

    folder = Path(args.folder)
    rows = zip(range(len(names)), names, evaluations.tolist(), strict=True)
    write_csv(folder / "evaluations.csv", ["sample", "class", "evaluations"], rows)
    plots.plot_evaluations(folder / "evaluations.png", evaluations.numpy(), most)
    say(
        f"evaluations per sample: mean {evaluations.double().mean():.1f} of {most}, {evaluations.min()} to "
        f"{evaluations.max()}; each in evaluations.csv, histogram in evaluations.png"
    )


def write_energies(args, energies):
    """The energy of each sample at each step: a table and a plot."""
    from scoring import plots  # matplotlib takes a while to load

    folder, each = Path(args.folder), enumerate(energies)
    rows = ((sample, *point) for sample, row in each for point in enumerate(row.tolist()) if not math.isnan(point[1]))
    write_csv(folder / "energy.csv", ["sample", "step", "energy"], rows)
    plots.plot_energies(folder / "energy.png", energies.numpy(), args.sampler)
    say(f"energy of each sample over the steps: {folder / 'energy.csv'}, energy.png")


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()

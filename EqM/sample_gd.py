"""Sample videos or images from a checkpoint by gradient descent.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --video --num-frames 16 \
        --ckpt results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt --num-samples 16 \
        --folder samples
    python EqM/sample_gd.py --video --num-frames 16 --ckpt FILE --given clip.mp4 --given-frames 0-7
    python EqM/sample_gd.py --video --ckpt FILE --given datasets/ucf-101 --given-split val \
        --given-frames 0-7 --num-samples 2048 --samples-per-clip 8 --no-keep-background

Architecture, latents, classes, frame rate and sampler settings come from the checkpoint.
Architecture flags are checked against it; sampler flags replace its settings. Published image
models need --model.
"""

import uncaught  # noqa: F401
import argparse
import csv
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import given
import plans
import preflight
from generation import cast_products, generate
from given import ClipReader, DrawnClip, as_ranges, given_clips, init_clips, open_given
from models import EBMS, NAMES
from plans import provenance, sampling_settings
from runtime import cli, distributed
from runtime.atomic import write_file
from runtime.cli import (
    COUNT,
    NATURAL,
    ArgumentParser,
    UserError,
    add_speed_flags,
    fail,
    one_line_errors,
    say,
)
from runtime.distributed import own_indices, rank, world_size
from runtime.untrusted import FPS
from scoring.manifest import is_of_samples
from scoring.sources import find_real
from transport import OBJECTIVES
from video.actions import names_of
from video.samples import LATENTS, UNFINISHED, WRITTEN, is_sample_folder
from video.writers import write_samples

# more is a typing error
FRAMES = cli.number(int, least=1, most=2**16)
SAMPLES = cli.number(int, least=1, most=2**24)
(LEAST_FPS, MOST_FPS) = FPS
RATE = cli.number(float, least=LEAST_FPS, most=MOST_FPS)
SECONDS = cli.number(float, least=1 / MOST_FPS, most=1 / LEAST_FPS)


def parse_args(words=None, error=None):
    """The Flags of a command line, by default of this process.

    error: called with the message about a wrong flag, in place of ending this process.
    """
    parser = ArgumentParser(
        description="Sample videos or images from a checkpoint by gradient descent."
    )
    parser.error = error or parser.error
    group = parser.add_argument_group("samples")
    add = group.add_argument
    add_rate = group.add_mutually_exclusive_group().add_argument
    add(
        "--ckpt",
        required=True,
        metavar="FILE",
        help="checkpoint of train.py, export or published image model",
    )
    add("--video", action="store_true", help="sample videos; without it images")
    add(
        "--num-frames",
        type=FRAMES,
        nargs="+",
        help="frames per video; several go to DIR-fN; default: as in training",
    )
    add(
        "--window",
        type=FRAMES,
        help="frames sampled at once; default: a training clip's, all without --forcing",
    )
    add("--overlap", type=COUNT, help="frames that two windows share; default: half of a window")
    add_rate(
        "--fps",
        type=RATE,
        help="frames per second of the samples; default: the same as in training",
    )
    add_rate("--time-scale", type=SECONDS, help="seconds per frame, instead of --fps")
    add(
        "--classes",
        nargs="+",
        metavar="C",
        help="names or indices, used in turn; none: no label; default: all",
    )
    add(
        "--actions",
        nargs="+",
        metavar="A",
        help=(
            'what is done after the given frames, or after the first, such as "right*8,up*4", or a '
            "file, .npy or text; several are used in turn; --num-frames may be less; default: none"
        ),
    )
    add("--num-samples", "--num-fid-samples", type=SAMPLES, default=16, help="number of samples")
    add("--seed", "--global-seed", type=NATURAL, default=0, help="seed of the noise")
    add(
        "--rope-scale",
        choices=["none", "linear"],
        default="none",
        help=(
            "linear: fit longer videos into the time span of training; the motion is complete but "
            "slower"
        ),
    )
    add(
        "--weak-ckpt",
        metavar="FILE",
        help=(
            "autoguidance: --cfg-scale moves away from this weaker model, such as an earlier "
            "checkpoint of the run"
        ),
    )
    add("--no-ema", action="store_true", help="use the raw weights instead of the EMA weights")

    given.add_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--folder", default="samples", metavar="DIR", help="folder for the samples")
    add(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replace samples of another training run or model in --folder",
    )
    add(
        "--no-previews",
        action="store_true",
        help="skip GIFs, sheet.png and grids, which keep rank 0 busy",
    )
    add(
        "--save-latents",
        action="store_true",
        help="keep the latents, latents.npy, so that train.py --pairs need not encode the samples",
    )
    add("--batch-size", type=COUNT, default=16, help="samples per rank at a time")
    add(
        "--report-energy",
        action="store_true",
        help="write the (guided) energy of each sample at each step",
    )

    add = parser.add_argument_group("checked against the checkpoint").add_argument
    add(
        "--model",
        choices=NAMES,
        metavar="NAME",
        help="EqM-{Ti,S,B,L,XL}/{2,4,8}; published models need it",
    )
    add("--use-rope", action="store_true", default=None, help="the model has 3D rotary positions")
    add("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    add("--objective", choices=OBJECTIVES, help="what the model was trained to predict")
    add("--temporal-patch-size", type=COUNT, help="frames per patch")
    add("--image-size", type=COUNT, metavar="PX", help="height and width of the samples in pixels")
    add("--num-classes", type=COUNT, help="number of classes of the model")
    add("--vae", metavar="VAE", help="new path of the checkpoint's VAE, if it was moved")
    add_speed_flags(parser)
    plans.add_flags(parser)
    return parser.parse_args(words)


@one_line_errors()
def main():
    args = parse_args()
    try:
        runs = preflight.resolve_sampling(args)
        if args.given_split is None:
            clips = [open_clips(flags, plan) for flags, plan in runs]
            device = distributed.start()
        else:
            splits = [open_split(flags, plan) for flags, plan in runs]
            device = distributed.start()
            splits = distributed.broadcast(splits)
            clips = [
                open_clips(flags, plan, split)
                for (flags, plan), split in zip(runs, splits, strict=True)
            ]
    except UserError as error:  # find_real names the flags of evaluate.py
        fail(str(error).replace("--data-path ", "--given ").replace("--split ", "--given-split "))
    while runs:  # a model is freed before the next is moved to the device
        flags, plan = runs.pop(0)
        sample_run(flags, plan, clips.pop(0), device)
    distributed.stop()


def open_split(args, plan):
    """(Clips of --given-split, their description for samples.json) on rank 0, None elsewhere.

    Raises UserError.
    """
    if rank() != 0:  # the others wait for rank 0 in start()
        return None
    clips, _, about = find_real(
        args.given,
        split=args.given_split,
        val_fraction=args.val_fraction,
        num_frames=plan.num_frames,
        time_scale=plan.time_scale,
        image_size=plan.image_size,
        ckpt=args.ckpt,
        images=False,
    )
    if args.num_samples % args.samples_per_clip:
        say(
            f"note: --num-samples {args.num_samples}: the last clip has fewer samples than "
            "--samples-per-clip, so --metric prediction and world can't score them"
        )
    count = math.ceil(args.num_samples / args.samples_per_clip)
    return clips, about | {"num_clips": count, "samples_per_clip": args.samples_per_clip}


@dataclass
class InputClips:
    """What this rank's samples continue or start from."""

    indices: list  # of this rank's samples
    given: ClipReader | None = None  # of --given
    init: ClipReader | None = None  # of --init
    split: dict | None = None  # the description of --given-split for samples.json


def open_clips(args, plan, split=None):
    """The InputClips of a Plan. split: from `open_split`. Raises UserError."""
    clips = InputClips(own_indices(args.num_samples, block=args.batch_size))
    if split is not None:
        drawn, clips.split = split
        files = [
            DrawnClip(f"--given {args.given}", drawn, index)
            for index in range(clips.split["num_clips"])
        ]
    elif args.given is not None:
        files = given_clips(args)
    if args.given is not None:
        clips.given = open_given(args, plan, files, clips.indices)
    if args.init is not None:
        files = init_clips(args)
        frames = [range(plan.num_frames)] * len(files)
        clips.init = ClipReader(plan, files, frames, clips.indices)
    return clips


def sample_run(args, plan, clips, device):
    """Sample a Plan on all ranks, and write the folder. clips: its InputClips."""
    plan.vae.to(device)
    distributed.set_precision(args.precision)
    for model in filter(None, (plan.model, plan.weak)):
        cast_products(model.to(device).requires_grad_(False), args.precision)
        if args.compile:
            model.compile_blocks()
    idle = world_size() - math.ceil(args.num_samples / args.batch_size)
    if idle > 0:
        say(
            f"note: {idle} of {world_size()} ranks are idle: a smaller --batch-size shares the work"
        )
    batches = generate(
        plan,
        clips.indices,
        seed=args.seed,
        device=device,
        settings=sampling_settings(args),
        batch_size=args.batch_size,
        given=clips.given,
        init=clips.init,
        init_gamma=args.init_gamma,
        keep_background=args.keep_background,
        energy=args.report_energy,
        keep_latents=args.save_latents and plan.vae.name != "none",
    )
    rounds = math.ceil(args.num_samples / (args.batch_size * world_size()))
    parts = in_order(batches, rounds * len(plan.window_starts))
    if rank() != 0:
        list(parts)  # it is empty, but the ranks wait for each other in each round
        return
    with cli.writing(Path(args.folder, "samples.npz")):
        write_folder(args, plan, parts, clips)


def in_order(batches, rounds):
    """Yield on rank 0 what `generate` yields on all ranks, in order and on the CPU.

    All ranks call this.
    """
    for _ in range(rounds):
        part = next(batches, None)
        if part is not None:
            part = [value.cpu() if isinstance(value, torch.Tensor) else value for value in part]
        yield from filter(None, distributed.gather(part, on_all=False))


def write_folder(args, plan, parts, clips):
    """Write the samples that `in_order` yields, previews and reports, and at last samples.json: how
    they were made.
    """
    folder = Path(args.folder)
    previews = not args.no_previews
    evaluations = torch.zeros_like(plan.conditions)
    windows = torch.zeros_like(plan.conditions)
    energies = []
    # if this fails, the samples of an earlier call stay
    parts = itertools.chain([next(parts)], parts)
    begin_folder(folder)
    marked = clips.given and [clips.given.frames[number] for number in clips.given.numbers]
    write_samples(
        folder,
        videos_of(plan, folder, parts, evaluations, windows, energies),
        plan.num_frames,
        labels=plan.conditions,
        fps=[1 / seconds for seconds in plan.time_scales],
        names=plan.names,
        marked=marked,
        previews=previews,
    )
    if args.stop_below is not None or args.report_energy:
        write_reports(args, plan.names, evaluations, energies, windows.max().item())
    given_frames = args.given_frames and as_ranges(args.given_frames)
    about = {
        "classes": plan.classes,
        "time_scale": plan.time_scale,
        "mean_evaluations": evaluations.double().mean().item(),
        "source": provenance(plan, args),
        "flags": vars(args) | {"given_frames": given_frames},
    }
    if plan.spans is not None:
        about["spans"] = plan.spans.tolist()
    if plan.actions is not None:
        about["actions"] = names_of(plan.actions, plan.model.config.action_names)
    if clips.given:
        about["given"] = clips.given.about()
    if clips.split:
        about["real"] = clips.split
    write_file(folder / "samples.json", json.dumps(about, indent=2).encode())
    (folder / UNFINISHED).unlink()
    kind = f"videos of {cli.plural(args.num_frames, 'frame')}" if args.video else "images"
    with_previews = ", previews" if previews else ""
    say(f"{folder}: {len(plan.conditions)} {kind}{with_previews} and samples.npz")


def videos_of(plan, folder, parts, evaluations, windows, energies):
    """Yield (indices, first frame, videos) of parts. Add what they took to `evaluations`, the
    windows that were not given as a whole to `windows`, and their energies to `energies`. Latents
    go to LATENTS, float32 (N, C, T, h, w), as the VAE decodes them.
    """
    file = None
    for indices, first, videos, spent, energy, latents in parts:
        indices = list(indices)
        evaluations[indices] += spent
        windows[indices] += spent > 0
        energies.append(energy)
        if latents is not None:
            if file is None:
                shape = (len(plan.conditions), *latents.shape[1:])
                file = np.lib.format.open_memmap(folder / LATENTS, "w+", np.float32, shape)
            file[indices] = plan.vae.unscale(latents).numpy()
        yield indices, first, videos.numpy()


def begin_folder(folder):
    """Make the folder, or remove the samples and scores of an earlier call, so that all files are
    from one call.
    """
    is_old = is_sample_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    if not is_old:
        return
    (folder / "samples.json").unlink(missing_ok=True)  # first, as it marks a complete folder
    old = [path for pattern in WRITTEN for path in folder.glob(pattern)]
    for path in folder.glob("*.json"):
        if is_of_samples(path, folder):  # scores with their pictures
            old += [path, path.with_suffix(".png"), path.with_suffix(".sheet.png")]
    for path in old:
        path.unlink(missing_ok=True)


def write_reports(args, names, evaluations, energies, windows):
    """Write tables and plots of samples' evaluations (--stop-below) and energies.

    Energies need --report-energy.
    """
    from scoring import plots  # matplotlib loads slowly

    folder = Path(args.folder)
    most = (args.num_sampling_steps - 1) * windows
    if args.stop_below is not None:
        rows = zip(range(len(names)), names, evaluations.tolist(), strict=True)
        write_csv(folder / "evaluations.csv", ["sample", "class", "evaluations"], rows)
        plots.plot_evaluations(folder / "evaluations.png", evaluations.numpy(), most)
        say(
            f"evaluations per sample: mean {evaluations.double().mean():.1f} of {most}, "
            f"{evaluations.min()} to {evaluations.max()}; each in evaluations.csv, histogram in "
            "evaluations.png"
        )
    if args.report_energy:
        energies = torch.cat(energies)  # NaN after the step at which a sample stopped
        points = (~energies.isnan()).nonzero().tolist()
        rows = [(sample, step, energies[sample, step].item()) for sample, step in points]
        write_csv(folder / "energy.csv", ["sample", "step", "energy"], rows)
        plots.plot_energies(folder / "energy.png", energies.numpy(), args.sampler)
        say(f"energy of each sample over the steps: {folder / 'energy.csv'}, energy.png")


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()

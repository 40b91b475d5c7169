"""Enlarge a small data set: copy its training videos in other colors, slightly zoomed and shifted.

    python datasets/augment.py --data-path datasets/weizmann --out datasets/weizmann-more --copies 7

A model that has seen only six people in front of six walls fails on a seventh person. Copies are
lossless videos, <Class>/<stem>-copy1.mkv and so on, with the size and frame rate of the original.
All frames of a copy are changed in the same way, and its actions are those of the original. OUT
also holds the original videos, and their split in OUT/ucfTrainTestlist. Validation videos have no
copies. The script is safe to run again: it only makes missing files. A new OUT is .OUT.partial
until it is complete.
"""

import os
from layout import missing_videos, write_lists
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from autoencoder import draw_colors
from runtime import cli
from runtime.atomic import write_file
from runtime.cli import Bar, UserError, check_writable, say, wrong_input
from runtime.rng import generator
from video.actions import copy_actions, open_actions
from video.files import UnreadableError
from video.index import split_videos
from video.source import check_data_path, open_source
from video.writers import write_lossless

SEED_FILE = "seed.txt"  # in OUT
ZOOM = 0.15  # largest zoom; the crop is drawn for each copy


def parse_args():
    parser = cli.ArgumentParser(
        description="Enlarge a small data set: copy its training videos with other colors."
    )
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        metavar="DIR",
        help="folder of <class>/<video>, or of videos without classes",
    )
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for the larger data set",
    )
    add(
        "--copies",
        type=cli.COUNT,
        default=7,
        help="copies per training video, besides the original",
    )
    add(
        "--val-fraction",
        type=cli.SHARE,
        default=0.05,
        help="share of the videos that validate, without split files",
    )
    add(
        "--seed",
        type=cli.NATURAL,
        default=0,
        help="seed of every random draw",
    )
    return parser.parse_args()


def changed_frames(source, video, random):
    """Yield the frames of a video of a source, uint8 (H, W, 3), all changed in the same way."""
    matrix, offset = draw_colors(random, most=2)
    zoom, down, right = torch.rand(3, generator=random).tolist()
    for frames in source.decode(video):
        x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, H, W)
        height, width = x.shape[2:]
        h = round(height / (1 + ZOOM * zoom))
        w = round(width / (1 + ZOOM * zoom))
        top = round(down * (height - h))
        left = round(right * (width - w))
        crop = x[:, :, top : top + h, left : left + w]
        x = F.interpolate(crop, (height, width), mode="bilinear", antialias=True)
        x = torch.einsum("ij,njhw->nihw", matrix, x) + offset
        pixels = (x.clamp(-1, 1) + 1) * 127.5
        yield from pixels.round().byte().permute(0, 2, 3, 1).numpy()


def plan_copies(source, args):
    """({file in --out: (video, copy number; 0: original)}, training videos, validation videos).

    Raises UserError if a copy would have the name of another video.
    """
    train, val = split_videos(args.data_path, source.videos(), args.val_fraction)
    keys = {video.key for video in (*train, *val)}
    copies = {}
    train_names = []
    for video, copy in product(train, range(args.copies + 1)):
        file = video.path
        if copy > 0:
            file = f"{os.path.splitext(file)[0]}-copy{copy}.mkv"
            key = f"{video.key}-copy{copy}"
            if key in keys:
                raise UserError(
                    f"--data-path {args.data_path}: has another {key}, the name of a copy; rename "
                    "that video, or name the folder without copies"
                )
            keys.add(key)
        copies[file] = video, copy
        train_names.append(f"{video.class_name}/{Path(file).name}")
    copies |= {video.path: (video, 0) for video in val}
    val_names = [f"{video.class_name}/{Path(video.path).name}" for video in val]
    return copies, sorted(train_names), sorted(val_names)


@cli.one_line_errors(UnreadableError)
def main():
    args = parse_args()
    with wrong_input():
        check_writable("--out", args.out)
        if Path(args.out).resolve() == Path(args.data_path).resolve():
            raise UserError(f"--out {args.out}: the same as --data-path; expected another folder")
        check_data_path(args.data_path, cached=False)
        source = open_source(args.data_path, image_size=None)
        open_actions(args.data_path, source.videos())  # raises UserError if some are wrong
        copies, train, val = plan_copies(source, args)
        out = Path(args.out).resolve()
        is_new = not out.exists() or not any(out.iterdir())
        folder = out.with_name(f".{out.name}.partial") if is_new else out
        missing = missing_videos(folder, copies)
        seed_file = folder / SEED_FILE
        seed = seed_file.read_text().strip() if seed_file.exists() else f"{args.seed}"
        if seed != f"{args.seed}":
            raise UserError(
                f"--seed {args.seed}: --out {args.out} has copies of seed {seed}; name another"
            )
    for path in source.scan.unreadable:
        say(f"{path} can't be opened; it is skipped")
    folder.mkdir(parents=True, exist_ok=True)
    with cli.writing(folder):
        seed_file.write_text(f"{args.seed}\n")
        write_lists(folder, train, val)  # first: new copies must not validate
    for file in Bar(missing, desc="copying", unit="video"):
        video, copy = copies[file]
        path = folder / file
        with cli.writing(path):
            path.parent.mkdir(exist_ok=True)
            if copy == 0:
                write_file(path, Path(args.data_path, file).read_bytes())
            else:
                random = generator(args.seed, "copies", video.key, copy)
                write_lossless(path, changed_frames(source, video, random), video.fps)
    with cli.writing(folder):
        videos = {file: video for file, (video, _) in copies.items()}
        copy_actions(args.data_path, videos, folder)
    folder.replace(out)
    before = len(train) // (args.copies + 1)
    after = len(train)
    total = after + len(val)
    say(f"{args.out}: {after} training videos instead of {before}, {total} videos in all")


if __name__ == "__main__":
    main()

"""More training videos for data sets of few: copies in other colors, a little enlarged and moved.

    python datasets/augment.py --data-path datasets/weizmann --out datasets/weizmann-more --copies 7

A model that has seen six people in front of six walls fails where it is given a seventh. Copies are lossless,
<Class>/<stem>-copy1.mkv and so on, of the videos' own sizes and rates; all frames of a copy are changed alike. OUT has
the videos themselves as well, and in OUT/ucfTrainTestlist their split: those that validate have no copies. Safe to run
again: it does only what is missing.
"""

import shutil
import sys
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from autoencoder import draw_colors
from runtime import cli
from runtime.cli import Bar, UserError, check_writable, fail, say
from runtime.rng import generator
from video.files import UnreadableError, read_all_frames
from video.index import UCF_LISTS, check_data_path, latents_settings, scan_videos, split_videos
from video.writers import write_lossless

CHUNK = 64  # frames that are decoded and changed at a time
ZOOM = 0.15  # enlarged by up to so much; what is cut off is drawn for each copy


def parse_args():
    parser = cli.ArgumentParser(description="More training videos for data sets of few: copies that look different.")
    add = parser.add_argument
    add("--data-path", required=True, metavar="DIR", help="folder with <class>/<video>, or videos without classes")
    add("--out", required=True, metavar="DIR", help="the larger data set")
    add("--copies", type=cli.COUNT, default=7, metavar="N", help="copies of each training video, besides itself")
    fraction = "share of the videos that validate, where no split files are found"
    add("--val-fraction", type=cli.SHARE, default=0.05, metavar="F", help=fraction)
    add("--seed", type=cli.NATURAL, default=0, metavar="N", help="seed of every random draw")
    return parser.parse_args()


def changed_frames(root, video, random):
    """Yields the frames of a video, uint8 (H, W, 3), all changed alike."""
    matrix, offset = draw_colors(random, most=2)
    zoom, down, right = torch.rand(3, generator=random).tolist()
    for frames in read_all_frames(root, video, CHUNK):
        x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, H, W)
        height, width = x.shape[2:]
        h, w = (round(side / (1 + ZOOM * zoom)) for side in (height, width))
        top, left = round(down * (height - h)), round(right * (width - w))
        x = F.interpolate(x[:, :, top : top + h, left : left + w], (height, width), mode="bilinear", antialias=True)
        x = torch.einsum("ij,njhw->nihw", matrix, x) + offset
        yield from ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def plan(args):
    """({place in --out: (video, number of the copy, 0: itself)}, the training places). Raises UserError."""
    scan = scan_videos(args.data_path)
    train, val = split_videos(args.data_path, scan.videos, args.val_fraction)
    files = {video.path: (video, 0) for video in scan.videos}
    for video in train:
        for copy in range(1, args.copies + 1):
            files[str(PurePosixPath(video.path).with_suffix("")) + f"-copy{copy}.mkv"] = video, copy
    kept = {video.path for video in val}
    return files, [place for place in sorted(files) if place not in kept], scan.classes


def write_lists(folder, files, train, classes):
    """Write UCF-101's lists; the one of the training videos comes last: it says that all is there."""
    folder.mkdir(exist_ok=True)
    for name, places in (("testlist01.txt", sorted(set(files) - set(train))), ("trainlist01.txt", train)):
        videos = [files[place][0] for place in places]
        lines = [
            f"{video.class_name}/{PurePosixPath(place).name} {classes.index(video.class_name) + 1}"
            for place, video in zip(places, videos, strict=True)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")


@cli.one_line_errors(UnreadableError)
def main():
    args = parse_args()
    try:
        check_writable("--out", args.out)
        check_data_path(args.data_path)
        if latents_settings(args.data_path) is not None:
            raise UserError(f"--data-path {args.data_path}: a latent cache; name the folder of its videos")
        if Path(args.out).resolve() == Path(args.data_path).resolve():
            raise UserError(f"--out {args.out}: the same as --data-path; name another folder")
        files, train, classes = plan(args)
        there = {path.relative_to(args.out).as_posix() for path in Path(args.out).rglob("*") if path.is_file()}
        if foreign := sorted(p for p in there - set(files) if not p.endswith(".tmp") and UCF_LISTS not in p):
            raise UserError(f"--out {args.out}: holds {foreign[0]}, which is not of these copies: name another folder")
    except UserError as error:
        fail(error)
    for place in Bar([place for place in files if place not in there], desc="copying", unit="video"):
        (video, copy), path = files[place], Path(args.out, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if copy == 0:
            shutil.copyfile(Path(args.data_path, place), f"{path}.tmp")
            Path(f"{path}.tmp").rename(path)
        else:
            random = generator(args.seed, "copies", video.key, copy)
            write_lossless(path, changed_frames(args.data_path, video, random), video.fps)
    write_lists(Path(args.out, UCF_LISTS), files, train, classes)
    say(f"{args.out}: {len(train)} training videos instead of {len(train) // (args.copies + 1)}, {len(files)} in all")


if __name__ == "__main__":
    main()

"""Make an HTML page of a sample folder, with real clips beside; it needs no other file or network.

    python scripts/gallery.py samples --data-path datasets/ucf-101

This writes samples/gallery.html. All videos play in step; you can pause, step by frame, and filter
by class. The template is gallery.html beside this script.
"""

import engine  # noqa: F401
import base64
import itertools
import re
import statistics
import tempfile
from collections import Counter
from html import escape
from pathlib import Path

from runtime.atomic import write_file
from runtime.cli import (
    COUNT,
    SHARE,
    ArgumentParser,
    UserError,
    check_writable,
    one_line_errors,
    say,
    wrong_input,
)
from runtime.runs import results_of
from scoring.sources import Samples
from video.clips import Clips
from video.index import split_videos
from video.samples import class_name
from video.source import check_data_path, open_source
from video.writers import write_videos

TEMPLATE = Path(__file__).with_suffix(".html")
SMALL = 128  # px; the page does not smooth smaller samples
WORDS = {"None": "none", "False": "off", "True": "on"}  # for values of flags
# keys of samples.json or its flags
NEEDED = {"ckpt", "video", "sampler", "cfg_scale", "seed", "mean_evaluations"}


def parse_args():
    parser = ArgumentParser(
        description="Make an HTML page of a sample folder, with real clips beside the samples."
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a sample folder of sample_gd.py")
    add(
        "--data-path",
        metavar="DIR",
        help=(
            "data set for real clips, from validation videos of the same classes; default: "
            "samples only"
        ),
    )
    add("--out", metavar="FILE.html", help="the page; default: FOLDER/gallery.html")
    add("--num-samples", type=COUNT, default=64, help="show at most the first N samples")
    add(
        "--val-fraction",
        type=SHARE,
        default=0.05,
        help=(
            "share of validation videos, the same as for train.py, if the data set has no split "
            "files"
        ),
    )
    return parser.parse_args()


def open_real(root, samples, count, val_fraction):
    """{class: iterator over its `real_clips`} for the classes of the first `count` samples."""
    flags = samples.about["flags"]
    here = f"--data-path {root}"
    T = samples.num_frames
    check_data_path(root, not flags["video"], cached=False)
    source = open_source(root, samples.image_size, not flags["video"], results_of(flags["ckpt"]))
    parts = split_videos(root, source.videos(), val_fraction)
    real = {}
    for name in {*samples.names[:count]} - {None}:
        if name not in source.scan.classes:
            raise UserError(
                f"{here}: no class {name!r}, which samples have; pass the data set of training"
            )
        train, val = (
            [v for v in part if v.class_name == name and v.num_frames >= T] for part in parts
        )
        if not train + val:
            raise UserError(
                f"{here}: no video of class {name!r} has the {T} frames of the samples; remove "
                "the flag"
            )
        title = "real" if val else "real, from training"  # a small class may have no val video
        real[name] = real_clips(source, val or train, title, T, 1 / samples.time_scale)
    return real


def real_clips(source, videos, title, num_frames, fps):
    """Yield (clip uint8 (T, H, W, 3), its title) from videos, if possible at the samples' rate."""
    interval = max(1, round(statistics.median(video.fps for video in videos) / fps))
    clips = Clips(
        source,
        videos,
        source.scan.classes,
        num_frames,
        (interval, interval),
        flip=False,
        stream="real",
    )
    for item in map(clips.__getitem__, itertools.count()):
        # else the video has too few frames
        same = num_frames == 1 or abs(item["time_scale"] * fps - 1) <= 0.05
        yield (
            item["clip"].permute(1, 2, 3, 0).numpy(),
            title + ("" if same else f", {1 / item['time_scale']:.3g} fps"),
        )


def make_page(samples, count, real):
    """The HTML of the first `count` samples; real: {class: real clips} of `open_real`."""
    flags = samples.about["flags"]
    labels = Counter(samples.labels[:count])
    names = {label: class_name(samples.classes, label) or "none" for label in sorted(labels)}
    shown = {
        name.replace("_", "-"): WORDS.get(str(value), str(value)) for name, value in flags.items()
    }
    parts = vars(samples) | {
        "title": escape(samples.folder.resolve().name),
        "what": escape(summary_line(samples, count)),
        "ckpt": escape(flags["ckpt"]),
        "flags": "".join(
            f"<tr><td>--{escape(flag)}<td>{escape(value)}" for flag, value in shown.items()
        ),
        "options": "".join(
            f'<option value="{n}">{escape(name)} ({labels[n]})' for n, name in names.items()
        ),
        "cards": "\n".join(
            make_card(samples, index, real.get(samples.names[index])) for index in range(count)
        ),
        "count": count,
        "fps": 1 / samples.time_scale,
        "last": samples.num_frames - 1,
        "columns": 2 if real else 1,
        "rendering": "pixelated" if samples.image_size < SMALL else "auto",
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: str(parts[match[1]]), TEMPLATE.read_text(encoding="utf-8")
    )


def summary_line(samples, count):
    """A line of text: number, kind, size and frame rate of the samples, and their sampler."""
    T = samples.num_frames
    size = samples.image_size
    total = len(samples)
    flags = samples.about["flags"]
    number = f"{total}" if count == total else f"The first {count} of {total}"
    rate = f", {1 / samples.time_scale:.4g} frames per second" if T > 1 else ""
    kind = f"videos of {T} frames" if T > 1 else "images"
    sampled = (
        f"{flags['sampler']}, {samples.about['mean_evaluations']:.4g} evaluations, guidance "
        f"{flags['cfg_scale']}"
    )
    return f"{number} {kind}, {size} x {size} px{rate}; {sampled}, seed {flags['seed']}"


def make_card(samples, index, real):
    """The HTML of a sample, with the next real clip beside it."""
    name = samples.names[index] or "none"
    is_image = samples.num_frames == 1
    path = samples.folder / f"{index:06d}{'.png' if is_image else '.mp4'}"
    if not path.exists():
        raise UserError(f"{samples.place}: no {path.name}; sample again")
    shown = {"generated": path.read_bytes()}
    if real:
        clip, title = next(real)
        shown[title] = clip_file(clip, 1 / samples.time_scale)
    media = ""
    size = f'width="{samples.image_size}" height="{samples.image_size}"'
    for title, data in shown.items():
        text = base64.b64encode(data).decode()
        label = escape(f"{title}, {name}")
        tag = f'<img {size} alt="{label}" src="data:image/png;base64,{text}">'
        if not is_image:
            source = f'data-src="data:video/mp4;base64,{text}"'
            tag = (
                f'<video {size} muted playsinline preload="auto" '
                f'aria-label="{label}" {source}></video>'
            )
        media += f"<div>{tag}<span>{escape(title)}</span></div>"
    origin = f"sample {index}, seed {samples.about['flags']['seed']}"
    if samples.given[index]:
        given = samples.about["given"][index]
        origin += f"; frames {given['frames']} given: {Path(given['source']).name}"
    marks = (
        f'data-label="{samples.labels[index]}" '
        f'data-given="{" ".join(map(str, samples.given[index]))}"'
    )
    caption = f"<figcaption>{escape(name)}<span>{escape(origin)}</span></figcaption>"
    return f'<figure class="card" {marks}><div class="pair">{media}</div>{caption}</figure>'


def clip_file(clip, fps):
    """The bytes of a clip uint8 (T, H, W, 3) as an mp4 file, or as a PNG file if T = 1."""
    with tempfile.TemporaryDirectory() as folder:
        write_videos(folder, clip[None], fps, gifs=False)
        return next(Path(folder).iterdir()).read_bytes()


@one_line_errors()
def main():
    args = parse_args()
    out = Path(args.out or Path(args.folder, "gallery.html"))
    with wrong_input():
        samples = Samples(args.folder, "FOLDER")
        if missing := NEEDED - samples.about.keys() - samples.about["flags"].keys():
            raise UserError(
                f"{samples.place}: its samples.json has no {min(missing)}; sample again"
            )
        if out.is_dir():
            raise UserError(f"--out {out}: a folder; expected the name of an HTML file")
        check_writable("--out", out.parent)
        count = min(args.num_samples, len(samples))
        total = len(samples)
        real = (
            open_real(args.data_path, samples, count, args.val_fraction) if args.data_path else {}
        )
        page = make_page(samples, count, real)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page.encode("utf-8", "replace"))  # file names may not be UTF-8
    more = f" ({total - count} more: --num-samples {total})" if count < total else ""
    say(f"{out}: {count} samples{more}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    main()

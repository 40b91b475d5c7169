"""Make an HTML page of a sample folder, with real clips beside; it needs no other file or network.

    python scripts/gallery.py samples --data-path datasets/ucf-101
    python scripts/gallery.py samples/demo-f7 samples/demo-f16 --png picture.png

The first command writes samples/gallery.html. All videos play in step; you can pause, step by
frame, and filter by class. The template is gallery.html beside this script. The second command
draws one PNG with a row per sample and a column per frame. A row shows at most COLUMNS frames,
evenly spaced from the first to the last. Given frames have an orange border.
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

import numpy as np
from PIL import Image

from runtime.atomic import atomic_write, write_file
from runtime.cli import (
    COUNT,
    SHARE,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    flag_text,
    one_line_errors,
    say,
    wrong_input,
)
from runtime.runs import results_of
from scoring.sources import Samples
from video.clips import Clips
from video.drawing import draw_sheet, evenly_spaced, few, stack, text_line
from video.index import split_videos
from video.samples import class_name
from video.source import check_data_path, open_source
from video.writers import write_video

TEMPLATE = Path(__file__).with_suffix(".html")
SMALL = 128  # px; the page does not smooth smaller samples
WORDS = {"None": "none", "False": "off", "True": "on"}  # for values of flags
# keys of samples.json or its flags
NEEDED = {"ckpt", "video", "sampler", "cfg_scale", "seed", "mean_evaluations"}
# of a picture: frames of a row; px of a frame and between two; px and characters of class names
COLUMNS = 12
SIDE = 64
GAP = 4
LEFT = 190
MAX_NAME_LENGTH = 16


def parse_args():
    parser = ArgumentParser(
        description=(
            "Make an HTML page of a sample folder, with real clips beside the samples, or draw the "
            "samples of several folders as one PNG."
        )
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="a sample folder of sample_gd.py; several only with --png",
    )
    add(
        "--data-path",
        metavar="DIR",
        help=(
            "data set for real clips, from validation videos of the same classes; default: "
            "samples only"
        ),
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--out", metavar="FILE.html", help="the page; default: FOLDER/gallery.html")
    output.add_argument("--png", metavar="FILE.png", help="a picture to draw instead of a page")
    add("--num-samples", type=COUNT, default=64, help="show at most the first N samples on a page")
    add("--rows", type=COUNT, default=4, help="samples of each folder in a picture")
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


# The page -----------------------------------------------------------------------------------------


def open_real(root, samples, count, val_fraction):
    """{class: iterator over its `real_clips`} for the classes of the first `count` samples."""
    T = samples.num_frames
    flags = samples.about["flags"]
    is_images = not flags["video"]
    results = results_of(flags["ckpt"])
    check_data_path(root, is_images, cached=False)
    source = open_source(root, samples.image_size, is_images, results)
    train, val = split_videos(root, source.videos(), val_fraction)
    real = {}
    for name in set(samples.names[:count]):
        if name is None:
            continue
        if name not in source.scan.classes:
            raise UserError(
                f"--data-path {root}: no class {name!r}, which samples have; pass the data set of "
                "training"
            )
        title = "real"
        videos = usable_videos(val, name, T)
        if not videos:  # a small class may have no validation video
            title = "real, from training"
            videos = usable_videos(train, name, T)
        if not videos:
            raise UserError(
                f"--data-path {root}: no video of class {name!r} has the {T} frames of the "
                "samples; remove the flag"
            )
        real[name] = real_clips(
            source=source,
            videos=videos,
            title=title,
            num_frames=T,
            fps=1 / samples.time_scale,
        )
    return real


def usable_videos(videos, class_name, num_frames):
    return [
        video
        for video in videos
        if video.class_name == class_name and video.num_frames >= num_frames
    ]


def real_clips(source, videos, title, num_frames, fps):
    """Yield (clip uint8 (T, H, W, 3), its title) from videos, if possible at the samples' rate."""
    rate = statistics.median(video.fps for video in videos)
    interval = max(1, round(rate / fps))
    clips = Clips(
        source,
        videos,
        num_frames,
        (interval,),
        flip=False,
        stream="real",
    )
    for index in itertools.count():
        item = clips[index]
        clip = item["clip"].permute(1, 2, 3, 0)
        seconds = item["time_scale"]
        note = ""
        if num_frames > 1 and abs(seconds * fps - 1) > 0.05:
            note = f", {1 / seconds:.3g} fps"  # the video has too few frames for fps
        yield clip.numpy(), title + note


def make_page(samples, count, real):
    """The HTML of the first `count` samples; real: {class: real clips} of `open_real`."""
    flags = samples.about["flags"]
    rows = ""
    for name, value in flags.items():
        flag = name.replace("_", "-")
        text = str(value)
        rows += f"<tr><td>--{escape(flag)}<td>{escape(WORDS.get(text, text))}"
    options = ""
    counts = Counter(samples.labels[:count])
    for label in sorted(counts):
        name = escape(class_name(samples.classes, label) or "none")
        options += f'<option value="{label}">{name} ({counts[label]})'
    cards = []
    for index in range(count):
        clips = real.get(samples.names[index])
        cards.append(make_card(samples, index, clips))
    parts = {
        "title": escape(samples.folder.resolve().name),
        "what": escape(summary_line(samples, count)),
        "ckpt": escape(flags["ckpt"]),
        "flags": rows,
        "options": options,
        "cards": "\n".join(cards),
        "count": count,
        "num_frames": samples.num_frames,
        "fps": 1 / samples.time_scale,
        "last": samples.num_frames - 1,
        "columns": 2 if real else 1,
        "rendering": "pixelated" if samples.image_size < SMALL else "auto",
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(parts[match[1]]), template)


def summary_line(samples, count):
    """A line of text: number, kind, size and frame rate of the samples, and their sampler."""
    T = samples.num_frames
    size = samples.image_size
    flags = samples.about["flags"]
    total = len(samples)
    number = str(total)
    if count < total:
        number = f"The first {count} of {total}"
    kind = "images"
    rate = ""
    if T > 1:
        kind = f"videos of {T} frames"
        rate = f", {1 / samples.time_scale:.4g} frames per second"
    return (
        f"{number} {kind}, {size} x {size} px{rate}; {flags['sampler']}, "
        f"{samples.about['mean_evaluations']:.4g} evaluations, guidance {flags['cfg_scale']}, "
        f"seed {flags['seed']}"
    )


def make_card(samples, index, real):
    """The HTML of a sample, with the next real clip beside it."""
    name = samples.names[index] or "none"
    suffix = "png" if samples.num_frames == 1 else "mp4"
    path = samples.folder / f"{index:06d}.{suffix}"
    if not path.exists():
        raise UserError(f"{samples.place}: no {path.name}; sample again")
    files = {"generated": path.read_bytes()}
    if real:
        clip, title = next(real)
        files[title] = clip_file(clip, 1 / samples.time_scale)
    media = ""
    size = f'width="{samples.image_size}" height="{samples.image_size}"'
    for title, content in files.items():
        text = base64.b64encode(content).decode()
        label = escape(f"{title}, {name}")
        if suffix == "png":
            tag = f'<img {size} alt="{label}" src="data:image/png;base64,{text}">'
        else:
            tag = (
                f'<video {size} muted playsinline preload="auto" aria-label="{label}" '
                f'data-src="data:video/mp4;base64,{text}"></video>'
            )
        media += f"<div>{tag}<span>{escape(title)}</span></div>"
    origin = f"sample {index}, seed {samples.about['flags']['seed']}"
    given = samples.given[index]
    if given:
        about = samples.about["given"][index]
        origin += f"; frames {about['frames']} given: {Path(about['source']).name}"
    frames = " ".join(map(str, given))
    marks = f'data-label="{samples.labels[index]}" data-given="{frames}"'
    caption = f"<figcaption>{escape(name)}<span>{escape(origin)}</span></figcaption>"
    return f'<figure class="card" {marks}><div class="pair">{media}</div>{caption}</figure>'


def clip_file(clip, fps):
    """The bytes of a clip uint8 (T, H, W, 3) as an mp4 file, or as a PNG file if T = 1."""
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder, "clip"), clip, fps)
        return next(Path(folder).iterdir()).read_bytes()


def write_page(args):
    with wrong_input():
        folder, *others = args.folders
        if others:
            raise UserError(f"FOLDER {others[0]}: a page shows one folder; remove it or add --png")
        out = Path(args.out or f"{folder}/gallery.html")
        samples = Samples(folder, "FOLDER")
        missing = NEEDED - samples.about.keys() - samples.about["flags"].keys()
        if missing:
            raise UserError(
                f"{samples.place}: its samples.json has no {min(missing)}; sample again"
            )
        if out.is_dir():
            raise UserError(f"--out {out}: a folder; expected the name of an HTML file")
        check_writable("--out", out.parent)
        total = len(samples)
        count = min(args.num_samples, total)
        real = {}
        if args.data_path:
            real = open_real(args.data_path, samples, count, args.val_fraction)
        page = make_page(samples, count, real)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = page.encode("utf-8", "replace")  # file names may not be UTF-8
    write_file(out, content)
    what = f"{count} samples"
    if count < total:
        what += f" ({total - count} more: --num-samples {total})"
    say(f"{out}: {what}, {len(content) / 1e6:.1f} MB; open it in a browser")


# The picture --------------------------------------------------------------------------------------


def draw_rows(samples, count):
    """The first `count` samples of a folder, under its name and what it has: uint8 (h, w, 3)."""
    T = samples.num_frames
    size = samples.image_size
    columns = evenly_spaced(T, COLUMNS)
    clips = samples.clips[:count, columns]
    N, n = clips.shape[:2]
    title = [
        samples.folder.resolve().name,
        *few(N, len(samples), "samples"),
        *(few(n, T, "frames") or [f"{T} frames"]),
        f"{1 / samples.time_scale:.3g} per second",
        f"{size} x {size} px",
    ]
    if samples.given[0]:
        title.append("given frames in orange")
    smooth = Image.Resampling.NEAREST if size < SIDE else Image.Resampling.LANCZOS
    frames = np.empty((N, n, SIDE, SIDE, 3), np.uint8)
    for index in np.ndindex(N, n):
        frame = Image.fromarray(clips[index])
        frames[index] = frame.resize((SIDE, SIDE), smooth)
    names = [samples.shown_class(name) for name in samples.names[:count]]
    names = [name[:MAX_NAME_LENGTH] for name in names]
    marked = [np.isin(columns, given) for given in samples.given[:count]]
    sheet = draw_sheet(frames, names=names, marked=marked, left=LEFT, gap=GAP)
    return stack(text_line(", ".join(title)), sheet)


def write_picture(args):
    with wrong_input():
        if args.data_path:
            raise UserError(f"--data-path {args.data_path}: a picture has no real clips; remove it")
        if Path(args.png).is_dir():
            raise UserError(f"--png {args.png}: a folder; expected the name of a PNG file")
        check_writable("--png", Path(args.png).parent)
        parts = [draw_rows(Samples(folder, "FOLDER"), args.rows) for folder in args.folders]
    picture = Image.fromarray(stack(*parts))
    Path(args.png).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.png) as file:
        picture.save(file, "PNG", optimize=True)
    say(f"{args.png}: {picture.width} x {picture.height} px")


@one_line_errors()
def main():
    args = parse_args()
    unused = "num_samples" if args.png else "rows"
    if unused in args.typed:
        output = "a picture" if args.png else "a page"
        fail(f"{flag_text(args, unused)}: does not apply to {output}; remove the flag")
    if args.png:
        write_picture(args)
    else:
        write_page(args)


if __name__ == "__main__":
    main()

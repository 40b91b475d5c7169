"""Make an HTML page of a sample folder, with real clips beside the samples. It needs no other file and no network.

    python scripts/gallery.py samples --data-path datasets/ucf-101

The page is FOLDER/gallery.html: all videos play in step, can be paused and stepped by frame, and filtered by class.
Its template is gallery.html beside this script.
"""

import base64
import itertools
import re
import statistics
import sys
import tempfile
from collections import Counter
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from given import frame_ranges
from runtime.atomic import atomic_write
from runtime.cli import COUNT, SHARE, ArgumentParser, UserError, check_writable, fail, say
from runtime.runs import results_of
from video.clips import Clips
from video.index import split_videos
from video.samples import NO_LABEL, class_name, read_samples
from video.source import check_data_path, open_source
from video.writers import write_videos

TEMPLATE = Path(__file__).with_suffix(".html")
SMALL = 128  # px; smaller samples are shown with sharp pixels instead of smoothed
WORDS = {"None": "none", "False": "off", "True": "on"}  # values of flags


def parse_args():
    parser = ArgumentParser(description="Make an HTML page of a sample folder, with real clips beside the samples.")
    parser.add_argument("folder", metavar="FOLDER", help="a folder that sample_gd.py has written")
    real = "data set of the real clips, taken from validation videos of the same classes; default: samples only"
    parser.add_argument("--data-path", metavar="DIR", help=real)
    parser.add_argument("--out", metavar="FILE.html", help="the page; default: FOLDER/gallery.html")
    parser.add_argument("--num-samples", type=COUNT, default=64, metavar="N", help="show at most the first N samples")
    split = "share of validation videos, as given to train.py, if the data set has no split files"
    parser.add_argument("--val-fraction", type=SHARE, default=0.05, metavar="F", help=split)
    return parser.parse_args()


class Samples:
    """A folder that sample_gd.py has written. Raises UserError."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.about, self.clips, labels = read_samples(f"FOLDER {folder}", folder)  # clips: (N, T, H, W, 3)
        self.labels, self.flags, self.fps = labels.tolist(), self.about["flags"], 1 / self.about["time_scale"]
        self.num_frames, self.image_size = self.clips.shape[1:3]
        given = [frame_ranges(entry["frames"]) for entry in self.about.get("given", ())]
        self.given = given or [()] * len(labels)  # the numbers of each sample's given frames

    def class_name(self, label):
        return class_name(self.about["classes"], label) or "none"


def open_real(root, samples, val_fraction):
    """{label: iterator over real clips of that class} for the labels of the samples, see `real_clips`."""
    images = not samples.flags["video"]
    check_data_path(root, images, cached=False)
    source = open_source(root, samples.image_size, images, results_of(samples.flags["ckpt"]))
    parts = split_videos(root, source.videos(), val_fraction)
    return {label: real_clips(source, samples, label, *parts) for label in set(samples.labels) - {NO_LABEL}}


def real_clips(source, samples, label, train, val):
    """Yield (clip uint8 (T, H, W, 3), its title) of a class, at the frame rate of the samples if possible.

    Raises UserError if there is none.
    """
    here, name, T, fps = f"--data-path {source.root}", samples.class_name(label), samples.num_frames, samples.fps
    if name not in source.scan.classes:
        raise UserError(f"{here}: no class {name!r}, which samples have; name the data set of training")
    train, val = ([v for v in part if v.class_name == name and v.num_frames >= T] for part in (train, val))
    videos, title = (val, "real") if val else (train, "real, from training")  # a small class may have no val video
    if not videos:
        raise UserError(f"{here}: no video of class {name!r} has {T} frames, as the samples have; remove the flag")
    interval = max(1, round(statistics.median(video.fps for video in videos) / fps))
    clips = Clips(source, videos, source.scan.classes, T, (interval, interval), flip=False, stream="real")
    for item in map(clips.__getitem__, itertools.count()):
        same = T == 1 or abs(item["time_scale"] * fps - 1) <= 0.05  # else its video has no frames at that rate
        own = title if same else f"{title}, {1 / item['time_scale']:.3g} fps"
        yield item["clip"].permute(1, 2, 3, 0).numpy(), own


def make_page(samples, count, real):
    """The HTML of the first `count` samples; real: {label: real clips} of `open_real`."""
    labels = Counter(samples.labels[:count])
    names = {label: f"{escape(samples.class_name(label))} ({labels[label]})" for label in sorted(labels)}
    flags = {name.replace("_", "-"): WORDS.get(str(value), str(value)) for name, value in samples.flags.items()}
    parts = vars(samples) | {
        "title": escape(samples.folder.resolve().name),
        "what": escape(summary_line(samples, count)),
        "ckpt": escape(samples.flags["ckpt"]),
        "flags": "".join(f"<tr><td>--{escape(flag)}<td>{escape(value)}" for flag, value in flags.items()),
        "options": "".join(f'<option value="{label}">{name}' for label, name in names.items()),
        "cards": "\n".join(make_card(samples, index, real.get(samples.labels[index])) for index in range(count)),
        "count": count,
        "last": samples.num_frames - 1,
        "columns": 2 if real else 1,
        "rendering": "pixelated" if samples.image_size < SMALL else "auto",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(parts[match[1]]), TEMPLATE.read_text(encoding="utf-8"))


def summary_line(samples, count):
    """Number, kind, size and frame rate of the samples, and how they were sampled."""
    T, size, total, flags = samples.num_frames, samples.image_size, len(samples.labels), samples.flags
    number = f"{total}" if count == total else f"The first {count} of {total}"
    kind, rate = ("images", "") if T == 1 else (f"videos of {T} frames", f", {samples.fps:.4g} frames per second")
    sampled = f"{flags['sampler']}, {samples.about['mean_evaluations']:.4g} evaluations, guidance {flags['cfg_scale']}"
    return f"{number} {kind}, {size} x {size} px{rate}; {sampled}, seed {flags['seed']}"


def make_card(samples, index, real):
    """The HTML of a sample, with the next of the real clips beside it."""
    label, name = samples.labels[index], samples.class_name(samples.labels[index])
    path = samples.folder / f"{index:06d}{'.png' if samples.num_frames == 1 else '.mp4'}"
    if not path.exists():
        raise UserError(f"FOLDER {samples.folder}: no {path.name}; sample again")
    media = make_media(samples, path.read_bytes(), "generated", name)
    if real:
        clip, title = next(real)
        media += make_media(samples, clip_file(clip, samples.fps), title, name)
    origin = f"sample {index}, seed {samples.flags['seed']}"
    if samples.given[index]:
        given = samples.about["given"][index]
        origin += f"; frames {given['frames']} given: {Path(given['source']).name}"
    marks = f'data-label="{label}" data-given="{" ".join(map(str, samples.given[index]))}"'
    caption = f"<figcaption>{escape(name)}<span>{escape(origin)}</span></figcaption>"
    return f'<figure class="card" {marks}><div class="pair">{media}</div>{caption}</figure>'


def make_media(samples, data, title, name):
    """The HTML of a video or an image of a class, embedded in the page, and its title."""
    text, label = base64.b64encode(data).decode(), escape(f"{title}, {name}")
    size = f'width="{samples.image_size}" height="{samples.image_size}"'
    if samples.num_frames == 1:
        tag = f'<img {size} alt="{label}" src="data:image/png;base64,{text}">'
    else:
        source = f'data-src="data:video/mp4;base64,{text}"'
        tag = f'<video {size} muted playsinline preload="auto" aria-label="{label}" {source}></video>'
    return f"<div>{tag}<span>{escape(title)}</span></div>"


def clip_file(clip, fps):
    """A clip uint8 (T, H, W, 3) as the bytes of an mp4 file, or of a PNG file if T = 1."""
    with tempfile.TemporaryDirectory() as folder:
        write_videos(folder, clip[None], fps, gifs=False)
        return next(Path(folder).iterdir()).read_bytes()


def main():
    args = parse_args()
    out = Path(args.out or Path(args.folder, "gallery.html"))
    try:
        samples = Samples(args.folder)
        if out.is_dir():
            raise UserError(f"--out {out}: a folder; expected the name of an HTML file")
        check_writable("--out", out.parent)
        count, total = min(args.num_samples, len(samples.labels)), len(samples.labels)
        real = open_real(args.data_path, samples, args.val_fraction) if args.data_path else {}
        page = make_page(samples, count, real)
    except UserError as error:
        fail(error)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            file.write(page.encode("utf-8", "replace"))  # names of files may have bytes that are not UTF-8
    except OSError as error:  # such as a full disk
        fail(error, status=1)
    more = f" ({total - count} more: --num-samples {total})" if count < total else ""
    say(f"{out}: {count} samples{more}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    main()

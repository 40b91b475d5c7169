"""Make an HTML page of a sample folder, with real clips beside the samples. It needs no other file and no network.

    python scripts/gallery.py samples --data-path datasets/ucf-101

The page is FOLDER/gallery.html: all videos play in step, can be paused and stepped by frame, and filtered by class.
Its template is gallery.html beside this script.
"""

import base64
import html
import io
import re
import statistics
import sys
import tempfile
from argparse import ArgumentTypeError
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from given import frame_ranges
from runtime.atomic import atomic_write
from runtime.cli import COUNT, SHARE, ArgumentParser, UserError, check_writable, fail, say
from runtime.runs import results_of
from video.clips import Clips
from video.index import check_data_path, latents_settings, scan_videos, split_videos
from video.samples import NO_LABEL, class_name, read_samples
from video.writers import write_mp4

TEMPLATE = Path(__file__).with_suffix(".html")
SMALL = 128  # px; smaller samples are shown with sharp pixels instead of smoothed


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


@dataclass
class Samples:
    """A folder that sample_gd.py has written."""

    folder: Path
    labels: list  # of all samples
    num_frames: int
    image_size: int  # px
    about: dict  # content of samples.json

    @property
    def are_images(self):
        return self.num_frames == 1

    def class_name(self, index):
        return class_name(self.about["classes"], self.labels[index]) or "none"

    def given(self, index):
        """What samples.json says of the given frames of a sample, {"source", "frames", "class"}; None without any."""
        return self.about["given"][index] if "given" in self.about else None


def load_samples(folder):
    """A sample folder as Samples, without the pixels. Raises UserError."""
    here, folder = f"FOLDER {folder}", Path(folder)
    if not folder.is_dir():
        raise UserError(f"{here}: {'not a folder' if folder.exists() else 'no such folder'}")
    about, clips, labels = read_samples(here, folder)
    if missing := {"ckpt", "video"} - about["flags"].keys():
        raise UserError(f"{here}: samples.json has no flag {min(missing)}; sample again")
    if "given" in about:
        check_given(here, about["given"], len(labels))
    return Samples(folder, labels.tolist(), *clips.shape[1:3], about)


def check_given(here, given, count):
    """Raise UserError unless `given` of a samples.json describes so many samples."""
    try:
        texts = [entry[name] for entry in given for name in ("frames", "source")]
        if len(texts) != 2 * count or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"wanted {count} entries with frames and source")
        for text in texts[::2]:
            frame_ranges(text)
    except (ArgumentTypeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{here}: samples.json is damaged (given: {error}); sample again") from error


# ----------------------------------------------------------------------------------------------------------------------
# Real clips


class RealClips:
    """Real clips with the size, the number of frames and, if possible, the frame rate of the samples, by class."""

    def __init__(self, root, samples, val_fraction):
        self.root, self.samples = root, samples
        images = not samples.about["flags"]["video"]
        check_data_path(root, images)
        if latents_settings(root, images) is not None:
            raise UserError(f"--data-path {root}: a latent cache; name the folder of its videos")
        self.scan = scan_videos(root, results_of(samples.about["flags"]["ckpt"]), images=images)
        self.train, self.val = split_videos(root, self.scan.videos, val_fraction)
        self.of_class, self.taken = {}, {}

    def next(self, class_name):
        """(clip uint8 (T, H, W, 3), its title) of a class. Raises UserError if the class has none."""
        if class_name not in self.of_class:
            self.of_class[class_name], self.taken[class_name] = self._open(class_name), 0
        clips, title = self.of_class[class_name]
        item = clips[self.taken[class_name]]
        self.taken[class_name] += 1
        rate = item["time_scale"] / self.samples.about["time_scale"]
        if not self.samples.are_images and abs(rate - 1) > 0.05:
            title += f", {1 / item['time_scale']:.3g} fps"  # the video has no frames at the rate of the samples
        return item["clip"].permute(1, 2, 3, 0).numpy(), title

    def _open(self, class_name):
        """The Clips of a class, and their title."""
        here, samples = f"--data-path {self.root}", self.samples
        if class_name not in self.scan.classes:
            raise UserError(f"{here}: no class {class_name!r}, which samples have; name the data set of training")
        val, train = (
            [video for video in part if video.class_name == class_name and video.num_frames >= samples.num_frames]
            for part in (self.val, self.train)
        )
        videos = val or train  # in a small data set, a class may have no validation video
        if not videos:
            raise UserError(
                f"{here}: no video of class {class_name!r} has {samples.num_frames} frames, as the samples have; leave "
                "the flag out"
            )
        interval = max(1, round(samples.about["time_scale"] * statistics.median(video.fps for video in videos)))
        clips = Clips(
            self.root, videos, self.scan.classes, samples.num_frames, samples.image_size, (interval, interval),
            flip=False, stream="real",
        )  # fmt: skip
        return clips, "real" if val else "real, from training"


# ----------------------------------------------------------------------------------------------------------------------
# The page


def make_page(samples, indices, real):
    """The HTML of the samples `indices`; `real` is a RealClips or None."""
    classes, flags = samples.about["classes"], samples.about["flags"]
    fps = 1 / samples.about["time_scale"]
    counts = Counter(samples.labels[index] for index in indices)
    names = {label: escape(class_name(classes, label) or "none") for label in sorted(counts)}
    options = [f'<option value="{label}">{name} ({counts[label]})' for label, name in names.items()]
    columns = 2 if real else 1
    parts = {
        "title": escape(samples.folder.resolve().name),
        "what": escape(summary_line(samples, indices, fps)),
        "ckpt": escape(flags["ckpt"]),
        "flags": "".join(f"<tr><td>{escape(flag)}<td>{escape(value)}" for flag, value in map(as_typed, flags.items())),
        "options": f'<option value="">all classes ({len(indices)})' + "".join(options),
        "cards": "\n".join(make_card(samples, index, real) for index in indices),
        "frames": samples.num_frames,
        "last": samples.num_frames - 1,
        "fps": fps,
        "columns": columns,
        "width": 180 * columns,
        "rendering": "pixelated" if samples.image_size < SMALL else "auto",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(parts[match[1]]), TEMPLATE.read_text(encoding="utf-8"))


def as_typed(item):
    """(flag as a user types it, its value as text) of a name and a value in samples.json."""
    name, value = item
    words = {"None": "none", "False": "off", "True": "on"}
    return f"--{name.replace('_', '-')}", words.get(str(value), value)


def summary_line(samples, indices, fps):
    """Number, kind, size and frame rate of the samples, and how they were sampled."""
    kind = "images" if samples.are_images else f"videos of {samples.num_frames} frames"
    total = len(samples.labels)
    count = f"{total}" if len(indices) == total else f"The first {len(indices)} of {total}"
    rate = "" if samples.are_images else f", {fps:.4g} frames per second"
    flags = samples.about["flags"]
    known = {"sampler": "{}", "num_sampling_steps": "{} points", "cfg_scale": "guidance {}", "seed": "seed {}"}
    sampled = ", ".join(text.format(flags[name]) for name, text in known.items() if name in flags)
    size = f"{samples.image_size} x {samples.image_size} px"
    return f"{count} {kind}, {size}{rate}" + (f"; {sampled}" if sampled else "")


def make_card(samples, index, real):
    """The HTML of a sample, with a real clip beside it."""
    name, label, flags = samples.class_name(index), samples.labels[index], samples.about["flags"]
    path = samples.folder / f"{index:06d}{'.png' if samples.are_images else '.mp4'}"
    try:
        shown = [("generated", path.read_bytes())]
    except OSError as error:
        raise UserError(f"FOLDER {path.parent}: no {path.name} ({error.strerror}); sample again") from error
    if real and label != NO_LABEL:
        clip, title = real.next(name)
        shown.append((title, clip_file(clip, 1 / samples.about["time_scale"])))
    pair = "".join(make_media(samples, data, f"{title}, {name}", title) for title, data in shown)
    origin = f"sample {index}" + (f", seed {flags['seed']}" if "seed" in flags else "")
    marks, given = "", samples.given(index)
    if given:
        origin += f"; frames {given['frames']} given: {Path(given['source']).name}"
        marks = f' data-given="{" ".join(map(str, frame_ranges(given["frames"])))}"'
    caption = f"<figcaption>{escape(name)}<span>{escape(origin)}</span></figcaption>"
    return f'<figure class="card" data-label="{label}"{marks}><div class="pair">{pair}</div>{caption}</figure>'


def make_media(samples, data, label, title):
    """The HTML of a video or an image, embedded in the page, and its title."""
    text, size = base64.b64encode(data).decode(), f'width="{samples.image_size}" height="{samples.image_size}"'
    if samples.are_images:
        tag = f'<img {size} alt="{escape(label)}" src="data:image/png;base64,{text}">'
    else:
        source = f'data-src="data:video/mp4;base64,{text}"'
        tag = f'<video {size} muted playsinline preload="auto" aria-label="{escape(label)}" {source}></video>'
    return f"<div>{tag}<span>{escape(title)}</span></div>"


def clip_file(clip, fps):
    """A clip uint8 (T, H, W, 3) as the bytes of an mp4 file, or of a PNG file if T = 1."""
    if len(clip) == 1:
        file = io.BytesIO()
        Image.fromarray(clip[0]).save(file, "PNG")
        return file.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_mp4(path, clip, fps)
        return path.read_bytes()


def escape(value):
    return html.escape(str(value))


def write_page(path, page):
    """Write the page whole or not at all. Bytes of file names that are not UTF-8 become question marks."""
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))


def main():
    args = parse_args()
    out = Path(args.out or Path(args.folder, "gallery.html"))
    try:
        samples = load_samples(args.folder)
        if out.is_dir():
            raise UserError(f"--out {out}: a folder; wanted the name of an HTML file")
        check_writable("--out", out.parent)
        indices = range(min(args.num_samples, len(samples.labels)))
        real = RealClips(args.data_path, samples, args.val_fraction) if args.data_path else None
        page = make_page(samples, indices, real)
    except UserError as error:
        fail(error)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_page(out, page)
    except OSError as error:  # such as a full disk
        fail(error, status=1)
    hidden = len(samples.labels) - len(indices)
    more = f" ({hidden} more: --num-samples {len(samples.labels)})" if hidden else ""
    say(f"{out}: {len(indices)} samples{more}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    main()

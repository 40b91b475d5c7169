"""Look at a folder of videos before training on it: what it holds, what would be skipped and why, what it would cost.

    python datasets/check.py datasets/my-videos --num-frames 16 --image-size 64 --vae none --model EqM-S/4

Prints how many videos there are, how long, at which rates and sizes; the files that can't be read, by name; what
training would leave out; the memory and the time of a step, measured here with a few clips of noise. Writes a sheet of
clips as the model sees them. Every video is decoded to its end, unless --quick.
"""

import math
import os
import statistics
import sys
import time
from collections import Counter, deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import numpy as np
import torch

from models import NAMES, EqM, model_config
from runtime import distributed
from runtime.cli import COUNT, SHARE, ArgumentParser, Bar, UserError, check_writable, fail, one_line_errors, say
from vae import REPOSITORIES, load_vae
from video.clips import Clips
from video.files import has_suffix, read_all_frames
from video.index import fitting_interval, split_videos
from video.source import THREADS, check_data_path, open_source, write_each
from video.writers import MAX_ROWS, write_sheet

PUBLISHED_LATENTS = 4, 8  # channels and downsampling of --vae ema and mse, which need not be loaded for an estimate
CLIPS_TIMED = 4  # of a step, at most
BYTES = 16 + 4  # per parameter: float32 weight, gradient and AdamW's two averages; the averaged weights


def parse_args():
    parser = ArgumentParser(description="Look at a folder of videos before training on it.")
    add = parser.add_argument
    add("data_path", metavar="DIR", help="folder with <class>/<video>, or videos without classes")
    add("--num-frames", type=COUNT, default=16, help="frames per clip")
    add("--frame-interval", type=COUNT, default=1, help="video frames from frame to frame of a clip")
    add("--image-size", type=COUNT, default=256, metavar="PX", help="height and width of the clips")
    add("--vae", default="ema", metavar="VAE", help="ema, mse, a directory, or none: pixels")
    add("--model", choices=NAMES, default="EqM-S/4", metavar="NAME", help="EqM-{Ti,S,B,L,XL}/{2,4,8}")
    add("--global-batch-size", type=COUNT, default=256, help="clips per step")
    add("--val-fraction", type=SHARE, default=0.05, help="share of the videos that validate")
    add("--quick", action="store_true", help="open the videos, but do not decode them")
    add("--out", metavar="FILE.png", help="the sheet; default: check-NAME.png here, NAME is that of the folder")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    out = args.out or f"check-{Path(args.data_path).resolve().name}.png"
    try:
        check_writable("--out", os.path.dirname(out) or ".")
        check_data_path(args.data_path, cached=False)
        config = make_config(args)
        source = open_source(args.data_path, args.image_size)
        scan = source.scan
        describe(scan)
        usable = describe_losses(args, scan, [] if args.quick else undecodable(args.data_path, scan.videos))
        train, val = split_videos(args.data_path, scan.videos, args.val_fraction)
    except UserError as error:
        fail(str(error).replace("--data-path", "DIR"))
    say(f"split: {len(train)} videos train, {len(val)} validate")
    for name in sorted({video.class_name for video in val} - {video.class_name for video in train}):
        say(f"  class {name}: all its videos validate, so the model never sees it: add some")
    if shown := usable[:MAX_ROWS]:
        interval = args.frame_interval, args.frame_interval
        clips = Clips(source, shown, scan.classes, args.num_frames, interval, flip=False)
        samples = [clips[index] for index in range(len(shown))]
        videos = np.stack([sample["clip"].permute(1, 2, 3, 0) for sample in samples])
        labels = [sample["y"] for sample in samples]
        write_sheet(out, videos, [scan.classes[label] for label in labels], labels=labels)
        say(f"{out}: {len(shown)} clips as the model sees them")
    estimate(args, config)


# ----------------------------------------------------------------------------------------------------------------------
# What is there, and what would be skipped


def describe(scan):
    """Counts, lengths, rates and sizes."""
    videos = scan.videos
    say(f"{len(videos)} videos in {len(scan.classes)} classes; {len(scan.unreadable)} files can't be opened")
    for name in scan.classes:
        own = [video.num_frames / video.fps for video in videos if video.class_name == name]
        say(f"  {name}: {len(own)} videos, {sum(own):.1f} s")
    columns = {"frames": [video.num_frames for video in videos], "frames per second": [video.fps for video in videos]}
    columns["seconds"] = [video.num_frames / video.fps for video in videos]
    for what, values in columns.items():
        say(f"{what}: {min(values):.4g} to {max(values):.4g}, median {statistics.median(values):.4g}")
    sizes = Counter(f"{video.width} x {video.height}" for video in videos)
    say("sizes, upright: " + ", ".join(f"{count} of {size}" for size, count in sizes.most_common(8)))


def undecodable(root, videos):
    """The paths of the videos that can't be decoded to their end."""
    decoded = write_each(videos, lambda video: deque(read_all_frames(root, video), maxlen=0), THREADS)
    bar = Bar(decoded, total=len(videos), desc="decoding", unit="video")
    return [video.path for video, is_readable in bar if not is_readable]


def describe_losses(args, scan, bad):
    """Say what training would leave out or change, and why. Returns the videos that can be used."""
    skipped = [(path, "can't be opened: repair or remove it") for path in scan.unreadable]
    skipped += [(path, "can't be decoded to its end: repair or remove it") for path in bad]
    found = {*(video.path for video in scan.videos), *scan.unreadable}
    for path in sorted(Path(args.data_path).rglob("[!.]*")):
        name = str(path.relative_to(args.data_path))
        if has_suffix("video", name) and name not in found and path.is_file():
            skipped.append((name, "is too deep, expected DIR/<class>/<video>"))
        elif path.suffix.lower() in (".m4v", ".3gp", ".mpg", ".mpeg", ".mts", ".wmv", ".flv"):
            skipped.append((name, "a video of another kind: convert it, such as by ffmpeg -i FILE FILE.mp4"))
    short = [video for video in scan.videos if video.num_frames < args.num_frames]
    least = f"a clip has --num-frames {args.num_frames}"
    for name, why in skipped + [(video.path, f"{video.num_frames} frames, {least}") for video in short]:
        say(f"skipped: {name}: {why}")
    usable = [video for video in scan.videos if video not in short and video.path not in bad]
    interval, size = args.frame_interval, args.image_size
    if near := sum(fitting_interval(video, args.num_frames, interval) < interval for video in usable):
        say(f"{near} videos are too short for --frame-interval {interval}: theirs is as large as fits")
    if small := [side for video in usable if (side := min(video.height, video.width)) < size]:
        sides = f"from {min(small)} px on the short side"
        say(f"{len(small)} videos are smaller than --image-size {size} and get enlarged, {sides}")
    return usable


# ----------------------------------------------------------------------------------------------------------------------
# What a step costs


def make_config(args):
    """The EqMConfig of the model that would be trained. Raises UserError."""
    channels, downsample = PUBLISHED_LATENTS
    if args.vae not in REPOSITORIES:
        vae = load_vae(args.vae)
        channels, downsample = vae.channels, vae.downsample
    unit = downsample * int(args.model.split("/")[1])
    if args.image_size % unit:
        raise UserError(f"--image-size {args.image_size}: not a multiple of {unit} (VAE's downsampling x patch)")
    shape = {"input_size": args.image_size // downsample, "in_channels": channels, "num_classes": 1}
    try:
        config = model_config(args.model, **shape, num_frames=args.num_frames, use_rope=True)
        config.check_num_frames(args.num_frames)
    except ValueError as error:
        raise UserError(f"--num-frames {args.num_frames}, --model {args.model}: {error}") from error
    return config


def estimate(args, config):
    """Say what a step takes here: time and memory of forward and backward of a few clips, scaled to the batch."""
    device, batch = distributed.start(), args.global_batch_size
    model, count = EqM(config).to(device), min(CLIPS_TIMED, batch)
    x = torch.randn(count, config.in_channels, args.num_frames, config.input_size, config.input_size, device=device)
    y, kept = torch.zeros(count, dtype=torch.int64, device=device), {}  # place of what the backward pass needs: bytes

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for _ in range(2):  # the first one warms up
        kept.clear()
        began = time.monotonic()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = (model(x, y).float() - x).square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - began) / count
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in weights) / count
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{args.model}: {size / 1e6:.1f} M parameters, {math.prod(config.grid(args.num_frames))} tokens a clip")
    each = f"{activations / 1e6:.3g} MB for each clip that a process has at once"
    total = f"{(size * BYTES + activations * batch) / 1e9:.3g} GB for {batch} clips"
    say(f"memory, fp32: {size * BYTES / 1e9:.2g} GB for the model, {each}: {total}")
    step = f"about {seconds * batch:.3g} s a step ({seconds:.3g} s a clip)"
    say(f"time, fp32 on this {device.type}: {step}, without the VAE")


if __name__ == "__main__":
    main()

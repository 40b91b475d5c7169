"""Look at a folder of videos before you train on it.

    python datasets/check.py datasets/my-videos --num-frames 16 --image-size 64 --vae none \
        --model EqM-S/4 --max-steps 20000

Prints the number of videos, their lengths, frame rates and sizes; every file that training would
skip, and why; the videos that validate; the memory, the seconds a step and the hours of training,
measured here on clips of noise. Writes a sheet of clips as the model sees them. It decodes every
video to its end, unless --quick. The last line is a command that trains on these videos on this
machine, with the flags that you gave.

If train.py would refuse these videos, it says so at the end, in the words of train.py. The exit
status is then 2, as for a mistake in the flags.
"""

import layout  # noqa: F401
import functools
import os
import re
import shlex
import shutil
import statistics
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import models
import preflight
from checkpoint import Progress, Start
from models import NAMES, EqM, model_shape
from runtime import cli, distributed
from runtime.cli import (
    COUNT,
    SHARE,
    ArgumentParser,
    Bar,
    UserError,
    fail,
    number,
    one_line_errors,
    plural,
    say,
)
from runtime.untrusted import is_text
from vae import REPOSITORIES, load_vae
from video.actions import names_of
from video.clips import Clips
from video.drawing import drawable, enlarge, evenly_spaced, stack, text_line
from video.files import has_suffix, why_unreadable
from video.index import CorruptDataError, CorruptVideos, find_data, find_files, log_data, name_some
from video.samples import is_sample_folder
from video.source import THREADS, check_data_path, latents_settings, open_source, write_each
from video.writers import MAX_ROWS, write_sheet

# what --vae ema and mse have, without a download
PUBLISHED_VAE = SimpleNamespace(channels=4, downsample=8)
CLIPS_TIMED = 4  # most clips of a step that is timed
SLOW = 10  # seconds; one clip that takes longer is enough to time
BYTES = 16 + 4  # per parameter: float32 weight, gradient and AdamW's two averages; the EMA weight
LENGTHS = 16, 8, 4  # frames of the clips that a command suggests, if the user does not say
MOST_PIXELS = 64  # px: smaller videos train without a VAE (docs/own-videos.md); half of it on a CPU
MANY = 1000  # videos from which the defaults of the scripts suit, with a GPU
SIDES = re.compile("left|right", re.IGNORECASE)  # "bright" costs only the mirrored clips
TRAIN = Path(__file__).resolve().parent.parent / "EqM" / "train.py"
# longer runs get a suggestion: a laptop or a borrowed GPU rarely runs for more than three days
MOST_HOURS = 72


def parse_args():
    parser = ArgumentParser(description="Look at a folder of videos before you train on it.")
    parser.set_defaults(
        video=True,
        epochs=None,
        real_data=None,
        use_rope=True,
        num_classes=1,
        frames_schedule=None,
        val_frames=[],
    )
    parser.set_defaults(**dict.fromkeys(models.FLAGS))
    add = parser.add_argument
    add("data_path", metavar="DIR", help="folder of <class>/<video>, or of videos without classes")
    add(
        "--num-frames",
        type=COUNT,
        default=16,
        help="frames per clip",
    )
    add(
        "--frame-interval",
        type=COUNT,
        nargs=1,
        default=[1],
        help="video frames from one frame of a clip to the next; default: 1",
    )
    add(
        "--image-size",
        type=COUNT,
        default=256,
        metavar="PX",
        help="height and width of the clips in pixels",
    )
    add(
        "--vae",
        default="ema",
        metavar="VAE",
        help="ema, mse, an AutoencoderKL's directory, or none: pixels",
    )
    add(
        "--model",
        choices=NAMES,
        default="EqM-S/4",
        metavar="NAME",
        help="EqM-{Ti,S,B,L,XL}/{2,4,8}",
    )
    add(
        "--global-batch-size",
        type=COUNT,
        default=256,
        help="clips per step",
    )
    add(
        "--max-steps",
        type=COUNT,
        help="steps of the training; default: those of 1400 epochs, as in train.py",
    )
    add(
        "--val-fraction",
        type=number(float, above=0, most=1),
        default=0.05,
        help="share of the videos to validate on, at least one video",
    )
    add(
        "--max-bad-fraction", type=SHARE, default=0.1, help="share of the files that may be corrupt"
    )
    add("--quick", action="store_true", help="open the videos, but do not decode them")
    add(
        "--out",
        metavar="FILE.png",
        help="the sheet; default: check-NAME.png here, where NAME is the folder's name",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    out = args.out or f"check-{Path(args.data_path).resolve().name}.png"
    try:
        if not out.lower().endswith(".png") or os.path.isdir(out):
            raise UserError(f"--out {out}: not a picture; expected a name that ends in .png")
        cli.check_writable("--out", Path(out).parent)
        if not os.path.isdir(args.data_path) or latents_settings(args.data_path):
            check_data_path(args.data_path, cached=False)
        vae = PUBLISHED_VAE if args.vae in REPOSITORIES else load_vae(args.vae)
        config = preflight.make_config(args, vae, Start(Progress()), [args.num_frames])
    except UserError as error:
        fail(str(error).replace("--data-path", "DIR"))
    device = distributed.start()
    source = None
    corrupt = []
    refusal = None  # the first reason for which train.py would refuse these videos
    try:
        source = open_videos(args)
        describe(source.scan)
        corrupt = [] if args.quick else undecodable(source)
        describe_skipped(args, source.scan, corrupt)
        refusal = too_many_corrupt(args, source.scan, corrupt)
        args, config = with_actions(args, config, source)
        data = check_data(args, source, corrupt)
        log_data(say, args, data)
        write_clips(args, data, out)
        steps = preflight.only_phase(args, Start(Progress()), data).last_step
        estimate(
            args,
            config=config,
            steps=steps,
            device=device,
        )
    except UserError as error:
        refusal = refusal or error
    if source and not isinstance(refusal, CorruptDataError):
        suggest_command(
            args=args,
            vae=vae,
            source=source,
            corrupt=corrupt,
            device=device,
        )
    if refusal:
        fail(f"train.py would refuse these videos: {refusal}")


# The videos ---------------------------------------------------------------------------------------


def open_videos(args):
    """The source of the videos. Raises UserError, if none can be opened after a reason for each."""
    try:
        return open_source(args.data_path, args.image_size)
    except CorruptDataError:
        for path in find_files(args.data_path, images=False):
            say(f"skipped: {path}: {why_unreadable(os.path.join(args.data_path, path))}")
        raise


def with_actions(args, config, source):
    """(args, config) of a model with the actions of the videos; unchanged if they have none.

    The source then knows them, too. Raises UserError.
    """
    changes = {"temporal_patch_size": 1, "no_flip": True, "pairs": None}
    flags = cli.Flags(vars(args) | changes, args.typed)
    fitted = replace(config, temporal_patch_size=1)
    fitted = preflight.fit_actions(flags, fitted, Start(Progress()), source)
    if source.actions is None:
        return args, config
    say(f"actions: {', '.join(source.actions.names)}")
    return flags, fitted


def too_many_corrupt(args, scan, corrupt):
    """The CorruptDataError of train.py if too many files are corrupt, else None."""
    try:
        CorruptVideos(scan, args.max_bad_fraction).add([*scan.unreadable, *corrupt])
    except CorruptDataError as error:
        return error
    return None


def check_data(args, source, corrupt):
    """The Data of the training, without corrupt videos. Raises UserError where train.py does."""
    num_frames = args.num_frames
    data = find_data(source, args.val_fraction, [num_frames], [], "--num-frames")
    train = [video for video in data.train[num_frames] if video.path not in corrupt]
    val = [video for video in data.val[num_frames] if video.path not in corrupt]
    if not train:
        raise UserError(
            f"--data-path {args.data_path}: all training videos are corrupt; add videos"
        )
    return replace(data, train={num_frames: train}, val={num_frames: val})


def describe(scan):
    """Print counts, lengths, rates and sizes."""
    videos = scan.videos
    counts = f"{plural(len(videos), 'video')} in {plural(len(scan.classes), 'class')}"
    say(f"{counts}; {plural(len(scan.unreadable), 'file')} that can't be opened")
    for name in scan.classes:
        seconds = [video.num_frames / video.fps for video in videos if video.class_name == name]
        say(f"  {name}: {plural(len(seconds), 'video')}, {sum(seconds):.1f} s")
    columns = {
        "frames": [video.num_frames for video in videos],
        "frames per second": [video.fps for video in videos],
        "seconds": [video.num_frames / video.fps for video in videos],
    }
    for name, values in columns.items():
        say(
            f"{name}: {min(values):.4g} to {max(values):.4g}, median "
            f"{statistics.median(values):.4g}"
        )
    sizes = Counter(f"{video.width} x {video.height}" for video in videos)
    common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(8))
    say(f"sizes, upright: {common}")


def undecodable(source):
    """The paths of the videos that can't be decoded to their end."""
    videos = source.videos()
    decoded = write_each(videos, lambda video: deque(source.decode(video), maxlen=0), THREADS)
    bar = Bar(
        decoded,
        total=len(videos),
        desc="decoding",
        unit="video",
    )
    return [video.path for video, is_readable in bar if not is_readable]


def describe_skipped(args, scan, corrupt):
    """Print which files training would skip, and why."""
    skipped = [
        (path, why_unreadable(os.path.join(args.data_path, path))) for path in scan.unreadable
    ]
    skipped += [(path, "can't be decoded to its end; repair or remove it") for path in corrupt]
    scanned = {*scan.unreadable, *(video.path for video in scan.videos)}
    for path in sorted(Path(args.data_path).rglob("[!.]*")):
        name = str(path.relative_to(args.data_path))
        if is_sample_folder(path.parent):  # the scan has named this folder
            continue
        if any(part.startswith(".") for part in Path(name).parts):  # in a hidden folder
            continue
        if not path.is_file() or name in scanned:
            continue
        if has_suffix("video", name):
            skipped.append((name, "in the wrong place; expected DIR/<class>/<video>"))
        elif path.suffix.lower() in (".3gp", ".mpg", ".mpeg", ".mts", ".wmv", ".flv"):
            skipped.append((name, "another kind of video; convert it: ffmpeg -i FILE FILE.mp4"))
    for video in scan.videos:
        if video.num_frames < args.num_frames:
            frames = plural(video.num_frames, "frame")
            skipped.append((video.path, f"{frames}, fewer than --num-frames {args.num_frames}"))
    for name, why in skipped:
        say(f"skipped: {name}: {why}")


def write_clips(args, data, out):
    """Write a sheet with clips of some training videos, first to last, and print their files."""
    videos = data.train[args.num_frames]
    shown = [videos[index] for index in evenly_spaced(len(videos), MAX_ROWS)]
    clips = Clips(
        source=data.source,
        videos=shown,
        num_frames=args.num_frames,
        frame_interval=args.frame_interval,
        flip=False,
    )
    samples = [clips[index] for index in range(len(shown))]
    samples.sort(key=lambda sample: sample["video"])
    names = []
    for row, sample in enumerate(samples):
        folder, file = os.path.split(sample["video"])
        folder = drawable(folder, f"class {np.ravel(sample['y'])[0]}")
        names.append(os.path.join(folder, drawable(file, f"video {row}")))
    videos = np.stack([sample["clip"].permute(1, 2, 3, 0) for sample in samples])
    if data.source.actions is not None:
        actions = names_of([sample["y"][1:] for sample in samples], data.source.actions.names)
        videos = add_actions(videos, actions)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_sheet(out, videos, names)
    count = plural(len(shown), "training clip")
    paths = ", ".join(sample["video"] for sample in samples)
    say(f"{out}: {count} as the model sees them, from the top: {paths}")


def add_actions(videos, actions):
    """Videos (N, T, H, W, 3), enlarged, with the action that led to each frame below it."""
    videos = enlarge(videos)
    N, T = videos.shape[:2]
    lines = {name: text_line(name) for name in set(sum(actions, []))}
    width = max(videos.shape[3], *(line.shape[1] for line in lines.values()))
    margin = np.full((0, width + width % 2, 3), 255, np.uint8)
    frames = []
    for row, column in np.ndindex(N, T):
        frames.append(stack(videos[row, column], lines[actions[row][column]], margin))
    return np.stack(frames).reshape(N, T, *frames[0].shape)


# What a step costs --------------------------------------------------------------------------------


@functools.cache
def measure(config, num_frames, most_clips, device):
    """(parameters, seconds, bytes of activations) of a forward and backward pass on one clip."""
    model = EqM(config).to(device)
    kept = {}  # address -> bytes of what the backward pass needs

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = config.input_size
    for count in (1, most_clips):  # the first clip warms up
        kept.clear()
        x = torch.randn(count, config.in_channels, num_frames, size, size, device=device)
        began = time.monotonic()
        size_of_y = (count, 1 + num_frames) if config.actions else (count,)
        y = torch.zeros(size_of_y, dtype=torch.int64, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(x, y)
            loss = (output.float() - x).square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - began) / count
        if seconds > SLOW:
            break
    num_parameters = 0
    for parameter in model.parameters():
        num_parameters += parameter.numel()
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return num_parameters, seconds, sum(kept.values()) / count


def estimate(args, config, steps, device):
    """Print memory and time of training, scaled from a few clips to the batch."""
    batch = args.global_batch_size
    size, seconds, activations = measure(
        config=config,
        num_frames=args.num_frames,
        most_clips=min(CLIPS_TIMED, batch),
        device=device,
    )
    tokens = config.num_tokens(args.num_frames)
    say(f"{args.model}: {size / 1e6:.1f} M parameters, {plural(tokens, 'token')} per clip")
    of_model = size * BYTES
    total = of_model + activations * batch
    say(
        f"memory, fp32: {of_model / 1e9:.2g} GB for the model, {activations / 1e6:.3g} MB for each "
        f"clip that a process has at once: {total / 1e9:.3g} GB for {plural(batch, 'clip')}"
    )
    step = seconds * batch
    hours = step * steps / 3600
    say(
        f"time, fp32 on this {device.type}: about {step:.3g} s per step x "
        f"{plural(steps, 'step')} = {in_words(hours)}, without VAE, validation and samples"
    )
    if hours > MOST_HOURS:
        suggest(args, config, hours)


def in_words(hours):
    return f"{hours:.2g} hours" if hours < 10 else f"{hours:,.0f} hours"


def suggest(args, config, hours):
    """Print how to shorten a training of so many hours.

    Another model's hours are in proportion to its FLOPs.
    """
    smaller = {}  # hours of the smaller models whose width fits what a token holds
    for name in NAMES:
        with suppress(ValueError):
            shape = model_shape(name)
            other = replace(config, **shape, temporal_patch_size=shape["patch_size"])
            other.check_num_frames(args.num_frames)
            ratio = other.training_flops(args.num_frames) / config.training_flops(args.num_frames)
            if ratio < 1 and other.values_per_token <= other.hidden_size:
                smaller[name] = hours * ratio
    model = ""
    if smaller:
        quick = {name: time for name, time in smaller.items() if time <= MOST_HOURS}
        name = max(quick, key=quick.get) if quick else min(smaller, key=smaller.get)
        model = f"--model {name} takes about {in_words(smaller[name])}; "
    say(
        f"note: more than {MOST_HOURS} hours are too long for most machines; {model}a GPU, or a "
        "lower --max-steps, --image-size, --num-frames or --global-batch-size helps too"
    )


# A command of train.py ----------------------------------------------------------------------------


def suggest_command(args, vae, source, corrupt, device):
    """Print a command that trains on these videos on this machine, with the flags of the user.

    Prints nothing if the videos are too few or too short.
    """
    num_gpus = count_gpus()
    flags, vae = choose_flags(
        args=args,
        vae=vae,
        videos=source.videos(),
        num_gpus=num_gpus,
    )
    flags = with_num_frames(
        flags=flags,
        vae=vae,
        source=source,
        corrupt=corrupt,
    )
    if flags is None:
        return
    batch = flags.global_batch_size
    processes = max(count for count in range(1, max(1, num_gpus) + 1) if batch % count == 0)
    sided = [name for name in source.scan.classes if SIDES.search(name)]
    if sided:
        say(
            f"note: class {name_some(sided)}: a mirrored clip may show another class, hence "
            "--no-flip"
        )
    has_rule = source.actions is None or source.actions.mirrored is not None
    if not has_rule:
        say("note: actions.json has no mirror rule, hence --no-flip")
    if flags.vae != "none":
        say(
            f"note: --vae {flags.vae} encodes the clips of each step; EqM/cache_latents.py encodes "
            "each video once"
        )
    _, seconds, _ = measure(
        config=preflight.make_config(flags, vae, Start(Progress()), [flags.num_frames]),
        num_frames=flags.num_frames,
        most_clips=min(CLIPS_TIMED, batch),
        device=device,
    )
    hours = in_words(seconds * batch * flags.max_steps / 3600 / processes)
    say(f"to train on these videos on this machine, for about {hours}, paste this command:")
    words = [
        *launcher(processes, num_gpus),
        shown_path(TRAIN),
        *train_words(flags, no_flip=sided or not has_rule),
    ]
    say(shlex.join(words))


def count_gpus():
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_flags(args, vae, videos, num_gpus):
    """(flags of train.py that suit these videos and this machine, their VAE), without --num-frames.

    With GPUs, these are the defaults of our scripts. Without, a small model that trains in hours.
    """
    side = statistics.median_low(min(video.height, video.width) for video in videos)
    if "image_size" in args.typed:
        side = args.image_size
    values = {
        "vae": "none",
        "model": "EqM-Ti/4",
        "global_batch_size": 8,
        "max_steps": 2_000,
    }
    if num_gpus:
        values["vae"] = "none" if side <= MOST_PIXELS else "ema"
        values["model"] = models.USUAL_NAME
        batch = 256 if len(videos) >= MANY else 32
        values["global_batch_size"] = max(1, batch // num_gpus) * num_gpus
        values["max_steps"] = 50_000 if len(videos) >= MANY else 12_000
    values = {name: value for name, value in values.items() if name not in args.typed}
    if "vae" in values:
        vae = PUBLISHED_VAE if values["vae"] == "ema" else load_vae("none")
    if "image_size" not in args.typed:
        most = MOST_PIXELS if num_gpus else MOST_PIXELS // 2
        size = min(side, most) if vae.downsample == 1 else 256
        unit = vae.downsample * model_shape(values.get("model", args.model))["patch_size"]
        values["image_size"] = max(unit, size // unit * unit)
    return cli.Flags(vars(args) | values, args.typed), vae


def with_num_frames(flags, vae, source, corrupt):
    """The flags with the user's --num-frames, or one that half of the videos have; else None."""
    median = statistics.median_high(video.num_frames for video in source.videos())
    lengths = [num_frames for num_frames in LENGTHS if num_frames <= median]
    if "num_frames" in flags.typed:
        lengths = [flags.num_frames]
    for num_frames in lengths:
        longer = cli.Flags(vars(flags) | {"num_frames": num_frames}, flags.typed)
        with suppress(UserError):
            preflight.make_config(longer, vae, Start(Progress()), [num_frames])
            check_data(longer, source, corrupt)
            return longer
    return None


def train_words(flags, no_flip):
    """The flags of train.py as words of its command line."""
    words = ["--video", "--num-frames", flags.num_frames, "--use-rope", "--model", flags.model]
    words += ["--position-table", "space", "--rope-speed", "0.5"]  # as train_progressive.sh
    words += ["--data-path", flags.data_path]
    name = Path(flags.data_path).resolve().name
    if is_text(name):
        words += ["--results-dir", f"results/{name}"]
    words += ["--vae", flags.vae, "--image-size", flags.image_size]
    if flags.temporal_patch_size:
        words += ["--temporal-patch-size", flags.temporal_patch_size]
    words += ["--global-batch-size", flags.global_batch_size, "--max-steps", flags.max_steps]
    if flags.max_steps <= 10_000:  # train.py would make its first samples there
        words += ["--val-every", max(100, flags.max_steps // 4)]
        # they take longer than a few steps
        words += ["--sample-every", max(100, flags.max_steps // 2)]
    for typed in sorted(flags.typed & {"frame_interval", "val_fraction", "max_bad_fraction"}):
        words += cli.flag_text(flags, typed).split()
    if no_flip:
        words.append("--no-flip")
    return [str(word) for word in words]


def launcher(processes, num_gpus):
    """The words that start a script with this Python: torchrun on GPUs, python on a CPU."""
    binaries = Path(sys.executable).parent

    def is_active(name):
        return Path(shutil.which(name) or "").parent == binaries

    python = "python" if is_active("python") else shown_path(sys.executable)
    if not num_gpus:
        return [python]
    start = ["torchrun"] if is_active("torchrun") else [python, "-m", "torch.distributed.run"]
    return [*start, f"--nproc_per_node={processes}"]


def shown_path(path):
    """A path relative to the current folder if it is inside, else absolute."""
    path = os.path.abspath(path)
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


if __name__ == "__main__":
    main()

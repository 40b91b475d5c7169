"""Encode every video once, so that training need not do it at every step: videos -> a latent cache.

    torchrun --nproc_per_node=8 EqM/cache_latents.py --data-path datasets/ucf-101 --vae ema --image-size 256 \
        --out datasets/ucf-101-latents

Then train with --data-path datasets/ucf-101-latents. Interrupted at any moment, the same command goes on; started
again when videos have come, gone or changed, it brings the cache up to date. The bytes do not depend on interruptions
or on the number of ranks; on the CPU the last bits do on that of threads (OMP_NUM_THREADS).

    OUT/<Class>/<stem>.safetensors   mean and std, with --with-flips mean_flipped and std_flipped, of the posterior of
                                     every frame: float16 (T, C, h, w)
    OUT/latents.json                 the settings and the videos; written last: where it is, the cache is complete
    OUT/latents.partial.json         the settings, until then
"""

import json
import os
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from runtime import cli, distributed
from runtime.atomic import atomic_write
from runtime.cli import COUNT, SHARE, ArgumentParser, UserError, check_writable, fail, one_line_errors, say
from runtime.distributed import rank, world_size
from runtime.untrusted import check_regular, plain_name, read_json
from vae import load_vae
from video import index
from video.files import LATENTS_SUFFIX, UnreadableError, read_all_frames, resize_and_crop
from video.index import LATENTS, PARTIAL, UCF_LISTS, latents_settings

PIECE = 16  # frames that are decoded together: an hour of 1080p would not fit the memory
ROUND = 16  # videos per rank between two looks at how far the others are


def parse_args():
    parser = ArgumentParser(description="Encode every video once: videos -> a latent cache to train on.")
    add = parser.add_argument
    add("--data-path", required=True, metavar="DIR", help="holds <class>/<video>, or videos without classes")
    add("--out", required=True, metavar="DIR", help="the cache: a new folder, or one to go on with")
    add("--vae", default="ema", metavar="VAE", help="ema, mse or a directory of an AutoencoderKL")
    add("--image-size", type=COUNT, default=256, metavar="PX", help="height and width of what is trained on")
    add("--with-flips", action="store_true", help="also encode mirrored frames, to train with flips; twice the size")
    add("--max-bad-fraction", type=SHARE, default=0.01, metavar="F", help="of the videos that may be broken")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Before anything is touched: what can be wrong


def check_flags(args):
    cli.check_devices()
    if args.vae == "none":
        raise UserError("--vae none: pixels need no cache, train.py reads them from the videos; name a VAE")
    check_writable("--out", args.out)
    index.check_data_path(args.data_path)
    if latents_settings(args.data_path) is not None:
        raise UserError(f"--data-path {args.data_path}: a latent cache; name the folder of its videos")


def describe(args, vae):
    """What all files of the cache have in common; raises UserError if the VAE can't make it."""
    if args.image_size % vae.downsample:
        raise UserError(f"--image-size {args.image_size} is not a multiple of {vae.downsample} (VAE's downsampling)")
    return {
        "format": index.LATENTS_FORMAT,
        "vae": vae.place,
        "image_size": args.image_size,
        "channels": vae.channels,
        "downsample": vae.downsample,
        "scale": vae.scale,
        "shift": vae.shift,
        "flips": args.with_flips,
    }


def check_out(out, settings):
    """Raise UserError unless `out` is new, empty or a cache of the same settings, complete or not."""
    names = os.listdir(out) if os.path.exists(out) else []
    if marks := [name for name in (LATENTS, PARTIAL) if name in names]:
        try:
            found = read_json(Path(out, marks[0]))
            other = next((name for name in settings if found[name] != settings[name]), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {out}: its {marks[0]} is damaged ({error}): name another folder") from error
        if other:
            has = str(found[other])[:200]
            raise UserError(
                f"--out {out}: a latent cache with {other} {has}, found {settings[other]}: give the same "
                "flags or name another folder"
            )
    elif foreign := sorted(name for name in names if name[0] != "." and name != PARTIAL + ".tmp"):
        raise UserError(f"--out {out}: holds {foreign[0]} but no latent cache: name a new or an empty folder")


def survey(args):
    """(scan, videos that are still to be encoded, books on the bad ones); for one rank only. Raises UserError."""
    has_index = os.path.exists(os.path.join(args.out, index.INDEX))
    scan = index.scan_videos(args.data_path, index_folder=args.out if has_index else None)
    bad_videos = index.BadVideos(len(scan.videos) + len(scan.unreadable), args.max_bad_fraction)
    for path in bad_videos.add(scan.unreadable):
        say(f"{path} can't be opened; it is left out")
    for video in scan.videos:
        name = PurePosixPath(latents_path(video)).name + ".tmp"  # as it is called while it is written
        if len(os.fsencode(name)) > 255:
            raise UserError(
                f"--data-path {args.data_path}: {video.path[:60]}... has too long a name for its latents: "
                f"shorten it by {len(os.fsencode(name)) - 255} bytes"
            )
    return scan, [video for video in scan.videos if not is_done(args.out, video, scan)], bad_videos


def latents_path(video):
    return str(PurePosixPath(video.path).with_suffix(LATENTS_SUFFIX))


def source(video, scan):
    """The metadata of a video's latents, by which a video that was replaced is told."""
    stamp, _ = scan.entries[video.path]
    return {"source_bytes": str(stamp[0])}


def is_done(out, video, scan):
    """Whether the latents of this very video are there, whole."""
    path = os.path.join(out, latents_path(video))
    try:
        check_regular(path)
        with plain_name(path) as plain, safe_open(plain, "pt") as file:
            return file.metadata() == source(video, scan)
    except (OSError, SafetensorError):
        return False


# ----------------------------------------------------------------------------------------------------------------------
# The story


def main():
    args = parse_args()
    try:
        check_flags(args)
        vae = load_vae(args.vae)
        settings = describe(args, vae)
        check_out(args.out, settings)
        plan = survey(args) if rank() == 0 else None  # the others wait for it in start()
    except UserError as error:
        fail(error)
    device = distributed.start()
    with one_line_errors():
        if rank() == 0:
            begin_cache(args.out, settings, plan[0])
        scan, todo, bad_videos = distributed.broadcast(plan)
        if todo:
            say(
                f"{args.out}: {len(todo)} of {len(scan.videos)} videos to encode, {size(todo, settings)}; "
                f"{world_size()} x {device.type}"
            )
        encode_videos(args, vae.to(device), device, scan, todo, bad_videos)
        if rank() == 0:
            finish(args, settings, scan, bad_videos)
    distributed.stop()


def begin_cache(out, settings, scan):
    """Mark `out` as a cache that is being made, unless it is complete; sweep out what a crash has left."""
    os.makedirs(out, exist_ok=True)
    if not Path(out, LATENTS).exists():
        write(Path(out, PARTIAL), json.dumps(settings, indent=1).encode())
    for left in (*Path(out).rglob("*.tmp"), *Path(out).glob(f"{index.INDEX}.*")):
        if not left.is_dir():  # a class may have any name
            left.unlink()
    index.save_index(scan, out)


def encode_videos(args, vae, device, scan, todo, bad_videos):
    """Encode and write what is to be done, in rounds that the ranks share; raises UserError if too many are bad."""
    frames = sum(video.num_frames for video in todo)
    bar = tqdm(total=frames, desc="encoding", unit="frame", smoothing=0, disable=rank() != 0 or not todo)
    with ThreadPoolExecutor(1) as decoder:
        for first in range(0, len(todo), ROUND * world_size()):
            shares, bad = split_evenly(todo[first : first + ROUND * world_size()]), []
            for video in shares[rank()]:
                try:
                    latents = encode(vae, device, decoder, args, video)
                    data = safetensors.torch.save(latents, metadata=source(video, scan))
                    write(Path(args.out, latents_path(video)), data)
                except UnreadableError:
                    bad.append(video.path)
                bar.update(video.num_frames)
            for path in bad_videos.add(sorted(path for part in distributed.gather(bad) for path in part)):
                say(f"{path} can't be decoded; it is left out")
            bar.update(sum(video.num_frames for part in shares[1:] for video in part))  # only rank 0 has a bar
    bar.close()


def split_evenly(videos):
    """A list of videos for each rank, of about equally many frames."""
    shares = [[] for _ in range(world_size())]
    for video in sorted(videos, key=lambda video: -video.num_frames):
        min(shares, key=lambda part: sum(video.num_frames for video in part)).append(video)
    return shares


def encode(vae, device, decoder, args, video):
    """The tensors of a video's file, each float16 (T, C, h, w); raises UnreadableError.

    Pixels are held for two pieces at a time, latents for the whole video.
    """
    pieces = (
        resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), args.image_size)
        for frames in read_all_frames(args.data_path, video, PIECE)
    )
    parts = defaultdict(list)
    for piece in ahead(decoder, pieces):
        clip = piece.transpose(0, 1)[None].to(device)  # (1, 3, T, H, W)
        for suffix, view in (("", clip), ("_flipped", clip.flip(-1)))[: 1 + args.with_flips]:
            for name, latents in zip(("mean", "std"), vae.posterior(view), strict=True):
                parts[name + suffix].append(latents[0].transpose(0, 1).half().cpu())
    return {name: torch.cat(latents).contiguous() for name, latents in parts.items()}


def ahead(executor, items):
    """The items of an iterator, of which the next one is made while this one is used."""
    coming = executor.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = executor.submit(next, items, None)
        yield item


def finish(args, settings, scan, bad_videos):
    """Write latents.json: the cache is complete."""
    videos = [replace(video, path=latents_path(video)) for video in scan.videos if video.path not in bad_videos.paths]
    if not videos:
        raise UserError(f"--data-path {args.data_path}: none of its videos can be decoded")
    lists, _ = index.find_ucf_lists(args.data_path, scan.videos)
    for file in lists.glob("*.txt") if lists else ():
        Path(args.out, UCF_LISTS).mkdir(exist_ok=True)
        shutil.copyfile(file, Path(args.out, UCF_LISTS, file.name))
    about = settings | {
        "num_videos": len(videos),
        "num_frames": sum(video.num_frames for video in videos),
        "classes": scan.classes,
        "videos": [asdict(video) for video in videos],
        "unreadable": sorted(bad_videos.paths),
    }
    before = latents_settings(args.out) if Path(args.out, LATENTS).exists() else about | {"videos": []}
    if gone := sorted({old["path"] for old in before["videos"]} - {video.path for video in videos}):
        say(f"{len(gone)} videos are gone, {gone[0]} first: the cache does without them, their files stay")
    if about != before:
        write(Path(args.out, LATENTS), json.dumps(about, indent=1).encode())
    Path(args.out, PARTIAL).unlink(missing_ok=True)
    say(f"{args.out} is finished: it holds {len(videos)} videos, {size(videos, settings)}")


def size(videos, settings):
    """How much latents take: '2484199 frames of 16 KB, 40.7 GB'."""
    side = settings["image_size"] // settings["downsample"]
    per_frame = settings["channels"] * side**2 * 2 * (1 + settings["flips"]) * 2  # mean and std; float16
    frames = sum(video.num_frames for video in videos)
    return f"{frames} frames of {per_frame / 1024:.3g} KB, {frames * per_frame / 1e9:.3g} GB"


def write(path, data):
    """A file that is there whole or not at all, whatever happens. Raises UserError if the disk is full or refuses."""
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}); what is there stays: with that put right, the "
            "same command goes on"
        ) from error


if __name__ == "__main__":
    main()

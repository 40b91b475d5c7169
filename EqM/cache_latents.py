"""Encode every video once, so that training does not have to at every step: videos -> a latent cache.

    torchrun --nproc_per_node=8 EqM/cache_latents.py --data-path datasets/ucf-101 --vae ema --image-size 256 \
        --out datasets/ucf-101-latents

Then train with --data-path datasets/ucf-101-latents. After an interruption, the same command continues; when videos
were added, removed or changed, it updates the cache. The bytes do not depend on interruptions or the number of ranks;
on the CPU the last bits depend on the number of threads (OMP_NUM_THREADS).

    OUT/<Class>/<stem>.safetensors   posterior mean and std of every frame, float16 (T, C, h, w); with --with-flips
                                     also mean_flipped and std_flipped
    OUT/latents.json                 settings and videos, written last: if it exists, the cache is complete
    OUT/latents.partial.json         settings, until then
"""

import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch

from runtime import cli, distributed
from runtime.atomic import atomic_write
from runtime.cli import COUNT, SHARE, ArgumentParser, Bar, UserError, fail, one_line_errors, say
from runtime.distributed import rank, world_size
from runtime.untrusted import read_json
from vae import load_vae
from video import index
from video.files import UnreadableError, latents_metadata, read_all_frames, resize_and_crop
from video.index import latents_path

CHUNK = 16  # frames decoded at once: an hour of 1080p does not fit into memory
ROUND = 16  # videos per rank between two synchronizations of the ranks


def parse_args():
    parser = ArgumentParser(description="Encode every video once: videos -> a latent cache to train on.")
    add = parser.add_argument
    add("--data-path", required=True, metavar="DIR", help="folder with <class>/<video>, or videos without classes")
    add("--out", required=True, metavar="DIR", help="the cache: a new folder, or one to continue or update")
    add("--vae", default="ema", metavar="VAE", help="ema, mse or the directory of a diffusers AutoencoderKL")
    add("--image-size", type=COUNT, default=256, metavar="PX", help="height and width of the training clips, px")
    add("--with-flips", action="store_true", help="also encode mirrored frames, to train with flips; doubles the size")
    add("--max-bad-fraction", type=SHARE, default=0.1, metavar="F", help="share of the videos that may be bad")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Checks before anything is written


def check_flags(args):
    """Raise UserError for flags that contradict each other, the machine or the file system."""
    cli.check_devices()
    if args.vae == "none":
        raise UserError("--vae none: pixels need no cache, train.py reads them from the videos: name a VAE")
    cli.check_writable("--out", args.out)
    index.check_data_path(args.data_path)
    if index.latents_settings(args.data_path) is not None:
        raise UserError(f"--data-path {args.data_path}: a latent cache; name the folder of its videos")


def cache_settings(args, vae):
    """The settings in latents.json, the same for all videos. Raises UserError if --image-size does not fit the VAE."""
    if args.image_size % vae.downsample:
        raise UserError(f"--image-size {args.image_size} is not a multiple of {vae.downsample} (VAE's downsampling)")
    settings = {"format": index.LATENTS_FORMAT, "vae": vae.place, "vae_sha256": vae.sha256}
    settings |= {"image_size": args.image_size}
    settings |= {name: getattr(vae, name) for name in ("channels", "downsample", "scale", "shift")}
    return settings | {"flips": args.with_flips}


def check_out(out, settings):
    """Raise UserError unless `out` is new, empty or a cache with the same settings, complete or not."""
    names = os.listdir(out) if os.path.exists(out) else []
    if present := [name for name in (index.LATENTS_FILE, index.PARTIAL_FILE) if name in names]:
        try:
            found = {"vae_sha256": settings["vae_sha256"]} | read_json(Path(out, present[0]))  # older caches have none
            other = next((name for name in settings if found[name] != settings[name]), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {out}: its {present[0]} is damaged ({error}): name another folder") from error
        if other:
            value, advice = str(found[other])[:200], "give the same flags or name another folder"
            raise UserError(f"--out {out}: a latent cache with {other} {value}, not {settings[other]}: {advice}")
    elif foreign := sorted(name for name in names if name[0] != "." and name != index.PARTIAL_FILE + ".tmp"):
        raise UserError(f"--out {out}: holds {foreign[0]} but no latent cache: name a new or an empty folder")


def plan_encoding(args):
    """(scan, videos still to encode, BadVideos found so far); for one rank only. Raises UserError."""
    scan = index.scan_videos(args.data_path, index_folder=args.out)
    bad_videos = index.BadVideos(len(scan.videos) + len(scan.unreadable), args.max_bad_fraction)
    for path in bad_videos.add(scan.unreadable):
        say(f"{path} can't be opened; it is left out")
    todo = []
    for video in scan.videos:
        excess = len(os.fsencode(PurePosixPath(latents_path(video)).name + ".tmp")) - 255  # .tmp: while it is written
        if excess > 0:
            found = f"{video.path[:60]}... has too long a name for its latents"
            raise UserError(f"--data-path {args.data_path}: {found}: shorten it by {excess} bytes")
        if latents_metadata(args.out, latents_path(video)) != source_metadata(video, scan):
            todo.append(video)
    return scan, todo, bad_videos


def source_metadata(video, scan):
    """The metadata in a video's latents file. They tell a video from one of another size that replaced it."""
    stamp, _ = scan.entries[video.path]
    return {"source_bytes": str(stamp[0])}


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


@one_line_errors()
def main():
    args = parse_args()
    try:
        check_flags(args)
        vae = load_vae(args.vae)
        settings = cache_settings(args, vae)
        check_out(args.out, settings)
        plan = plan_encoding(args) if rank() == 0 else None  # the other ranks wait for rank 0 in start()
    except UserError as error:
        fail(error)

    device = distributed.start()
    if rank() == 0:
        begin_cache(args, settings, plan[0])
    scan, todo, bad_videos = distributed.broadcast(plan)
    if todo:
        amount = f"{len(todo)} of {len(scan.videos)} videos to encode, {size_text(todo, settings)}"
        say(f"{args.out}: {amount}; {world_size()} x {device.type}")
    encode_videos(args, vae.to(device), device, scan, todo, bad_videos)
    if rank() == 0:
        finish_cache(args, settings, scan, bad_videos)
    distributed.stop()


def begin_cache(args, settings, scan):
    """Mark --out as an unfinished cache, unless it is complete; remove temporary files that a crash has left."""
    out = args.out
    os.makedirs(out, exist_ok=True)
    if not Path(out, index.LATENTS_FILE).exists():
        write_file(Path(out, index.PARTIAL_FILE), json.dumps(settings, indent=1).encode())
    for temporary in (*Path(out).rglob("*.tmp"), *Path(out).glob(index.INDEX_FILE.format("*") + ".*")):
        if not temporary.is_dir():  # a class may have any name
            temporary.unlink()
    index.save_index(scan, args.data_path, out)


def encode_videos(args, vae, device, scan, todo, bad_videos):
    """Encode and write the videos in `todo`, in rounds split over the ranks. Raises UserError if too many are bad."""
    num_frames = sum(video.num_frames for video in todo)
    bar = Bar(total=num_frames, desc="encoding", unit="frame", smoothing=0, disable=rank() != 0 or not todo)
    with ThreadPoolExecutor(1) as decoder:
        for first in range(0, len(todo), ROUND * world_size()):
            parts, bad = split_evenly(todo[first : first + ROUND * world_size()]), []
            for video in parts[rank()]:
                try:
                    latents = encode_video(vae, device, decoder, args, video)
                    data = safetensors.torch.save(latents, metadata=source_metadata(video, scan))
                    write_file(Path(args.out, latents_path(video)), data)
                except UnreadableError:
                    bad.append(video.path)
                bar.update(video.num_frames)
            for path in bad_videos.add(sorted(path for paths in distributed.gather(bad) for path in paths)):
                say(f"{path} can't be decoded; it is left out")
            bar.update(sum(video.num_frames for part in parts[1:] for video in part))  # only rank 0 shows the bar
    bar.close()


def split_evenly(videos):
    """A list of videos for each rank, with about the same number of frames."""
    parts = [[] for _ in range(world_size())]
    for video in sorted(videos, key=lambda video: -video.num_frames):
        min(parts, key=lambda part: sum(video.num_frames for video in part)).append(video)
    return parts


def encode_video(vae, device, decoder, args, video):
    """The tensors of a video's latents file, each float16 (T, C, h, w). Raises UnreadableError.

    Keeps the pixels of at most two chunks in memory, and the latents of the whole video.
    """
    chunks = (
        resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), args.image_size)
        for frames in read_all_frames(args.data_path, video, CHUNK)
    )
    parts = defaultdict(list)
    for chunk in prefetch(decoder, chunks):
        clip = chunk.transpose(0, 1)[None].to(device)  # (1, 3, T, H, W)
        for suffix, view in (("", clip), ("_flipped", clip.flip(-1)))[: 1 + args.with_flips]:
            for name, latents in zip(("mean", "std"), vae.posterior(view), strict=True):
                parts[name + suffix].append(latents[0].transpose(0, 1).half().cpu())
    return {name: torch.cat(latents).contiguous() for name, latents in parts.items()}


def prefetch(executor, items):
    """Yields the items of an iterator; the executor computes the next one while the caller uses this one."""
    future = executor.submit(next, items, None)
    while (item := future.result()) is not None:
        future = executor.submit(next, items, None)
        yield item


def finish_cache(args, settings, scan, bad_videos):
    """Write latents.json, which completes the cache. Raises UserError if no video could be decoded."""
    videos = [replace(video, path=latents_path(video)) for video in scan.videos if video.path not in bad_videos.paths]
    if not videos:
        raise UserError(f"--data-path {args.data_path}: none of its videos can be decoded")
    index.copy_ucf_lists(args.data_path, scan.videos, args.out)
    content = settings | {"num_videos": len(videos), "num_frames": sum(video.num_frames for video in videos)}
    content |= {"classes": scan.classes, "videos": [asdict(video) for video in videos]}
    content |= {"unreadable": sorted(bad_videos.paths)}
    place = Path(args.out, index.LATENTS_FILE)
    old = index.latents_settings(args.out) if place.exists() else {"videos": []}
    if gone := sorted({video["path"] for video in old["videos"]} - {video.path for video in videos}):
        say(
            f"{len(gone)} videos are gone from --data-path, the first is {gone[0]}: removed from {place.name}, "
            "their latents are kept"
        )
    if content != old:
        write_file(place, json.dumps(content, indent=1).encode())
    Path(args.out, index.PARTIAL_FILE).unlink(missing_ok=True)
    say(f"{args.out} is complete: {len(videos)} videos, {size_text(videos, settings)}")


def size_text(videos, settings):
    """The size of videos' latents, such as '2484199 frames of 16 KB, 40.7 GB'."""
    side = settings["image_size"] // settings["downsample"]
    per_frame = settings["channels"] * side**2 * 2 * (1 + settings["flips"]) * 2  # mean and std; float16
    num_frames = sum(video.num_frames for video in videos)
    return f"{num_frames} frames of {per_frame / 1024:.3g} KB, {num_frames * per_frame / 1e9:.3g} GB"


def write_file(path, data):
    """Write bytes to a file, whole or not at all, and make its folder. Raises UserError, such as for a full disk."""
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        advice = "existing files are intact: fix that and run the same command again to continue"
        raise UserError(f"{path} can't be written ({error.strerror}); {advice}") from error


if __name__ == "__main__":
    main()

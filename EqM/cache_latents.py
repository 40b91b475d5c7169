"""Decode and encode every video once, so that training steps don't have to: videos -> a cache.

    torchrun --nproc_per_node=8 EqM/cache_latents.py --data-path datasets/ucf-101 --vae ema \
        --image-size 256 --out datasets/ucf-101-latents

Then train with --data-path datasets/ucf-101-latents. The same command continues after an
interruption. It also updates the cache after you add, remove or change videos. The bytes do not
depend on interruptions or the number of ranks. On the CPU, the last bits of latents depend on the
number of threads (OMP_NUM_THREADS).

    OUT/<Class>/<stem>.safetensors   posterior mean and std of every frame, float16 (T, C, h, w);
                                     with --with-flips also mean_flipped and std_flipped; with
                                     --vae none only pixels, uint8 (T, 3, H, W)
    OUT/<Class>/<stem>.actions.npy   a copy of the video's actions, if there are any, and of their
                                     names, OUT/actions.json
    OUT/latents.json                 settings and videos, written last: a cache with this file is
                                     complete
    OUT/latents.partial.json         settings of a cache that is not complete
"""

import uncaught  # noqa: F401
import json
import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from runtime import cli, distributed
from runtime.atomic import write_file
from runtime.cli import (
    COUNT,
    SHARE,
    ArgumentParser,
    Bar,
    UserError,
    one_line_errors,
    plural,
    say,
    wrong_input,
)
from runtime.distributed import rank, world_size
from runtime.runs import remove_temporary_files
from runtime.untrusted import read_json
from vae import load_vae
from video import actions, index, source
from video.files import UnreadableError, read_all_frames
from video.source import LATENTS_FILE, PARTIAL_FILE, cached_path

ROUND = 16  # videos that each rank encodes before the ranks exchange what is corrupt
CHUNK = 16  # frames to encode at once, while the next ones are decoded


def parse_args():
    parser = ArgumentParser(
        description="Decode and encode every video once: videos -> a cache to train on.",
        fromfile_prefix_chars="@",
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
        help="the cache: a new folder, or a cache to continue or update",
    )
    add(
        "--vae",
        default="ema",
        metavar="VAE",
        help="ema, mse or the directory of a diffusers AutoencoderKL; none: cache pixels",
    )
    add(
        "--image-size",
        type=COUNT,
        default=256,
        metavar="PX",
        help="height and width of the clips in pixels",
    )
    add(
        "--with-flips",
        action="store_true",
        help="also encode mirrored frames, to train with flips; doubles the size",
    )
    add("--no-flip", dest="with_flips", action="store_false", help="undo --with-flips")
    add(
        "--skip-others",
        action="store_true",
        help="skip flags that only train.py has, so that both take the same recipe",
    )
    add(
        "--max-bad-fraction",
        type=SHARE,
        default=0.1,
        help="share of the files that may be corrupt; one always may",
    )
    return parser.parse_args()


def cache_settings(args, vae):
    """The settings in latents.json, which all videos share.

    Raises UserError if --image-size does not fit the VAE.
    """
    if args.image_size % vae.downsample:
        raise UserError(
            f"--image-size {args.image_size}: not a multiple of {vae.downsample}, the VAE's "
            "downsampling"
        )
    return {
        "format": source.LATENTS_FORMAT,
        "vae": vae.name,
        "vae_sha256": vae.sha256,
        "image_size": args.image_size,
        "channels": vae.channels,
        "downsample": vae.downsample,
        "scale": vae.scale,
        "shift": vae.shift,
        "flips": args.with_flips or args.vae == "none",  # reading mirrors pixels
    }


def check_out(out, settings):
    """Raise UserError unless `out` is new, empty, or a cache of these settings, maybe partial."""
    names = os.listdir(out) if os.path.exists(out) else []
    settings_file = LATENTS_FILE if LATENTS_FILE in names else PARTIAL_FILE
    if settings_file not in names:
        names = [name for name in names if name[0] != "." and name != PARTIAL_FILE + ".tmp"]
        if names:
            raise UserError(
                f"--out {out}: contains {min(names)} but no latent cache; name a new or an empty "
                "folder"
            )
        return
    try:
        cached = read_json(Path(out, settings_file))
        different = [name for name in settings if cached[name] != settings[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out {out}: its {settings_file} is damaged ({error}); name another folder"
        ) from error
    for name in different:
        raise UserError(
            f"--out {out}: a latent cache with {name} {cached[name]}, not {settings[name]}; use "
            "the same flags or name another folder"
        )


def plan_encoding(args):
    """(source, videos that still need encoding, CorruptVideos so far), on one rank.

    Raises UserError.
    """
    files = source.open_source(args.data_path, args.image_size, index_folder=args.out)
    actions.open_actions(args.data_path, files.videos())  # raises UserError if some are wrong
    bad_videos = index.CorruptVideos(files.scan, args.max_bad_fraction)
    for path in bad_videos.add(files.scan.unreadable):
        say(f"{path} can't be opened; it is skipped")
    for video in files.videos():
        name = Path(cached_path(video)).name + ".tmp"  # while it is written
        excess = len(os.fsencode(name)) - 255
        if excess > 0:
            raise UserError(
                f"--data-path {args.data_path}: the name of {video.path[:60]}... is too long for a "
                f"file of the cache; shorten it by {plural(excess, 'byte')}"
            )
    todo = find_changed(args.out, files)
    # ranks get similar numbers of frames
    return files, sorted(todo, key=lambda video: -video.num_frames), bad_videos


def find_changed(out, files):
    """The videos of a Files that are new or have changed since their files in `out` were written.

    Files of earlier versions record no time of change. They stay valid while their video has the
    recorded size and is not newer than they are: encoding a whole cache again may take days.
    """
    changed = []
    num_untimed = 0
    for video in files.videos():
        path = Path(out, cached_path(video))
        metadata = source.cached_metadata(path)
        size, mtime_ns = files.scan.stamps[video.path]
        if metadata == {"source_bytes": str(size)} and mtime_ns <= path.stat().st_mtime_ns:
            num_untimed += 1
        elif metadata != source_metadata(files.scan, video):
            changed.append(video)
    if num_untimed:
        say(
            f"note: {out}: keeps {plural(num_untimed, 'file')} of an earlier version, without the "
            "times of change of the videos; if you replaced videos by older ones of equal size, "
            "delete their files"
        )
    return changed


def source_metadata(scan, video):
    """The metadata in a video's cache file: size and time of change, which differ if another video
    replaces this one.

    One entry, because safetensors writes several in random order.
    """
    size, mtime_ns = scan.stamps[video.path]
    return {"source_stamp": f"{size} bytes, changed at {mtime_ns} ns"}


@one_line_errors()
def main():
    args = parse_args()
    with wrong_input():
        cli.check_devices()
        cli.check_writable("--out", args.out)
        source.check_data_path(args.data_path, cached=False)
        vae = load_vae(args.vae)
        settings = cache_settings(args, vae)
        check_out(args.out, settings)
        plan = plan_encoding(args) if rank() == 0 else None  # the other ranks wait in start()

    device = distributed.start()
    if rank() == 0:
        begin_cache(args, settings, *plan[:2])
    files, todo, bad_videos = distributed.broadcast(plan)
    if todo:
        say(
            f"{args.out}: encoding {len(todo)} of {plural(len(files.videos()), 'video')}, "
            f"{size_text(todo, settings)}; {world_size()} x {device.type}"
        )
        encode_videos(
            args=args,
            vae=vae.to(device),
            device=device,
            files=files,
            todo=todo,
            bad_videos=bad_videos,
        )
    if rank() == 0:
        finish_cache(args, settings, files, bad_videos)
    distributed.stop()


def begin_cache(args, settings, files, todo):
    """Mark --out as unfinished unless nothing is to do, and remove temporary files of a crash."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if todo or not (out / LATENTS_FILE).exists():
        write_file(out / PARTIAL_FILE, json.dumps(settings, indent=1).encode())
        (out / LATENTS_FILE).unlink(missing_ok=True)
    remove_temporary_files(out)
    index.save_index(files.scan, args.data_path, out)


def encode_videos(args, vae, device, files, todo, bad_videos):
    """Write the cache files of the videos in `todo`.

    Raises CorruptDataError if too many are corrupt.
    """

    def cache(video):
        path = Path(args.out, cached_path(video))
        metadata = source_metadata(files.scan, video)
        path.parent.mkdir(parents=True, exist_ok=True)
        if args.vae == "none":
            source.write_pixels(path=path, files=files, video=video, metadata=metadata)
        else:
            tensors = encode_video(
                vae=vae,
                device=device,
                files=files,
                video=video,
                with_flips=args.with_flips,
            )
            write_file(path, safetensors.torch.save(tensors, metadata))

    # a thread keeps all latents of its video in memory
    threads = source.THREADS if args.vae == "none" else 1
    size = ROUND * world_size()
    with Bar(
        total=count_frames(todo),
        desc="caching frames",
        unit="frame",
        smoothing=0,
    ) as bar:
        for first in range(0, len(todo), size):
            videos = todo[first + rank() : first + size : world_size()]
            corrupt = []
            for video, is_readable in source.write_each(videos, cache, threads):
                if not is_readable:
                    corrupt.append(video.path)
                bar.update(video.num_frames)
            corrupt = sorted(distributed.gather_items(corrupt))
            for path in bad_videos.add(corrupt):
                say(f"{path} can't be decoded, or its latents exceed float16; it is skipped")
            num_done = count_frames(todo[: first + size])
            bar.update(num_done - bar.n)  # frames of the other ranks


def encode_video(vae, device, files, video, with_flips):
    """{name: float16 (T, C, h, w)} of a video's cache file. Raises UnreadableError."""
    chunks = read_all_frames(files.root, video, CHUNK)
    parts = defaultdict(list)

    def next_frames(_):
        return files.fit(next(chunks))

    def encode(clip, suffix):
        for name, latents in zip(("mean", "std"), vae.posterior(clip), strict=True):
            frames = latents[0].transpose(0, 1).half().cpu()
            if not frames.isfinite().all():
                raise UnreadableError(f"{video.path}: latents exceed float16")
            parts[name + suffix].append(frames)

    for frames in source.in_threads(next_frames, range(0, video.num_frames, CHUNK), threads=1):
        clip = frames.transpose(0, 1)[None].to(device)  # (1, 3, T, H, W)
        encode(clip, "")
        if with_flips:
            encode(clip.flip(-1), "_flipped")
    return {name: torch.cat(latents).contiguous() for name, latents in parts.items()}


def finish_cache(args, settings, files, bad_videos):
    """Write latents.json, which completes the cache.

    Raises CorruptDataError if no video could be decoded.
    """
    videos = [video for video in files.videos() if video.path not in bad_videos.paths]
    if not videos:
        raise index.CorruptDataError(
            f"--data-path {args.data_path}: can't decode any of its videos; name others"
        )
    index.copy_ucf_lists(args.data_path, files.videos(), args.out)
    copies = {cached_path(video): video for video in videos}
    actions.copy_actions(args.data_path, copies, args.out)
    rows = []
    for video in videos:
        row = asdict(video) | {"path": cached_path(video)}
        del row["varies"], row["keyframes"]  # of the file, not of its latents
        rows.append(row)
    content = settings | {
        "num_videos": len(videos),
        "num_frames": count_frames(videos),
        "classes": files.scan.classes,
        "videos": rows,
        "unreadable": sorted(bad_videos.paths),
    }
    write_file(Path(args.out, LATENTS_FILE), json.dumps(content, indent=1).encode())
    Path(args.out, PARTIAL_FILE).unlink(missing_ok=True)
    say(f"{args.out} is complete: {plural(len(videos), 'video')}, {size_text(videos, settings)}")


def count_frames(videos):
    return sum(video.num_frames for video in videos)


def size_text(videos, settings):
    """The size of the cache files of videos, such as '2484199 frames of 16 KB, 40.7 GB'."""
    side = settings["image_size"] // settings["downsample"]
    per_frame = settings["channels"] * side**2
    if settings["vae"] != "none":
        per_frame *= 2 * (1 + settings["flips"]) * 2  # mean and std; float16
    count = count_frames(videos)
    total = count * per_frame
    return f"{plural(count, 'frame')} of {per_frame / 1024:.3g} KB, {total / 1e9:.3g} GB"


if __name__ == "__main__":
    main()

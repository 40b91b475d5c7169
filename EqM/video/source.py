"""Where clips come from: loose files, or a cache of the latents or pixels of their frames.

A source has `root`, its folder; `scan`, the videos, classes and unreadable files there; `has_flips`, whether it can
read them mirrored; videos() and read(...). To read from elsewhere, add a class and let open_source return it.
"""

import fcntl
import itertools
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from runtime.atomic import atomic_write
from runtime.cli import Bar, UserError, say
from runtime.distributed import local_rank
from runtime.runs import remove_temporary_files
from runtime.untrusted import check_regular, check_types, read_json
from video.files import UnreadableError, Video, read_all_frames, read_frames, resize_and_crop
from video.index import Scan, file_stamp, find_files, name_hash, scan_videos

SUFFIX = ".safetensors"  # of the files of a cache
LATENTS_FILE, PARTIAL_FILE = "latents.json", "latents.partial.json"  # of a complete, of an unfinished cache
LATENTS_FORMAT = 1
LATENTS_TYPES = {  # of latents.json
    "vae": str, "vae_sha256": str | None, "image_size": int, "channels": int, "downsample": int, "scale": float,
    "shift": float, "flips": bool, "classes": list, "unreadable": list, "videos": list,
}  # fmt: skip
LARGEST = 20 * 10**9  # bytes that --cache-frames takes without --cache-frames-force
CHUNK = 16  # frames decoded at once: an hour of 1080p does not fit into memory
ROUND = 16  # videos per rank that are cached between two synchronizations of the ranks


class Source:
    """What all sources have, besides read(video, frame_indices, flipped=False): the frames with these numbers, which
    ascend, as training takes them. Pixels are uint8 (3, T, H, W); latents are the posterior's mean and std, float16
    (2, C, T, h, w). It raises UnreadableError.
    """

    has_flips = True

    def __init__(self, root, scan):
        self.root, self.scan = root, scan

    def videos(self):
        return self.scan.videos


def open_source(root, image_size, images=False, index_folder=None):
    """The source of a data folder, whose clips have image_size px unless it is a cache. Raises UserError.

    Only one rank should call this: it opens videos, as scan_videos does.
    """
    if (settings := latents_settings(root, images)) is not None:
        return Cache(root, settings)
    return Files(root, scan_videos(root, index_folder, images), image_size)


def check_data_path(root, images=False, cached=True):
    """The checks of open_source that open no video; with cached=False a cache is an error too. Raises UserError."""
    if latents_settings(root, images) is None:
        find_files(root, images)
    elif not cached:
        raise UserError(f"--data-path {root}: a latent cache; name the folder of its videos")


class Files(Source):
    """Videos or images, decoded and resized at each read."""

    def __init__(self, root, scan, image_size):
        super().__init__(root, scan)
        self.image_size = image_size

    def read(self, video, frame_indices, flipped=False):
        frames = self.fit(read_frames(self.root, video, frame_indices))
        return (frames.flip(-1) if flipped else frames).transpose(0, 1).contiguous()

    def fit(self, frames):
        """uint8 (T, H, W, 3) of a file -> (T, 3, image_size, image_size)"""
        return resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), self.image_size)


# ----------------------------------------------------------------------------------------------------------------------
# Caches: a file for each video, which is mapped into memory that all processes share


def latents_settings(root, images=False):
    """The content of a cache's latents.json, None if root is not a cache. Raises UserError if it can't be used."""
    prefix, path = f"--data-path {root}", Path(root, LATENTS_FILE)
    if not os.path.exists(path):
        if os.path.exists(os.path.join(root, PARTIAL_FILE)):
            raise UserError(f"{prefix}: a cache that is not complete: run cache_latents.py again to continue")
        return None
    try:
        settings = read_json(path)
        if (found := settings["format"]) != LATENTS_FORMAT:
            raise ValueError(f"format {str(found)[:20]}, this code reads {LATENTS_FORMAT}")
        check_types(settings, LATENTS_TYPES)
        settings["videos"] = [Video(**fields) for fields in settings["videos"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{prefix}: its {LATENTS_FILE} is damaged ({error}): make the cache again") from error
    if images:
        raise UserError(f"{prefix}: a cache of videos, wanted images: add --video to use it")
    return settings


class Cache(Source):
    """A cache of cache_latents.py: latents, or pixels where the VAE is "none"."""

    def __init__(self, root, settings):
        for video in settings["videos"]:
            if not os.path.isfile(os.path.join(root, video.path)):
                raise UserError(f"--data-path {root}: a cache without its {video.path}: run cache_latents.py again")
        super().__init__(root, Scan(settings["videos"], settings["classes"], settings["unreadable"]))
        self.has_flips, self.has_pixels = settings["flips"], settings["vae"] == "none"
        side = settings["image_size"] // settings["downsample"]
        self.shape = settings["channels"], side, side

    def read(self, video, frame_indices, flipped=False):
        return read_cached(os.path.join(self.root, video.path), self.has_pixels, self.shape, frame_indices, flipped)


def read_cached(path, has_pixels, shape, frame_indices, flipped):
    """What Source.read returns, from a file of a cache; shape: (C, h, w) of a frame. Frames between are not read."""
    names = ["pixels"] if has_pixels else ["mean_flipped", "std_flipped"] if flipped else ["mean", "std"]
    first, parts = frame_indices[0], []
    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            for part in map(file.get_slice, names):
                found = part.get_dtype(), *part.get_shape()[1:]
                if found != ("U8" if has_pixels else "F16", *shape):
                    raise OSError(f"holds {found} per frame")
                frames = part[first : frame_indices[-1] + 1]
                parts.append(frames[[frame_index - first for frame_index in frame_indices]].transpose(0, 1))
    # Not a file; truncated or something else, or without flips; fewer frames than latents.json says.
    except (OSError, SafetensorError, IndexError, RuntimeError) as error:
        raise UnreadableError(f"{path}: {error}") from error
    if has_pixels:
        return (parts[0].flip(-1) if flipped else parts[0]).contiguous()
    return torch.stack(parts)


def cached_path(video):
    """The path of a video's file in a cache, relative to the cache."""
    return str(PurePosixPath(video.path).with_suffix(SUFFIX))


def cached_metadata(path):
    """The metadata of a file of a cache, a dict of strings; None if it is missing, damaged or has none."""
    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None


@contextmanager
def written(path):
    """A file to write to, all or nothing, and its folder. Raises UserError, such as for a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        advice = "existing files are intact: fix that and run the same command again to continue"
        raise UserError(f"{path} can't be written ({error.strerror}); {advice}") from error


def write_pixels(path, files, video, metadata):
    """Write a video of a Files to a file of a cache, as its frames are decoded. Raises UnreadableError, UserError."""
    shape = video.num_frames, 3, files.image_size, files.image_size
    pixels = {"dtype": "U8", "shape": shape, "data_offsets": [0, math.prod(shape)]}
    header = json.dumps({"__metadata__": metadata, "pixels": pixels}).encode()
    with written(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for frames in read_all_frames(files.root, video, CHUNK):
            file.write(files.fit(frames).contiguous().numpy())


def fill(todo, write, threads, rank=0, world_size=1, gather=lambda value: [value]):
    """Call write for each video of `todo`, in rounds split over the ranks, and show how far it is.

    After each round, yields the paths of its videos for which write has raised UnreadableError.
    """

    def unreadable(video):
        with suppress(UnreadableError):
            write(video)
            return []
        return [video.path]

    todo = sorted(todo, key=lambda video: -video.num_frames)  # so that all ranks get about as many frames
    total, hidden = sum(video.num_frames for video in todo), rank != 0 or not todo
    with (
        Bar(total=total, desc="caching frames", unit="frame", smoothing=0, disable=hidden) as bar,
        ThreadPoolExecutor(threads) as pool,  # decoders leave Python's lock while they work
    ):
        for first in range(0, len(todo), ROUND * world_size):
            part, paths = todo[first : first + ROUND * world_size], []
            own = part[rank::world_size]
            for video, found in zip(own, pool.map(unreadable, own), strict=True):
                paths += found
                bar.update(video.num_frames)
            yield sorted(itertools.chain(*gather(paths)))
            bar.update(sum(video.num_frames for video in part) - sum(video.num_frames for video in own))


# ----------------------------------------------------------------------------------------------------------------------
# --cache-frames: the pixels of Files, beside the runs


class CachedFiles(Files):
    """Files whose pixels are in a folder; those of corrupt videos, of which some frames can be decoded, are not.

    Raises UserError if there is nothing to decode or, unless force, too much.
    """

    def __init__(self, files, results_dir, force=False):
        if not isinstance(files, Files):
            raise UserError("--cache-frames: --data-path is a cache, which needs no decoding: remove it")
        super().__init__(files.root, files.scan, files.image_size)
        self.folder = Path(results_dir, f".pixels-{name_hash(os.path.realpath(files.root))}-{files.image_size}")
        disk = next(folder for folder in self.folder.absolute().parents if folder.exists())
        total, new, free = self.size(self.videos()), self.size(self.todo()), shutil.disk_usage(disk).free
        found = f"--cache-frames: {len(self.videos()):,} videos take {total / 1e6:,.1f} MB in {self.folder}"
        if total > LARGEST and not force:
            limit = f"expected at most {LARGEST // 10**9} GB"
            raise UserError(f"{found}; {limit}: add --cache-frames-force, or remove --cache-frames")
        if new > free:
            raise UserError(f"{found}, {new / 1e6:,.1f} of them new; {free / 1e6:,.1f} MB are free: free some space")
        say(found)

    def size(self, videos):
        return 3 * self.image_size**2 * sum(video.num_frames for video in videos)

    def place(self, video):
        return self.folder / (name_hash(video.path, 16) + SUFFIX)

    def todo(self):
        """{video: metadata of its file} of the videos that are not in the folder or have changed since."""
        stamps = {video: {"stamp": str(file_stamp(self.root, video.path))} for video in self.videos()}
        return {video: stamp for video, stamp in stamps.items() if cached_metadata(self.place(video)) != stamp}

    def fill(self):
        """Decode what is to do, on the first rank of each machine; the others must wait for it. Raises UserError."""
        if local_rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"--cache-frames: waiting for another run that fills {self.folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
            remove_temporary_files(self.folder)
            todo = self.todo()
            for video in todo:
                self.place(video).unlink(missing_ok=True)

            def write(video):
                write_pixels(self.place(video), self, video, todo[video])

            for _ in fill(todo, write, min(8, os.cpu_count())):
                pass  # who reads a corrupt video will name it

    def read(self, video, frame_indices, flipped=False):
        shape = 3, self.image_size, self.image_size
        try:
            return read_cached(self.place(video), True, shape, frame_indices, flipped)
        except UnreadableError:
            return super().read(video, frame_indices, flipped)

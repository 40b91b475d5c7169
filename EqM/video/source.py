"""Data sources: loose files, or a cache with the latents or pixels of their frames.

To read other data, add a Source and return it from open_source.
"""

import fcntl
import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from runtime.atomic import atomic_write
from runtime.cli import Bar, UserError, say
from runtime.distributed import local_rank
from runtime.runs import remove_temporary_files
from runtime.untrusted import check_regular, read_json
from video.files import UnreadableError, Video, read_all_frames, read_frames, resize_and_crop
from video.index import Scan, file_stamp, find_files, name_hash, scan_videos

SUFFIX = ".safetensors"  # of the files of a cache
LATENTS_FILE = "latents.json"  # of a complete cache
PARTIAL_FILE = "latents.partial.json"  # of an unfinished cache
LATENTS_FORMAT = 1
LATENTS_NAMES = {  # in latents.json
    "vae",
    "image_size",
    "channels",
    "downsample",
    "scale",
    "shift",
    "flips",
    "classes",
    "unreadable",
}
THREADS = min(8, os.cpu_count())  # for decoding; decoders release Python's lock while they work
LARGEST = 20 * 10**9  # bytes: most that --cache-frames takes


class Source:
    """The videos or images of a folder `root`, listed in a Scan."""

    actions = None  # the video.actions.Actions of the videos, if clips have them
    has_latents = False  # whether it reads latents, not pixels
    has_samples = False  # whether they are samples of a model, a teacher (pairs.py)
    pairs = {}  # path -> (seed, index, window) of the noise that it was sampled from

    def __init__(self, root, scan):
        self.root = root
        self.scan = scan
        self.classes = scan.classes

    def videos(self):
        return self.scan.videos

    def read(self, video, frame_indices, flipped):
        """The frames at `frame_indices`, which ascend, in the form that training takes.

        Raises UnreadableError. Pixels are uint8 (3, T, H, W). Latents are the posterior's mean and
        std, float16 (2, C, T, h, w).
        """
        raise NotImplementedError


def open_source(root, image_size, images=False, index_folder=None):
    """The source of a data folder, for one rank.

    Its clips have image_size px, or that of a cache. Raises UserError.
    """
    settings = latents_settings(root, images)
    if settings is not None:
        return Cache(root, settings)
    return Files(root, scan_videos(root, index_folder, images), image_size)


def check_data_path(root, images=False, cached=True):
    """Check a data folder without opening a video.

    With cached=False, a cache is an error. Raises UserError.
    """
    if latents_settings(root, images) is None:
        find_files(root, images)
    elif not cached:
        raise UserError(f"--data-path {root}: a latent cache; name the folder of its videos")


class Files(Source):
    """Videos or images; each read decodes and resizes them."""

    def __init__(self, root, scan, image_size):
        super().__init__(root, scan)
        self.image_size = image_size

    def read(self, video, frame_indices, flipped):
        frames = self.fit(read_frames(self.root, video, frame_indices))
        frames = frames.flip(-1) if flipped else frames
        return frames.transpose(0, 1).contiguous()

    def decode(self, video, chunk_size=16):
        """Yield all frames in order, in chunks uint8 (T, H, W, 3) with T <= chunk_size.

        Raises UnreadableError.
        """
        return read_all_frames(self.root, video, chunk_size)

    def stamp(self, video):
        """[size in bytes, modification time in ns] of a video's file; [0, 0] if it is gone."""
        return file_stamp(self.root, video.path)

    def fit(self, frames):
        """uint8 (T, H, W, 3) of a file -> (T, 3, image_size, image_size)"""
        return resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), self.image_size)


# Caches: one file per video, mapped into memory that all processes share --------------------------


def latents_settings(root, images=False):
    """The content of a cache's latents.json; None if root is not a cache.

    Raises UserError if the cache is unusable.
    """
    prefix = f"--data-path {root}"
    path = Path(root, LATENTS_FILE)
    if not os.path.exists(path):
        if os.path.exists(os.path.join(root, PARTIAL_FILE)):
            raise UserError(
                f"{prefix}: a cache that is not complete: run cache_latents.py again to continue"
            )
        return None
    try:
        settings = read_json(path)
        if settings["format"] != LATENTS_FORMAT:
            raise ValueError(f"format {settings['format']}, this code reads {LATENTS_FORMAT}")
        settings["videos"] = [Video(**fields) for fields in settings["videos"]]
        missing = LATENTS_NAMES - settings.keys()
        if missing:
            raise ValueError(f"{min(missing)} is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{prefix}: its {LATENTS_FILE} is damaged ({error}): make the cache again"
        ) from error
    if images:
        raise UserError(f"{prefix}: a cache of videos, expected images: add --video to use it")
    return settings


class Cache(Source):
    """A cache that cache_latents.py made: latents, or pixels if its VAE is "none"."""

    def __init__(self, root, settings):
        for video in settings["videos"]:
            if not os.path.isfile(os.path.join(root, video.path)):
                raise UserError(
                    f"--data-path {root}: a cache without its {video.path}: run cache_latents.py "
                    "again"
                )
        # cache_latents.py counts corrupt videos
        scan = Scan(settings["videos"], settings["classes"], unreadable=[])
        super().__init__(root, scan)
        side = settings["image_size"] // settings["downsample"]
        self.has_latents = settings["vae"] != "none"
        self.shape = (settings["channels"], side, side)

    def read(self, video, frame_indices, flipped):
        path = os.path.join(self.root, video.path)
        suffix = "_flipped" if flipped else ""
        if not self.has_latents:
            return read_pixels(
                path=path,
                side=self.shape[-1],
                frame_indices=frame_indices,
                flipped=flipped,
            )
        return read_cache_file(
            path=path,
            names=[f"mean{suffix}", f"std{suffix}"],
            shape=self.shape,
            frame_indices=frame_indices,
        )


def read_cache_file(path, names, shape, frame_indices):
    """Frames (C, h, w) from the tensors `names` of a cache file: (len(names), C, T, h, w).

    Raises UnreadableError.
    """
    first = frame_indices[0]
    last = frame_indices[-1]
    offsets = torch.tensor(frame_indices) - first
    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            spans = [file.get_slice(name)[first : last + 1] for name in names]
        frames = torch.stack([span[offsets].transpose(0, 1) for span in spans])
        channels, *sides = shape
        expected = [len(names), channels, len(frame_indices), *sides]
        if list(frames.shape) != expected:
            raise OSError(f"got {list(frames.shape)}, expected {expected}")
    # No regular file; a truncated or other file; one without flips or with too few frames.
    except (OSError, SafetensorError, IndexError, RuntimeError) as error:
        raise UnreadableError(f"{path}: {error}") from error
    return frames


def read_pixels(path, side, frame_indices, flipped):
    """Frames from a cache file of pixels: uint8 (3, T, side, side). Raises UnreadableError."""
    (clip,) = read_cache_file(
        path=path,
        names=["pixels"],
        shape=(3, side, side),
        frame_indices=frame_indices,
    )
    return clip.flip(-1) if flipped else clip


def cached_path(video):
    """The path of a video's cache file, relative to the cache."""
    return str(PurePosixPath(video.path).with_suffix(SUFFIX))


def cached_metadata(path):
    """The metadata of a cache file, a dict of strings.

    None if the file is missing or damaged, or has no metadata.
    """
    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None


def write_pixels(path, files, video, metadata):
    """Decode a video of a Files into a cache file, a few frames at a time.

    Raises UnreadableError, OSError.
    """
    shape = [video.num_frames, 3, files.image_size, files.image_size]
    pixels = {"dtype": "U8", "shape": shape, "data_offsets": [0, math.prod(shape)]}
    header = json.dumps({"__metadata__": metadata, "pixels": pixels}).encode()
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for frames in files.decode(video):
            file.write(files.fit(frames).contiguous().numpy())


def write_each(videos, write, threads):
    """Call write(video) for each video, in threads.

    Yield (video, whether it is readable) in order.
    """

    def attempt(video):
        with suppress(UnreadableError):
            write(video)
            return video, True
        return video, False

    return in_threads(attempt, videos, threads)


def in_threads(function, items, threads):
    """Yield function(item) for each item, in order.

    At most 2 * threads items run or wait for their turn.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        futures = (pool.submit(function, item) for item in items)
        ahead = deque(islice(futures, 2 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(islice(futures, 1))
    finally:
        pool.shutdown(cancel_futures=True)


# --cache-frames: the pixels of Files, in the folder of the runs -----------------------------------


class CachedFiles(Files):
    """Files with a cache of their pixels, without corrupt videos: each read decodes their frames.

    Raises UserError.
    """

    def __init__(self, files, results_dir):
        if not isinstance(files, Files):
            raise UserError(
                "--cache-frames: --data-path is a cache, which needs no decoding: remove it"
            )
        super().__init__(files.root, files.scan, files.image_size)
        root_hash = name_hash(os.path.realpath(files.root))
        self.folder = Path(results_dir, f".pixels-{root_hash}-{files.image_size}")
        num_frames = sum(video.num_frames for video in self.videos())
        size = 3 * self.image_size**2 * num_frames
        summary = (
            f"--cache-frames: {len(self.videos()):,} videos take {size / 1e6:,.1f} MB in "
            f"{self.folder}"
        )
        if size > LARGEST:
            raise UserError(
                f"{summary}; expected at most {LARGEST // 10**9} GB: use a smaller --image-size, "
                "or train on a cache of cache_latents.py"
            )
        say(summary)

    def cache_path(self, video):
        return self.folder / (name_hash(video.path, 16) + SUFFIX)

    def fill(self):
        """Decode new and changed videos, on the first rank of each machine; the others must wait.

        Raises UserError.
        """
        if local_rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(
                    f"--cache-frames: {self.folder} can't be locked ({error.strerror}): move "
                    "--results-dir to another file system, or remove this flag"
                ) from error
            remove_temporary_files(self.folder)
            self.write_changed()

    def write_changed(self):
        """Decode the videos whose cache files are missing or have another stamp."""
        todo = {}  # video -> metadata of its cache file
        for video in self.videos():
            metadata = {"stamp": str(self.stamp(video))}
            if cached_metadata(self.cache_path(video)) != metadata:
                todo[video] = metadata
                self.cache_path(video).unlink(missing_ok=True)

        def write(video):
            write_pixels(
                path=self.cache_path(video),
                files=self,
                video=video,
                metadata=todo[video],
            )

        for _ in Bar(
            write_each(todo, write, THREADS),
            total=len(todo),
            desc="caching frames",
            unit="video",
            disable=not todo,
        ):
            pass  # a corrupt video is named when a clip needs it

    def read(self, video, frame_indices, flipped):
        try:
            return read_pixels(
                path=self.cache_path(video),
                side=self.image_size,
                frame_indices=frame_indices,
                flipped=flipped,
            )
        except UnreadableError:
            return super().read(video, frame_indices, flipped)

"""The stream of samples: clips with labels, and the batches that each rank takes from it.

A sample is a function of the data set's arguments and its index in the stream, so workers, ranks and interruptions
change nothing.
"""

import os

import torch

from runtime.cli import UserError
from runtime.rng import generator
from video.files import (
    KINDS,
    SUFFIXES,
    UnreadableError,
    is_a,
    is_cached,
    probe,
    read_frames,
    read_latents,
    resize_and_crop,
)
from video.index import latents_settings, list_folder

ATTEMPTS = 100  # videos tried for one sample before giving up


class Clips(torch.utils.data.Dataset):
    """The sample at an index of a stream: a clip of one of `videos`, all of which have at least num_frames frames.

    The stream is one permutation of the videos after another; `stream` names it: the first step of a training phase,
    or a word. frame_interval is the smallest and the largest distance from frame to frame; each clip draws one, or
    takes the largest that fits its video. Videos of a latent cache have their image size already.
    """

    def __init__(
        self, root, videos, classes, num_frames, image_size, frame_interval=(1, 1), flip=True, seed=0, stream=0
    ):
        if any(video.num_frames < num_frames for video in videos):
            raise ValueError(f"a video has fewer than {num_frames} frames: leave it out with long_enough()")
        self.latent_shape = None  # (C, h, w) of a cache
        if any(map(is_cached, videos)):
            about = latents_settings(root)
            side = about["image_size"] // about["downsample"]
            self.latent_shape = about["channels"], side, side
            if flip and not about["flips"]:
                raise ValueError(f"{root} holds no mirrored latents: pass flip=False")
        self.root, self.videos, self.classes = root, videos, classes
        self.num_frames, self.image_size, self.frame_interval = num_frames, image_size, frame_interval
        self.flip, self.seed, self.stream = flip, seed, stream
        self.watch = None  # a LoaderWatch that is told what is being read
        self._epoch, self._permutation = None, None

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        """A dict: clip, uint8 (C, T, H, W) or from a cache float16 (2, C, T, h, w); label; time_scale, seconds per
        frame; index; video, its path; bad, the paths of the videos that should have been here but can't be decoded.

        Raises UserError if too many can't.
        """
        flipped = self.flip and self._random_int("flip", 2, index) == 1
        tried = []
        while len(tried) < min(ATTEMPTS, len(self.videos)):
            video = self._video(index, tried)
            frames, time_scale = self._frames(video, index, len(tried))
            try:
                self._note(video.path)
                clip = self._read(video, frames, flipped)
            except UnreadableError:
                tried.append(video)
                continue
            finally:
                self._note("")
            return {
                "clip": clip,
                "label": self.classes.index(video.class_name),
                "time_scale": time_scale,
                "index": index,
                "video": video.path,
                "bad": [video.path for video in tried],
            }
        raise UserError(f"--data-path {self.root}: {len(tried)} files in a row are bad, {tried[0].path} the first")

    def _read(self, video, frames, flipped):
        if is_cached(video):
            return read_latents(self.root, video, frames, flipped, self.latent_shape)
        clip = torch.from_numpy(read_frames(self.root, video, frames)).permute(0, 3, 1, 2)
        clip = resize_and_crop(clip, self.image_size)
        return (clip.flip(-1) if flipped else clip).transpose(0, 1).contiguous()  # (C, T, H, W)

    def _note(self, path):
        if self.watch is not None:
            self.watch.note(path)

    def _random_int(self, purpose, below, *key):
        """An integer from 0 to below - 1."""
        return int(torch.randint(below, (), generator=generator(self.seed, purpose, self.stream, *key)))

    def _video(self, index, tried):
        if tried:
            others = [video for video in self.videos if video not in tried]
            return others[self._random_int("replacement", len(others), index, len(tried))]
        epoch, position = divmod(index, len(self.videos))
        if epoch != self._epoch:  # kept, as it costs O(videos) and serves a whole epoch
            order = generator(self.seed, "order", self.stream, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.videos), generator=order)
        return self.videos[self._permutation[position]]

    def _frames(self, video, index, attempt):
        """The indices of the frames to read, and the seconds from one to the next."""
        smallest, largest = self.frame_interval
        interval = smallest + self._random_int("interval", largest - smallest + 1, index, attempt)
        gaps = self.num_frames - 1
        if gaps:
            interval = min(interval, (video.num_frames - 1) // gaps)
        start = self._random_int("start", video.num_frames - gaps * interval, index, attempt)
        return [start + step * interval for step in range(self.num_frames)], interval / video.fps


class ClipsByFrames(torch.utils.data.Dataset):
    """Several Clips, one per number of frames; a sample is asked for as (num_frames, index)."""

    def __init__(self, clips, watch=None):
        self.clips, self.watch = clips, watch
        for one in clips.values():
            one.watch = watch

    def __getitem__(self, key):
        num_frames, index = key
        return self.clips[num_frames][index]


class Batches:
    """A batch sampler: for each of `steps` steps the indices of this rank's samples, as `micro_batches` lists.

    Step s takes the global_batch indices from first + s * global_batch on; every rank takes its slice of them.
    """

    def __init__(self, first, steps, global_batch, rank, world_size, micro_batches=1):
        self.size, rest = divmod(global_batch, world_size * micro_batches)
        if rest or not self.size:
            raise ValueError(f"a global batch of {global_batch} for {world_size} ranks x {micro_batches} micro-batches")
        self.first, self.steps, self.global_batch = first, steps, global_batch
        self.offset, self.micro_batches = rank * self.size * micro_batches, micro_batches

    def __len__(self):
        return self.steps * self.micro_batches

    def __iter__(self):
        for step in range(self.steps):
            for micro in range(self.micro_batches):
                start = self.first + step * self.global_batch + self.offset + micro * self.size
                yield list(range(start, start + self.size))


def collate(samples):
    """clips (B, ...); labels, indices (B,) int64; time_scales (B,) float32; lists: videos, bad."""
    return {
        "clips": torch.stack([sample["clip"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "time_scales": torch.tensor([sample["time_scale"] for sample in samples], dtype=torch.float32),
        "indices": torch.tensor([sample["index"] for sample in samples]),
        "videos": [sample["video"] for sample in samples],
        "bad": [path for sample in samples for path in sample["bad"]],
    }


# ----------------------------------------------------------------------------------------------------------------------
# What sampling starts from in place of noise (--init)


def init_files(place, images):
    """What --init names: [place] if it is a file, else the paths of the videos (images) right in this folder, sorted.

    Raises UserError if there is none.
    """
    if os.path.isfile(place):
        return [place]
    here, kind = f"--init {place}", KINDS[images]
    files = list_folder(here, place, kind)[1]
    if not files:
        raise UserError(f"{here}: no {kind} right in this folder, wanted one of {' '.join(SUFFIXES[kind])}")
    return [os.path.join(place, file) for file in files]


def read_init(path, num_frames, seconds_per_frame, image_size, images):
    """What sampling starts from (--init): uint8 (T, H, W, 3) with T = num_frames and H = W = image_size, not resized.

    A video gives its first frame and those behind it that are the whole number of frames apart that comes closest to
    seconds_per_frame; an image gives itself. Raises UserError.
    """
    here, kind = f"--init {path}", KINDS[images]
    if not os.path.isfile(path):
        raise UserError(f"{here}: no such file")
    if not is_a(kind, path):
        raise UserError(f"{here}: by its name no {kind}, wanted one of {' '.join(SUFFIXES[kind])}")
    try:
        video = probe("", "", path)
        interval = max(1, round(seconds_per_frame * video.fps))
        frames = range(0, num_frames * interval, interval)
        if frames[-1] >= video.num_frames:
            raise UserError(
                f"{here}: has {video.num_frames} frames, but {num_frames} that are {interval} apart take "
                f"{frames[-1] + 1}; name a longer video"
            )
        pixels = read_frames("", video, frames)
    except UnreadableError as error:
        raise UserError(f"{here}: can't be decoded; name another file") from error
    height, width = pixels.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise UserError(f"{here}: {width} x {height} pixels, wanted {image_size} x {image_size}: resize it first")
    return pixels

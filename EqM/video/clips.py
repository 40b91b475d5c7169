"""The stream of samples, clips with their conditions, and the batches that each rank takes from it.

A sample depends only on the arguments of Clips and its index in the stream, not on workers, ranks
or interruptions.
"""

import copy
import math
import os
from contextlib import suppress
from dataclasses import dataclass

import torch

from runtime.cli import UserError, plural
from runtime.rng import generator
from video.files import UnreadableError
from video.index import CorruptDataError, fitting_interval

MAX_ATTEMPTS = 100  # videos tried for one sample


@dataclass(eq=False)
class Clips(torch.utils.data.Dataset):
    """Maps an index to a sample: a clip of one of `videos`.

    Their stream is a sequence of permutations.
    """

    source: object  # see source.py
    videos: list  # each of at least num_frames frames
    num_frames: int
    # smallest and perhaps largest distance of frames; each clip draws one that fits its video
    frame_interval: tuple = (1,)
    flip: bool = True
    seed: int = 0
    # the name of the stream, part of its seed: a training phase uses its first step
    stream: int | str = 0
    spare: list = ()  # videos that replace `videos` if all of them are corrupt

    _epoch = _order = None

    def note(self, path):
        """Called with the path of the file being read, or "" for none.

        A ClipsByFrames replaces this method.
        """

    @property
    def classes(self):
        return self.source.classes

    @property
    def parts(self):
        return [self]

    def __getstate__(self):  # for a loader process
        source = copy.copy(self.source)
        source.scan = None  # a large object that reading does not need
        return vars(self) | {"source": source}

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        """A dict: clip, as the source reads it; y, the condition, a class or a list of the class
        and T actions; time_scale, seconds per frame; index; video, the path of its file; pair and
        is_sample, see Source; corrupt, the paths of corrupt videos that it replaces. Raises
        CorruptDataError if all, or MAX_ATTEMPTS, are corrupt.
        """
        flipped = self.flip and self._random_int("flip", 2, index) == 1
        tried = []
        while len(tried) < min(MAX_ATTEMPTS, len(self.videos) + len(self.spare)):
            video, frame_indices, time_scale = self.draw(index, tried)
            self.note(video.path)
            with suppress(UnreadableError):
                clip = self.source.read(video, frame_indices, flipped)
                y = self.classes.index(video.class_name)
                if self.source.actions is not None:
                    y = [y, *self.source.actions.of_clip(video, frame_indices, flipped)]
                self.note("")
                return {
                    "clip": clip,
                    "y": y,
                    "time_scale": time_scale,
                    "index": index,
                    "video": video.path,
                    "pair": self.source.pairs.get(video.path),
                    "is_sample": self.source.has_samples,
                    "corrupt": [video.path for video in tried],
                }
            tried.append(video)
        if not os.path.isdir(self.source.root):
            raise UserError(
                f"--data-path {self.source.root}: was deleted or moved; put it back and start again"
            )
        raise CorruptDataError(
            f"--data-path {self.source.root}: {plural(len(tried), 'corrupt file')} in a row, the "
            f"first is {tried[0].path}; repair or replace the files"
        )

    def draw(self, index, tried=()):
        """(video, frame indices, seconds between them) at an index, but no video in `tried`.

        Opens no file.
        """
        attempt = len(tried)
        smallest = self.frame_interval[0]
        largest = self.frame_interval[-1]
        video = self._replacement(index, tried) if tried else self._video(index)
        interval = smallest + self._random_int("interval", largest - smallest + 1, index, attempt)
        interval = fitting_interval(video, self.num_frames, interval)
        num_starts = video.num_frames - (self.num_frames - 1) * interval
        start = self._random_int("start", num_starts, index, attempt)
        frame_indices = [start + step * interval for step in range(self.num_frames)]
        return video, frame_indices, interval / video.fps

    def _video(self, index):
        epoch, position = divmod(index, len(self.videos))
        if epoch != self._epoch:  # only once per epoch, because it takes O(videos)
            order = generator(self.seed, "order", self.stream, epoch)
            self._epoch = epoch
            self._order = torch.randperm(len(self.videos), generator=order)
        return self.videos[self._order[position]]

    def _replacement(self, index, tried):
        others = [video for video in self.videos if video not in tried]
        others = others or [video for video in self.spare if video not in tried]
        return others[self._random_int("replacement", len(others), index, len(tried))]

    def _random_int(self, purpose, below, *key):
        """A random integer from 0 to below - 1."""
        random = generator(self.seed, purpose, self.stream, *key)
        return int(torch.randint(below, (), generator=random))


@dataclass(eq=False)
class Mix(torch.utils.data.Dataset):
    """Maps an index to a sample of one of two streams, `first` at a `share` of the indices.

    The two are interleaved as evenly as possible, and neither skips a sample.
    """

    first: Clips
    second: Clips
    share: float

    @property
    def parts(self):
        return [self.first, self.second]

    def __getitem__(self, index):
        before = math.floor(index * self.share)  # samples of the first stream at lower indices
        if math.floor((index + 1) * self.share) > before:
            sample = self.first[before]
        else:
            sample = self.second[index - before]
        return sample | {"index": index}


def rank_batches(first, steps, global_batch, rank, world_size, micro_batches=1):
    """Yield lists of this rank's sample indices from `first` on, `micro_batches` per step."""
    size = global_batch // (world_size * micro_batches)
    for step in range(steps):
        start = first + step * global_batch + rank * micro_batches * size
        for _ in range(micro_batches):
            yield list(range(start, start + size))
            start += size


def collate(samples):
    """A batch of samples, a dict: clips (B, ...); y int64 (B,), with actions (B, 1 + T); indices
    int64 (B,); time_scales float32 (B,), in seconds; is_sample bool (B,); lists: pairs, and of
    paths: videos, corrupt.
    """

    def column(name):
        return [sample[name] for sample in samples]

    return {
        "clips": torch.stack(column("clip")),
        "y": torch.tensor(column("y")),
        "time_scales": torch.tensor(column("time_scale"), dtype=torch.float32),
        "indices": torch.tensor(column("index")),
        "is_sample": torch.tensor(column("is_sample")),
        "pairs": column("pair"),
        "videos": column("video"),
        "corrupt": sum(column("corrupt"), []),
    }

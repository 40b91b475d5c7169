"""The stream of samples, clips with labels, and the batches that each rank takes from it.

A sample depends only on the arguments of Clips and its index in the stream, not on workers, ranks or interruptions.
"""

import torch

from runtime.cli import UserError
from runtime.rng import generator
from video.files import UnreadableError, is_cached, read_frames, read_latents, resize_and_crop
from video.index import fitting_interval, latents_settings

MAX_ATTEMPTS = 100  # videos tried for one sample


class Clips(torch.utils.data.Dataset):
    """Maps an index of a stream to a sample: a clip of one of `videos`, each of at least num_frames frames.

    A stream is a sequence of permutations of the videos. `stream` is its name, an int or a string, which seeds it: a
    training phase uses its first step. frame_interval is the smallest and largest distance between the frames of a
    clip, in frames of the video; each clip draws one, at most the largest that fits its video. image_size is in px;
    videos of a latent cache are not resized. frames is a FrameCache of the videos, if any. Where all of `videos` are
    bad, those of `spare` take their place. Raises ValueError.
    """

    def __init__(
        self, root, videos, classes, num_frames, image_size, frame_interval=(1, 1), flip=True, seed=0, stream=0,
        frames=None, spare=(),
    ):  # fmt: skip
        if any(video.num_frames < num_frames for video in videos):
            raise ValueError(f"a video has fewer than {num_frames} frames: filter the videos with long_enough()")
        self.latent_shape = None  # (C, h, w), of a cache only
        if any(map(is_cached, videos)):
            settings = latents_settings(root)
            side = settings["image_size"] // settings["downsample"]
            self.latent_shape = settings["channels"], side, side
            if flip and not settings["flips"]:
                raise ValueError(f"{root} holds no mirrored latents: pass flip=False")
        self.root, self.videos, self.spare, self.classes = root, videos, spare, classes
        self.num_frames, self.image_size, self.frame_interval = num_frames, image_size, frame_interval
        self.flip, self.seed, self.stream, self.frames = flip, seed, stream, frames
        self.watch = None  # a LoaderWatch, which is told the file that is being read
        self._epoch, self._permutation = None, None

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        """A dict: clip, uint8 (C, T, H, W) or from a cache float16 (2, C, T, h, w); label; time_scale, seconds per
        frame; index; video, its path; bad, the paths of videos that can't be decoded and that it replaces.

        Raises UserError if all videos tried for it are bad, MAX_ATTEMPTS of them at most.
        """
        flipped = self.flip and self._random_int("flip", 2, index) == 1
        tried = []
        while len(tried) < min(MAX_ATTEMPTS, len(self.videos) + len(self.spare)):
            video = self._choose_video(index, tried)
            frame_indices, time_scale = self._choose_frames(video, index, len(tried))
            try:
                self._note(video.path)
                clip = self._read_clip(video, frame_indices, flipped)
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
        raise UserError(f"--data-path {self.root}: {len(tried)} files in a row are bad, the first is {tried[0].path}")

    def _read_clip(self, video, frame_indices, flipped):
        if is_cached(video):
            return read_latents(self.root, video, frame_indices, flipped, self.latent_shape)
        clip = self.frames and self.frames.read(self.root, video, frame_indices)  # (T, C, H, W)
        if clip is None:
            clip = torch.from_numpy(read_frames(self.root, video, frame_indices)).permute(0, 3, 1, 2)
            clip = resize_and_crop(clip, self.image_size)
        return (clip.flip(-1) if flipped else clip).transpose(0, 1).contiguous()  # (C, T, H, W)

    def _note(self, path):
        if self.watch is not None:
            self.watch.note(path)

    def _random_int(self, purpose, below, *key):
        """An integer from 0 to below - 1."""
        return int(torch.randint(below, (), generator=generator(self.seed, purpose, self.stream, *key)))

    def _choose_video(self, index, tried):
        """The video at an index of the stream or, if some were tried already, a random one of the others."""
        if tried:
            others = [video for video in self.videos if video not in tried]
            others = others or [video for video in self.spare if video not in tried]
            return others[self._random_int("replacement", len(others), index, len(tried))]
        epoch, position = divmod(index, len(self.videos))
        if epoch != self._epoch:  # computed once per epoch, as it costs O(videos)
            order = generator(self.seed, "order", self.stream, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.videos), generator=order)
        return self.videos[self._permutation[position]]

    def _choose_frames(self, video, index, attempt):
        """(indices of the frames to read, time_scale: seconds between them)."""
        smallest, largest = self.frame_interval
        interval = smallest + self._random_int("interval", largest - smallest + 1, index, attempt)
        interval = fitting_interval(video, self.num_frames, interval)
        start = self._random_int("start", video.num_frames - (self.num_frames - 1) * interval, index, attempt)
        return [start + step * interval for step in range(self.num_frames)], interval / video.fps


class ClipsByFrames(torch.utils.data.Dataset):
    """A dict num_frames -> Clips as one data set, whose keys are (num_frames, index)."""

    def __init__(self, clips, watch=None):
        self.clips, self.watch = clips, watch
        for data_set in clips.values():
            data_set.watch = watch

    def __getitem__(self, key):
        num_frames, index = key
        return self.clips[num_frames][index]


class Batches:
    """A batch sampler: for each of `steps` steps, `micro_batches` lists of the indices of this rank's samples.

    Step s takes global_batch indices, from first + s * global_batch on; each rank takes its slice of them. Raises
    ValueError if they can't be divided evenly.
    """

    def __init__(self, first, steps, global_batch, rank, world_size, micro_batches=1):
        self.size, rest = divmod(global_batch, world_size * micro_batches)
        if rest or not self.size:
            raise ValueError(f"can't divide a global batch of {global_batch} for {world_size} ranks x {micro_batches}")
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
    """Samples -> a batch, a dict: clips (B, ...); labels, indices int64 (B,); time_scales float32 (B,), s; videos, bad:
    lists of paths.
    """
    return {
        "clips": torch.stack([sample["clip"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "time_scales": torch.tensor([sample["time_scale"] for sample in samples], dtype=torch.float32),
        "indices": torch.tensor([sample["index"] for sample in samples]),
        "videos": [sample["video"] for sample in samples],
        "bad": [path for sample in samples for path in sample["bad"]],
    }

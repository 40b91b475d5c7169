"""The frames of a small data set in memory that the ranks and loader processes of a machine share (--cache-frames)."""

import fcntl
import math
import mmap
import os

import numpy as np
import torch

from video.files import UnreadableError, has_suffix, read_all_frames, read_frames, resize_and_crop

EMPTY, FILLED, REFUSED = range(3)  # what is known of a video
CHUNK = 64  # frames that are decoded and resized at a time


class FrameCache:
    """All frames of some videos, resized and cropped to image_size px; a video is decoded when it is first asked for.

    The memory is that of a file without a name: it is free again when the last process that uses it has ended, however
    it ended. place is the path under which a process that has the cache offers it to others; None: make a new one. A
    cache that is sent to a process opens there.
    """

    def __init__(self, videos, image_size, place=None):
        counts = [video.num_frames for video in videos]
        firsts = np.cumsum([0, *counts]).tolist()
        self.places = {
            video.path: (n, first, count)
            for n, (video, first, count) in enumerate(zip(videos, firsts, counts, strict=False))
        }
        self.shape = firsts[-1], 3, image_size, image_size
        self._open(os.memfd_create("frames") if place is None else place)

    def _open(self, file):
        self.file = open(file, "r+b", buffering=0)  # noqa: SIM115 (as long as the cache lives)
        self.file.truncate(len(self.places) + math.prod(self.shape))
        memory = np.frombuffer(mmap.mmap(self.file.fileno(), 0), np.uint8)
        self.states, frames = np.split(memory, [len(self.places)])
        self.frames = frames.reshape(self.shape)

    @property
    def place(self):
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}"

    def __getstate__(self):
        return {"places": self.places, "shape": self.shape, "place": self.place}

    def __setstate__(self, state):
        place = state.pop("place")
        self.__dict__ |= state
        self._open(place)

    def read(self, root, video, frame_indices):
        """The frames at `frame_indices` of a video, uint8 (T, 3, H, W); None if one of all its frames is damaged."""
        number, first, count = self.places[video.path]
        if self.states[number] == EMPTY:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, number)  # another process may be decoding it
            try:
                if self.states[number] == EMPTY:
                    self.states[number] = self._fill(root, video, self.frames[first : first + count])
            finally:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)
        if self.states[number] == REFUSED:
            return None
        return torch.from_numpy(self.frames[[first + index for index in frame_indices]])

    def _fill(self, root, video, place):
        """Decode a video into its place; returns its new state."""
        try:
            first = 0
            for frames in all_frames(root, video):
                resized = resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), self.shape[-1])
                place[first : first + len(frames)] = resized.numpy()
                first += len(frames)
        except UnreadableError:
            return REFUSED
        return FILLED


def all_frames(root, video):
    """Yields all frames of a video or image, uint8 (T, H, W, 3), some at a time."""
    if has_suffix("image", video.path):
        yield read_frames(root, video, [0])
    else:
        yield from read_all_frames(root, video, CHUNK)

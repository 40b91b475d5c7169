"""The stream of clips, its batches, corrupt videos in it and their count."""

import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_videos as tiny
from runtime.cli import UserError
from video.clips import Clips, collate, rank_batches
from video.files import UnreadableError, Video
from video.index import CorruptDataError, CorruptVideos, Scan
from video.source import Source, open_source

SIZE = 32  # px, of clips from files
CLASSES = ["Jump", "Run"]
FRAMES = {
    "Jump/d": (20, 30000 / 1001),
    "Jump/e": (20, 25.0),
    "Run/a": (40, 25.0),
    "Run/b": (60, 25.0),
    "Run/c": (30, 30.0),
}
VIDEOS = [
    Video(path, path[:-2], num_frames, fps, height=48, width=64)
    for path, (num_frames, fps) in FRAMES.items()
]


class Numbers(Source):
    """A clip (C, T, H, W) = (1, T, 1, 1) holds the numbers of its frames, negative ones if it is
    mirrored.
    """

    def __init__(self, corrupt=(), root="/"):
        super().__init__(root, Scan(VIDEOS, CLASSES, []))
        self.corrupt = corrupt

    def read(self, video, frame_indices, flipped=False):
        if video.key in self.corrupt:
            raise UnreadableError
        return torch.tensor(frame_indices).view(1, -1, 1, 1) * (-1 if flipped else 1)


def make_clips(num_frames=4, videos=VIDEOS, corrupt=(), flip=False, **settings):
    return Clips(Numbers(corrupt), videos, num_frames, flip=flip, **settings)


def numbers(sample):
    return sample["clip"].flatten().tolist()


# Draws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames, interval", [(1, 2), (10, 2), (4, 9)])
def test_frames_are_the_interval_apart_or_the_largest_that_fits(num_frames, interval):
    clips = make_clips(num_frames, frame_interval=(interval, interval))
    for index in range(10):
        sample = clips[index]
        length, fps = FRAMES[sample["video"]]
        largest = (length - 1) // max(num_frames - 1, 1)  # of 9, 6 fit into 20 frames
        expected = min(interval, largest)
        assert np.diff(numbers(sample)).tolist() == [expected] * (num_frames - 1)
        assert sample["time_scale"] == pytest.approx(expected / fps, rel=1e-6)


def test_a_sample_has_the_condition_of_its_video_and_a_batch_stacks_them():
    clips = make_clips()
    samples = [clips[index] for index in range(10)]
    batch = collate(samples)
    assert torch.equal(batch["clips"], torch.stack([sample["clip"] for sample in samples]))
    assert batch["videos"] == [sample["video"] for sample in samples]
    names = [video.split("/")[0] for video in batch["videos"]]
    assert batch["y"].tolist() == [CLASSES.index(name) for name in names]
    assert batch["y"].dtype == torch.int64
    assert batch["time_scales"].dtype == torch.float32
    assert batch["indices"].tolist() == [*range(10)]
    assert batch["corrupt"] == []


def test_intervals_and_starts_are_uniform_over_their_whole_range():
    clips = make_clips(videos=VIDEOS[4:], frame_interval=(1, 3))  # 30 frames
    seen = [numbers(clips[index]) for index in range(2000)]
    for interval in (1, 2, 3):
        starts = [frames[0] for frames in seen if frames[1] - frames[0] == interval]
        assert 600 <= len(starts) < 700
        assert set(starts) == set(range(30 - 3 * interval))


def test_about_half_of_the_clips_are_flipped_and_nothing_else_changes():
    clips = make_clips(flip=True)
    plain = make_clips()
    signs = [torch.sign(clips[index]["clip"].sum()).item() for index in range(200)]
    assert 75 <= signs.count(-1) <= 125
    for index, sign in enumerate(signs):
        assert torch.equal(clips[index]["clip"], sign * plain[index]["clip"])


def test_an_epoch_shows_every_video_once_and_streams_and_seeds_differ():
    def draws(**settings):
        clips = make_clips(frame_interval=(1, 3), **settings)
        samples = [clips[index] for index in range(50)]
        return [sample["video"] for sample in samples], [numbers(sample) for sample in samples]

    videos, frames = draws()
    epochs = {tuple(videos[first : first + 5]) for first in range(0, 50, 5)}
    assert {len(set(epoch)) for epoch in epochs} == {5}
    assert len(epochs) > 5
    assert draws() == (videos, frames)
    for settings in ({"seed": 1}, {"stream": 7}, {"stream": "validation"}):
        other_videos, other_frames = draws(**settings)
        assert other_videos != videos
        assert other_frames != frames


# Corrupt videos -----------------------------------------------------------------------------------


def test_no_replacement_has_failed_before_and_spare_videos_come_last():
    keys = ["Jump/d", "Jump/e", "Run/a", "Run/b"]
    clips = make_clips(corrupt=keys)
    for index in range(20):
        sample = clips[index]
        assert sample["video"] == "Run/c"
        assert sample["y"] == 1
        assert len(set(sample["corrupt"])) == len(sample["corrupt"])
    first = make_clips(videos=VIDEOS[:2], corrupt=keys[:1], spare=VIDEOS[2:])
    assert {first[index]["video"] for index in range(20)} == {"Jump/e"}
    spare = make_clips(videos=VIDEOS[:2], corrupt=keys[:3], spare=VIDEOS[2:])
    samples = [spare[index] for index in range(40)]
    assert {sample["video"] for sample in samples} == {"Run/b", "Run/c"}
    for sample in samples:
        assert set(keys[:2]) <= set(sample["corrupt"]) <= set(keys[:3])
    message = "--data-path /: 4 corrupt files in a row, the first is "
    with pytest.raises(CorruptDataError, match=message):
        make_clips(videos=VIDEOS[:2], corrupt=keys, spare=VIDEOS[2:4])[0]
    with pytest.raises(UserError, match="--data-path /gone: was deleted") as error:
        Clips(Numbers(keys, "/gone"), VIDEOS[:2], 4)[0]
    assert not isinstance(error.value, CorruptDataError)  # which has status 2


def check_replacements(clips, count, path):
    """Checks in two epochs of `count` samples that another file replaces the corrupt one, with that
    file's class.
    """
    samples = [clips[index] for index in range(count)]
    bad = [sample for sample in samples if sample["corrupt"]]
    assert len(bad) == 2  # it comes once in each epoch
    for sample in bad:
        assert sample["corrupt"] == [path] != [sample["video"]]
        assert sample["y"] == clips.classes.index(sample["video"].split("/")[0])
    return bad


@pytest.mark.parametrize(
    "damage, suffix",
    [(tiny.scribble, "avi"), (tiny.scribble, "mp4"), (tiny.truncate, "mkv"), (Path.unlink, "avi")],
)
def test_a_corrupt_video_is_named_and_replaced_the_same_way_each_time(tmp_path, damage, suffix):
    root = tiny.write_equal_videos(tmp_path / "data")
    name = f"A/bad.{suffix}"
    tiny.write_video(root / name, codec="libx264" if suffix == "mp4" else "mpeg4")
    clips = tiny.clips_of(open_source(root, SIZE), 16, seed=3)
    damage(root / name)
    for sample in check_replacements(clips, 10, name):
        assert np.diff(tiny.frame_indices_of(sample["clip"])).tolist() == [1] * 15
        again = Clips(clips.source, clips.videos, 16, seed=3)[sample["index"]]
        assert torch.equal(again["clip"], sample["clip"])


def bomb(path):
    """A PNG that claims 20000 x 10000 pixels."""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 20000, 10000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def lose_palette(path):
    """A PNG without its palette, though parts of it are transparent."""
    Image.fromarray(tiny.picture()).quantize(4).save(path, format="PNG", transparency=1)
    data = path.read_bytes()
    start = data.index(b"PLTE") - 4
    (size,) = struct.unpack(">I", data[start : start + 4])
    path.write_bytes(data[:start] + data[start + 12 + size :])


def spoil_exif(path):
    tiny.save(path, tiny.picture(), exif=b"Exif\x00\x00no TIFF header")


@pytest.mark.parametrize(
    "damage, suffix",
    [
        (tiny.truncate, "jpg"),
        (tiny.truncate, "webp"),
        (Path.unlink, "jpg"),
        (bomb, "png"),
        (lose_palette, "png"),
        (spoil_exif, "png"),
    ],
)
def test_a_corrupt_image_is_named_replaced_and_counted(tmp_path, damage, suffix):
    root = tiny.write_images(tmp_path / "images")
    name = f"A/bad.{suffix}"
    tiny.save(root / name, tiny.picture(seed=9))
    clips = tiny.clips_of(open_source(root, SIZE, images=True), 1)
    damage(root / name)
    check_replacements(clips, 12, name)


def test_corrupt_videos_are_named_once_and_one_is_always_allowed():
    videos = [SimpleNamespace(path=f"{number}.mp4") for number in range(297)]
    bad_videos = CorruptVideos(Scan(videos, [], ["a", "b", "c"]), 0.01)
    assert bad_videos.add(["a", "b", "a"]) == ["a", "b"]
    assert bad_videos.add(["b", "c"]) == ["c"]
    assert bad_videos.add([]) == []
    message = "0.01: 8 of 300 files are corrupt, .* 3: d, e, f and 2 more; .*move"
    with pytest.raises(CorruptDataError, match=message):
        bad_videos.add("defgh")
    bad_videos = CorruptVideos(Scan(videos[:2], [], []), 0.0, known=["0.mp4", "deleted.mp4"])
    assert bad_videos.add(["0.mp4"]) == []
    assert str(bad_videos) == "corrupt so far: 1 of 2"
    with pytest.raises(CorruptDataError, match="--max-bad-fraction"):
        bad_videos.add(["1.mp4"])


@pytest.mark.parametrize("world_size, micro_batches", [(1, 1), (3, 2), (4, 3)])
def test_ranks_and_micro_batches_divide_every_step_without_gap_or_overlap(
    world_size, micro_batches
):
    ranks = [  # (ranks, steps x micro-batches, samples)
        list(rank_batches(100, 5, 12, rank, world_size, micro_batches))
        for rank in range(world_size)
    ]
    steps = torch.tensor(ranks).view(world_size, 5, -1).transpose(0, 1).reshape(5, 12)
    assert torch.equal(steps, torch.arange(100, 160).view(5, 12))

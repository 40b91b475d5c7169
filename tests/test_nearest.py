"""The nearest training clips compared with a search by loops, and evaluate.py --metric nearest end
to end.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sample_folders import read_clips, refused, run, write_samples
from scoring import nearest
from training import record_calls
from video.files import UnreadableError, Video
from video.index import Scan
from video.source import Files


def random_videos(lengths, size=6, seed=0):
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 256, (length, size, size, 3), dtype=np.uint8) for length in lengths]


class Arrays(Files):
    """A source of arrays, whose frames come 5 at a time. The damaged videos end after these."""

    def __init__(self, arrays, damaged):
        super().__init__("", Scan([], ["A"], unreadable=[]), arrays[0].shape[1])
        self.arrays = arrays
        self.damaged = damaged

    def decode(self, video, chunk_size):
        number = int(video.path)
        yield self.arrays[number][:5]
        if number in self.damaged:
            raise UnreadableError
        for first in range(5, video.num_frames, 5):
            yield self.arrays[number][first : first + 5]


class Samples(NamedTuple):
    num_frames: int
    time_scale: float = 1 / 25


def find(clips, arrays, intervals, of_rank=None, damaged=()):
    """What `search` finds for clips, an array (N, T, H, W, 3), in videos, arrays."""
    videos = []
    for number, pixels in enumerate(arrays):
        videos.append(Video(str(number), "A", len(pixels), 25.0, None, None))
    source = Arrays(arrays, damaged)
    windows = nearest.TrainingWindows(source, videos, Samples(clips.shape[1]))
    windows.intervals = intervals
    if of_rank is not None:
        windows.of_rank = of_rank
    (distances, places), corrupt = nearest.search(torch.from_numpy(clips), windows, num_workers=0)
    return distances.tolist(), places.tolist(), corrupt


def naive(clip, videos, intervals):
    """(least squared distance, [video, first frame, mirrored]) of a clip (T, H, W, 3) to all
    windows, by loops.
    """
    rows = []
    for number, (video, interval) in enumerate(zip(videos, intervals, strict=True)):
        span = (len(clip) - 1) * interval + 1
        for first in range(len(video) - span + 1):
            window = video[first : first + span : interval].astype(int)
            for mirrored, pixels in enumerate((window, window[:, :, ::-1])):
                distance = ((clip - pixels) ** 2).sum()
                rows.append((distance, [number, first, mirrored]))
    return min(rows)


def test_the_nearest_window_and_its_distance_equal_a_search_by_loops(monkeypatch):
    videos = random_videos((5, 17, 4, 11, 23))
    intervals = (1, 2, 1, 3, 1, 2)
    videos.append(videos[1])  # of equal windows the first counts
    clips = np.stack(random_videos([4] * 9, seed=1))
    shown = [[1, 10, 0], [4, 19, 1], [3, 0, 1], [2, 0, 0]]  # the first or last ones of a video
    for clip, (number, first, mirrored) in zip(clips, shown, strict=False):
        window = videos[number][first:][:: intervals[number]][:4].astype(int)
        window = window[:, :, ::-1] if mirrored else window
        clip[:] = np.clip(window + clip % 9, 0, 255)
    monkeypatch.setattr(nearest, "BLOCK", 50)  # of 108 values
    distances, places, corrupt = find(clips, videos, intervals)
    expected = [naive(clip, videos, intervals) for clip in clips]
    assert [*zip(distances, places, strict=True)] == expected
    assert places[:4] == shown and not corrupt
    parts = []
    for of_rank in ((5, 4), (0, 2, 3), (), (1,)):
        of_part = find(clips, videos, intervals, of_rank)
        parts.append([torch.tensor(column) for column in of_part[:2]])
    shared = functools.reduce(nearest.nearer, parts)  # as the ranks do
    assert [column.tolist() for column in shared] == [distances, places]


def test_distances_are_exact_for_the_largest_sums_of_products():
    videos = random_videos((9, 9), size=64)
    videos[1][2:, :32] = 0
    videos[1][2:, 32:] = 255
    copy = videos[1][3:6, :, ::-1].copy()
    other = copy.copy()
    other[1, 5, 7, 2] = 1
    clips = np.stack([copy, other, videos[0][6:, :, ::-1]])
    distances, places, _ = find(clips, videos, (1, 1))
    assert distances == [0, 1, 0]
    assert places[0][:2] == [1, 2] and places[2] == [0, 6, 1]  # of equal windows the first


def test_frames_before_damage_are_compared_and_the_video_is_named():
    videos = random_videos((9, 9))
    clips = np.stack([videos[1][1:4], videos[1][4:7]])
    distances, places, corrupt = find(clips, videos, (1, 1), damaged=[1])
    assert distances[0] == 0 and places[0] == [1, 1, 0] and corrupt == ["1"]
    assert distances[1] == naive(clips[1], [videos[0], videos[1][:5]], (1, 1))[0] > 0


def test_the_frame_interval_is_the_closest_in_time_or_the_largest_that_fits():
    videos = []
    for num_frames, fps in ((20, 25.0), (20, 12.5), (5, 25.0), (20, 3.0)):
        videos.append(Video("a", "A", num_frames, fps, None, None))
    windows = nearest.TrainingWindows(None, videos, Samples(4, 1 / 12.5))
    assert windows.intervals == [2, 1, 1, 1]


def test_means_ratio_and_shares_match_their_definitions():
    generated = np.array([0.0, 4, 8, 8] * 3)
    real = np.arange(10.0, 111)
    found = nearest.summarize(generated, real)
    assert found["rmse"] == 5 and found["rmse_median"] == 6 and found["rmse_real"] == 60
    assert found["rmse_ratio"] == pytest.approx(5 / 60)
    low, high = found["rmse_ratio_interval95"]
    assert low < 5 / 60 < high
    assert high - low == pytest.approx(3.92 * 11**0.5 / 12**0.5 / 60, rel=0.2)
    assert nearest.summarize(generated[:8], real)["rmse_ratio_interval95"] is None
    assert found["nearer_than_all_real"] == found["nearer_than_95_percent"] == 1
    # 5% of the real ones are below 15
    found = nearest.summarize(np.array([9.0, 10, 14.9, 15, 50]), real)
    assert found["nearer_than_all_real"] == 0.2
    assert found["nearer_than_95_percent"] == 0.6
    assert nearest.summarize(generated, np.zeros(3))["rmse_ratio"] is None
    once = nearest.summarize(generated, real)
    videos = ([*range(12)] * 3, [*range(101)] * 3)
    # several clips of each video
    found = nearest.summarize(np.tile(generated, 3), np.tile(real, 3), videos)
    assert found == {name: pytest.approx(value) for name, value in once.items()}


def test_copies_of_training_clips_are_found_and_held_out_clips_are_not(
    shapes, tmp_path, monkeypatch
):
    clips, labels, classes = read_clips(shapes, "train", 6, interval=3)
    held_out, _, _ = read_clips(shapes, "val", 1, interval=3)
    clips = np.concatenate([clips[:5, :, :, ::-1], held_out])  # five are mirrored copies
    sheets = []
    monkeypatch.setattr(nearest, "write_sheet", lambda path, **sheet: sheets.append(sheet))
    folder = write_samples(tmp_path / "copies", clips, labels, classes, time_scale=3 / 25)
    flags = ["--metric", "nearest", "--samples", folder, "--data-path", shapes, "--num-real", 12]
    made = run(tmp_path / "n.json", *flags)
    pairs = made["result"]["pairs"]
    assert made["protocol"] == "nearest6_real12_8f" and made["result"]["training_videos"] == 12
    assert sorted(pair["clip"] for pair in pairs[:5]) == [0, 1, 2, 3, 4] and pairs[5]["clip"] == 5
    assert [pair["rmse"] == 0 for pair in pairs] == [True] * 5 + [False]
    assert made["values"]["nearer_than_all_real"] == pytest.approx(5 / 6)
    assert made["values"]["rmse_real"] > 1
    (sheet,) = sheets
    videos = sheet["videos"]
    assert videos.shape == (12, 8, 16, 16, 3)
    assert np.array_equal(videos[:10:2], videos[1:10:2])
    assert not np.array_equal(videos[10], videos[11])
    first = pairs[0]
    name = classes[labels[first["clip"]]]
    assert first["class"] == first["video_class"] == name
    assert first["video"].startswith(f"{name}/")
    assert sheet["names"][0] == f"{name} {first['clip']}: 0.0"
    assert sheet["names"][1].endswith(f", frame {first['first_frame']}, mirrored")


def test_training_videos_that_cannot_be_decoded_are_named(shapes, tmp_path, monkeypatch, capsys):
    bad = {"SquareUp/v_SquareUp_g02_c01.avi"}

    def damaged(source, video, chunk_size):
        if video.path in bad or not bad:
            raise UnreadableError

    record_calls(monkeypatch, Files, "decode", damaged)
    folder = write_samples(tmp_path / "s", *read_clips(shapes, "val", 2))
    flags = ["--metric", "nearest", "--samples", folder, "--data-path", shapes, "--num-real", 2]
    assert run(tmp_path / "n.json", *flags)["result"]["bad_training_videos"] == [*bad]
    assert f"{[*bad][0]} can't be decoded to its end" in capsys.readouterr().out
    bad.clear()
    words = ["no training video can be decoded"]
    refused(capsys, tmp_path / "m.json", *flags, words=words, status=1)

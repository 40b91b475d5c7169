"""Frame k of a test video says k: one half of it is grey 4 * k, the other (the right one, unless flipped) white."""

import json
import os
import struct
import zlib
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import decord
import numpy as np
import pytest
import torch
from PIL import Image

from runtime.cli import UserError
from video import index
from video.clips import Batches, Clips, collate, read_start, start_files
from video.files import UnreadableError, Video, read_frames
from video.index import BadVideos, long_enough, scan_videos, split_videos

SIZE = 32  # of the clips; videos are 64 x 48


def write_video(path, num_frames=20, rate=25, codec="mpeg4", times=None, size=(64, 48), **options):
    """`times`: a time stamp in ms for each frame, for a variable rate; `size`: width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        (stream.width, stream.height), stream.pix_fmt, stream.gop_size = size, "yuv420p", 10
        stream.bit_rate, stream.options = 2_000_000, options
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            picture = np.full((size[1], size[0], 3), 4 * number, np.uint8)
            picture[:, size[0] // 2 :] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_sound(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def scribble(path):
    """Overwrite the beginning of packet 10."""
    with av.open(str(path)) as file:
        position = [packet.pos for packet in file.demux(video=0) if packet.size][10]
    data = bytearray(path.read_bytes())
    data[position : position + 200] = bytes(range(200))
    path.write_bytes(data)


def halves(frames):
    """Mean grey of the left and right edge of frames (..., H, W)."""
    frames = torch.as_tensor(frames).float()
    return frames[..., :8].mean((-2, -1)), frames[..., -8:].mean((-2, -1))


def frame_numbers(clip):
    """Which frames a clip (C, T, H, W) consists of."""
    left, right = halves(clip[0])
    return (torch.minimum(left, right) / 4).round().int().tolist()


def read_numbers(root, video, numbers):
    frames = read_frames(root, video, numbers)
    return (halves(frames[..., 0])[0] / 4).round().int().tolist()


def make_clips(root, num_frames=4, **kwargs):
    scan = scan_videos(root)
    return Clips(root, scan.videos, scan.classes, num_frames, SIZE, **kwargs)


def fake(key, num_frames=20, suffix=".avi"):
    return Video(key + suffix, key.split("/")[0], num_frames, 25.0, 48, 64)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    """Two classes, five videos, three rates; tests only read it."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "Run" / "a.avi", 40)
    write_video(root / "Run" / "b.mp4", 60, codec="libx264")
    write_video(root / "Run" / "c.mkv", 30, rate=30)
    write_video(root / "Jump" / "d.mov", 20, rate=30000 / 1001)
    write_video(root / "Jump" / "e.avi", 20)
    return root


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    for name in ("A/one", "A/two", "B/three", "B/four"):
        write_video(root / f"{name}.avi")
    return root


# Scan.


def test_a_scan_finds_videos_classes_rates_and_frames(shared_root):
    scan = scan_videos(shared_root)
    assert scan.classes == ["Jump", "Run"]
    assert [video.path for video in scan.videos] == ["Jump/d.mov", "Jump/e.avi", "Run/a.avi", "Run/b.mp4", "Run/c.mkv"]
    assert [video.num_frames for video in scan.videos] == [20, 20, 40, 60, 30]
    assert [video.fps for video in scan.videos] == pytest.approx([30000 / 1001, 25, 25, 25, 30])
    assert {(video.height, video.width) for video in scan.videos} == {(48, 64)}
    assert scan.videos[0].key == "Jump/d"
    assert scan.unreadable == []


def test_videos_directly_in_root_are_one_class(tmp_path):
    write_video(tmp_path / "a.avi")
    write_video(tmp_path / "b.avi")
    scan = scan_videos(tmp_path)
    assert scan.classes == ["all"]
    assert [video.key for video in scan.videos] == ["all/a", "all/b"]


def test_odd_names_work_and_hidden_files_and_other_files_are_ignored(tmp_path):
    write_video(tmp_path / "Tai Chi" / "Übung 1 (äöü, 太极).AVI")
    write_video(tmp_path / "Tai Chi" / "it's #2%20.mp4")
    for name in ("Tai Chi/.hidden.avi", "Tai Chi/notes.txt", "ucfTrainTestlist/fake.avi", ".cache/x.avi", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not a video")
    clips = make_clips(tmp_path)
    assert clips.classes == ["Tai Chi"] and len(clips) == 2
    assert {clips[number]["video"] for number in range(2)} == {video.path for video in clips.videos}


def test_a_file_that_cannot_be_opened_is_reported_and_left_out(root):
    (root / "A" / "text.avi").write_text("this is no video")
    (root / "A" / "empty.mp4").write_bytes(b"")
    write_sound(root / "B" / "sound.mp4")
    scan = scan_videos(root)
    assert scan.unreadable == ["A/empty.mp4", "A/text.avi", "B/sound.mp4"]
    assert len(scan.videos) == 4


# Index.


def test_a_file_that_the_index_knows_is_not_opened_again(root, monkeypatch):
    first = scan_videos(root)
    monkeypatch.setattr(decord, "VideoReader", lambda *args, **kwargs: pytest.fail("opened a video"))
    assert scan_videos(root) == first


def test_only_new_and_changed_files_are_opened_and_lost_ones_forgotten(root, monkeypatch):
    scan_videos(root)
    write_video(root / "A" / "one.avi", 30)
    write_video(root / "B" / "five.avi")
    (root / "A" / "two.avi").unlink()
    opened, really_open = [], decord.VideoReader
    monkeypatch.setattr(
        decord, "VideoReader", lambda path, **kwargs: opened.append(path) or really_open(path, **kwargs)
    )
    scan = scan_videos(root)
    assert opened == [str(root / "A" / "one.avi"), str(root / "B" / "five.avi")]
    assert {video.key: video.num_frames for video in scan.videos} == {
        "A/one": 30,
        "B/five": 20,
        "B/four": 20,
        "B/three": 20,
    }
    assert "two" not in (root / ".video_index.json").read_text()


@pytest.mark.parametrize("text", ["", '{"format": 1, "v', "[]", '{"format": 0}', '{"format": 1, "videos": [[1, {}]]}'])
def test_a_torn_or_foreign_index_is_rebuilt_and_said(root, capsys, text):
    scan = scan_videos(root)
    (root / ".video_index.json").write_text(text)
    assert scan_videos(root) == scan
    assert "building it anew" in capsys.readouterr().out
    json.loads((root / ".video_index.json").read_text())


def test_where_root_is_read_only_the_index_lies_in_the_run_folder(root, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root)
    first = scan_videos(root, tmp_path)
    assert not (root / ".video_index.json").exists()
    monkeypatch.setattr(decord, "VideoReader", lambda *args, **kwargs: pytest.fail("opened a video"))
    assert scan_videos(root, tmp_path) == first


def test_an_index_that_no_folder_took_is_saved_in_the_run_folder_once_there_is_one(root, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root)
    scan = scan_videos(root)
    assert not scan.is_saved
    index.save_index(scan, tmp_path)
    monkeypatch.setattr(decord, "VideoReader", lambda *args, **kwargs: pytest.fail("opened a video"))
    again = scan_videos(root, tmp_path)
    assert again.videos == scan.videos
    assert again.is_saved


def test_a_root_that_refuses_the_index_gets_no_half_of_it(root, tmp_path, monkeypatch, capsys):
    really_replace = os.replace

    def full(source, target):
        if Path(target).parent == root:
            raise OSError(28, "No space left on device")
        really_replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    scan_videos(root, tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["A", "B"]
    assert (tmp_path / "video_index.json").exists()
    assert "No space left" in capsys.readouterr().out


# Split.


def test_the_hash_split_stays_when_videos_are_added_or_converted(tmp_path):
    videos = [fake(f"C{number % 7}/v{number}") for number in range(2000)]
    train, val = split_videos(tmp_path, videos, 0.05)
    assert sorted(train + val, key=videos.index) == videos
    assert 70 <= len(val) <= 130
    fewer, fewer_val = split_videos(tmp_path, videos[:1000], 0.05)
    assert fewer_val == [video for video in val if video in videos[:1000]]
    converted = [fake(video.key, suffix=".mp4") for video in videos]
    assert [video.key for video in split_videos(tmp_path, converted, 0.05)[1]] == [video.key for video in val]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_at_least_one_video_trains_and_one_validates(tmp_path, fraction):
    for first in range(20):
        train, val = split_videos(tmp_path, [fake(f"A/v{first}"), fake(f"B/w{first}")], fraction)
        assert len(train) == len(val) == 1 and train != val


@pytest.mark.parametrize("place", ["data", "."])
def test_ucf_lists_beside_or_in_root_set_the_split(tmp_path, place):
    folder = tmp_path / place / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    (folder / "trainlist01.txt").write_text("A/v_A_g08_c01.avi 1\r\nB/v_B_g08_c01.avi 2\r\n\r\nB/v_B_g09_c01.avi 2\r\n")
    videos = [fake(key, suffix=".mp4") for key in ("A/v_A_g01_c01", "A/v_A_g08_c01", "B/v_B_g08_c01")]
    train, val = split_videos(tmp_path / "data", videos, 0.99)
    assert [video.key for video in train] == ["A/v_A_g08_c01", "B/v_B_g08_c01"]
    assert [video.key for video in val] == ["A/v_A_g01_c01"]


def write_ucf_list(folder, keys):
    (folder / "ucfTrainTestlist").mkdir(parents=True)
    (folder / "ucfTrainTestlist" / "trainlist01.txt").write_text("".join(f"{key}.avi 1\n" for key in keys))


def test_a_ucf_list_in_root_comes_before_the_one_beside_it_unless_it_knows_no_video(tmp_path):
    videos = [fake(f"A/s{number}") for number in range(4)]
    for root, listed, trains in (("own", "A/s0", "A/s0"), ("foreign", "B/s0", "A/s1")):
        write_ucf_list(tmp_path / root, [])
        write_ucf_list(tmp_path / root / "data", [listed])
        (tmp_path / root / "ucfTrainTestlist" / "trainlist01.txt").write_text("A/s1.avi 1")
        assert [video.key for video in split_videos(tmp_path / root / "data", videos, 0.2)[0]] == [trains]


@pytest.mark.parametrize("listed", [["B/other"], [f"A/s{number}" for number in range(10)]])
def test_ucf_lists_that_know_none_or_all_of_the_videos_leave_the_split_to_the_hash(tmp_path, listed):
    videos = [fake(f"A/s{number}") for number in range(10)]
    by_hash = split_videos(tmp_path / "data", videos, 0.2)
    write_ucf_list(tmp_path, listed)
    assert split_videos(tmp_path / "data", videos, 0.2) == by_hash


def test_videos_that_are_too_short_are_counted_and_left_out():
    videos = [fake("A/short", 7), fake("A/fits", 8), fake("A/long", 9)]
    assert long_enough(videos, 8) == (videos[1:], 1)
    with pytest.raises(ValueError, match="long_enough"):
        Clips("", videos, ["A"], 8, SIZE)


# Clips.


@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_spacing_in_time_does_not_depend_on_the_number_of_frames(shared_root, num_frames):
    scan = scan_videos(shared_root)
    videos, _ = long_enough(scan.videos, 1 + 2 * 15)
    clips = Clips(shared_root, videos, scan.classes, num_frames, SIZE, frame_interval=(2, 2))
    for number in range(8):
        item = clips[number]
        shown = frame_numbers(item["clip"])
        assert np.diff(shown).tolist() == [2] * (num_frames - 1)
        assert item["time_scale"] == pytest.approx(2 / 25)


def test_an_item_has_the_clip_its_label_and_the_files_own_rate(shared_root):
    clips = make_clips(shared_root, num_frames=4)
    rates = {"Run/a.avi": 25, "Run/b.mp4": 25, "Run/c.mkv": 30, "Jump/d.mov": 30000 / 1001, "Jump/e.avi": 25}
    for number in range(10):
        item = clips[number]
        assert item["clip"].shape == (3, 4, SIZE, SIZE) and item["clip"].dtype == torch.uint8
        assert item["label"] == (1 if item["video"].startswith("Run") else 0)
        assert item["time_scale"] == pytest.approx(1 / rates[item["video"]], rel=1e-6)
        assert item["number"] == number and item["bad"] == []


def test_intervals_and_starts_are_drawn_over_their_whole_range(shared_root):
    clips = make_clips(shared_root, num_frames=4, frame_interval=(1, 3), flip=False)
    clips.videos = [video for video in clips.videos if video.path == "Run/c.mkv"]  # 30 frames at 30 Hz
    seen = [clips._frame_numbers(clips.videos[0], number, 0) for number in range(2000)]
    intervals = [numbers[1] - numbers[0] for numbers, _ in seen]
    assert {interval: intervals.count(interval) // 100 * 100 for interval in (1, 2, 3)} == {1: 600, 2: 600, 3: 600}
    for interval in (1, 2, 3):
        starts = {numbers[0] for numbers, _ in seen if numbers[1] - numbers[0] == interval}
        assert starts == set(range(30 - 3 * interval))
    assert all(time_scale == (numbers[1] - numbers[0]) / 30 for numbers, time_scale in seen)


def test_an_interval_that_does_not_fit_becomes_the_largest_that_does(shared_root):
    clips = make_clips(shared_root, num_frames=4, frame_interval=(9, 9))
    for number in range(10):
        item = clips[number]
        length = next(video.num_frames for video in clips.videos if video.path == item["video"])
        interval = min(9, (length - 1) // 3)  # 20 frames: 6
        assert np.diff(frame_numbers(item["clip"])).tolist() == [interval] * 3
        fps = next(video.fps for video in clips.videos if video.path == item["video"])
        assert item["time_scale"] == pytest.approx(interval / fps)


def test_a_clip_is_flipped_as_a_whole_and_about_half_of_them_are(root):
    clips, unflipped = make_clips(root), make_clips(root, flip=False)
    flipped = 0
    for number in range(100):
        item, plain = clips[number], unflipped[number]["clip"]
        left, right = halves(item["clip"])
        is_flipped = left > right  # (C, T)
        assert is_flipped.all() or not is_flipped.any()
        assert torch.equal(item["clip"], plain.flip(-1) if is_flipped.any() else plain)
        flipped += bool(is_flipped.any())
    assert 35 <= flipped <= 65


def test_an_epoch_shows_every_video_once_and_streams_and_seeds_differ(shared_root):
    def order(**kwargs):
        clips = make_clips(shared_root, **kwargs)
        return [clips._video(number, []).path for number in range(50)]

    videos = order()
    for epoch in range(10):
        assert len(set(videos[5 * epoch : 5 * epoch + 5])) == 5
    assert len({tuple(videos[5 * epoch : 5 * epoch + 5]) for epoch in range(10)}) > 5
    assert videos == order() != order(stream=7)
    assert videos != order(seed=1)


def test_each_stream_draws_its_own_starts_intervals_and_flips(shared_root):
    def draws(stream):
        clips = make_clips(shared_root, frame_interval=(1, 3), stream=stream)
        return [clips._frame_numbers(clips.videos[2], number, 0) for number in range(20)]

    assert draws(0) == draws(0) != draws(50000) != draws("validation")


def test_an_item_does_not_depend_on_what_was_read_before(shared_root):
    numbers = [7, 3, 12, 0, 7, 4]
    clips = make_clips(shared_root, frame_interval=(1, 3))
    for number, item in zip(numbers, [clips[number] for number in numbers], strict=True):
        alone = make_clips(shared_root, frame_interval=(1, 3))[number]
        assert torch.equal(item.pop("clip"), alone.pop("clip")) and item == alone


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(shared_root, num_workers):
    clips, batches = make_clips(shared_root, frame_interval=(1, 3)), Batches(3, 3, 4, rank=0, world_size=1)
    loader = torch.utils.data.DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)
    for batch, numbers in zip(loader, batches, strict=True):
        expected = collate([clips[number] for number in numbers])
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value


def test_a_batch_stacks_clips_labels_and_time_scales(shared_root):
    batch = collate([make_clips(shared_root)[number] for number in (4, 9)])
    assert batch["clips"].shape == (2, 3, 4, SIZE, SIZE) and batch["clips"].dtype == torch.uint8
    assert batch["labels"].dtype == torch.int64 and batch["time_scales"].dtype == torch.float32
    assert batch["numbers"].tolist() == [4, 9] and len(batch["videos"]) == 2 and batch["bad"] == []


# Frames.


def test_a_clip_opens_one_reader_with_one_thread_and_decodes_no_further_than_it_must(root, monkeypatch):
    clips = make_clips(root, num_frames=4)
    readers, decoded = [], []

    class Reader(decord.VideoReader):
        def __init__(self, *args, **kwargs):
            readers.append(kwargs["num_threads"])
            super().__init__(*args, **kwargs)

        def next(self):
            decoded.append(super().next())
            return decoded[-1]

    monkeypatch.setattr(decord, "VideoReader", Reader)
    for number in range(8):
        decoded.clear()
        item = clips[number]
        assert len(decoded) == frame_numbers(item["clip"])[-1] + 1
    assert readers == [1] * 8


# Bad videos.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


DAMAGES = [scribble, truncate, Path.unlink, lambda path: path.write_text("hello")]


@pytest.mark.parametrize("damage", DAMAGES, ids=["scribbled", "truncated", "vanished", "text"])
@pytest.mark.parametrize(
    ("name", "codec"), [("bad.avi", "mpeg4"), ("bad.mp4", "mpeg4"), ("bad.mkv", "mpeg4"), ("bad.mov", "libx264")]
)
def test_a_bad_video_is_named_and_replaced_the_same_way_each_time(root, damage, name, codec):
    write_video(root / "A" / name, codec=codec)
    clips = make_clips(root, num_frames=16, seed=3)
    damage(root / "A" / name)
    items = [clips[number] for number in range(10)]
    bad = [item for item in items if item["bad"]]
    assert len(bad) == 2  # it comes once in each epoch
    for item in bad:
        assert item["bad"] == [f"A/{name}"] != [item["video"]]
        assert item["label"] == clips.classes.index(item["video"].split("/")[0])
        assert np.diff(frame_numbers(item["clip"])).tolist() == [1] * 15
        again = Clips(root, clips.videos, clips.classes, 16, SIZE, seed=3)
        assert torch.equal(again[item["number"]]["clip"], item["clip"])


def test_a_video_that_lost_frames_since_the_scan_is_bad_only_for_those(tmp_path):
    write_video(tmp_path / "v.avi", 30)
    video = scan_videos(tmp_path).videos[0]
    write_video(tmp_path / "v.avi", 20)
    assert read_numbers(tmp_path, video, [15, 19]) == [15, 19]
    with pytest.raises(UnreadableError, match="ends too early"):
        read_frames(tmp_path, video, [15, 20])


def test_a_replacement_is_never_one_that_failed_already(root):
    clips = make_clips(root)
    for name in ("A/one", "A/two", "B/four"):
        (root / f"{name}.avi").unlink()
    for number in range(20):
        item = clips[number]
        assert item["video"] == "B/three.avi"
        assert len(set(item["bad"])) == len(item["bad"])


def test_a_data_set_of_bad_videos_is_an_error(root):
    clips = make_clips(root)
    for video in clips.videos:
        (root / video.path).unlink()
    with pytest.raises(UserError, match="4 files in a row are bad"):
        clips[0]


def test_bad_videos_are_named_once_and_too_many_are_an_error():
    books = BadVideos(300, 0.01)
    assert books.add(["a", "b", "a"]) == ["a", "b"]
    assert books.add(["b", "c"]) == ["c"] and books.add([]) == [] and books.count == 3
    with pytest.raises(UserError, match="4 of 300 files are bad, d"):
        books.add(["d"])


def test_one_bad_video_is_always_allowed():
    books = BadVideos(2, 0.0)
    assert books.add(["a"]) == ["a"]
    with pytest.raises(UserError, match="--max-bad-fraction"):
        books.add(["b"])


# Batches.


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (3, 2), (4, 3), (12, 1)])
def test_ranks_and_micro_batches_share_every_step_without_gap_or_overlap(world_size, micro_batches):
    ranks = [Batches(100, 5, 12, rank, world_size, micro_batches) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {5 * micro_batches}
    ranks = torch.tensor([list(batches) for batches in ranks])  # (ranks, steps x micro-batches, samples)
    steps = ranks.view(world_size, 5, -1).transpose(0, 1).reshape(5, 12)
    assert torch.equal(steps, torch.arange(100, 160).view(5, 12))


def test_steps_go_on_over_epoch_borders_and_show_every_video_equally_often(shared_root):
    clips = make_clips(shared_root)  # 5 videos, batches of 2 on each of 2 ranks
    numbers = [number for rank in range(2) for batch in Batches(0, 5, 4, rank, 2) for number in batch]
    videos = [clips._video(number, []).path for number in numbers]
    assert {videos.count(path) for path in videos} == {4} and len(set(videos)) == 5


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="10 for 2 ranks x 3"):
        Batches(0, 5, 10, 0, 2, 3)


# Errors of the user.


def test_every_mistake_in_the_data_path_is_one_line_that_says_what_to_do(tmp_path):
    def message(path):
        with pytest.raises(UserError) as error:
            index.check_data_path(path)
        assert f"--data-path {path}" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder" in message(tmp_path / "missing")
    (tmp_path / "file.avi").write_text("")
    assert "wanted a folder" in message(tmp_path / "file.avi")
    (tmp_path / "empty" / "A").mkdir(parents=True)
    (tmp_path / "empty" / "A" / "x.txt").write_text("")
    assert "no video found" in message(tmp_path / "empty")
    (tmp_path / "twins" / "A").mkdir(parents=True)
    for name in ("A/x.avi", "A/x.mp4"):
        (tmp_path / "twins" / name).write_text("")
    assert "A/x.avi and A/x.mp4 differ only in their suffix" in message(tmp_path / "twins")
    (tmp_path / "mixed" / "A").mkdir(parents=True)
    for name in ("A/x.avi", "y.avi"):
        (tmp_path / "mixed" / name).write_text("")
    assert "A/x.avi" in message(tmp_path / "mixed") and "y.avi" in message(tmp_path / "mixed")


def test_a_quick_check_opens_no_file(root, monkeypatch):
    monkeypatch.setattr(decord, "VideoReader", lambda *args, **kwargs: pytest.fail("opened a video"))
    index.check_data_path(root)


def test_videos_that_are_all_unreadable_too_short_or_too_few_are_an_error(tmp_path):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "x.avi").write_text("hello")
    with pytest.raises(UserError, match="none of its 1 videos can be opened"):
        scan_videos(tmp_path)
    with pytest.raises(UserError, match="--num-frames 16: the longest video .* has 8 frames"):
        long_enough([fake("A/x", 8), fake("A/y", 4)], 16)
    with pytest.raises(UserError, match="wanted at least 2"):
        split_videos(tmp_path, [fake("A/x")], 0.05)


# Images.


def picture(height=40, width=56, seed=0):
    """uint8 (height, width, 3): smooth, so that JPEG keeps it, and like none of its mirror images."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def image_clips(root, num_frames=1, **kwargs):
    scan = scan_videos(root, images=True)
    return Clips(root, scan.videos, scan.classes, num_frames, SIZE, **kwargs)


@pytest.fixture
def image_root(tmp_path):
    """Two classes, five images of every suffix."""
    root = tmp_path / "images"
    for seed, name in enumerate(("A/a.jpg", "A/b.jpeg", "A/c.png", "B/d.webp", "B/e.PNG")):
        save(root / name, picture(seed=seed))
    return root


def test_a_scan_of_images_opens_none_of_them_and_leaves_no_index(image_root, tmp_path, monkeypatch):
    (image_root / "B" / "f.jpg").write_text("not an image, which only reading it will tell")
    (image_root / "B" / "thumbnails.db").write_text("")
    write_video(image_root / "B" / "video.mp4")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened an image"))
    scan = scan_videos(image_root, tmp_path, images=True)
    assert [video.path for video in scan.videos] == ["A/a.jpg", "A/b.jpeg", "A/c.png", "B/d.webp", "B/e.PNG", "B/f.jpg"]
    assert scan.videos[0] == Video("A/a.jpg", "A", num_frames=1, fps=25.0, height=None, width=None)
    assert scan.classes == ["A", "B"] and scan.unreadable == [] and scan.is_saved
    index.save_index(scan, tmp_path)
    assert not list(tmp_path.rglob("*index*"))


def test_images_directly_in_root_are_one_class(tmp_path):
    save(tmp_path / "a.png", picture())
    assert [video.key for video in scan_videos(tmp_path, images=True).videos] == ["all/a"]


def test_an_image_is_a_clip_of_one_frame_the_centre_crop_of_the_resized_image(tmp_path):
    save(tmp_path / "wide.png", picture(64, 96, seed=1))
    save(tmp_path / "high.png", picture(90, 45, seed=2))
    clips = image_clips(tmp_path, flip=False)
    for number in range(2):
        item = clips[number]
        assert item["clip"].dtype == torch.uint8 and item["clip"].shape == (3, 1, SIZE, SIZE)
        assert (item["label"], item["time_scale"], item["bad"]) == (0, 0.04, [])
        with Image.open(tmp_path / item["video"]) as image:
            size = {"wide.png": (48, SIZE), "high.png": (SIZE, 64)}[item["video"]]
            resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)
        expected = resized[:, 8:40] if item["video"] == "wide.png" else resized[16:48]
        assert np.abs(item["clip"][:, 0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_images_are_split_streamed_and_batched_as_videos_are(tmp_path):
    for number in range(40):
        save(tmp_path / f"C{number % 4}" / f"{number}.png", picture(seed=number))
    scan = scan_videos(tmp_path, images=True)
    train, val = split_videos(tmp_path, scan.videos, 0.2)
    assert sorted(video.key for video in train + val) == sorted(video.key for video in scan.videos)
    as_videos = split_videos(tmp_path, [fake(video.key) for video in scan.videos], 0.2)[1]
    assert [video.key for video in val] == [video.key for video in as_videos]
    assert long_enough(train, 1) == (train, 0)
    clips = Clips(tmp_path, train, scan.classes, 1, SIZE)
    steps = len(train)  # of 2: two epochs
    loader = torch.utils.data.DataLoader(clips, batch_sampler=Batches(0, steps, 2, 0, 1), collate_fn=collate)
    batches = list(loader)
    seen = [path for batch in batches for path in batch["videos"]]
    assert sorted(seen) == sorted(2 * [video.path for video in train])
    assert {batch["clips"].shape for batch in batches} == {(2, 3, 1, SIZE, SIZE)}
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert labels == [scan.classes.index(path.split("/")[0]) for path in seen]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def bomb(path):
    Image.new("1", (20000, 10000)).save(path, format="PNG")


def lose_size(path):
    """A PNG whose first chunk is too short."""
    header = struct.pack(">I", 4) + b"IHDR" + bytes(4)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zlib.crc32(header[4:])))


def lose_palette(path):
    """A PNG with a palette that is not there, though parts of it are transparent."""
    Image.fromarray(picture()).quantize(4).save(path, format="PNG", transparency=1)
    data = path.read_bytes()
    start = data.index(b"PLTE") - 4
    path.write_bytes(data[:start] + data[start + 12 + struct.unpack(">I", data[start : start + 4])[0] :])


def scramble_exif(path):
    Image.fromarray(picture()).save(path, format="PNG", exif=b"Exif\x00\x00no TIFF header")


WAYS = {
    "truncated": cut,
    "vanished": Path.unlink,
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_bytes(b""),
}
PNG_WAYS = {"bomb": bomb, "size": lose_size, "palette": lose_palette, "exif": scramble_exif}


@pytest.mark.parametrize(("way", "suffix"), [*product(WAYS, ("jpg", "png", "webp")), *product(PNG_WAYS, ("png",))])
def test_a_bad_image_is_named_replaced_and_counted(image_root, way, suffix):
    name = f"bad.{suffix}"
    save(image_root / "A" / name, picture(seed=9))
    clips = image_clips(image_root)
    (WAYS | PNG_WAYS)[way](image_root / "A" / name)
    items = [clips[number] for number in range(12)]
    bad = [item for item in items if item["bad"]]
    assert len(bad) == 2  # it comes once in each epoch
    for item in bad:
        assert item["bad"] == [f"A/{name}"] != [item["video"]]
        assert item["label"] == clips.classes.index(item["video"].split("/")[0])
    books = BadVideos(len(clips), 0.0)
    assert books.add([path for item in items for path in item["bad"]]) == [f"A/{name}"]


def test_a_folder_of_the_other_kind_is_one_line_that_says_what_to_do_about_video(tmp_path):
    save(tmp_path / "images" / "A" / "a.jpg", picture())
    write_video(tmp_path / "videos" / "a.avi")
    (tmp_path / "empty").mkdir()

    def message(folder, images):
        with pytest.raises(UserError) as error:
            scan_videos(tmp_path / folder, images=images)
        assert str(error.value).startswith(f"--data-path {tmp_path / folder}: ") and "\n" not in str(error.value)
        return str(error.value)

    assert "no video found, but images: leave out --video" in message("images", images=False)
    assert "no image found, but videos: add --video" in message("videos", images=True)
    nothing = message("empty", images=True)
    assert "no image found, wanted <class>/<image> with one of" in nothing and "--video" not in nothing
    save(tmp_path / "images" / "b.png", picture())
    assert "images in class folders (A/a.jpg) and beside them (b.png)" in message("images", images=True)


# Where sampling starts from.


def starts_wrong(path, *arguments):
    with pytest.raises(UserError) as error:
        read_start(path, *arguments)
    assert str(error.value).startswith(f"--init {path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("rate", "seconds", "interval"), [(25, 1 / 25, 1), (25, 0.09, 2), (25, 0.15, 4), (10, 0.01, 1), (30, 0.1, 3)]
)
def test_a_start_is_the_first_frames_of_a_video_as_far_apart_as_comes_closest(tmp_path, rate, seconds, interval):
    write_video(tmp_path / "v.mp4", 20, rate=rate, codec="libx264", size=(48, 48))
    frames = read_start(tmp_path / "v.mp4", 4, seconds, 48, images=False)
    assert frames.dtype == np.uint8 and frames.shape == (4, 48, 48, 3)
    assert (halves(frames[..., 0])[0] / 4).round().int().tolist() == [0, interval, 2 * interval, 3 * interval]


def test_a_start_may_use_a_video_up_to_its_last_frame_and_no_further(tmp_path):
    write_video(tmp_path / "v.avi", 10, size=(48, 48))
    write_video(tmp_path / "w.avi", 9, size=(48, 48))
    assert len(read_start(str(tmp_path / "v.avi"), 4, 3 / 25, 48, False)) == 4  # frames 0, 3, 6, 9
    assert "has 9 frames, but 4 that are 3 apart take 10" in starts_wrong(tmp_path / "w.avi", 4, 3 / 25, 48, False)


def test_an_image_to_start_from_comes_as_it_is(tmp_path):
    save(tmp_path / "a.png", picture(48, 48))
    assert np.array_equal(read_start(tmp_path / "a.png", 1, 1 / 25, 48, images=True), picture(48, 48)[None])


def test_every_mistake_in_what_to_start_from_is_one_line_that_says_what_to_do(tmp_path):
    save(tmp_path / "a.png", picture(48, 56))
    write_video(tmp_path / "v.avi", 10)
    (tmp_path / "text.avi").write_text("hello")
    (tmp_path / "text.png").write_text("hello")
    assert "no such file" in starts_wrong(tmp_path / "b.png", 1, 1 / 25, 48, True)
    assert "no video, wanted one of .avi" in starts_wrong(tmp_path / "a.png", 4, 1 / 25, 48, False)
    assert "no image, wanted one of .jpeg" in starts_wrong(tmp_path / "v.avi", 1, 1 / 25, 48, True)
    assert "can't be decoded" in starts_wrong(tmp_path / "text.avi", 4, 1 / 25, 48, False)
    assert "can't be decoded" in starts_wrong(tmp_path / "text.png", 1, 1 / 25, 48, True)
    resize = "pixels, wanted 48 x 48: resize it first"
    assert f"56 x 48 {resize}" in starts_wrong(tmp_path / "a.png", 1, 1 / 25, 48, True)
    assert f"64 x 48 {resize}" in starts_wrong(tmp_path / "v.avi", 4, 1 / 25, 48, False)


def test_a_folder_to_start_from_stands_for_its_files_of_the_kind_in_the_order_of_their_names(tmp_path):
    for name in ("2.png", "10.JPG", ".hidden.png", "v.mp4", "notes.txt", "inner/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert start_files(tmp_path, images=True) == [str(tmp_path / "10.JPG"), str(tmp_path / "2.png")]
    assert start_files(tmp_path, images=False) == [str(tmp_path / "v.mp4")]
    assert start_files(tmp_path / "2.png", images=True) == [tmp_path / "2.png"]
    for place, images, words in ((tmp_path / "gone", True, "No such file"), (tmp_path / "inner", False, "no video")):
        with pytest.raises(UserError, match=words) as error:
            start_files(place, images)
        assert str(error.value).startswith(f"--init {place}: ") and "\n" not in str(error.value)


# Files and indices that others have made.


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile one.avi\n", "#EXTM3U\n#EXTINF:1,\none.avi\n", "RIFF", ""])
def test_a_playlist_or_a_stub_is_a_bad_video_whatever_it_is_called(root, text):
    (root / "A" / "list.mp4").write_text(text)
    assert scan_videos(root).unreadable == ["A/list.mp4"]


def test_a_pipe_is_a_bad_video_and_nobody_waits_for_it(root):
    os.mkfifo(root / "A" / "pipe.avi")
    assert scan_videos(root).unreadable == ["A/pipe.avi"]


def test_a_video_that_claims_more_frames_than_it_has_bytes_is_bad(root):
    path = root / "A" / "one.avi"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 2**32 - 1)  # decord would abort the process
    path.write_bytes(data)
    assert scan_videos(root).unreadable == ["A/one.avi"]


@pytest.mark.parametrize(
    "change",
    [{"class_name": "Z"}, {"num_frames": 10**30}, {"num_frames": "9"}, {"fps": 0}, {"fps": float("nan")},
     {"path": "../A/one.avi"}, {"width": -1}, {"more": 1}],
)  # fmt: skip
def test_an_index_that_says_what_can_not_be_is_not_believed(root, change):
    expected = scan_videos(root)
    index = json.loads((root / ".video_index.json").read_text())
    index["videos"][0][1] |= change
    (root / ".video_index.json").write_text(json.dumps(index))
    assert scan_videos(root).videos == expected.videos


def test_a_list_may_name_videos_with_spaces_and_bytes_that_are_no_text(tmp_path):
    names = ["A b/c d", os.fsdecode(b"A b/\xff"), "A b/9"]
    lines = b"A b/c d.avi 1\r\n\n" + os.fsencode(names[1]) + b".avi 1\n/ 1\n.. 2\n"
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_bytes(lines)
    train, val = split_videos(tmp_path, [fake(name) for name in names], 0.5)
    assert [video.key for video in train] == names[:2]
    assert [video.key for video in val] == names[2:]

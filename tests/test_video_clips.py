"""The stream of clips, its batches, bad videos in it."""

import struct
import zlib
from itertools import product
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from PIL import Image

from runtime.cli import UserError
from tiny_videos import (
    frame_indices_of,
    halves,
    make_video,
    picture,
    read_frame_indices,
    save,
    scribble,
    write_equal_videos,
    write_images,
    write_mixed_videos,
    write_video,
)
from video.clips import Batches, Clips, collate
from video.files import UnreadableError, read_frames
from video.index import BadVideos, long_enough, scan_videos, split_videos

SIZE = 32  # px, of the clips; videos are 64 x 48


def make_clips(root, num_frames=4, **kwargs):
    scan = scan_videos(root)
    return Clips(root, scan.videos, scan.classes, num_frames, SIZE, **kwargs)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    """Tests only read it."""
    return write_mixed_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def root(tmp_path):
    return write_equal_videos(tmp_path / "data")


# Clips.


def test_odd_names_work_and_hidden_files_and_other_files_are_ignored(tmp_path):
    write_video(tmp_path / "Tai Chi" / "Übung 1 (äöü, 太极).AVI")
    write_video(tmp_path / "Tai Chi" / "it's #2%20.mp4")
    for name in ("Tai Chi/.hidden.avi", "Tai Chi/notes.txt", "ucfTrainTestlist/fake.avi", ".cache/x.avi", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not a video")
    clips = make_clips(tmp_path)
    assert clips.classes == ["Tai Chi"] and len(clips) == 2
    assert {clips[index]["video"] for index in range(2)} == {video.path for video in clips.videos}


@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_spacing_in_time_does_not_depend_on_the_number_of_frames(shared_root, num_frames):
    scan = scan_videos(shared_root)
    videos, _ = long_enough(scan.videos, 1 + 2 * 15)
    clips = Clips(shared_root, videos, scan.classes, num_frames, SIZE, frame_interval=(2, 2))
    for sample in (clips[index] for index in range(8)):
        shown = frame_indices_of(sample["clip"])
        assert np.diff(shown).tolist() == [2] * (num_frames - 1)
        assert sample["time_scale"] == pytest.approx(2 / 25)


def test_a_sample_has_the_clip_its_label_and_the_frame_rate_of_its_file_and_a_batch_stacks_them(shared_root):
    clips = make_clips(shared_root, num_frames=4)
    rates = {"Run/a.avi": 25, "Run/b.mp4": 25, "Run/c.mkv": 30, "Jump/d.mov": 30000 / 1001, "Jump/e.avi": 25}
    samples = [clips[index] for index in range(10)]
    for index, sample in enumerate(samples):
        assert sample["clip"].shape == (3, 4, SIZE, SIZE) and sample["clip"].dtype == torch.uint8
        assert sample["label"] == (1 if sample["video"].startswith("Run") else 0)
        assert sample["time_scale"] == pytest.approx(1 / rates[sample["video"]], rel=1e-6)
        assert sample["index"] == index and sample["bad"] == []
    batch = collate([samples[4], samples[9]])
    assert torch.equal(batch["clips"], torch.stack([samples[4]["clip"], samples[9]["clip"]]))
    assert batch["labels"].dtype == torch.int64 and batch["time_scales"].dtype == torch.float32
    assert batch["indices"].tolist() == [4, 9] and len(batch["videos"]) == 2 and batch["bad"] == []


def test_intervals_and_starts_are_random_over_their_whole_range(shared_root):
    clips = make_clips(shared_root, num_frames=4, frame_interval=(1, 3), flip=False)
    clips.videos = [video for video in clips.videos if video.path == "Run/c.mkv"]  # 30 frames at 30 Hz
    seen = [clips._choose_frames(clips.videos[0], index, 0) for index in range(2000)]
    intervals = [frames[1] - frames[0] for frames, _ in seen]
    assert {interval: intervals.count(interval) // 100 * 100 for interval in (1, 2, 3)} == {1: 600, 2: 600, 3: 600}
    for interval in (1, 2, 3):
        starts = {frames[0] for frames, _ in seen if frames[1] - frames[0] == interval}
        assert starts == set(range(30 - 3 * interval))
    assert all(time_scale == (frames[1] - frames[0]) / 30 for frames, time_scale in seen)


def test_an_interval_that_does_not_fit_becomes_the_largest_that_does(shared_root):
    clips = make_clips(shared_root, num_frames=4, frame_interval=(9, 9))
    for sample in (clips[index] for index in range(10)):
        (video,) = [video for video in clips.videos if video.path == sample["video"]]
        interval = min(9, (video.num_frames - 1) // 3)  # 20 frames: 6
        assert np.diff(frame_indices_of(sample["clip"])).tolist() == [interval] * 3
        assert sample["time_scale"] == pytest.approx(interval / video.fps)


def test_a_clip_is_flipped_as_a_whole_and_about_half_of_them_are(root):
    clips, unflipped = make_clips(root), make_clips(root, flip=False)
    flipped = 0
    for index in range(100):
        sample, plain = clips[index], unflipped[index]["clip"]
        left, right = halves(sample["clip"])
        is_flipped = left > right  # (C, T)
        assert is_flipped.all() or not is_flipped.any()
        assert torch.equal(sample["clip"], plain.flip(-1) if is_flipped.any() else plain)
        flipped += bool(is_flipped.any())
    assert 35 <= flipped <= 65


def test_an_epoch_shows_every_video_once_and_streams_and_seeds_differ(shared_root):
    def order(**kwargs):
        clips = make_clips(shared_root, **kwargs)
        return [clips._choose_video(index, []).path for index in range(50)]

    videos = order()
    epochs = [tuple(videos[5 * epoch : 5 * epoch + 5]) for epoch in range(10)]
    assert all(len(set(epoch)) == 5 for epoch in epochs) and len(set(epochs)) > 5
    assert videos == order() != order(stream=7)
    assert videos != order(seed=1)

    def draws(stream):
        clips = make_clips(shared_root, frame_interval=(1, 3), stream=stream)
        return [clips._choose_frames(clips.videos[2], index, 0) for index in range(20)]

    assert draws(0) == draws(0) != draws(50000) != draws("validation")  # of starts and intervals


def test_a_sample_does_not_depend_on_what_was_read_before(shared_root):
    indices = [7, 3, 12, 0, 7, 4]
    clips = make_clips(shared_root, frame_interval=(1, 3))
    for index, sample in zip(indices, [clips[index] for index in indices], strict=True):
        alone = make_clips(shared_root, frame_interval=(1, 3))[index]
        assert torch.equal(sample.pop("clip"), alone.pop("clip")) and sample == alone


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
    for index in range(8):
        decoded.clear()
        sample = clips[index]
        assert len(decoded) == frame_indices_of(sample["clip"])[-1] + 1
    assert readers == [1] * 8


# Bad videos.


DAMAGES = {
    "scribbled": scribble,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "vanished": Path.unlink,
    "text": lambda path: path.write_text("hello"),
}


def check_replacements(clips, samples, path):
    """The samples of two epochs in which another file replaces the bad one, with that file's label."""
    bad = [sample for sample in samples if sample["bad"]]
    assert len(bad) == 2  # it comes once in each epoch
    for sample in bad:
        assert sample["bad"] == [path] != [sample["video"]]
        assert sample["label"] == clips.classes.index(sample["video"].split("/")[0])
    return bad


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [*product(["scribbled", "truncated"], ["avi", "mp4", "mkv", "mov"]), ("vanished", "avi"), ("text", "avi")],
)
def test_a_bad_video_is_named_and_replaced_the_same_way_each_time(root, damage, suffix):
    name = f"bad.{suffix}"
    write_video(root / "A" / name, codec="libx264" if suffix == "mov" else "mpeg4")
    clips = make_clips(root, num_frames=16, seed=3)
    DAMAGES[damage](root / "A" / name)
    for sample in check_replacements(clips, [clips[index] for index in range(10)], f"A/{name}"):
        assert np.diff(frame_indices_of(sample["clip"])).tolist() == [1] * 15
        again = Clips(root, clips.videos, clips.classes, 16, SIZE, seed=3)
        assert torch.equal(again[sample["index"]]["clip"], sample["clip"])


def test_a_video_that_lost_frames_since_the_scan_is_bad_only_for_those(tmp_path):
    write_video(tmp_path / "v.avi", 30)
    video = scan_videos(tmp_path).videos[0]
    write_video(tmp_path / "v.avi", 20)
    assert read_frame_indices(tmp_path, video, [15, 19]) == [15, 19]
    with pytest.raises(UnreadableError, match="ends too early"):
        read_frames(tmp_path, video, [15, 20])


def test_a_replacement_is_never_one_that_failed_already_and_a_data_set_of_bad_videos_is_an_error(root):
    clips = make_clips(root)
    for name in ("A/one", "A/two", "B/four"):
        (root / f"{name}.avi").unlink()
    for sample in (clips[index] for index in range(20)):
        assert sample["video"] == "B/three.avi"
        assert len(set(sample["bad"])) == len(sample["bad"])
    (root / "B/three.avi").unlink()
    with pytest.raises(UserError, match="4 files in a row are bad"):
        clips[0]


# Batches.


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (3, 2), (4, 3), (12, 1)])
def test_ranks_and_micro_batches_divide_every_step_without_gap_or_overlap(world_size, micro_batches):
    ranks = [Batches(100, 5, 12, rank, world_size, micro_batches) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {5 * micro_batches}
    ranks = torch.tensor([list(batches) for batches in ranks])  # (ranks, steps x micro-batches, samples)
    steps = ranks.view(world_size, 5, -1).transpose(0, 1).reshape(5, 12)
    assert torch.equal(steps, torch.arange(100, 160).view(5, 12))


def test_steps_continue_over_epoch_ends_and_show_every_video_equally_often(shared_root):
    clips = make_clips(shared_root)  # 5 videos, batches of 2 on each of 2 ranks
    indices = [index for rank in range(2) for batch in Batches(0, 5, 4, rank, 2) for index in batch]
    videos = [clips._choose_video(index, []).path for index in indices]
    assert {videos.count(path) for path in videos} == {4} and len(set(videos)) == 5


def test_a_video_that_is_too_short_and_a_batch_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="long_enough"):
        Clips("", [make_video("A/short", 7), make_video("A/fits", 8)], ["A"], 8, SIZE)
    with pytest.raises(ValueError, match="10 for 2 ranks x 3"):
        Batches(0, 5, 10, 0, 2, 3)


# Images.


def image_clips(root, num_frames=1, **kwargs):
    scan = scan_videos(root, images=True)
    return Clips(root, scan.videos, scan.classes, num_frames, SIZE, **kwargs)


@pytest.fixture
def image_root(tmp_path):
    return write_images(tmp_path / "images")


def test_an_image_is_a_clip_of_one_frame_the_center_crop_of_the_resized_image(tmp_path):
    save(tmp_path / "wide.png", picture(64, 96, seed=1))
    save(tmp_path / "high.png", picture(90, 45, seed=2))
    clips = image_clips(tmp_path, flip=False)
    for index in range(2):
        sample = clips[index]
        assert sample["clip"].dtype == torch.uint8 and sample["clip"].shape == (3, 1, SIZE, SIZE)
        assert (sample["label"], sample["time_scale"], sample["bad"]) == (0, 0.04, [])
        with Image.open(tmp_path / sample["video"]) as image:
            size = {"wide.png": (48, SIZE), "high.png": (SIZE, 64)}[sample["video"]]
            resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)
        expected = resized[:, 8:40] if sample["video"] == "wide.png" else resized[16:48]
        assert np.abs(sample["clip"][:, 0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_images_are_split_streamed_and_batched_as_videos_are(tmp_path):
    for index in range(40):
        save(tmp_path / f"C{index % 4}" / f"{index}.png", picture(seed=index))
    scan = scan_videos(tmp_path, images=True)
    train, val = split_videos(tmp_path, scan.videos, 0.2)
    assert sorted(video.key for video in train + val) == sorted(video.key for video in scan.videos)
    as_videos = split_videos(tmp_path, [make_video(video.key) for video in scan.videos], 0.2)[1]
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


def bomb(path):
    """A PNG that claims 20000 x 10000 pixels."""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 20000, 10000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def lose_size(path):
    """A PNG whose first chunk is too short."""
    header = struct.pack(">I", 4) + b"IHDR" + bytes(4)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zlib.crc32(header[4:])))


def lose_palette(path):
    """A PNG without its palette, though parts of it are transparent."""
    Image.fromarray(picture()).quantize(4).save(path, format="PNG", transparency=1)
    data = path.read_bytes()
    start = data.index(b"PLTE") - 4
    path.write_bytes(data[:start] + data[start + 12 + struct.unpack(">I", data[start : start + 4])[0] :])


def scramble_exif(path):
    Image.fromarray(picture()).save(path, format="PNG", exif=b"Exif\x00\x00no TIFF header")


PNG_DAMAGES = {"bomb": bomb, "size": lose_size, "palette": lose_palette, "exif": scramble_exif}


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [*product(["truncated", "text"], ["jpg", "png", "webp"]), ("vanished", "jpg"), *product(PNG_DAMAGES, ["png"])],
)
def test_a_bad_image_is_named_replaced_and_counted(image_root, damage, suffix):
    name = f"bad.{suffix}"
    save(image_root / "A" / name, picture(seed=9))
    clips = image_clips(image_root)
    (DAMAGES | PNG_DAMAGES)[damage](image_root / "A" / name)
    samples = [clips[index] for index in range(12)]
    check_replacements(clips, samples, f"A/{name}")
    bad_videos = BadVideos(len(clips), 0.0)
    assert bad_videos.add([path for sample in samples for path in sample["bad"]]) == [f"A/{name}"]

"""Scans, their index and splits."""

import json
import os
import shutil
import struct
from itertools import product
from shlex import split

import decord
import pytest
from PIL import Image

import cache_latents
import tiny_videos as tiny
from training import error_of, no_space, record_calls, run_main
from video.files import Video
from video.index import find_data, index_path, log_skipped, save_index, scan_videos, split_videos
from video.inputs import find_clips
from video.source import Files, check_data_path, open_source


@pytest.fixture
def root(tmp_path):
    return tiny.write_equal_videos(tmp_path / "data")


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def opened(monkeypatch):
    """The paths of the videos that are opened from here on."""
    return record_calls(monkeypatch, decord, "VideoReader", lambda path, **_: path)


# Scan ---------------------------------------------------------------------------------------------


def test_a_scan_finds_videos_classes_rates_and_frames_and_ignores_hidden_and_other_files(tmp_path):
    odd = "Tai Chi/it's #2%20, Übung 1 (äöü, 太极).AVI"
    tiny.write_video(tiny.write_mixed_videos(tmp_path) / odd)
    for name in ("Tai Chi/.hidden.avi", "Tai Chi/notes.txt", "ucfTrainTestlist/x.avi", ".a/x.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not a video")
    scan = scan_videos(tmp_path)
    paths = ["Jump/d.mov", "Jump/e.avi", "Run/a.avi", "Run/b.mp4", "Run/c.mkv", odd]
    assert scan.classes == ["Jump", "Run", "Tai Chi"]
    assert scan.unreadable == []
    assert [video.path for video in scan.videos] == paths
    assert [video.num_frames for video in scan.videos] == [20, 20, 40, 60, 30, 20]
    assert [video.fps for video in scan.videos] == pytest.approx([30000 / 1001, 25, 25, 25, 30, 25])
    assert {(video.height, video.width) for video in scan.videos} == {(48, 64)}


def test_videos_or_images_directly_in_root_are_one_class_also_in_a_cache(tmp_path):
    for name in ("b.avi", "a.avi", ".hidden.avi"):
        tiny.write_video(tmp_path / name)
    tiny.save(tmp_path / "c.png", tiny.picture())
    scan = scan_videos(tmp_path)
    assert scan.classes == ["all"]
    assert [video.key for video in scan.videos] == ["all/a", "all/b"]
    scan = scan_videos(tmp_path, images=True)
    assert [video.key for video in scan.videos] == ["all/c"]
    cache = tmp_path.with_name("cache")
    places = ["--data-path", tmp_path, "--out", cache]
    run_main(cache_latents, *places, *split("--vae none --image-size 16"))
    assert [video.key for video in open_source(cache, 16).videos()] == ["all/a", "all/b"]


def test_a_file_that_cannot_be_opened_is_reported_also_a_pipe(root):
    folder = root / "A"
    texts = {
        "text.avi": "not a video",
        "empty.mp4": "",
        "list.mp4": "ffconcat version 1.0\nfile one.avi\n",
        "m3u.mp4": "#EXTM3U\n#EXTINF:1,\none.avi\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    tiny.write_sound(folder / "sound.mp4")
    os.mkfifo(folder / "pipe.avi")
    (folder / "link.avi").symlink_to("nowhere")
    not_utf8 = os.fsdecode(b"\xff.avi")
    shutil.copyfile(folder / "one.avi", folder / not_utf8)
    data = bytearray((folder / "one.avi").read_bytes())
    num_frames = data.index(b"strh") + 8 + 32
    struct.pack_into("<I", data, num_frames, 2**32 - 1)  # decord would abort
    (folder / "claims.avi").write_bytes(data)
    scan = scan_videos(root)
    names = [*texts, "sound.mp4", "pipe.avi", "link.avi", not_utf8, "claims.avi"]
    assert scan.unreadable == sorted(f"A/{name}" for name in names)
    assert len(scan.videos) == 4


# Index --------------------------------------------------------------------------------------------


def test_a_file_that_the_index_knows_is_not_opened_again(root, runs, monkeypatch, opened):
    before = sorted(root.rglob("*"))
    first = scan_videos(root, runs)
    (place,) = runs.iterdir()
    opened.clear()
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    for name in (root, root.parent / "link", "data"):  # by any of its names
        assert scan_videos(name, runs) == first
    assert opened == []
    assert list(runs.iterdir()) == [place]
    assert sorted(root.rglob("*")) == before
    other = tiny.write_equal_videos(root.parent / "other")
    (other / "A/one.avi").unlink()
    assert len(scan_videos(other, runs).videos) == 3
    assert len(scan_videos(root, runs).videos) == 4
    assert len(list(runs.iterdir())) == 2  # of each data folder its own


def test_only_new_and_changed_files_are_opened_and_missing_ones_dropped(root, runs, opened):
    scan_videos(root, runs)
    tiny.write_video(root / "A/one.avi", 30)
    tiny.write_video(root / "B/five.avi")
    (root / "A/two.avi").unlink()
    opened.clear()
    scan = scan_videos(root, runs)
    assert opened == [str(root / "A/one.avi"), str(root / "B" / "five.avi")]
    frames = {video.key: video.num_frames for video in scan.videos}
    assert frames == {"A/one": 30, "B/five": 20, "B/four": 20, "B/three": 20}
    assert "two" not in index_path(root, runs).read_text()


@pytest.mark.parametrize(
    "settings, fields",
    [
        ({}, {"num_frames": "9"}),
        ({}, {"num_frames": 0}),
        ({}, {"more": 1}),
        ({"format": 2}, {"keyframes": []}),  # the format without keyframes
        ({"videos": None}, {}),
        (None, {}),  # torn
    ],
)
def test_a_torn_or_foreign_index_is_built_again_and_reported(root, runs, capsys, settings, fields):
    scan = scan_videos(root, runs)
    path = index_path(root, runs)
    content = json.loads(path.read_text())
    content["videos"][0][1] |= fields
    path.write_text('{"format": 1, "v' if settings is None else json.dumps(content | settings))
    again = scan_videos(root, runs).videos
    assert again == scan.videos
    assert all(video.keyframes for video in again)
    assert "building it again" in capsys.readouterr().out
    assert scan_videos(root, runs).videos == again
    assert capsys.readouterr().out == ""


def test_the_first_run_writes_the_index_once_its_folder_is_there(root, tmp_path, opened):
    first = scan_videos(root, tmp_path / "new")
    assert not first.is_saved
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    save_index(first, root, tmp_path / "new")
    opened.clear()
    assert scan_videos(root, tmp_path / "new").videos == first.videos
    assert opened == []
    tiny.write_video(root / "A/later.avi")
    newer = scan_videos(root, tmp_path / "new")
    save_index(first, root, tmp_path / "new")  # leaves the newer index of another run alone
    opened.clear()
    assert scan_videos(root, tmp_path / "new") == newer
    assert opened == []


def test_a_disk_that_refuses_the_index_is_a_line_and_has_no_partial_file(
    root, runs, monkeypatch, capsys
):
    monkeypatch.setattr(os, "replace", no_space)
    assert len(scan_videos(root, runs).videos) == 4
    assert list(runs.iterdir()) == []
    assert "No space left" in capsys.readouterr().out


def test_a_scan_of_images_opens_none_of_them_and_leaves_no_index(tmp_path, monkeypatch):
    root = tiny.write_images(tmp_path / "images")
    (root / "B/f.jpg").write_text("not an image, as only reading it shows")
    (root / "B/thumbnails.db").write_text("")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened an image"))
    scan = scan_videos(root, tmp_path, images=True)
    names = [video.path for video in scan.videos]
    assert names == ["A/a.jpg", "A/b.jpeg", "A/c.png", "B/d.webp", "B/e.PNG", "B/f.jpg"]
    assert scan.videos[0] == Video("A/a.jpg", "A", num_frames=1, fps=25.0, height=None, width=None)
    assert scan.classes == ["A", "B"]
    assert scan.unreadable == []
    assert not list(tmp_path.rglob("*index*"))


# Splits -------------------------------------------------------------------------------------------


def test_the_hash_split_stays_when_videos_are_added_or_converted(tmp_path):
    videos = [tiny.make_video(f"C{index % 7}/v{index}") for index in range(2000)]
    train, val = split_videos(tmp_path, videos, 0.05)
    order = {video: index for index, video in enumerate(videos)}
    assert sorted(train + val, key=order.get) == videos
    assert 70 <= len(val) <= 130
    _, fewer_val = split_videos(tmp_path, videos[:1000], 0.05)
    assert fewer_val == [video for video in val if order[video] < 1000]
    converted = [tiny.make_video(video.key, suffix=".mp4") for video in videos]
    _, converted_val = split_videos(tmp_path, converted, 0.05)
    assert [video.key for video in converted_val] == [video.key for video in val]


def test_at_least_one_video_trains_and_one_validates(tmp_path):
    for number, fraction in product(range(20), (0.0, 0.5, 1.0)):
        videos = [tiny.make_video(f"A/v{number}"), tiny.make_video(f"B/w{number}")]
        train, val = split_videos(tmp_path, videos, fraction)
        assert len(train) == len(val) == 1
        assert train != val


def test_lists_in_root_come_first_unless_they_name_none_or_all_videos(tmp_path, capsys):
    videos = [tiny.make_video(f"A/s{index}", suffix=".mp4") for index in range(4)]
    keys = [video.key for video in videos]
    by_hash = split_videos(tmp_path / "data", videos, 0.2)

    def split(inside, beside):
        tiny.write_ucf_list(tmp_path / "data", inside)
        tiny.write_ucf_list(tmp_path, beside)
        return split_videos(tmp_path / "data", videos, 0.2)

    assert split(keys[:1], keys[1:2]) == (videos[:1], videos[1:])
    assert split([], [*keys[2:], "A/t"]) == (videos[2:], videos[:2])
    assert "note" not in capsys.readouterr().out
    for inside, amount in [(["B/s0"], "none"), (keys, "all")]:
        assert split(inside, keys) == by_hash
        assert f"trainlist01.txt: names {amount} of the 4 usable files" in capsys.readouterr().out


def test_a_list_may_begin_with_a_mark_and_name_odd_videos_and_those_without_a_class(tmp_path):
    names = ["A b/c d", os.fsdecode(b"A b/\xff"), "all/v2", "A b/9"]
    lines = b"\xef\xbb\xbfA b/c d.avi 1\r\n\n" + os.fsencode(names[1]) + b".avi 1\nv2.avi\n"
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_bytes(lines)
    train, val = split_videos(tmp_path, [tiny.make_video(name) for name in names], 0.5)
    assert [video.key for video in train] == names[:3]
    assert [video.key for video in val] == names[3:]


def test_the_data_of_training_are_long_enough_and_short_videos_counted(root):
    tiny.write_video(root / "A/short.avi", 6)
    for n in range(3):
        tiny.write_video(root / "B" / f"long{n}.avi", 40)
    data = find_data(Files(root, scan_videos(root), 16), 0.5, [4, 20], [8], "--num-frames")
    train, val = split_videos(root, data.source.videos(), 0.5)

    def long_enough(videos, num_frames):
        return [video for video in videos if video.num_frames >= num_frames]

    assert data.train == {4: train, 20: long_enough(train, 20)}
    assert list(data.val) == [4, 8, 20]
    assert data.val[8] == long_enough(val, 8)
    assert data.num_too_short == 1
    assert data.spare(21) == long_enough(train, 21)


def test_short_validation_videos_are_counted_and_the_longest_is_named_if_all_are_too_short(root):
    _, val = split_videos(root, scan_videos(root).videos, 0.9)
    assert len(val) == 3
    for video, num_frames in zip(val, [40, 8, 6], strict=True):
        tiny.write_video(root / video.path, num_frames)
    source = Files(root, scan_videos(root), 16)
    data = find_data(source, 0.9, [4, 16], [30, 40], "--num-frames")
    assert {n: len(videos) for n, videos in data.val.items()} == {4: 3, 16: 1, 30: 1, 40: 1}
    assert data.num_too_short == 2
    log = []
    log_skipped(log.append, data)
    assert len(log) == 3
    assert "2 files with fewer than 16 frames (2 for validation), 0 files that can't" in log[0]
    assert log[1].endswith("2 validation files with fewer than the 30 frames of --val-frames")
    tiny.write_video(root / val[0].path, 9)
    source = Files(root, scan_videos(root), 16)
    line = error_of(find_data, source, 0.9, [4, 16], [], "--num-frames")
    assert line == (
        f"--num-frames 16: the longest validation video has 9 frames: {val[0].path}; use fewer, "
        "replace it, or start over with a higher --val-fraction"
    )


def test_folders_of_samples_are_no_data_and_a_scan_says_so_once(root, runs, capsys):
    expected = scan_videos(root, runs)
    for folder in (root / "Made", root / "Begun", root):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(root / "A/one.avi", folder / "000000.avi")
    for mark in ("Made/samples.json", "Begun/samples.unfinished", "samples.json"):
        (root / mark).write_text("{}")
    capsys.readouterr()
    for folder in (None, runs):
        scan = scan_videos(root, folder)
        assert scan.videos == expected.videos
        assert scan.classes == ["A", "B"]
        folders = f"{root}, {root / 'Begun'}, {root / 'Made'}"
        note = f"skipped 3 folders with samples of sample_gd.py: {folders}; move"
        assert capsys.readouterr().out.count(note) == 1
    check_data_path(root)
    assert capsys.readouterr().out == ""  # checks before the scan are silent
    tiny.write_images(root / "pictures")
    (root / "pictures/B/samples.json").write_text("{}")
    scan = scan_videos(root / "pictures", images=True)
    assert scan.classes == ["A"]
    assert "skipped 1 folder with" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_one_line_also_for_samplers(root, monkeypatch):
    def refuse(folder):
        if str(folder).endswith("B"):
            raise PermissionError(13, "Permission denied", folder)

    record_calls(monkeypatch, os, "scandir", refuse)  # root may read any folder
    reason = f"{root}: {root / 'B'} can't be read (Permission denied)"
    assert error_of(check_data_path, root) == f"--data-path {reason}"
    assert error_of(find_clips, "--init", root, ["video"]) == f"--init {reason}"

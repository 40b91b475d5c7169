"""Scans, their index, splits and the count of bad videos."""

import json
import os
import shutil
import struct
from itertools import product

import decord
import pytest
from PIL import Image

from runtime.cli import UserError
from tiny_videos import (
    make_video,
    picture,
    save,
    write_equal_videos,
    write_images,
    write_mixed_videos,
    write_sound,
    write_ucf_list,
    write_video,
)
from video import index
from video.files import Video
from video.index import BadVideos, long_enough, scan_videos, split_videos


@pytest.fixture
def root(tmp_path):
    return write_equal_videos(tmp_path / "data")


@pytest.fixture
def no_video_may_be_opened(monkeypatch):
    """Called by a test when it comes to that."""
    return lambda: monkeypatch.setattr(decord, "VideoReader", lambda *args, **kwargs: pytest.fail("opened a video"))


# Scan.


def test_a_scan_finds_videos_classes_rates_and_frames(tmp_path):
    scan = scan_videos(write_mixed_videos(tmp_path))
    assert scan.classes == ["Jump", "Run"]
    assert [video.path for video in scan.videos] == ["Jump/d.mov", "Jump/e.avi", "Run/a.avi", "Run/b.mp4", "Run/c.mkv"]
    assert [video.num_frames for video in scan.videos] == [20, 20, 40, 60, 30]
    assert [video.fps for video in scan.videos] == pytest.approx([30000 / 1001, 25, 25, 25, 30])
    assert {(video.height, video.width) for video in scan.videos} == {(48, 64)}
    assert scan.videos[0].key == "Jump/d"
    assert scan.unreadable == []


def test_videos_or_images_directly_in_root_are_one_class(tmp_path):
    write_video(tmp_path / "a.avi")
    write_video(tmp_path / "b.avi")
    save(tmp_path / "c.png", picture())
    for images, keys in ((False, ["all/a", "all/b"]), (True, ["all/c"])):
        scan = scan_videos(tmp_path, images=images)
        assert scan.classes == ["all"] and [video.key for video in scan.videos] == keys


def test_a_file_that_cannot_be_opened_is_reported_and_left_out_and_a_pipe_does_not_block(root):
    (root / "A" / "text.avi").write_text("not a video")
    (root / "A" / "empty.mp4").write_bytes(b"")
    write_sound(root / "B" / "sound.mp4")
    os.mkfifo(root / "B" / "pipe.avi")
    scan = scan_videos(root)
    assert scan.unreadable == ["A/empty.mp4", "A/text.avi", "B/pipe.avi", "B/sound.mp4"]
    assert len(scan.videos) == 4


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile one.avi\n", "#EXTM3U\n#EXTINF:1,\none.avi\n", "RIFF"])
def test_a_playlist_or_a_stub_is_a_bad_video_whatever_its_suffix(root, text):
    (root / "A" / "list.mp4").write_text(text)
    assert scan_videos(root).unreadable == ["A/list.mp4"]


def test_a_video_whose_name_is_not_utf8_is_bad(root):
    name = os.fsdecode(b"A/\xff.avi")
    shutil.copyfile(root / "A/one.avi", root / name)
    scan = scan_videos(root)
    assert scan.unreadable == [name] and len(scan.videos) == 4
    assert scan_videos(root) == scan


def test_a_video_that_claims_more_frames_than_it_has_bytes_is_bad(root):
    path = root / "A" / "one.avi"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 2**32 - 1)  # decord would abort the process
    path.write_bytes(data)
    assert scan_videos(root).unreadable == ["A/one.avi"]


# Index.


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_a_file_that_the_index_knows_is_not_opened_again_and_the_data_are_left_as_they_are(
    root, runs, monkeypatch, no_video_may_be_opened
):
    before = sorted(root.rglob("*"))
    first = scan_videos(root, runs)
    (place,) = runs.iterdir()
    no_video_may_be_opened()
    assert scan_videos(root, runs) == first and first.is_saved
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    for name in (root.parent / "link", "data"):  # by any of its names
        assert scan_videos(name, runs).videos == first.videos
    assert list(runs.iterdir()) == [place] and sorted(root.rglob("*")) == before


def test_each_data_folder_has_its_own_index_in_a_folder_of_runs(root, runs, tmp_path):
    other = write_equal_videos(tmp_path / "other")
    (other / "A/one.avi").unlink()
    counts = [len(scan_videos(folder, runs).videos) for folder in (root, other, root, other)]
    assert counts == [4, 3, 4, 3] and len(list(runs.iterdir())) == 2


def test_only_new_and_changed_files_are_opened_and_missing_ones_dropped(root, runs, monkeypatch):
    scan_videos(root, runs)
    write_video(root / "A" / "one.avi", 30)
    write_video(root / "B" / "five.avi")
    (root / "A" / "two.avi").unlink()
    opened, really_open = [], decord.VideoReader
    spy = lambda path, **kwargs: opened.append(path) or really_open(path, **kwargs)  # noqa: E731
    monkeypatch.setattr(decord, "VideoReader", spy)
    scan = scan_videos(root, runs)
    assert opened == [str(root / "A" / "one.avi"), str(root / "B" / "five.avi")]
    frames = {video.key: video.num_frames for video in scan.videos}
    assert frames == {"A/one": 30, "B/five": 20, "B/four": 20, "B/three": 20}
    assert "two" not in index.index_place(root, runs).read_text()


@pytest.mark.parametrize("text", ["", '{"format": 1, "v', "[]", '{"format": 0}', '{"format": 2, "videos": [[1, {}]]}'])
def test_a_torn_or_foreign_index_is_rebuilt_and_reported(root, runs, capsys, text):
    scan, place = scan_videos(root, runs), index.index_place(root, runs)
    place.write_text(text)
    assert scan_videos(root, runs).videos == scan.videos
    assert "building it again" in capsys.readouterr().out
    json.loads(place.read_text())


@pytest.mark.parametrize("change", [{"class_name": "Z"}, {"num_frames": "9"}, {"path": "../A/one.avi"}, {"more": 1}])
def test_an_index_with_invalid_values_is_rebuilt(root, runs, change):
    expected, place = scan_videos(root, runs), index.index_place(root, runs)
    content = json.loads(place.read_text())
    content["videos"][0][1] |= change
    place.write_text(json.dumps(content))
    assert scan_videos(root, runs).videos == expected.videos


def test_the_first_run_writes_the_index_once_its_folder_is_there(root, tmp_path, no_video_may_be_opened):
    first = scan_videos(root, tmp_path / "new")
    assert not first.is_saved and not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    index.save_index(first, root, tmp_path / "new")
    no_video_may_be_opened()
    assert scan_videos(root, tmp_path / "new").videos == first.videos


def test_a_disk_that_refuses_the_index_is_a_line_and_has_no_partial_file(root, runs, monkeypatch, capsys):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(scan_videos(root, runs).videos) == 4
    assert list(runs.iterdir()) == []
    assert "No space left" in capsys.readouterr().out


# Splits.


def test_the_hash_split_stays_when_videos_are_added_or_converted(tmp_path):
    videos = [make_video(f"C{index % 7}/v{index}") for index in range(2000)]
    train, val = split_videos(tmp_path, videos, 0.05)
    order = {video: index for index, video in enumerate(videos)}
    assert sorted(train + val, key=order.get) == videos
    assert 70 <= len(val) <= 130
    _, fewer_val = split_videos(tmp_path, videos[:1000], 0.05)
    assert fewer_val == [video for video in val if order[video] < 1000]
    converted = [make_video(video.key, suffix=".mp4") for video in videos]
    assert [video.key for video in split_videos(tmp_path, converted, 0.05)[1]] == [video.key for video in val]


def test_at_least_one_video_trains_and_one_validates(tmp_path):
    for first, fraction in product(range(20), (0.0, 0.5, 1.0)):
        train, val = split_videos(tmp_path, [make_video(f"A/v{first}"), make_video(f"B/w{first}")], fraction)
        assert len(train) == len(val) == 1 and train != val


@pytest.mark.parametrize("place", ["data", "."])
def test_ucf_lists_beside_or_in_root_set_the_split(tmp_path, place):
    write_ucf_list(tmp_path / place, ["A/v_A_g08_c01", "B/v_B_g08_c01", "B/v_B_g09_c01"])
    videos = [make_video(key, suffix=".mp4") for key in ("A/v_A_g01_c01", "A/v_A_g08_c01", "B/v_B_g08_c01")]
    assert split_videos(tmp_path / "data", videos, 0.99) == (videos[1:], videos[:1])


def test_a_ucf_list_in_root_comes_before_the_one_beside_it_unless_it_names_none_of_the_videos(tmp_path):
    videos = [make_video(f"A/s{index}") for index in range(4)]
    for root, listed, train_key in (("own", "A/s0", "A/s0"), ("foreign", "B/s0", "A/s1")):
        write_ucf_list(tmp_path / root, ["A/s1"])
        write_ucf_list(tmp_path / root / "data", [listed])
        assert [video.key for video in split_videos(tmp_path / root / "data", videos, 0.2)[0]] == [train_key]


@pytest.mark.parametrize("listed", [["B/other"], [f"A/s{index}" for index in range(10)]])
def test_ucf_lists_that_name_none_or_all_of_the_videos_leave_the_split_to_the_hash(tmp_path, listed):
    videos = [make_video(f"A/s{index}") for index in range(10)]
    by_hash = split_videos(tmp_path / "data", videos, 0.2)
    write_ucf_list(tmp_path, listed)
    assert split_videos(tmp_path / "data", videos, 0.2) == by_hash


def test_a_list_may_name_videos_with_spaces_and_bytes_that_are_not_utf8(tmp_path):
    names = ["A b/c d", os.fsdecode(b"A b/\xff"), "A b/9"]
    lines = b"A b/c d.avi 1\r\n\n" + os.fsencode(names[1]) + b".avi 1\n/ 1\n.. 2\n"
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_bytes(lines)
    train, val = split_videos(tmp_path, [make_video(name) for name in names], 0.5)
    assert [video.key for video in train] == names[:2]
    assert [video.key for video in val] == names[2:]


def test_videos_that_are_too_short_are_counted_and_left_out():
    videos = [make_video("A/short", 7), make_video("A/fits", 8), make_video("A/long", 9)]
    assert long_enough(videos, 8) == (videos[1:], 1)


# Images.


def test_a_scan_of_images_opens_none_of_them_and_leaves_no_index(tmp_path, monkeypatch):
    image_root = write_images(tmp_path / "images")
    (image_root / "B" / "f.jpg").write_text("not an image, as only reading it shows")
    (image_root / "B" / "thumbnails.db").write_text("")
    write_video(image_root / "B" / "video.mp4")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened an image"))
    scan = scan_videos(image_root, tmp_path, images=True)
    assert [video.path for video in scan.videos] == ["A/a.jpg", "A/b.jpeg", "A/c.png", "B/d.webp", "B/e.PNG", "B/f.jpg"]
    assert scan.videos[0] == Video("A/a.jpg", "A", num_frames=1, fps=25.0, height=None, width=None)
    assert scan.classes == ["A", "B"] and scan.unreadable == [] and scan.is_saved
    index.save_index(scan, image_root, tmp_path)
    assert not list(tmp_path.rglob("*index*"))


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


# Bad videos.


def test_bad_videos_are_named_once_and_too_many_are_an_error_but_one_is_always_allowed():
    bad_videos = BadVideos(300, 0.01)
    assert bad_videos.add(["a", "b", "a"]) == ["a", "b"]
    assert bad_videos.add(["b", "c"]) == ["c"] and bad_videos.add([]) == [] and bad_videos.count == 3
    with pytest.raises(UserError, match="4 of 300 files are bad .newest: d.,"):
        bad_videos.add(["d"])
    bad_videos = BadVideos(2, 0.0)
    assert bad_videos.add(["a"]) == ["a"]
    with pytest.raises(UserError, match="--max-bad-fraction"):
        bad_videos.add(["b"])


# User errors.


def test_every_mistake_in_the_data_path_is_one_line_that_says_what_to_do(tmp_path):
    def message(path):
        with pytest.raises(UserError) as error:
            index.check_data_path(path)
        assert f"--data-path {path}" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    for name in ("file.avi", "empty/A/x.txt", "twins/A/x.avi", "twins/A/x.mp4", "mixed/A/x.avi", "mixed/y.avi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert "no such folder" in message(tmp_path / "missing")
    assert "wanted a folder" in message(tmp_path / "file.avi")
    assert "no video found" in message(tmp_path / "empty")
    assert "A/x.avi and A/x.mp4 differ only in their suffix" in message(tmp_path / "twins")
    assert "videos in class folders (A/x.avi) and beside them (y.avi)" in message(tmp_path / "mixed")


def test_the_checks_before_the_scan_open_no_file(root, no_video_may_be_opened):
    no_video_may_be_opened()
    index.check_data_path(root)


def test_videos_that_are_all_unreadable_too_short_or_too_few_are_an_error(tmp_path):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "x.avi").write_text("hello")
    with pytest.raises(UserError, match="none of its 1 videos can be opened"):
        scan_videos(tmp_path)
    with pytest.raises(UserError, match="--num-frames 16: the longest video .* has 8 frames"):
        long_enough([make_video("A/x", 8), make_video("A/y", 4)], 16)
    with pytest.raises(UserError, match="wanted at least 2"):
        split_videos(tmp_path, [make_video("A/x")], 0.05)

"""Frames of videos and images: exact, in order and upright, for every container and format."""

import struct
from dataclasses import replace

import av
import decord
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tiny_videos import decode, halves, picture, read_frame_indices, save, scribble, write_video
from video import files
from video.files import UnreadableError, probe, read_all_frames, read_frames, resize_and_crop
from video.index import scan_videos


def remux(source, target, change, **options):
    """Copy the packets of a video to another file, as change(packet) returns them."""
    with av.open(str(source)) as old, av.open(str(target), "w", **options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet = change(packet)
                packet.stream = stream
                new.mux(packet)


def written(path, *numbers, **options):
    """The only Video of a folder, written as `write_video` does."""
    write_video(path, *numbers, **options)
    (video,) = scan_videos(path.parent).videos
    return video


VARIABLE = [*range(0, 800, 40), *range(800, 800 + 25 * 70, 70)]  # ms
X265 = {
    "codec": "libx265",
    "x265-params": "log-level=none:keyint=10:min-keyint=5:bframes=3:open-gop=1",
}
LONG = {
    "plain.avi": {},
    "B-frames.mov": {"bf": "2"},
    "XviD.avi": {"tag": "XVID", "bf": "2"},
    "B-frames.mp4": {"codec": "libx264", "bf": "3"},
    "open GOP.mkv": {
        "codec": "libx264",
        "x264-params": "open-gop=1:bframes=8:b-pyramid=2:ref=8:scenecut=0",
    },
    "interlaced.mp4": {
        "codec": "libx264",
        "x264-params": "open-gop=1:bframes=3:interlaced=1:scenecut=0",
    },
    "HEVC.mp4": X265,
    "10 bits.mkv": X265 | {"pixel_format": "yuv420p10le"},
    "VP9.webm": {
        "codec": "libvpx-vp9",
        "cpu-used": "5",
        "auto-alt-ref": "1",
        "lag-in-frames": "16",
    },
    "odd.mkv": {"codec": "libvpx-vp9", "cpu-used": "8", "size": (65, 49)},
    "variable.mp4": {"codec": "libx264", "bf": "3", "times": VARIABLE},
    "variable.mkv": X265 | {"times": VARIABLE},
}


@pytest.mark.parametrize("name", LONG)
def test_a_clip_is_decoded_from_the_keyframe_before_it_to_the_same_bits(
    tmp_path, monkeypatch, name
):
    seen = []  # the frames that PyAV decodes
    decode_from = files.decode_from

    def recorded(*args):
        for frame in decode_from(*args):
            seen.append(frame)
            yield frame

    monkeypatch.setattr(files, "decode_from", recorded)
    video = written(tmp_path / name, 45, noise=200, **LONG[name])
    assert len(video.keyframes) >= 3
    assert video.num_frames == 45
    assert video.varies == ("variable" in name)
    plain = replace(video, keyframes=())
    expected = read_frames(tmp_path, plain, range(45))  # in order, with decord
    for numbers in ([0], [9, 10], [8, 19, 41], [44]):
        assert np.array_equal(read_frames(tmp_path, plain, numbers), expected[numbers])
        assert np.array_equal(read_frames(tmp_path, video, numbers), expected[numbers])
    if not video.varies:  # else decord gives the time stamps
        grays, _ = halves(expected[..., 0])
        assert (grays - 4 * torch.arange(45)).abs().max() < 4  # frame k is frame k
        monkeypatch.setattr(decord, "VideoReader", lambda *_, **__: pytest.fail("decord decodes"))
    keyframes = [number for number, _, _ in video.keyframes]
    for start in range(keyframes[1], 43):  # before, decord decodes
        seen.clear()
        numbers = [start, start + 2]
        assert np.array_equal(read_frames(tmp_path, video, numbers), expected[numbers])
        keyframe = max(number for number in keyframes if number <= start)
        assert 0 < len(seen) <= 3 + start - keyframe or video.varies


def test_all_frames_of_a_file_that_decord_refuses_are_decoded_with_pyav(tmp_path):
    closed = X265["x265-params"].replace("open-gop=1", "open-gop=0")
    options = X265 | {"x265-params": closed}
    video = written(tmp_path / "v.mp4", 45, noise=200, **options)
    expected, _ = decode(tmp_path / "v.mp4")
    assert np.array_equal(np.concatenate(list(read_all_frames(tmp_path, video))), expected)
    assert np.array_equal(read_frames(tmp_path, video, [3, 30]), expected[[3, 30]])


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damage_makes_only_the_clips_between_two_keyframes_unreadable(tmp_path, codec):
    options = (
        {"g": "8", "sc_threshold": "1000000000"}
        if codec == "mpeg4"
        else {"x264-params": "keyint=8:scenecut=0"}
    )
    video = written(tmp_path / "v.mp4", 30, codec=codec, noise=200, **options)
    assert [number for number, _, _ in video.keyframes] == [0, 8, 16, 24]
    expected = read_frames(tmp_path, video, range(30))
    scribble(tmp_path / "v.mp4")  # frame 10
    for numbers in ([0, 7], [16, 20], [25, 29]):
        assert np.array_equal(read_frames(tmp_path, video, numbers), expected[numbers])
    for numbers in ([10], [9, 12], [7, 16]):
        with pytest.raises(UnreadableError):
            read_frames(tmp_path, video, numbers)


def bytes_or_none(root, video, numbers):
    try:
        return read_frames(root, video, numbers).tobytes()
    except UnreadableError:
        return None


@pytest.mark.parametrize("params", ["keyint=10", "keyint=10:slices=4", "intra-refresh=1:keyint=20"])
def test_frames_after_a_keyframe_that_is_damaged_or_none_are_those_of_decord(tmp_path, params):
    options = {"codec": "libx264", "x264-params": f"{params}:bframes=0:scenecut=0"}
    video = written(tmp_path / "v.mp4", 45, noise=200, **options)
    if "refresh" not in params:
        scribble(tmp_path / "v.mp4", offset=1000)  # in the middle of frame 10, a keyframe
    for numbers in ([8, 9], [10, 11], [25, 28]):
        by_pyav = bytes_or_none(tmp_path, video, numbers)
        by_decord = bytes_or_none(tmp_path, replace(video, keyframes=()), numbers)
        assert by_pyav == by_decord or (numbers[0] == 25 and by_decord is None), numbers


def test_keyframes_are_not_used_where_their_frames_have_no_certain_number(tmp_path):
    write_video(tmp_path / "a.avi", 45, codec="libx264", bf="3")  # an AVI has no time stamps
    write_video(tmp_path / "plain.avi", 45)

    def doubled(packet):
        # XviD puts a B-frame into the packet of the frame before it
        two = av.Packet(2 * bytes(packet))
        two.dts = packet.dts
        two.pts = packet.pts
        two.is_keyframe = packet.is_keyframe
        return two

    remux(tmp_path / "plain.avi", tmp_path / "packed.avi", doubled)
    assert len(probe(tmp_path, "all", "plain.avi").keyframes) > 1
    assert probe(tmp_path, "all", "packed.avi").keyframes == ()
    video = probe(tmp_path, "all", "a.avi")
    assert video.keyframes == ()
    assert read_frame_indices(tmp_path, video, range(45)) == list(range(45))


def test_a_video_of_too_many_pixels_is_unreadable(tmp_path, monkeypatch):
    write_video(tmp_path / "a.avi", size=(16, 16))
    write_video(tmp_path / "b.avi", size=(64, 48))
    video = scan_videos(tmp_path).videos[1]
    monkeypatch.setattr(files, "MAX_PIXELS", 64 * 48 - 1)
    assert scan_videos(tmp_path).unreadable == ["b.avi"]
    with pytest.raises(UnreadableError, match="64 x 48 pixels"):
        read_frames(tmp_path, replace(video, keyframes=()), [0])


def test_a_video_that_lost_frames_is_unreadable_only_for_those(tmp_path):
    video = written(tmp_path / "v.avi", 30)
    write_video(tmp_path / "v.avi", 20)
    assert read_frame_indices(tmp_path, video, [15, 19]) == [15, 19]
    with pytest.raises(UnreadableError, match="ends too early"):
        read_frames(tmp_path, video, [15, 20])


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4"])
def test_frames_of_a_variable_rate_are_those_at_equal_distances_in_time(tmp_path, name):
    times = [*range(0, 400, 40), *range(400, 1200, 80)]
    video = written(tmp_path / name, codec="libx264", times=times)
    assert video.num_frames == 20
    assert video.fps == pytest.approx(19 / 1.12)
    distances = np.abs(np.subtract.outer(np.linspace(0, 1120, 20), times))
    expected = distances.argmin(axis=1)
    assert expected[:3].tolist() == [0, 1, 3]  # twice as fast at first
    assert len(set(expected)) < 20  # some twice at the end
    assert read_frame_indices(tmp_path, video, range(20)) == expected.tolist()
    assert read_frame_indices(tmp_path, video, [3, 17, 19]) == expected[[3, 17, 19]].tolist()
    chunks = np.concatenate(list(read_all_frames(tmp_path, video, 7)))
    assert np.array_equal(chunks, read_frames(tmp_path, video, range(20)))


def test_time_stamps_that_jitter_leave_every_frame_in_its_place(tmp_path):
    jitter = np.random.default_rng(0).integers(-8, 9, 60).tolist()
    times = [round(1000 * index / 29.97) + shift for index, shift in enumerate(jitter)]
    video = written(tmp_path / "v.mp4", 60, codec="libx264", times=times)
    assert read_frame_indices(tmp_path, video, range(60)) == list(range(60))


@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_frames_that_an_edit_list_removes_do_not_count(tmp_path, b_frames):
    def shifted(packet):
        packet.pts -= 5 * packet.duration
        packet.dts -= 5 * packet.duration
        return packet

    write_video(tmp_path / "whole.mp4", 30, codec="libx264", bf=b_frames)
    options = {"avoid_negative_ts": "disabled"}
    remux(tmp_path / "whole.mp4", tmp_path / "cut.mp4", shifted, options=options)
    video = probe(tmp_path, "all", "cut.mp4")
    assert video.num_frames == 25
    assert video.fps == 25
    assert read_frame_indices(tmp_path, video, range(25)) == list(range(5, 30))
    with pytest.raises(UnreadableError, match="duplicate"):  # not the last frame once more
        read_frames(tmp_path, video, [25])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_after_the_end_of_an_edit_list_do_not_count(tmp_path, codec):
    write_video(tmp_path / "v.mp4", 40, codec=codec)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    struct.pack_into(">I", data, data.index(b"elst") + 12, 800)  # ms, of 1600
    (tmp_path / "v.mp4").write_bytes(data)
    video = probe(tmp_path, "all", "v.mp4")
    assert (video.num_frames, video.fps) == (20, 25)
    assert video.keyframes
    assert read_frame_indices(tmp_path, video, range(20)) == list(range(20))
    assert read_frame_indices(tmp_path, video, [12, 19]) == [12, 19]


def test_a_video_is_read_upright_however_the_phone_was_held(tmp_path):
    one = 0x10000
    matrices = {  # clockwise
        90: (0, one, 0, -one, 0),
        180: (-one, 0, 0, 0, -one),
        270: (0, -one, 0, one, 0),
    }
    write_video(tmp_path / "0.mp4", codec="libx264")
    data = bytearray((tmp_path / "0.mp4").read_bytes())
    start = data.index(b"tkhd") + 44  # in the track's header
    for turn, matrix in matrices.items():
        struct.pack_into(">5i", data, start, *matrix)
        (tmp_path / f"{turn}.mp4").write_bytes(data)
    stored = read_frames(tmp_path, probe(tmp_path, "all", "0.mp4"), [0, 1])
    for turn in matrices:
        video = probe(tmp_path, "all", f"{turn}.mp4")
        assert video.keyframes  # PyAV and decord agree
        frames = read_frames(tmp_path, video, [0, 1])
        assert frames.shape[1:3] == (video.height, video.width)
        assert np.array_equal(frames, np.rot90(stored, -turn // 90, axes=(1, 2))), turn


@pytest.mark.parametrize("size", [(16, 16), (24, 30), (48, 64), (66, 50)])
def test_videos_of_any_width_are_not_changed(tmp_path, size):
    video = written(tmp_path / "v.avi", size=size)
    frames = read_frames(tmp_path, video, [3, 7])
    assert (video.width, video.height) == size
    expected, _ = decode(tmp_path / "v.avi")
    assert np.abs(frames.astype(int) - expected[[3, 7]]).max() <= 1


def test_resizing_is_antialiased_and_keeps_the_center():
    stripes = torch.zeros(1, 3, 72, 144, dtype=torch.uint8)
    stripes[..., 1::3] = 240  # a pixel wide: invisible at a third of the size
    clip = resize_and_crop(stripes, 24)
    assert clip.shape == (1, 3, 24, 24)
    assert (clip.float() - 80).abs().max() < 30
    columns = torch.arange(96, dtype=torch.uint8).expand(1, 3, 48, 96)
    assert torch.equal(resize_and_crop(columns, 48), columns[..., 24:72])
    assert torch.equal(resize_and_crop(columns.mT, 48), columns.mT[..., 24:72, :])
    assert resize_and_crop(columns, 64).shape == (1, 3, 64, 64)


# Images -------------------------------------------------------------------------------------------


def read_image(path):
    """uint8 (H, W, 3)"""
    (image,) = read_frames(path.parent, probe(path.parent, "all", path.name), [0])
    return image


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_image_is_read_upright(tmp_path, suffix):
    upright = picture()
    exif = Image.Exif()
    stored = {  # what a camera in this orientation stores
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif[ExifTags.Base.Orientation] = orientation
        save(tmp_path / f"image.{suffix}", np.ascontiguousarray(pixels), exif=exif, quality=95)
        image = read_image(tmp_path / f"image.{suffix}")
        assert np.abs(image.astype(int) - upright).mean() < 6


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    colors = picture()
    gray = picture()[..., 0]
    three = np.repeat(gray[..., None], 3, axis=2)
    sixteen_bits = gray.astype(np.uint16) * 256 + gray[::-1]  # the low bytes do not matter
    palette = Image.fromarray(gray // 64 * 64).quantize(4)
    kinds = {
        "gray": (gray, three),
        "gray16": (sixteen_bits, three),
        "bilevel": (gray > 100, np.where(three > 100, 255, 0)),
        "grayalpha": (np.dstack([gray, 255 - gray]), three),
        "rgba": (np.dstack([colors, gray]), colors),
        "palette": (palette, np.asarray(palette.convert("RGB"))),
    }
    for name, (stored, expected) in kinds.items():
        save(tmp_path / f"{name}.png", stored)
        image = read_image(tmp_path / f"{name}.png")
        assert image.dtype == np.uint8
        assert np.array_equal(image, expected), name
    assert Image.open(tmp_path / "gray16.png").mode == "I;16"
    save(tmp_path / "cmyk.jpg", Image.fromarray(colors).convert("CMYK"), quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - colors).mean() < 6


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "PNG")])
def test_an_animated_image_of_any_suffix_gives_its_first_frame(tmp_path, name, kind):
    others = [Image.fromarray(picture(seed=seed)) for seed in (1, 2)]
    options = {"save_all": True, "append_images": others, "lossless": True, "duration": 40}
    save(tmp_path / name, picture(), format=kind, **options)
    assert Image.open(tmp_path / name).n_frames == 3
    assert np.array_equal(read_image(tmp_path / name), picture())

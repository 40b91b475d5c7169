"""Videos, GIFs, sheets, grids and arrays hold every pixel where it belongs."""

import json

import av
import numpy as np
import pytest
from einops import rearrange
from PIL import Image, ImageSequence
from skimage import data

from tiny_videos import decode
from training import content
from video import writers
from video.drawing import GAP, add_notes, drawable, enlarge, evenly_spaced, text_line, tile
from video.samples import read_samples
from video.writers import (
    write_gif,
    write_lossless,
    write_mp4,
    write_samples,
    write_sheet,
    write_videos,
)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def levels(values, side=2):
    """Gray videos (N, T, side, side, 3) of these values (N, T)."""
    values = np.asarray(values, np.uint8)
    return np.broadcast_to(values[..., None, None, None], (*values.shape, side, side, 3))


def color_bars(frames=6, height=16, width=20):
    """A uint8 video (frames, height, width, 3) whose frames all differ: bars of 4 px that move by a
    pixel per frame.
    """
    colors = [[230, 30, 30], [30, 200, 60], [40, 60, 220], [240, 220, 40], [10, 10, 10]]
    places = np.arange(width) + np.arange(frames)[:, None]  # (frames, width)
    pixels = np.array(colors, np.uint8)[places // 4 % len(colors)]
    return np.repeat(pixels[:, None], height, axis=1)


def read_gif(path):
    """Frames (T, H, W, 3) and their delays in ms."""
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # forever
        frames = []
        delays = []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            delays.append(frame.info["duration"])
    return np.stack(frames), delays


def read_png(path):
    return np.asarray(Image.open(path))


def holds_note(picture, *notes):
    """Whether these notes, and nothing else, are below a picture."""
    line = text_line(f"Shows {', '.join(notes)}.")
    height, width, _ = line.shape
    bottom = picture[-height:]
    return np.array_equal(bottom[:, :width], line) and (bottom[:, width:] == 255).all()


def is_marked(picture):
    """Which pixels are the border of a marked frame."""
    return (picture == (255, 127, 14)).all(axis=-1)


def mean_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


# Videos and GIFs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, factor",
    [((33, 47), 4), ((127, 200), 2), ((128, 128), 1), ((129, 128), 2), ((1, 2), 128)],
)
def test_pixels_are_repeated_until_the_short_side_is_128_and_sides_even(size, factor):
    video = noise(2, *size)
    large = enlarge(video)
    assert np.array_equal(large, np.kron(video, np.ones((1, factor, factor, 1), np.uint8)))
    assert min(large.shape[1:3]) >= 128
    assert large.shape[1] % 2 == large.shape[2] % 2 == 0


@pytest.mark.parametrize(
    "height, width, fps",
    [(16, 20, 30000 / 1001), (131, 129, 12.5), (2, 3, 25 / 3)],
)
def test_a_video_of_any_size_and_rate_holds_every_frame_in_order(tmp_path, height, width, fps):
    video = color_bars(9, height, width)
    write_mp4(tmp_path / "v.mp4", video, fps)
    frames, rate = decode(tmp_path / "v.mp4")
    expected = enlarge(video)
    assert rate == pytest.approx(fps, rel=1e-6)
    assert frames.shape == expected.shape
    # of 255; neighbors in time differ by 33
    assert max(map(mean_difference, frames, expected)) < 5
    write_lossless(tmp_path / "v.mkv", iter(video), fps)
    frames, rate = decode(tmp_path / "v.mkv")
    assert np.array_equal(frames, video)
    assert rate == pytest.approx(fps, rel=0.01)  # Matroska counts whole ms


@pytest.mark.parametrize("fps", [12.5, 29.97, 100])
def test_a_gif_lasts_as_long_as_the_video_unless_browsers_slow_it_down(tmp_path, fps):
    video = color_bars(16)
    write_gif(tmp_path / "v.gif", video, fps)
    frames, delays = read_gif(tmp_path / "v.gif")
    assert np.array_equal(frames, enlarge(video))  # 5 colors fit the palette
    assert sum(delays) == pytest.approx(1000 * 16 / min(fps, 50), abs=5)
    assert max(delays) - min(delays) <= 10
    write_gif(tmp_path / "static.gif", levels([[77] * 10])[0], fps=25)
    frames, delays = read_gif(tmp_path / "static.gif")  # equal frames may be stored as one
    assert sum(delays) == 400
    assert (frames == 77).all()
    write_gif(tmp_path / "slow.gif", levels([[77] * 64])[0], fps=0.001)
    _, delays = read_gif(tmp_path / "slow.gif")
    assert 600_000 < sum(delays) <= 655_350  # the longest delay


def test_a_gif_is_exact_if_no_frame_has_more_than_256_colors(tmp_path):
    video = noise(6, 16, 16)  # about 1,500 in all
    numbers = np.arange(256).reshape(16, 16, 1)
    video[0] = 100 + numbers // [1, 16, 256] % 16  # hard to tell apart
    write_gif(tmp_path / "v.gif", video, fps=25)
    frames, _ = read_gif(tmp_path / "v.gif")
    assert np.array_equal(frames, enlarge(video))


def test_the_gif_of_a_real_video_is_close_and_does_not_flicker(tmp_path):
    # a view that moves over a cat and, after a cut, over a cup
    photos = [data.chelsea()] * 3 + [data.coffee()] * 3
    views = []
    for t, photo in enumerate(photos):
        top = 20 + 9 * t
        left = 90 + 7 * t
        views.append(photo[top : top + 128, left : left + 128])
    video = np.stack(views)
    write_gif(tmp_path / "v.gif", video, fps=25)
    frames, _ = read_gif(tmp_path / "v.gif")
    # gray levels; 256 colors in a regular grid: 7.5
    assert max(map(mean_difference, frames, video)) < 4

    still = np.broadcast_to(video[:1], video.shape).copy()
    still[:, 40:90, 40:90] = video[:, 40:90, 40:90]  # it moves there alone
    write_gif(tmp_path / "v.gif", still, fps=25)
    frames, _ = read_gif(tmp_path / "v.gif")
    changes = (frames[1:] != frames[:-1]).any(axis=(0, 3))
    assert changes[40:90, 40:90].mean() > 0.5
    changes[40:90, 40:90] = False
    assert not changes.any()


# Sheets and grids ---------------------------------------------------------------------------------


def test_a_sheet_has_a_row_per_video_a_column_per_frame_and_names(tmp_path):
    videos = np.stack([color_bars(4), color_bars(4)[::-1], color_bars(4)[:, ::-1]])
    write_sheet(tmp_path / "plain.png", videos)
    large = enlarge(videos)
    h, w = large.shape[2:4]
    expected = np.full((3 * h + 2 * GAP, 4 * w + 3 * GAP, 3), 255, np.uint8)
    for row, column in np.ndindex(3, 4):
        y = row * (h + GAP)
        x = column * (w + GAP)
        expected[y : y + h, x : x + w] = large[row, column]
    assert np.array_equal(read_png(tmp_path / "plain.png"), expected)

    names = ["Archery", "", "a name that\n is much longer"]
    write_sheet(tmp_path / "named.png", videos, names)
    named = read_png(tmp_path / "named.png")
    margin = named.shape[1] - expected.shape[1]
    assert np.array_equal(named[:, margin:], expected)
    ink = (named[:, :margin] < 128).any(axis=(1, 2))
    assert ink[:h].any() and ink[-h:].any()
    assert not ink[h:-h].any()  # the second row has no name

    write_sheet(tmp_path / "marked.png", videos, marked=[(1,), (), (0, 3)])
    marked = is_marked(read_png(tmp_path / "marked.png"))
    tops = marked[:: h + GAP, w // 2 :: w + GAP]  # above the middle of each cell
    assert np.argwhere(tops).tolist() == [[0, 1], [2, 0], [2, 3]]


def test_a_sheet_of_many_long_videos_shows_few_of_them_and_of_their_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MAX_ROWS", 4)
    monkeypatch.setattr(writers, "MAX_COLUMNS", 8)
    write_sheet(tmp_path / "sheet.png", levels(np.arange(5)[:, None] + np.arange(100)))
    sheet = read_png(tmp_path / "sheet.png")
    assert holds_note(sheet, "4 of 5 videos", "8 of 100 frames")
    cells = sheet[: 4 * (128 + GAP) : 128 + GAP, :: 128 + GAP, 0].astype(int)
    assert np.array_equal(cells[:, 0], np.arange(4))
    assert cells[0, -1] == 99
    assert set(np.diff(cells[0])) <= {14, 15}  # evenly


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (11, 2, 8), (70, 8, 8)])
def test_a_grid_has_rows_of_8_videos_and_at_most_64(tmp_path, count, rows, columns):
    videos = levels(np.arange(count)[:, None] + [0, 50, 100], side=16).copy()
    side = 128 + GAP
    videos[0] = noise(3, 16, 16)  # enlarged without smoothing
    grid = tile(videos, (8, 8), 128)
    expected = np.full((rows * columns, 3, side, side, 3), 255)
    shown = videos[: rows * columns]
    expected[: len(shown), :, :128, :128] = enlarge(shown)
    expected = rearrange(expected, "(r c) t h w d -> t (r h) (c w) d", r=rows)
    assert np.array_equal(grid, expected)
    # no names are shown
    write_sheet(tmp_path / "grid.png", videos[:, :1], names=["a name"] * count)
    picture = read_png(tmp_path / "grid.png")
    assert np.array_equal(picture[: rows * side, : columns * side], grid[0])
    if count > 64:
        assert holds_note(picture, "64 of 70 images")
    else:
        assert picture.shape == grid[0].shape


def test_names_with_accents_are_drawn_and_names_that_the_font_lacks_become_numbers(
    tmp_path, capsys
):
    drawable.cache_clear()
    videos = np.stack([color_bars(4)] * 3)
    names = ["Cañón Łódź", "乒乓球", "乒乓球"]
    write_sheet(tmp_path / "names.png", videos, names, labels=[0, 7, 7])
    (line,) = capsys.readouterr().out.splitlines()  # once
    assert line.endswith("lacks characters of 乒乓球: pictures say 'class 7' instead")
    write_sheet(tmp_path / "same.png", videos, ["Cañón Łódź", "class 7", "class 7"])
    assert np.array_equal(read_png(tmp_path / "names.png"), read_png(tmp_path / "same.png"))
    pictures = {text_line(name).tobytes() for name in ("ñ", "n", "\uffff")}
    assert len(pictures) == 3


# All files of samples -----------------------------------------------------------------------------


def in_windows(videos, ends, batches):
    """The parts of samples whose frames come up to one end after the other, for each batch of
    samples.
    """
    for indices in batches:
        for first, end in zip([0, *ends], ends, strict=False):
            yield indices, first, videos[indices.start : indices.stop, first:end]


def files_of(folder):
    """The content of all files; of mp4s the pixels, as x264 does not always write the same
    bytes.
    """
    files = content(folder)
    for name in files:
        if name.endswith("mp4"):
            frames, _ = decode(folder / name)
            files[name] = frames.tobytes()
    return files


@pytest.mark.parametrize("ends", [(1,), (6,), (2, 4, 6)])
def test_samples_in_parts_give_the_files_of_samples_at_once(tmp_path, monkeypatch, ends):
    monkeypatch.setattr(writers, "MAX_ROWS", 4)
    monkeypatch.setattr(writers, "GRID", (2, 3))
    monkeypatch.setattr(writers, "IMAGE_GRID", (2, 3))
    T = ends[-1]
    videos = np.stack([color_bars(15)[shift:][:T] for shift in range(9)])
    names = [f"class {label}" for label in range(9)]

    def write(folder, parts, **settings):
        write_samples(
            folder=folder,
            parts=parts,
            num_frames=T,
            labels=range(9),
            fps=25,
            names=names,
            marked=[(0,), *[()] * 8],
            **settings,
        )

    once = tmp_path / "once"
    write(once, [(range(9), 0, videos)])
    parts = in_windows(videos, ends, [range(3), range(3, 4), range(4, 9)])
    write(tmp_path / "new/parts", parts)
    assert files_of(once) == files_of(tmp_path / "new/parts")
    write_videos(tmp_path / "videos", videos, 25)
    assert files_of(tmp_path / "videos").items() < files_of(once).items()
    suffixes = ["mp4", "gif"] if T > 1 else ["png"]
    files = {f"{index:06d}.{suffix}" for index in range(9) for suffix in suffixes}
    files.add("samples.npz")
    previews = {"grid.gif", "sheet.png"} if T > 1 else {"grid.png"}
    assert content(once).keys() == files | previews
    if T == 1:
        assert np.array_equal(read_png(once / "000008.png"), videos[8, 0])
    write(tmp_path / "bare", [(range(9), 0, videos)], previews=False)
    assert content(tmp_path / "bare").keys() == {name for name in files if "gif" not in name}

    (once / "samples.json").write_text(json.dumps({"classes": names, "time_scale": 0.04}))
    _, clips, labels = read_samples("here", once)
    assert isinstance(clips, np.memmap)
    assert np.array_equal(clips, videos)
    assert labels.tolist() == list(range(9))


def test_the_first_mp4s_grow_with_each_part_and_can_be_shown_before_their_end(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(writers, "MOST_GROWING", 2)
    videos = np.stack([color_bars(60)[shift:][:50] for shift in range(3)])
    shown = []

    def parts():
        for numbers, first, frames in in_windows(videos, range(2, 51, 2), [range(3)]):
            if first >= 20:
                shown.append([])
                for path in sorted(tmp_path.glob("*.mp4")):
                    frames_so_far, _ = decode(path)
                    assert mean_difference(frames_so_far[-1], enlarge(videos)[0, 0]) > 0
                    shown[-1].append(len(frames_so_far))
            yield numbers, first, frames

    write_samples(tmp_path, parts(), 50, labels=range(3), fps=25)
    assert len(shown) == 15
    for number, counts in enumerate(shown):
        assert len(counts) == 2 and min(counts) >= 20 + 2 * number - 12
    lone = tmp_path / "lone.mp4"
    write_mp4(lone, videos[0], 25)
    with av.open(str(tmp_path / "000000.mp4")) as grown, av.open(str(lone)) as whole:
        assert grown.duration == whole.duration
        assert grown.streams.video[0].frames == 50  # is told by ordinary mp4s only


def test_a_long_video_has_all_frames_and_a_thinned_gif_of_the_same_length(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "GIF_FRAMES", 10)
    videos = color_bars(41)[None]
    write_samples(
        folder=tmp_path,
        parts=in_windows(videos, (16, 32, 41), [range(1)]),
        num_frames=41,
        labels=[0],
        fps=25,
        marked=[(0, 40)],
    )
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], videos)
    frames, _ = decode(tmp_path / "000000.mp4")
    assert len(frames) == 41
    thinned = videos[:, evenly_spaced(41, 10)]
    grid = add_notes(tile(thinned), ["10 of 41 frames"])
    for name, video in (("000000.gif", thinned[0]), ("grid.gif", grid)):
        frames, delays = read_gif(tmp_path / name)
        assert np.array_equal(frames, enlarge(video))
        assert sum(delays) == pytest.approx(41 * 40, abs=10)
    assert is_marked(read_png(tmp_path / "sheet.png"))[0, [-1, -100]].all()  # the last frame
    write_samples(
        folder=tmp_path / "once",
        parts=[(range(1), 0, videos[:, :12])],
        num_frames=12,
        labels=[0],
        fps=25,
    )
    frames, _ = read_gif(tmp_path / "once/000000.gif")
    assert len(frames) == 12  # all of those that came at once

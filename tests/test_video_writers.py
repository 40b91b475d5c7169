"""Videos, GIFs, sheets, grids and arrays hold every pixel where it belongs."""

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence
from skimage import data

from tiny_videos import decode
from training import content
from video import writers
from video.drawing import GAP, add_notes, drawable, enlarge, evenly_spaced, few, text_line, tile
from video.samples import read_samples
from video.writers import write_gif, write_lossless, write_mp4, write_samples, write_sheet


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def levels(values, side=2):
    """Gray videos (N, T, side, side, 3) of these values (N, T)."""
    return np.broadcast_to(
        np.asarray(values, np.uint8)[..., None, None, None], (*np.shape(values), side, side, 3)
    )


def color_bars(frames=6, height=16, width=20):
    """A uint8 video (frames, height, width, 3) whose frames all differ: bars of 4 px that move by a
    pixel per frame.
    """
    colors = np.array(
        [[230, 30, 30], [30, 200, 60], [40, 60, 220], [240, 220, 40], [10, 10, 10]], np.uint8
    )
    columns = (np.arange(width) + np.arange(frames)[:, None]) // 4 % len(colors)  # (frames, width)
    return np.repeat(colors[columns][:, None], height, axis=1)


def read_gif(path):
    """Frames (T, H, W, 3) and their delays in ms."""
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # forever
        shown = [
            (np.asarray(one.convert("RGB")), one.info["duration"])
            for one in ImageSequence.Iterator(image)
        ]
    return np.stack([frame for frame, _ in shown]), [delay for _, delay in shown]


def read_png(path):
    return np.asarray(Image.open(path))


def holds_note(picture, *notes):
    """Whether these notes, and nothing else, are below a picture."""
    line = text_line(f"Shows {', '.join(notes)}.")
    bottom = picture[-len(line) :]
    return (
        np.array_equal(bottom[:, : line.shape[1]], line)
        and (bottom[:, line.shape[1] :] == 255).all()
    )


def mean_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


# Videos and GIFs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "factor"),
    [((33, 47), 4), ((127, 200), 2), ((128, 128), 1), ((129, 128), 2), ((1, 2), 128)],
)
def test_pixels_are_repeated_until_the_short_side_is_128_and_sides_even(size, factor):
    video = noise(2, *size)
    large = enlarge(video)
    assert np.array_equal(large, np.kron(video, np.ones((1, factor, factor, 1), np.uint8)))
    assert min(large.shape[1:3]) >= 128
    assert large.shape[1] % 2 == large.shape[2] % 2 == 0


@pytest.mark.parametrize(
    ("height", "width", "fps"),
    [(16, 20, 30000 / 1001), (131, 129, 12.5), (2, 3, 25 / 3), (15, 21, 0.5), (16, 20, 60)],
)
def test_a_video_of_any_size_and_rate_holds_every_frame_in_order(tmp_path, height, width, fps):
    video = color_bars(9, height, width)
    write_mp4(tmp_path / "v.mp4", video, fps)
    frames, rate = decode(tmp_path / "v.mp4")
    assert rate == pytest.approx(fps, rel=1e-6)
    assert frames.shape == enlarge(video).shape
    assert (
        max(map(mean_difference, frames, enlarge(video))) < 5
    )  # of 255; neighbors in time differ by 33
    write_lossless(tmp_path / "v.mkv", iter(video), fps)
    frames, rate = decode(tmp_path / "v.mkv")
    assert np.array_equal(frames, video) and rate == pytest.approx(
        fps, rel=0.01
    )  # Matroska counts whole ms


@pytest.mark.parametrize("fps", [10, 12.5, 29.97, 50, 100])
def test_a_gif_lasts_as_long_as_the_video_unless_browsers_slow_it_down(tmp_path, fps):
    video = color_bars(16)
    write_gif(tmp_path / "v.gif", video, fps)
    frames, delays = read_gif(tmp_path / "v.gif")
    assert np.array_equal(frames, enlarge(video))  # 5 colors fit the palette
    assert sum(delays) == pytest.approx(1000 * 16 / min(fps, 50), abs=5)
    assert max(delays) - min(delays) <= 10
    write_gif(tmp_path / "static.gif", levels([[77] * 10])[0], fps=25)
    frames, delays = read_gif(tmp_path / "static.gif")  # equal frames may be stored as one
    assert sum(delays) == 400 and (frames == 77).all()


def test_a_gif_is_exact_if_no_frame_has_more_than_256_colors(tmp_path):
    video = noise(6, 16, 16)  # about 1,500 in all
    alike = (
        100 + np.arange(256) // np.array([[1], [16], [256]]) % 16
    )  # (3, 256), hard to tell apart
    video[0] = alike.T.reshape(16, 16, 3)
    write_gif(tmp_path / "v.gif", video, fps=25)
    assert np.array_equal(read_gif(tmp_path / "v.gif")[0], enlarge(video))


def test_the_gif_of_a_real_video_is_close_and_does_not_flicker(tmp_path):
    photos = [data.chelsea()] * 3 + [
        data.coffee()
    ] * 3  # a view that moves over a cat and, after a cut, over a cup
    video = np.stack(
        [photo[20 + 9 * t :, 90 + 7 * t :][:128, :128] for t, photo in enumerate(photos)]
    )
    write_gif(tmp_path / "v.gif", video, fps=25)
    errors = list(map(mean_difference, read_gif(tmp_path / "v.gif")[0], video))
    assert max(errors) < 4  # gray levels; 256 colors in a regular grid: 7.5

    still = np.broadcast_to(video[:1], video.shape).copy()
    still[:, 40:90, 40:90] = video[:, 40:90, 40:90]  # it moves there alone
    write_gif(tmp_path / "v.gif", still, fps=25)
    changes = (np.diff(read_gif(tmp_path / "v.gif")[0].astype(int), axis=0) != 0).any(axis=(0, 3))
    assert changes[40:90, 40:90].mean() > 0.5
    changes[40:90, 40:90] = False
    assert not changes.any()


# Sheets and grids ---------------------------------------------------------------------------------


def test_a_sheet_has_a_row_per_video_a_column_per_frame_and_names(tmp_path):
    videos = np.stack([color_bars(4), color_bars(4)[::-1], color_bars(4)[:, ::-1]])
    write_sheet(tmp_path / "plain.png", videos)
    h, w = enlarge(videos).shape[2:4]
    expected = np.full((3 * h + 2 * GAP, 4 * w + 3 * GAP, 3), 255, np.uint8)
    for row, column in np.ndindex(3, 4):
        y = row * (h + GAP)
        x = column * (w + GAP)
        expected[y : y + h, x : x + w] = enlarge(videos[row, column])
    assert np.array_equal(read_png(tmp_path / "plain.png"), expected)

    write_sheet(
        tmp_path / "named.png", videos, names=["Archery", "", "a name that\n is much longer"]
    )
    named = read_png(tmp_path / "named.png")
    margin = named.shape[1] - expected.shape[1]
    assert np.array_equal(named[:, margin:], expected)
    ink = [(named[row * (h + GAP) :][:h, :margin] < 128).any(axis=2) for row in range(3)]
    assert ink[0].any() and not ink[1].any()
    right_ends = [np.flatnonzero(ink[row].any(axis=0)).max() for row in (0, 2)]
    assert right_ends[0] < right_ends[1] < margin  # the longest name fits
    assert np.flatnonzero(ink[0].any(axis=1)).mean() == pytest.approx(h / 2, abs=4)

    write_sheet(tmp_path / "marked.png", videos, marked=[(1,), (), (0, 3)])
    marked = (read_png(tmp_path / "marked.png") == (255, 127, 14)).all(axis=-1)
    found = {
        (row, column)
        for row, column in np.ndindex(3, 4)
        if marked[row * (h + GAP), column * (w + GAP) + w // 2]
    }
    assert found == {(0, 1), (2, 0), (2, 3)}
    assert np.flatnonzero(marked[h // 2]).tolist() == [
        w + 1,
        w + 2,
        w + 3,
        2 * w,
        2 * w + 1,
        2 * w + 2,
    ]  # 3 px wide
    assert np.flatnonzero(marked[:h, w + w // 2]).tolist() == [
        0,
        1,
        h - 2,
        h - 1,
    ]  # also below, in the gap


def test_a_sheet_of_many_long_videos_shows_few_of_them_and_of_their_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MAX_ROWS", 4)
    monkeypatch.setattr(writers, "MAX_COLUMNS", 8)
    write_sheet(tmp_path / "sheet.png", levels(np.arange(5)[:, None] + np.arange(100)))
    sheet = read_png(tmp_path / "sheet.png")
    assert holds_note(sheet, "4 of 5 videos", "8 of 100 frames")
    cells = sheet[: 4 * (128 + GAP) : 128 + GAP, :: 128 + GAP, 0].astype(int)
    assert np.array_equal(cells[:, 0], np.arange(4))
    assert cells.shape == (4, 8) and cells[0, -1] == 99
    assert set(np.diff(cells[0])) <= {14, 15}  # evenly


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (8, 1, 8), (11, 2, 8), (70, 8, 8)]
)
def test_a_grid_has_rows_of_8_videos_and_at_most_64(tmp_path, count, rows, columns):
    videos = levels(np.arange(count)[:, None] + [0, 50, 100], side=16).copy()
    side = 128 + GAP
    videos[0] = noise(3, 16, 16)  # enlarged without smoothing
    grid = tile(videos, (8, 8), 128)
    assert grid.shape == (3, rows * side, columns * side, 3)
    cells = (
        grid.reshape(3, rows, side, columns, side, 3)
        .transpose(1, 3, 0, 2, 4, 5)
        .reshape(-1, 3, side, side, 3)
    )
    for index, cell in enumerate(cells):
        assert (cell[:, :128, :128] == (enlarge(videos[index]) if index < count else 255)).all()
        assert (cell[:, 128:] == 255).all() and (cell[:, :, 128:] == 255).all()
    write_sheet(
        tmp_path / "grid.png", videos[:, :1], names=["a name"] * count
    )  # which is not shown
    shown = read_png(tmp_path / "grid.png")
    assert np.array_equal(shown[: rows * side, : columns * side], grid[0])
    assert (
        holds_note(shown, *few(64, count, "images")) if count > 64 else shown.shape == grid[0].shape
    )


def test_names_with_accents_are_drawn_and_names_that_the_font_lacks_become_numbers(
    tmp_path, capsys
):
    drawable.cache_clear()
    videos = np.stack([color_bars(4)] * 3)
    names = ["Cañón Łódź", "乒乓球", "乒乓球"]
    write_sheet(tmp_path / "names.png", videos, names, labels=[0, 7, 7])
    (line,) = capsys.readouterr().out.splitlines()  # once
    assert (
        line
        == "note: the font of pictures lacks characters of 乒乓球: pictures say 'class 7' instead"
    )
    write_sheet(tmp_path / "same.png", videos, ["Cañón Łódź", "class 7", "class 7"])
    assert np.array_equal(read_png(tmp_path / "names.png"), read_png(tmp_path / "same.png"))
    assert drawable("Cañón", "class 7") == "Cañón"  # accents of their own
    pictures = [text_line(name) for name in ("ñ", "n", "\uffff")]
    assert len({picture.tobytes() for picture in pictures}) == 3


# All files of samples -----------------------------------------------------------------------------


def in_windows(videos, ends, batches):
    """The parts of samples whose frames come up to one end after the other, for each batch of
    samples.
    """
    for a, b in batches:
        for first, end in zip([0, *ends], ends, strict=False):
            yield range(a, b), first, videos[a:b, first:end]


def files_of(folder):
    """The content of all files; of mp4s the pixels, as x264 does not always write the same
    bytes.
    """
    videos = {
        name: decode(folder / name)[0].tobytes() for name in content(folder) if name.endswith("mp4")
    }
    return content(folder) | videos


@pytest.mark.parametrize("ends", [(1,), (6,), (2, 4, 6)])
def test_samples_in_parts_give_the_files_of_samples_at_once(tmp_path, monkeypatch, ends):
    for name, most in (("MAX_ROWS", 4), ("GRID", (2, 3)), ("IMAGE_GRID", (2, 3))):
        monkeypatch.setattr(writers, name, most)
    T = ends[-1]
    videos = np.stack([color_bars(15)[shift:][:T] for shift in range(9)])
    settings = T, range(9), 25, [f"class {label}" for label in range(9)], [(0,), *[()] * 8]
    once = tmp_path / "once"
    parts = tmp_path / "new/parts"
    bare = tmp_path / "bare"
    write_samples(once, [(range(9), 0, videos)], *settings)
    write_samples(parts, in_windows(videos, ends, ((0, 3), (3, 4), (4, 9))), *settings)
    assert files_of(once) == files_of(parts)
    suffixes = ("mp4", "gif") if T > 1 else ("png",)
    own = {f"{index:06d}.{suffix}" for index in range(9) for suffix in suffixes} | {"samples.npz"}
    assert {path.name for path in once.iterdir()} == own | (
        {"grid.gif", "sheet.png"} if T > 1 else {"grid.png"}
    )
    assert T > 1 or np.array_equal(read_png(once / "000008.png"), videos[8, 0])
    write_samples(bare, [(range(9), 0, videos)], *settings, previews=False)
    assert content(bare).keys() == {name for name in own if "gif" not in name}

    (once / "samples.json").write_text(json.dumps({"classes": settings[3], "time_scale": 0.04}))
    _, clips, labels = read_samples("here", once)
    assert isinstance(clips, np.memmap)
    assert np.array_equal(clips, videos) and labels.tolist() == list(range(9))


def test_a_long_video_has_all_frames_and_a_thinned_gif_of_the_same_length(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "GIF_FRAMES", 10)
    videos = color_bars(41)[None]
    write_samples(
        tmp_path, in_windows(videos, (16, 32, 41), [(0, 1)]), 41, [0], 25, ["a"], [(0, 40)]
    )
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], videos)
    assert len(decode(tmp_path / "000000.mp4")[0]) == 41
    noted = "grid.gif", lambda video: add_notes(tile(video[None]), ["10 of 41 frames"])
    for name, cell in (("000000.gif", np.asarray), noted):
        frames, delays = read_gif(tmp_path / name)
        assert np.array_equal(frames, enlarge(cell(videos[0][evenly_spaced(41, 10)])))
        assert sum(delays) == pytest.approx(41 * 40, abs=10)
    marked = (read_png(tmp_path / "sheet.png") == (255, 127, 14)).all(axis=-1)
    assert marked[0].reshape(-1)[[-1, -100]].all()  # the last frame
    write_samples(tmp_path / "once", [(range(1), 0, videos[:, :12])], 12, [0], 25)
    assert len(read_gif(tmp_path / "once/000000.gif")[0]) == 12  # all of those that came at once

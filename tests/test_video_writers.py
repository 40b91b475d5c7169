"""Videos, GIFs, sheets, grids and arrays hold every pixel where it belongs."""

import av
import numpy as np
import pytest
from PIL import Image
from skimage import data

from tiny_data import write_npz
from video import writers
from video.samples import read_samples
from video.writers import (
    GAP,
    enlarge,
    npz_writer,
    write_gif,
    write_mp4,
    write_samples,
    write_sheet,
    write_videos,
)


def color_bars(frames=6, height=16, width=20):
    """A uint8 video (frames, height, width, 3) whose frames all differ: bars of 4 px that move by a pixel per frame."""
    colors = np.array([[230, 30, 30], [30, 200, 60], [40, 60, 220], [240, 220, 40], [10, 10, 10]], np.uint8)
    columns = (np.arange(width) + np.arange(frames)[:, None]) // 4 % len(colors)  # (frames, width)
    return np.repeat(colors[columns][:, None], height, axis=1)


def read_mp4(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), rate


def read_gif(path):
    """Frames (T, H, W, 3) and their delays in ms."""
    frames, delays = [], []
    with Image.open(path) as image:
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            delays.append(image.info["duration"])
    return np.stack(frames), delays


def mean_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize(
    ("size", "factor"), [((33, 47), 4), ((127, 200), 2), ((128, 128), 1), ((129, 128), 2), ((1, 2), 128)]
)
def test_enlarging_repeats_pixels_by_an_integer_factor_until_the_short_side_is_128_and_sides_are_even(size, factor):
    video = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    large = enlarge(video)
    assert np.array_equal(large, np.kron(video, np.ones((1, factor, factor, 1), np.uint8)))
    assert min(large.shape[1:3]) >= 128
    assert large.shape[1] % 2 == large.shape[2] % 2 == 0


@pytest.mark.parametrize(
    ("height", "width", "fps"),
    [(16, 20, 29.97), (15, 21, 30000 / 1001), (131, 129, 12.5), (2, 3, 25 / 3), (16, 20, 0.5), (16, 20, 60)],
)
def test_an_mp4_of_any_size_and_rate_holds_every_frame_in_order_with_its_colors(tmp_path, height, width, fps):
    video = color_bars(frames=9, height=height, width=width)
    write_mp4(tmp_path / "v.mp4", video, fps)
    frames, rate = read_mp4(tmp_path / "v.mp4")
    assert float(rate) == pytest.approx(fps, rel=1e-6)
    assert frames.shape == enlarge(video).shape
    assert max(map(mean_difference, frames, enlarge(video))) < 5  # of 255; neighbors in time differ by 33


@pytest.mark.parametrize("fps", [10, 12.5, 29.97, 50])
def test_a_gif_loops_forever_and_lasts_as_long_as_the_video_to_5_ms(tmp_path, fps):
    video = color_bars(frames=16)
    write_gif(tmp_path / "v.gif", video, fps)
    frames, delays = read_gif(tmp_path / "v.gif")
    assert np.array_equal(frames, enlarge(video))  # 5 colors fit the palette
    assert sum(delays) == pytest.approx(1000 * 16 / fps, abs=5)
    assert max(delays) - min(delays) <= 10
    assert Image.open(tmp_path / "v.gif").info["loop"] == 0


def test_a_gif_never_has_delays_that_browsers_slow_down(tmp_path):
    write_gif(tmp_path / "v.gif", color_bars(), fps=100)
    assert read_gif(tmp_path / "v.gif")[1] == [20] * 6


def test_a_gif_of_a_still_video_lasts_as_long_as_the_video(tmp_path):
    write_gif(tmp_path / "v.gif", np.full((10, 8, 8, 3), 77, np.uint8), fps=25)
    frames, delays = read_gif(tmp_path / "v.gif")  # equal frames may be stored as one
    assert sum(delays) == 400
    assert (frames == 77).all()


def real_video(frames=6, side=128):
    """A view that moves over a photo of a cat and then, after a cut, over one of a cup (frames, side, side, 3)."""
    photos = [data.chelsea()] * (frames // 2) + [data.coffee()] * (frames - frames // 2)
    return np.stack([photo[20 + 9 * t :, 90 + 7 * t :][:side, :side] for t, photo in enumerate(photos)])


def test_a_gif_is_exact_if_no_frame_has_more_than_256_colors(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)  # about 1,500 in all
    alike = 100 + np.arange(256) // np.array([[1], [16], [256]]) % 16  # (3, 256), hard to tell apart
    video[0] = alike.T.reshape(16, 16, 3)
    write_gif(tmp_path / "v.gif", video, fps=25)
    assert np.array_equal(read_gif(tmp_path / "v.gif")[0], enlarge(video))


def error_of_a_regular_palette(video):
    """Mean error of 16 x 4 x 4 colors that divide the range of its colors along their principal axes."""
    pixels = video.reshape(-1, 3) - video.mean((0, 1, 2))
    axes = np.linalg.svd(pixels.T @ pixels)[0]
    places = pixels @ axes
    low, step = places.min(0), np.ptp(places, axis=0) / (16, 4, 4)
    centers = low + step * (np.floor((places - low) / step) + 0.5)
    return np.abs((centers - places) @ axes.T).mean()


def test_each_frame_of_the_gif_of_a_real_video_is_closer_to_it_than_256_regular_colors_are(tmp_path):
    video = real_video()
    write_gif(tmp_path / "v.gif", video, fps=25)
    errors = list(map(mean_difference, read_gif(tmp_path / "v.gif")[0], video))
    assert max(errors) < error_of_a_regular_palette(video)


def test_what_stands_still_in_a_real_video_does_not_flicker_in_its_gif(tmp_path):
    video = real_video()
    still = np.broadcast_to(video[:1], video.shape).copy()
    still[:, 40:90, 40:90] = video[:, 40:90, 40:90]  # it moves there alone
    write_gif(tmp_path / "v.gif", still, fps=25)
    changes = (np.diff(read_gif(tmp_path / "v.gif")[0].astype(int), axis=0) != 0).any(axis=(0, 3))
    assert changes[40:90, 40:90].mean() > 0.5
    changes[40:90, 40:90] = False
    assert not changes.any()


def test_a_sheet_has_a_row_per_video_and_a_column_per_frame(tmp_path):
    videos = np.stack([color_bars(frames=4), color_bars(frames=4)[::-1], color_bars(frames=4)[:, ::-1]])
    write_sheet(tmp_path / "sheet.png", videos)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    h, w = enlarge(videos).shape[2:4]
    assert sheet.shape == (3 * h + 2 * GAP, 4 * w + 3 * GAP, 3)
    expected = np.full_like(sheet, 255)
    for row in range(3):
        for column in range(4):
            y, x = row * (h + GAP), column * (w + GAP)
            expected[y : y + h, x : x + w] = enlarge(videos[row, column])
    assert np.array_equal(sheet, expected)


def test_a_sheet_of_many_long_videos_shows_the_first_16_and_32_frames_from_the_first_to_the_last(tmp_path):
    values = np.arange(17)[:, None] + np.arange(100)  # (N, T)
    videos = np.broadcast_to(values[:, :, None, None, None], (17, 100, 2, 2, 3)).astype(np.uint8)
    write_sheet(tmp_path / "sheet.png", videos)
    side = 128 + GAP
    cells = np.asarray(Image.open(tmp_path / "sheet.png"))[::side, ::side, 0].astype(int)
    assert cells.shape == (16, 32)
    assert np.array_equal(cells[:, 0], np.arange(16))
    assert cells[0, -1] == 99
    assert set(np.diff(cells[0])) <= {3, 4}  # evenly


def test_names_are_drawn_left_of_their_rows_and_do_not_change_the_frames(tmp_path):
    videos = np.stack([color_bars(frames=2)] * 3)
    write_sheet(tmp_path / "plain.png", videos)
    write_sheet(tmp_path / "named.png", videos, names=["Archery", "", "a name that is much longer"])
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    named = np.asarray(Image.open(tmp_path / "named.png"))
    margin = named.shape[1] - plain.shape[1]
    assert margin > 0
    assert np.array_equal(named[:, margin:], plain)
    h = enlarge(videos).shape[2]
    ink = [(named[row * (h + GAP) :][:h, :margin] < 128).any(axis=(0, 2)) for row in range(3)]
    assert ink[0].any() and not ink[1].any()
    assert margin > np.flatnonzero(ink[2]).max() > np.flatnonzero(ink[0]).max()  # the longest name fits


@pytest.mark.parametrize("shape", [(3, 4, 5, 6, 3), (3, 1, 5, 6, 3)])
def test_an_npz_holds_the_pixels_and_labels_bit_for_bit_and_images_have_no_time_axis(tmp_path, shape):
    videos = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_npz(tmp_path / "samples.npz", videos, [2, 0, 1])
    with np.load(tmp_path / "samples.npz") as stored:
        expected = videos if shape[1] > 1 else videos[:, 0]
        assert stored["arr_0"].dtype == np.uint8 and np.array_equal(stored["arr_0"], expected)
        assert stored["labels"].dtype == np.int64 and stored["labels"].tolist() == [2, 0, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize("shape", [(5, 4, 5, 6, 3), (5, 1, 5, 6, 3)])
def test_an_npz_that_is_written_in_parts_has_the_bytes_of_numpys_and_is_mapped_into_memory(tmp_path, shape):
    videos, labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.array([2, 0, 1, 1, 0])
    with npz_writer(tmp_path / "samples.npz", labels.tolist(), shape[1]) as append:
        for part in (videos[:2], videos[2:4].transpose(0, 1, 3, 2, 4).copy().transpose(0, 1, 3, 2, 4), videos[4:]):
            append(part)
    pixels = videos if shape[1] > 1 else videos[:, 0]
    np.savez(tmp_path / "numpy.npz", arr_0=pixels, labels=labels)
    assert (tmp_path / "samples.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()
    (tmp_path / "samples.json").write_text('{"classes": ["a", "b", "c"], "time_scale": 0.04}')
    _, clips, found = read_samples("here", tmp_path)
    assert isinstance(clips, np.memmap)
    assert np.array_equal(clips, videos) and np.array_equal(found, labels)


def test_an_npz_that_fails_half_way_leaves_the_old_one_intact(tmp_path):
    videos = np.zeros((1, 2, 4, 4, 3), np.uint8)
    write_npz(tmp_path / "samples.npz", videos, [5])
    with pytest.raises(OSError, match="No space"), npz_writer(tmp_path / "samples.npz", [6, 7], 2) as append:
        append(videos)
        raise OSError("No space left on device")
    assert np.load(tmp_path / "samples.npz")["labels"].tolist() == [5]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_an_npz_has_as_many_videos_as_labels(tmp_path):
    with pytest.raises(AssertionError, match="2 frames, 2 labels"):
        write_npz(tmp_path / "samples.npz", np.zeros((1, 2, 4, 4, 3), np.uint8), [5, 6])
    assert not (tmp_path / "samples.npz").exists()


def whole(videos):
    """All samples as one part."""
    return [(range(len(videos)), 0, videos)]


@pytest.mark.parametrize("frames", [3, 1])
def test_samples_in_batches_give_the_files_of_samples_at_once(tmp_path, frames):
    videos = np.random.default_rng(0).integers(0, 256, (70, frames, 4, 4, 3), dtype=np.uint8)
    names = [f"class {index}" for index in range(70)]
    write_samples(tmp_path / "once", whole(videos), frames, range(70), 25, names)
    parts = [(range(a, b), 0, videos[a:b]) for a, b in ((0, 9), (9, 10), (10, 40), (40, 70))]
    write_samples(tmp_path / "parts", iter(parts), frames, range(70), 25, names)
    once, parts = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in sorted(tmp_path.iterdir()))
    assert once == parts
    assert len(once) == (70 * 2 + 3 if frames > 1 else 70 + 2)


def test_samples_are_an_mp4_and_a_gif_per_video_a_grid_a_sheet_and_an_npz(tmp_path):
    videos = np.stack([color_bars()] * 2)
    write_samples(tmp_path / "new" / "folder", whole(videos), 6, [0, 1], fps=25, names=["a", "b"])
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "000000.gif", "000000.mp4", "000001.gif", "000001.mp4", "grid.gif", "samples.npz", "sheet.png",
    ]  # fmt: skip


def test_samples_of_images_are_a_png_per_image_pixel_by_pixel_a_grid_and_an_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 20, 3), dtype=np.uint8)
    write_samples(tmp_path, whole(images), 1, [3, 1], fps=25, names=["a", "b"])
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["000000.png", "000001.png", "grid.png", "samples.npz"]
    for index in range(2):
        assert np.array_equal(np.asarray(Image.open(tmp_path / names[index])), images[index, 0])
    with np.load(tmp_path / "samples.npz") as stored:
        assert np.array_equal(stored["arr_0"], images[:, 0])
        assert stored["labels"].tolist() == [3, 1]


def in_windows(videos, ends, batches=((0, 2), (2, 3))):
    """The parts of samples whose frames come up to one end after the other, for each batch of samples."""
    for a, b in batches:
        for first, end in zip([0, *ends], ends, strict=False):
            yield range(a, b), first, videos[a:b, first:end]


def test_videos_that_come_in_windows_have_the_files_of_whole_ones(tmp_path):
    videos = np.stack([color_bars(frames=30)[shift:] [:20] for shift in range(3)])
    names, marked = ["a", "b", "c"], [(0, 1), (), (19,)]
    write_samples(tmp_path / "windows", in_windows(videos, (8, 14, 20)), 20, [0, 1, 2], 25, names, marked)
    write_samples(tmp_path / "once", whole(videos), 20, [0, 1, 2], 25, names, marked)
    once, parts = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in sorted(tmp_path.iterdir()))
    assert once == parts


def test_a_long_video_has_all_frames_and_a_thinned_gif_of_the_same_length(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "GIF_FRAMES", 10)
    videos = color_bars(frames=41)[None]
    write_samples(tmp_path, in_windows(videos, (16, 32, 41), [(0, 1)]), 41, [0], 25, ["a"], [(0, 40)])
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], videos)
    assert len(read_mp4(tmp_path / "000000.mp4")[0]) == 41
    frames, delays = read_gif(tmp_path / "000000.gif")
    assert np.array_equal(frames, enlarge(videos[0][writers.thinned(41)]))
    assert sum(delays) == pytest.approx(41 * 40, abs=10)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet == (255, 127, 14)).all(axis=-1).any()


def test_a_long_video_that_is_not_finished_has_temporary_names_only(tmp_path):
    videos = np.stack([color_bars(frames=20)] * 3)
    parts = in_windows(videos, (8, 14, 20))
    with pytest.raises(OSError, match="killed"):
        write_samples(tmp_path, (part if part[1] < 14 else fail() for part in parts), 20, [0, 1, 2], 25)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tmp"}


def fail():
    raise OSError("killed")


def test_videos_are_numbered_from_first(tmp_path):
    write_videos(tmp_path, np.stack([color_bars()] * 2), fps=25, first=7)
    assert sorted(file.stem for file in tmp_path.glob("*.mp4")) == ["000007", "000008"]


def test_the_grid_shows_all_videos_row_by_row():
    videos = np.stack([np.full((3, 16, 16, 3), 10 * index, np.uint8) for index in range(11)])
    videos[:, 1] += 1  # the second frame differs
    grid = writers.tile(videos)
    side = 64 + GAP
    assert grid.shape == (3, 2 * side, 8 * side, 3)
    for index in range(11):
        row, column = divmod(index, 8)
        cell = grid[:, row * side : row * side + 64, column * side : column * side + 64]
        assert (cell[0] == 10 * index).all()
        assert (cell[1] == 10 * index + 1).all()
    assert (grid[:, side:, 3 * side :] == 255).all()  # cells without a video


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (8, 1, 8), (11, 2, 8), (70, 8, 8)])
def test_a_sheet_of_images_is_a_grid_of_8_in_a_row_and_64_at_most_no_larger_than_necessary(
    tmp_path, count, rows, columns
):
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None, None], (count, 1, 16, 16, 3))
    write_sheet(tmp_path / "grid.png", images, names=["a name"] * count)  # which is not shown
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    side = 128 + GAP
    assert grid.shape == (rows * side, columns * side, 3)
    cells = grid.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    for index, cell in enumerate(cells):
        assert (cell[:128, :128] == (index if index < count else 255)).all()
        assert (cell[128:] == 255).all() and (cell[:, 128:] == 255).all()


def test_images_in_a_grid_are_enlarged_without_smoothing(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 48, 3), dtype=np.uint8)
    write_sheet(tmp_path / "grid.png", image)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(grid[:-GAP, :-GAP], np.kron(image[0, 0], np.ones((4, 4, 1), np.uint8)))

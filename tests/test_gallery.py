"""The page of a sample folder, as a file and in a browser, and the picture of several folders."""

import base64
import html
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image, ImageColor

import gallery
from browser import press
from tiny_data import make_images
from tiny_videos import decode
from training import run_main
from video.drawing import MARGIN, MARK, text_line
from video.index import scan_videos, split_videos
from video.writers import write_mp4, write_samples

FRAMES, SIZE, FPS = 8, 16, 8
CLASSES = [
    "CircleDown",
    "CircleLeft",
    'a "quoted" class',
    "<img src=x onerror=alert(1)>\n& ünï→{{cards}}'</script>",
]
LABELS = 0, 1, 2, 3, 0, 1
TITLES = ["generated", "real"]


def make_samples(
    folder, labels=LABELS, classes=CLASSES, num_frames=FRAMES, size=SIZE, fps=FPS, given=None
):
    """A folder as sample_gd.py writes it; frame f of sample n has the gray level 20 f + 10 n.
    Returns the folder.
    """
    levels = 20 * np.arange(num_frames) + 10 * np.arange(len(labels))[:, None]  # (N, T)
    videos = np.empty((*levels.shape, size, size, 3), np.uint8)
    videos[:] = levels[..., None, None, None]
    parts = [(range(len(labels)), 0, videos)]
    write_samples(folder, parts, num_frames, labels, fps, previews=False)
    flags = {
        "ckpt": "results/<E>/best.pt",
        "video": num_frames > 1,
        "num_frames": num_frames,
        "seed": 3,
        "sampler": "ngd",
        "num_sampling_steps": 40,
        "cfg_scale": 1.5,
        "stop_below": None,
    }
    about = {
        "classes": list(classes),
        "time_scale": 1 / fps,
        "mean_evaluations": 39.0,
        "flags": flags,
    }
    if given:
        source = {"source": "clips/5.mp4", "frames": given, "class": "A"}
        about["given"] = [source] * len(labels)
    (folder / "samples.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Videos of 30 frames at 25 fps, 6 per class; frame f of video v has the color (4 f, 40 v, 100
    left, 200 right).
    """
    root = tmp_path_factory.mktemp("real")
    frames = np.full((30, 32, 40, 3), 100, np.uint8)
    frames[..., 0] = 4 * np.arange(30)[:, None, None]
    frames[..., 20:, 2] = 200
    for name in CLASSES[:2]:
        (root / name).mkdir()
        for index in range(6):
            frames[..., 1] = 40 * index
            write_mp4(root / name / f"{index}.mp4", frames, 25)
    return root


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A sample folder with its page."""
    folder = make_samples(tmp_path_factory.mktemp("samples") / "my & samples", given="0-2,7")
    run_main(gallery, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A sample folder of images. Its page shows a real image beside each sample."""
    root = tmp_path_factory.mktemp("images")
    folder = make_samples(root / "samples", [0, 1, 0], ["A", "B"], num_frames=1)
    run_main(gallery, folder, "--data-path", make_images(root / "data", 8), "--val-fraction", 0.5)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, real):
    """The path of a page with 6 samples, each with a real clip beside it."""
    root = tmp_path_factory.mktemp("page")
    folder = make_samples(root / "samples", [0, 1, 0, 1, 0, 1])
    out = root / "new/page.html"
    run_main(gallery, folder, "--data-path", real, "--val-fraction", 0.5, "--out", out)
    return out


class Page:
    """The content of a page: its source, and all text outside of tags, script and style."""

    def __init__(self, path):
        self.source = path.read_text(encoding="utf-8")
        tags = r"<(script|style)>.*?</\1>|<[a-z/!][^>]*>"  # no attribute holds a >
        texts = re.sub(tags, "\0", self.source, flags=re.DOTALL).split("\0")
        self.texts = list(map(html.unescape, texts))

    def values(self, tag, attribute):
        """The values of an attribute of all tags of this name."""
        values = re.findall(rf'<{tag} [^>]*?\b{attribute}="([^"]*)"', self.source)
        return list(map(html.unescape, values))

    def videos(self):
        """The mp4 files in the page, as bytes."""
        return self.files("video", "data-src", "video/mp4")

    def files(self, tag, attribute, kind):
        """The files in the page, as bytes."""
        prefix = f"data:{kind};base64,"
        values = [value.removeprefix(prefix) for value in self.values(tag, attribute)]
        return [base64.b64decode(value, validate=True) for value in values]


# The page as a file -------------------------------------------------------------------------------


def test_a_page_embeds_the_sample_videos_and_settings_and_loads_no_other_file(samples):
    page = Page(samples / "gallery.html")
    assert page.videos() == [path.read_bytes() for path in sorted(samples.glob("*.mp4"))]
    assert page.values("figure", "data-label") == [str(label) for label in LABELS]
    assert page.values("figure", "data-given") == ["0 1 2 7"] * len(LABELS)
    text = "|".join(page.texts)
    for words in (
        "my & samples",
        "6 videos of 8 frames, 16 x 16 px, 8 frames per second; ngd, 39 evaluations, guidance 1.5",
        "results/<E>/best.pt",
        "--num-sampling-steps|40",
        "--stop-below|none",
        "--video|on",
        "CircleLeft (2)",
        "sample 5, seed 3; frames 0-2,7 given: 5.mp4",
    ):
        assert words in text, words
    assert "real" not in page.texts
    assert "default-src 'none'" in page.source  # the browser then refuses to load another file
    assert "://" not in page.source


def test_class_names_are_shown_as_text_whatever_they_contain(samples, tmp_path):
    page = Page(samples / "gallery.html")
    for name in CLASSES:
        assert page.texts.count(name) == LABELS.count(CLASSES.index(name))  # captions
        assert any(text.startswith(f"{name} (") for text in page.texts)  # the filter
        assert f"generated, {name}" in page.values("video", "aria-label")
    assert page.source.count("<script>") == page.source.count("</script>") == 1
    folder = make_samples(tmp_path / "samples", [0], [os.fsdecode(b"caf\xe9")])
    run_main(gallery, folder)
    assert "caf?" in Page(folder / "gallery.html").texts


def test_each_sample_has_a_real_clip_of_its_class_beside_it(page, real):
    page = Page(page)
    assert [text for text in page.texts if text in ("generated", "real")] == TITLES * 6
    keys = []
    for index, data in enumerate(page.videos()[1::2]):
        frames, rate = decode(io.BytesIO(data))
        assert (len(frames), rate) == (FRAMES, FPS)
        red, green, _ = frames.reshape(FRAMES, -1, 3).mean(axis=1).T
        assert frames[..., -1, 2].mean() > frames[..., 0, 2].mean() + 80  # not mirrored
        assert np.allclose(np.diff(red), 12, atol=4)  # every third of 25 frames per second
        keys.append(f"{CLASSES[index % 2]}/{round(green.mean() / 40)}")
    _, val = split_videos(real, scan_videos(real).videos, 0.5)
    assert set(keys) <= {video.key for video in val}
    assert len(set(keys)) == len(keys)  # each in turn


def test_titles_of_real_clips_name_their_split_and_a_different_frame_rate(tmp_path, real):
    folder = make_samples(tmp_path / "samples", [0, 1, -1], CLASSES[:2], fps=60)
    run_main(gallery, folder, "--data-path", real, "--val-fraction", 0)  # one video validates
    page = Page(folder / "gallery.html")
    titles = [text for text in page.texts if text[:4] in ("gene", "real")]
    assert titles[::2] == ["generated"] * 3  # without a label there is no real clip
    assert {*titles[1::2]} == {"real, 25 fps", "real, from training, 25 fps"}
    frames, _ = decode(io.BytesIO(page.videos()[1]))
    red = frames[..., 0].mean(axis=(1, 2))
    assert np.allclose(np.diff(red), 4, atol=3)  # every frame
    assert "none (1)" in page.texts


def test_a_page_of_images_holds_png_files(images):
    page = Page(images / "gallery.html")
    files = page.files("img", "src", "image/png")
    assert files[::2] == [path.read_bytes() for path in sorted(images.glob("0*.png"))]
    assert {Image.open(io.BytesIO(data)).size for data in files} == {(SIZE, SIZE)}
    assert not page.values("video", "data-src")
    assert "3 images, 16 x 16 px; ngd" in page.source


def test_a_page_of_many_samples_shows_the_first_and_says_so(samples, tmp_path, real, capsys):
    out = tmp_path / "page.html"
    # real has no other class
    run_main(gallery, samples, "--num-samples", 2, "--data-path", real, "--out", out)
    page = Page(out)
    assert len(page.videos()) == 4
    assert "The first 2 of 6 videos" in page.source
    assert f"{out}: 2 samples (4 more: --num-samples 6)" in capsys.readouterr().out


# The picture --------------------------------------------------------------------------------------


def test_a_picture_has_a_row_per_sample_and_a_border_around_given_frames(tmp_path):
    short = make_samples(tmp_path / "short")
    long = make_samples(tmp_path / "long", LABELS[:2], num_frames=23, size=128, given="0-3")
    run_main(gallery, short, long, "--rows", 2, "--png", tmp_path / "new/picture.png")
    pixels = np.array(Image.open(tmp_path / "new/picture.png")).astype(int)
    step = gallery.SIDE + gallery.GAP
    title = len(text_line("title"))
    half = len(pixels) // 2
    assert pixels.shape == (2 * (title + 2 * step - gallery.GAP), gallery.LEFT + 12 * step - 4, 3)
    for top, words, frames in (
        (0, "short, 2 of 6 samples, 8 frames", range(8)),
        (half, "long, 12 of 23 frames", range(0, 23, 2)),
    ):
        line = text_line(words)[:, : -2 * MARGIN]  # how the title begins
        assert np.array_equal(pixels[top : top + title, : line.shape[1]], line)
        for row in range(2):
            first = top + title + row * step
            assert (pixels[first : first + step - 4, : gallery.LEFT] < 128).any()  # the name
            columns = pixels[:, gallery.LEFT + gallery.SIDE // 2 :: step]
            levels = [(20 * frame + 10 * row) % 256 for frame in frames]
            levels += [255] * (12 - len(levels))
            assert (columns[first + gallery.SIDE // 2] == np.array(levels)[:, None]).all()
            marked = (columns[first] == ImageColor.getrgb(MARK)).all(axis=-1)
            assert marked.nonzero()[0].tolist() == ([0, 1] if top else [])  # frames 0 and 2


# The page in a browser ----------------------------------------------------------------------------

READY = "videos.every(video => video.ready && !video.seeking)"
PLAYING = "videos.filter(video => video.ready).every(video => !video.paused)"
TIMES = "videos.map(video => video.currentTime)"
CHOOSE = "filter.value = '%s'; filter.dispatchEvent(new Event('change'))"  # "" = all
SHOWN = (
    "cards.filter(card => card.offsetParent).map(card => "
    "card.querySelector('figcaption').firstChild.data)"
)


def test_videos_play_in_step_also_after_one_falls_behind_and_no_request_leaves_the_page(
    browser, page
):
    browser.open(page, READY)
    assert browser.ask(f"videos.every(video => Math.abs(video.duration - {FRAMES / FPS}) < 0.01)")
    browser.ask(f"videos[3].currentTime = (now + 0.5) % {FRAMES / FPS}; videos[4].pause()")
    spread = f"Math.max(...{TIMES}) - Math.min(...{TIMES})"
    browser.wait(f"videos.every(video => !video.paused) && {spread} < {0.5 / FPS}")
    times = browser.ask(
        f"""new Promise(done => {{
          const rows = [];
          let rounds = 0;
          (function check() {{
            rows.push({TIMES});
            if (rows.length > 1 && rows.at(-1)[0] < rows.at(-2)[0]) rounds += 1;
            rounds < 2 ? requestAnimationFrame(check) : done(rows);
          }})();
        }})"""
    )
    times = np.array(times)  # (moments, videos), over a whole round
    assert (times.max(axis=0) > (FRAMES - 1) / FPS).all()  # each reaches its last frame
    assert np.median(np.ptp(times, axis=1)) < 1 / FPS  # a busy machine may stall now and then
    for event in browser.seen("Network.requestWillBeSent"):
        assert event["request"]["url"].startswith(("file:", "data:", "blob:"))


def test_pausing_stops_all_videos_on_one_frame_and_slider_and_keys_move_it(browser, page):
    browser.open(page, READY + " && playing && now > 0")
    press(browser, " ")
    browser.wait(f"!playing && videos.every(video => video.paused) && {READY}")
    before = browser.ask(TIMES)
    assert len(set(before)) == 1
    browser.ask("new Promise(done => setTimeout(done, 300))")
    assert browser.ask(TIMES) == before
    assert browser.ask("play.textContent") == "Play"

    pixels = """videos.map(video => {
      const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
      context.drawImage(video, 0, 0, 8, 8);
      return [...context.getImageData(4, 4, 1, 1).data].slice(0, 3);
    })"""
    reds = {}
    for frame in (0, 7, 6):
        if frame == 6:
            press(browser, "ArrowLeft")
        else:
            browser.ask(f"slider.value = {frame}; slider.dispatchEvent(new Event('input'))")
        browser.wait(f"{READY} && +slider.value === {frame}")
        seen = np.array(browser.ask(pixels))
        assert np.abs(seen[::2] - (20 * frame + 10 * np.arange(6))[:, None]).max() <= 6  # generated
        reds[frame] = seen[1::2, 0]
        assert np.abs(reds[frame] - reds[0] - 12 * frame).max() <= 6  # of the real ones
    assert browser.ask("count.textContent") == "frame 7 of 8"
    browser.ask("play.click()")
    browser.wait("playing && videos.every(video => !video.paused)")


def test_the_filter_shows_one_class_and_hidden_videos_are_not_loaded(browser, samples):
    browser.open(samples / "gallery.html", READY)
    assert browser.ask(SHOWN) == [CLASSES[label] for label in LABELS]
    for label, name in enumerate(CLASSES):
        browser.ask(CHOOSE % label)
        assert browser.ask(SHOWN) == [name] * LABELS.count(label)
        browser.wait(
            f"videos.filter(video => video.ready).length === {LABELS.count(label)} && {PLAYING}"
        )
    browser.ask(CHOOSE % "")
    browser.wait(f"{READY} && {PLAYING}")
    # around samples while a given frame is shown
    for frame, border in {1: "solid", 3: "none", 7: "solid"}.items():
        browser.ask(f"setPlaying(false); show({frame})")
        browser.wait(f"getComputedStyle(videos[0]).outlineStyle === '{border}'")


def test_on_a_phone_the_page_fits_and_plays_only_visible_videos(browser, page):
    browser.open(page, "videos.some(video => video.ready)", width=360, height=500)
    assert browser.ask("document.documentElement.scrollWidth") <= 360
    assert not browser.ask("videos.at(-1).ready")
    browser.ask("scrollTo(0, document.body.scrollHeight)")
    browser.wait("videos.at(-1).ready && !videos.at(-1).paused && !videos[0].ready")
    browser.open(page, READY, **{"prefers-reduced-motion": "reduce"})
    assert browser.ask("!playing && videos.every(video => video.paused)")


def test_a_page_of_images_has_nothing_to_play(browser, images):
    browser.open(images / "gallery.html")
    assert browser.ask(f"[...document.images].every(image => image.naturalWidth === {SIZE})")
    assert browser.ask("[play, slider].every(part => !part.offsetParent)")
    browser.ask(CHOOSE % 0)
    assert len(browser.ask(SHOWN)) == 2

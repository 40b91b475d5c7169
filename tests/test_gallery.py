"""The page of a sample folder, as a file and in a browser, and the picture of several."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image, ImageColor

import gallery
import picture
from tiny_data import make_images, make_latents
from training import run_main
from video.index import scan_videos, split_videos
from video.writers import MARK, write_mp4, write_samples

FRAMES, SIZE, FPS = 8, 16, 8
CLASSES = ["CircleDown", "CircleLeft", 'a "quoted" class', "<img src=x onerror=alert(1)>\n& ünï→{{cards}}'</script>"]
LABELS = 0, 1, 2, 3, 0, 1


def make_samples(folder, labels=LABELS, classes=CLASSES, num_frames=FRAMES, size=SIZE):
    """A folder as sample_gd.py writes it; frame f of sample n has the grey level 20 f + 10 n. Returns the folder."""
    levels = 20 * np.arange(num_frames) + 10 * np.arange(len(labels))[:, None]  # (N, T)
    videos = np.broadcast_to(levels[..., None, None, None], (*levels.shape, size, size, 3)).astype(np.uint8)
    names = [classes[max(label, 0)] for label in labels]
    write_samples(folder, [(range(len(labels)), 0, videos)], num_frames, labels, FPS, names)
    flags = {
        "ckpt": "results/<E>/best.pt", "video": num_frames > 1, "num_frames": num_frames, "seed": 3, "sampler": "ngd",
        "num_sampling_steps": 40, "cfg_scale": 1.5, "stop_below": None,
    }  # fmt: skip
    about = {"classes": list(classes), "time_scale": 1 / FPS, "mean_evaluations": 39.0, "flags": flags}
    (folder / "samples.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Videos of 30 frames at 25 fps, 6 per class; frame f of video v has the color (4 f, 40 v, 100 left, 200 right)."""
    root = tmp_path_factory.mktemp("real")
    for name in CLASSES[:2]:
        (root / name).mkdir()
        for index in range(6):
            frames = np.full((30, 32, 40, 3), 100, np.uint8)
            frames[..., 0] = 4 * np.arange(30)[:, None, None]
            frames[..., 1] = 40 * index
            frames[..., 20:, 2] = 200
            write_mp4(root / name / f"{index}.mp4", frames, 25)
    return root


def failure(capsys, *flags, status=2):
    """The one line of an error."""
    with pytest.raises(SystemExit) as ended:
        run_main(gallery, *flags)
    assert ended.value.code == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "opening videos" not in line]
    assert line.startswith("gallery.py: error: ")
    return line


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A sample folder with its page."""
    folder = make_samples(tmp_path_factory.mktemp("samples") / "my & samples")
    run_main(gallery, folder)
    return folder


class Page(HTMLParser):
    """The content of a page: tags as (name, attributes), and all text outside of script and style."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.within = [], [], None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.within = tag

    def handle_data(self, text):
        if self.within not in ("script", "style"):
            self.texts.append(text)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def files(self, tag, attribute, kind):
        """The files embedded in the page, as bytes."""
        sources = [attributes[attribute] for attributes in self.named(tag)]
        assert all(source.startswith(f"data:{kind};base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


def decode(data):
    """(frames uint8 (T, H, W, 3), frames per second) of an mp4."""
    with av.open(io.BytesIO(data)) as file:
        rate = float(file.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]), rate


# ----------------------------------------------------------------------------------------------------------------------
# The page as a file


def test_the_page_holds_the_folders_own_videos_and_names_class_sample_seed_checkpoint_and_flags(samples):
    page = Page(samples / "gallery.html")
    assert page.files("video", "data-src", "video/mp4") == [path.read_bytes() for path in sorted(samples.glob("*.mp4"))]
    assert [attributes["data-label"] for attributes in page.named("figure")] == [str(label) for label in LABELS]
    text = "|".join(page.texts)
    for words in (
        "my & samples", "6 videos of 8 frames, 16 x 16 px, 8 frames per second; ngd, 40 points, guidance 1.5",
        "results/<E>/best.pt", "--num-sampling-steps|40", "--stop-below|none", "--video|on", "sample 5, seed 3",
        "CircleLeft (2)",
    ):  # fmt: skip
        assert words in text, words
    assert "real" not in page.texts
    assert list(samples.parent.iterdir()) == [samples]


def test_names_are_shown_as_text_whatever_they_contain(samples):
    page = Page(samples / "gallery.html")
    for name in CLASSES:
        assert page.texts.count(name) == LABELS.count(CLASSES.index(name))  # captions
        assert any(text.startswith(f"{name} (") for text in page.texts)  # the filter
        assert any(attributes["aria-label"] == f"generated, {name}" for attributes in page.named("video"))
    assert not page.named("img")
    assert len(page.named("script")) == page.source.count("</script>") == 1


def test_the_page_loads_no_other_file(samples):
    page = Page(samples / "gallery.html")
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith("data:") for link in links)
    assert "://" not in page.source
    (policy,) = [attributes["content"] for attributes in page.named("meta") if "http-equiv" in attributes]
    assert "default-src 'none'" in policy


def test_bytes_of_a_class_name_that_are_not_utf_8_become_question_marks(tmp_path):
    folder = make_samples(tmp_path / "samples", [0], [os.fsdecode(b"caf\xe9")])
    run_main(gallery, folder)
    assert "caf?" in Page(folder / "gallery.html").texts


def test_beside_each_sample_is_a_validation_clip_of_its_class_with_the_same_rate_size_and_length(tmp_path, real):
    labels = 0, 1, 0, 1, 1
    run_main(
        gallery, make_samples(tmp_path / "samples", labels),
        "--data-path",
        real,
        "--val-fraction",
        0.5,
        "--out",
        tmp_path / "new/page.html",
    )
    page = Page(tmp_path / "new/page.html")
    assert [text for text in page.texts if text in ("generated", "real")] == ["generated", "real"] * 5
    _, val = split_videos(real, scan_videos(real).videos, 0.5)
    for label, data in zip(labels, page.files("video", "data-src", "video/mp4")[1::2], strict=True):
        frames, rate = decode(data)
        assert (len(frames), rate) == (FRAMES, FPS)
        red, green, _ = frames.reshape(FRAMES, -1, 3).mean(axis=1).T
        left, right = (half[..., 2].mean() for half in np.array_split(frames, 2, axis=2))
        assert right > left + 80  # not mirrored
        assert np.allclose(np.diff(red), 12, atol=4)  # every third of 25 frames per second
        assert f"{CLASSES[label]}/{round(green.mean() / 40)}" in {video.key for video in val}


def test_real_clips_of_a_class_come_in_turn_and_the_title_says_if_they_are_from_training_or_at_another_rate(
    samples, real
):
    samples = gallery.load_samples(samples)
    _, val = split_videos(real, scan_videos(real).videos, 0.5)
    expected = {int(video.key[-1]) for video in val if video.class_name == CLASSES[0]}
    assert len(expected) > 1
    clips = gallery.RealClips(real, samples, 0.5)
    seen = [clips.next(CLASSES[0]) for _ in expected]
    assert {round(clip[..., 1].mean() / 40) for clip, _ in seen} == expected
    assert {title for _, title in seen} == {"real"}
    clips = gallery.RealClips(real, samples, 0)  # one video validates
    assert {clips.next(name)[1] for name in CLASSES[:2]} == {"real", "real, from training"}
    samples.about["time_scale"] = 1 / 60
    clip, title = gallery.RealClips(real, samples, 0.5).next(CLASSES[0])
    assert title == "real, 25 fps"
    assert np.allclose(np.diff(clip[..., 0].mean(axis=(1, 2))), 4, atol=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A sample folder of images, with its page, which has a real image beside each."""
    root = tmp_path_factory.mktemp("images")
    folder = make_samples(root / "samples", [0, 1, 0], ["A", "B"], num_frames=1)
    run_main(gallery, folder, "--data-path", make_images(root / "data", 8), "--val-fraction", 0.5)
    return folder


def test_a_page_of_images_holds_png_files(images):
    page = Page(images / "gallery.html")
    files = page.files("img", "src", "image/png")
    assert files[::2] == [path.read_bytes() for path in sorted(images.glob("0*.png"))]
    assert {Image.open(io.BytesIO(data)).size for data in files} == {(SIZE, SIZE)}
    assert not page.named("video")


def test_a_large_folder_shows_its_first_samples_and_says_so(samples, tmp_path, capsys):
    out = tmp_path / "page.html"
    run_main(gallery, samples, "--num-samples", 4, "--out", out)
    assert len(Page(out).named("figure")) == 4
    assert "The first 4 of 6 videos" in out.read_text(encoding="utf-8")
    assert f"{out}: 4 samples (2 more: --num-samples 6)" in capsys.readouterr().out


def test_given_frames_are_marked_and_their_source_is_named(samples, real, tmp_path, capsys):
    folder = shutil.copytree(samples, tmp_path / "samples")
    about = json.loads((folder / "samples.json").read_text())
    about["given"] = [{"source": f"clips/{n}.mp4", "frames": "0-2,7", "class": "A"} for n in range(len(LABELS))]
    (folder / "samples.json").write_text(json.dumps(about))
    run_main(gallery, folder)
    page = Page(folder / "gallery.html")
    assert [attributes["data-given"] for attributes in page.named("figure")] == ["0 1 2 7"] * len(LABELS)
    assert "sample 4, seed 3; frames 0-2,7 given: 4.mp4" in page.texts
    bad = [about["given"][:2], 7, ["a"] * 6, [{"frames": "x", "source": "y"}] * 6, [{"frames": 7, "source": "y"}] * 6]
    for given in bad:
        (folder / "samples.json").write_text(json.dumps(about | {"given": given}))
        assert "samples.json is damaged (given: " in failure(capsys, folder)


def test_samples_without_a_label_are_shown_without_a_real_clip(tmp_path, real):
    folder = make_samples(tmp_path / "samples", [0, -1], CLASSES[:2])
    run_main(gallery, folder, "--data-path", real)
    texts = Page(folder / "gallery.html").texts
    assert [text for text in texts if text[:4] in ("gene", "real")] == ["generated", "real, from training", "generated"]
    assert "none" in texts and "none (1)" in texts


DAMAGED = "samples.npz or samples.json of sample_gd.py is missing or damaged ("
DAMAGES = {  # file, what happens to it, words of the error
    "no json": ("samples.json", os.remove, "no samples.json"),
    "no npz": ("samples.npz", os.remove, "no samples.npz"),
    "no video": ("000001.mp4", os.remove, "no 000001.mp4"),
    "cut npz": ("samples.npz", lambda path: path.write_bytes(path.read_bytes()[:-200]), DAMAGED),
    "other json": ("samples.json", lambda path: path.write_text("[1, 2]"), DAMAGED),
    "no labels": ("samples.npz", lambda path: np.savez(path, arr_0=np.zeros((6, 8, 16, 16, 3), np.uint8)), DAMAGED),
}  # what else may be wrong: test_evaluate.py


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(samples, tmp_path, capsys, damage):
    name, apply, words = DAMAGES[damage]
    folder, out = shutil.copytree(samples, tmp_path / "samples"), tmp_path / "new.html"
    apply(folder / name)
    line = failure(capsys, folder, "--out", out)
    assert f"FOLDER {folder}: " in line
    assert words in line
    assert not out.exists()


def test_bad_input_is_one_line_and_status_2(samples, tmp_path, real, capsys):
    other = make_samples(tmp_path / "other", [0, 1], ["CircleDown", 'Cirque\ndu "soleil"'])
    long = make_samples(tmp_path / "long", [0, 1], num_frames=31)
    make_latents(tmp_path / "cache")
    out = tmp_path / "page.html"
    for words, *flags in (
        ("no such folder", tmp_path / "nowhere"),
        ("not a folder", samples / "samples.json"),
        ("--out", samples, "--out", tmp_path),
        ("--out", samples, "--out", samples / "samples.json/page.html"),
        ("no such folder", samples, "--data-path", tmp_path / "nowhere", "--out", out),
        ("no class 'Cirque\\ndu \"soleil\"'", other, "--data-path", real),
        ("no video of class 'CircleDown' has 31 frames", long, "--data-path", real),
        ("a latent cache", samples, "--data-path", tmp_path / "cache", "--out", out),
        ("--num-samples", samples, "--num-samples", 0, "--out", out),
    ):
        line = failure(capsys, *flags)
        assert words in line, line
    assert not list(tmp_path.rglob("*.html*"))


def test_a_full_disk_leaves_no_partial_page(samples, tmp_path, monkeypatch, capsys):
    def fail(descriptor):  # called before the temporary file replaces the page
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert "No space left on device" in failure(capsys, samples, "--out", tmp_path / "page.html", status=1)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def test_a_picture_has_a_row_per_sample_and_a_border_around_given_frames(tmp_path):
    short, long = make_samples(tmp_path / "short"), make_samples(tmp_path / "long", num_frames=23, size=128)
    about = json.loads((long / "samples.json").read_text())
    about["given"] = [{"source": "clip.mp4", "frames": "0-3", "class": "A"}] * len(LABELS)
    (long / "samples.json").write_text(json.dumps(about))
    run_main(picture, short, long, "--rows", 2, "--out", tmp_path / "picture.png")

    pixels = np.array(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
    step, half = picture.SIDE + picture.GAP, picture.SIDE // 2
    tops = [picture.TITLE, picture.TITLE + step, 2 * (picture.TITLE + step), 2 * (picture.TITLE + step) + step]
    assert pixels.shape == (tops[-1] + step, picture.LEFT + 12 * step, 3)
    for row, top in enumerate(tops):
        line = pixels[top + half, picture.LEFT + half :: step]  # the middle of each frame
        shown = range(8) if row < 2 else range(0, 23, 2)  # 12 of the 23 frames
        assert line[: len(shown)].tolist() == [[(20 * frame + 10 * (row % 2)) % 256] * 3 for frame in shown]
        assert (line[len(shown) :] == 255).all()
        marked = (pixels[top - 1, picture.LEFT + half :: step] == ImageColor.getrgb(MARK)).all(axis=-1)
        assert marked.tolist() == [row >= 2 and frame in (0, 2) for frame in [*shown, *[-1] * (12 - len(shown))]]


def test_a_folder_that_holds_no_samples_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run_main(picture, tmp_path / "empty", "--out", tmp_path / "picture.png", status=2)
    assert "no samples.json in it" in capsys.readouterr().err
    (tmp_path / "empty/samples.unfinished").touch()
    run_main(picture, tmp_path / "empty", "--out", tmp_path / "picture.png", status=2)
    assert "its samples are not finished: run sample_gd.py again" in capsys.readouterr().err
    run_main(picture, tmp_path / "nowhere", "--out", tmp_path / "picture.png", status=2)
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The page in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60  # seconds to wait before a test fails


class Browser:
    """A page in a headless Chromium, controlled by its DevTools protocol over a pipe: JSON that ends with a 0 byte."""

    def __init__(self, profile):
        commands, self.write = os.pipe()
        self.read, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
        command = [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", *command],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self.rest, self.message_id, self.session, self.events = b"", 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command; events that arrive before it are kept."""
        self.message_id += 1
        message = {"id": self.message_id, "method": method, "params": params} | self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.message_id:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], PATIENCE)
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, "the browser has ended or does not answer"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, ready="true", width=1000, height=800, **media):
        """Show a file and wait until it is ready; media: features such as prefers_color_scheme="dark"."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait(f"document.readyState === 'complete' && location.protocol === 'file:' && {ready}")

    def ask(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not self.ask(condition):
            assert time.monotonic() < deadline, f"{condition} is still not true: {self.errors()}"
            time.sleep(0.02)

    def choose(self, label):
        """Set the filter of classes; "" = all."""
        self.ask(f"filter.value = '{label}'; filter.dispatchEvent(new Event('change'))")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def seen(self, *methods):
        """The parameters of the events of these kinds since the page was opened."""
        self.ask("0")  # receives pending events
        return [event["params"] for event in self.events if event["method"] in methods]

    def errors(self):
        """In the console, of scripts and of the security policy."""
        return self.seen("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")

    def close(self):
        self.call("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.write)
        os.close(self.read)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        assert os.environ.get("CI") != "true", "no Chromium found: install the package chromium"
        pytest.skip("no Chromium found: install the package chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    yield chromium
    assert not chromium.errors()


@pytest.fixture(scope="module")
def page(tmp_path_factory, real):
    """The path of a page with 6 samples, each with a real clip beside it."""
    folder = make_samples(tmp_path_factory.mktemp("page") / "samples", [0, 1, 0, 1, 0, 1])
    run_main(gallery, folder, "--data-path", real, "--val-fraction", 0.5)
    return folder / "gallery.html"


READY = "videos.every(video => video.ready && !video.seeking)"
TIMES = "videos.map(video => video.currentTime)"


def test_all_videos_play_in_step_and_restart_together_and_no_request_leaves_the_page(browser, page):
    browser.open(page, READY)
    assert browser.ask("videos.length") == 12
    assert browser.ask(f"videos.every(video => Math.abs(video.duration - {FRAMES / FPS}) < 0.01)")
    times = browser.ask(
        f"""new Promise(done => {{
          const rows = [];
          let rounds = 0;
          (function check() {{
            rows.push({TIMES});
            if (rows.length > 1 && rows.at(-1)[0] < rows.at(-2)[0]) rounds += 1;
            rounds < 3 ? requestAnimationFrame(check) : done(rows);
          }})();
        }})"""
    )
    times = np.array(times)  # (moments, videos), over two whole rounds
    assert (times.max(axis=0) > (FRAMES - 1) / FPS).all()  # each reaches its last frame
    assert np.median(np.ptp(times, axis=1)) < 1 / FPS  # a busy machine may stall now and then
    requests = [params["request"]["url"].partition(":")[0] for params in browser.seen("Network.requestWillBeSent")]
    assert "file" in requests
    assert set(requests) <= {"file", "data", "blob"}


def test_a_video_that_falls_behind_or_stops_gets_back_into_step(browser, page):
    browser.open(page, READY)
    browser.ask(f"videos[3].currentTime = (now + 0.5) % {FRAMES / FPS}")
    browser.ask("videos[4].pause()")
    in_step = f"videos.every(video => !video.paused) && Math.max(...{TIMES}) - Math.min(...{TIMES}) < {0.5 / FPS}"
    browser.wait(in_step)
    browser.ask("setPlaying(false); show(1); speed.value = 0.25; setPlaying(true)")  # a round takes 4 s
    browser.wait(f"now > {2 / FPS} && now < {4 / FPS}")
    browser.ask("videos[4].pause()")
    same_round = f"""new Promise(done => {{
      const before = now;
      (function check() {{ {in_step} || now < before ? done(now >= before) : requestAnimationFrame(check); }})();
    }})"""
    assert browser.ask(same_round)  # without waiting for the next round


def test_a_pause_stops_all_on_one_frame_and_slider_and_keys_show_the_right_frames(browser, page):
    browser.open(page, READY + " && playing && now > 0")
    browser.press(" ")
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
    index, reds = np.arange(6), {}
    for frame in (0, 5, 7, 6):
        if frame == 6:
            browser.press("ArrowLeft")
        else:
            browser.ask(f"slider.value = {frame}; slider.dispatchEvent(new Event('input'))")
        browser.wait(f"{READY} && +slider.value === {frame}")
        seen = np.array(browser.ask(pixels))
        assert np.abs(seen[::2] - (20 * frame + 10 * index)[:, None]).max() <= 6  # generated
        reds[frame] = seen[1::2, 0]
    for frame, red in reds.items():
        assert np.abs(red - reds[0] - 12 * frame).max() <= 6  # of the real ones
    assert browser.ask("count.textContent") == "frame 7 of 8"
    browser.ask("play.click()")
    browser.wait("playing && videos.every(video => !video.paused)")


def test_the_filter_shows_the_samples_of_a_class_only_and_hidden_videos_are_not_loaded(browser, samples):
    browser.open(samples / "gallery.html", READY)
    names = "cards.filter(card => card.offsetParent).map(card => card.querySelector('figcaption').firstChild.data)"
    assert browser.ask(names) == [CLASSES[label] for label in LABELS]
    for label, name in enumerate(CLASSES):
        browser.choose(label)
        assert browser.ask(names) == [name] * LABELS.count(label)
        browser.wait(f"videos.filter(video => video.ready).length === {LABELS.count(label)}")
        browser.wait("videos.filter(video => video.ready).every(video => !video.paused)")
    browser.choose("")
    browser.wait(READY + " && videos.every(video => !video.paused)")


def test_on_a_phone_the_page_fits_the_width_and_videos_scrolled_into_view_play(browser, page):
    browser.open(page, "videos.some(video => video.ready)", width=360, height=500)
    assert browser.ask("document.documentElement.scrollWidth") <= 360
    assert not browser.ask("videos.at(-1).ready")
    browser.ask("scrollTo(0, document.body.scrollHeight)")
    browser.wait("videos.at(-1).ready && !videos.at(-1).paused && videos.at(-1).currentTime > 0")
    browser.wait("!videos[0].ready")


def test_colors_follow_the_dark_mode_of_the_system_and_reduced_motion_starts_paused(browser, page):
    lightness = "getComputedStyle(document.body)[%r].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3"
    for scheme, dark in (("light", False), ("dark", True)):
        browser.open(page, prefers_color_scheme=scheme)
        ground, text = (browser.ask(lightness % name) for name in ("backgroundColor", "color"))
        assert (ground < text) == dark
        assert abs(ground - text) > 150
    browser.open(page, READY, prefers_reduced_motion="reduce")
    assert not browser.ask("playing")
    assert browser.ask("videos.every(video => video.paused)")


def test_a_page_of_images_has_nothing_to_play(browser, images):
    browser.open(images / "gallery.html")
    assert browser.ask(f"[...document.images].every(image => image.naturalWidth === {SIZE})")
    assert browser.ask("[play, slider, speed].every(part => !part.offsetParent)")
    browser.choose(0)
    assert browser.ask("cards.filter(card => card.offsetParent).length") == 2

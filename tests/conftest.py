"""Shared by all tests: one thread each, the usual signals, data sets and checkpoints."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; other tests use the other cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # scripts/gpu_check.sh checks a GPU
os.environ.pop("EQM_ADVICE", None)  # of the shell script that runs the tests

import signal

import pytest

# Tests run as in a terminal, also under nohup or in the background: ignored signals would be
# ignored by children.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def usual_signals():
    """A training run in this process installs handlers; this restores the ones before it."""
    from runtime.signals import STOP_SIGNALS

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def same_numbers():
    """Tests that draw numbers without a generator of their own get the same ones each time."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Moving Shapes, 12 classes of 2 small videos."""
    from training import make_data

    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """The folder of a small VAE."""
    from tiny_data import make_vae

    return make_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="session")
def latents(shapes, tiny_vae, tmp_path_factory):
    """A cache of the latents of `shapes`, mirrored ones included."""
    import cache_latents
    from training import run_main

    out = tmp_path_factory.mktemp("cache") / "latents"
    flags = ["--data-path", shapes, "--vae", tiny_vae, "--image-size", 16, "--out", out]
    run_main(cache_latents, *flags, "--with-flips")
    return out


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A folder of checkpoints with random weights (an image model, models of 8 frames) and of clips
    to continue.
    """
    from tiny_data import make_vae, random_checkpoint
    from tiny_videos import picture, save, write_video

    root = tmp_path_factory.mktemp("places")
    forced = {"training": {"forcing": 0.5}, "num_frames": 8}
    random_checkpoint(root / "image.pt", input_size=8)
    random_checkpoint(root / "pixels.pt", use_rope=True, **forced)
    random_checkpoint(root / "latents.pt", make_vae(root / "vae"), use_rope=True, **forced)
    random_checkpoint(root / "energy.pt", use_rope=True, ebm="dot", **forced)
    random_checkpoint(root / "fixed.pt", **forced)
    random_checkpoint(root / "plain.pt", use_rope=True, num_frames=8)  # without forcing
    for name, count in (("B/b", 20), ("B/c", 3), ("other/d", 12)):
        write_video(root / f"{name}.mp4", count, codec="libx264", crf="0")
    save(root / "A" / "a.png", picture(20, 20))
    (root / "zz").mkdir()
    (root / "zz/z.mp4").write_text("not a video")
    return root


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium. Skips without one, except in CI."""
    from browser import CHROMIUM, TIMEOUT, Browser

    if CHROMIUM is None:
        assert os.environ.get("CI") != "true", "no Chromium found: install the package chromium"
        pytest.skip("no Chromium found: install the package chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.call("Browser.close")
    browser.process.wait(TIMEOUT)


@pytest.fixture
def browser(chromium):
    """A Chromium whose page must log no error."""
    from browser import ERRORS

    yield chromium
    assert not chromium.seen(*ERRORS)

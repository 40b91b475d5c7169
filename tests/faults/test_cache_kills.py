"""cache_latents.py in real processes: killed and run again, and on two ranks."""
# ruff: noqa: F811 (imported fixtures)

import signal
import sys

import pytest

from process import ENGINE, end, spawn
from runtime.cli import UserError
from test_cache_latents import NUM_FRAMES, cache, content, flags, root, run, vae  # noqa: F401
from training import TORCHRUN
from video.source import check_data_path


def launch(command, *arguments):
    return spawn(
        sys.executable, *command, *flags(*arguments), environment={"PYTHONPATH": str(ENGINE)}
    )


DIE_IN_RENAME = """
import itertools, os, signal, cache_latents
from video import source
replace, calls = os.replace, itertools.count(1)
def replace_or_die(source, target):
    if "video_index" not in str(target) and next(calls) == {}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace, source.THREADS = replace_or_die, 1
cache_latents.main()
"""


def check_kill(vae, rename, expected, root, out, *arguments):
    """A caching that is killed in a rename and started again writes the expected bytes, none of
    them twice.
    """
    process = launch(["-c", DIE_IN_RENAME.format(rename)], root, vae, out, *arguments)
    end(process, -signal.SIGKILL)
    assert len(list(out.rglob("*.tmp"))) == 1
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(finished) == max(0, rename - 2)
    refusal = "no videos found" if rename == 1 else "not complete: run cache_latents.py"
    with pytest.raises(UserError, match=refusal):
        check_data_path(out)
    run(root, vae, out, *arguments)
    assert content(out) == content(expected)
    for path, time in finished.items():
        assert path.stat().st_mtime_ns == time


# Of latents.partial.json, of the third video, of latents.json
@pytest.mark.parametrize("rename", [1, 4, 7])
def test_a_cache_that_is_killed_and_run_again_has_the_same_bytes(
    rename, root, vae, cache, tmp_path
):
    check_kill(vae, rename, cache, root, tmp_path / "out", "--with-flips")


def test_a_cache_of_pixels_that_is_killed_and_run_again_has_the_same_bytes(root, tmp_path):
    expected = tmp_path / "expected"
    run(root, "none", expected)
    check_kill("none", 4, expected, root, tmp_path / "out")


def test_two_ranks_write_the_bytes_of_one_and_encode_nothing_twice(root, vae, cache, tmp_path):
    count = """
import cache_latents
from runtime import cli, distributed
encode_video = cache_latents.encode_video
def spy(video, **settings):
    with open(f"{__file__}.{distributed.rank()}", "a") as file:
        print(video.path, file=file)
    return encode_video(video=video, **settings)
cache_latents.encode_video, cache_latents.ROUND = spy, 1
cli.LINE_SECONDS = 0
cache_latents.main()
"""
    (tmp_path / "count.py").write_text(count)
    command = [*TORCHRUN[1:], tmp_path / "count.py"]
    process = launch(command, root, vae, tmp_path / "out", "--with-flips")
    output = end(process, timeout=120)
    first = (tmp_path / "count.py.0").read_text().splitlines()
    second = (tmp_path / "count.py.1").read_text().splitlines()
    assert first
    assert second
    assert sorted(first + second) == sorted(NUM_FRAMES)
    assert content(tmp_path / "out") == content(cache)
    assert "127 of 127 frames" in output  # the bar counts the frames of both

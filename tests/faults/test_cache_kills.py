"""cache_latents.py in real processes: killed and run again, and on two ranks."""
# ruff: noqa: F811 (imported fixtures)

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cache_latents
from process import spawn
from runtime.cli import UserError
from test_cache_latents import NAMES, cache, content, encoded, flags, root, run, vae  # noqa: F401
from tiny_videos import write_video
from video.source import check_data_path, open_source

SOURCE = Path(cache_latents.__file__).parent


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The last bits of what a CPU computes depend on the number of threads; the processes below use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(command, *arguments):
    words, path = [sys.executable, *command, *flags(*arguments)], {"PYTHONPATH": str(SOURCE)}
    return spawn(*words, environment=path, stderr=subprocess.PIPE)


DIE_IN_RENAME = """
import itertools, os, signal, cache_latents
replace, calls = os.replace, itertools.count(1)
def replace_or_die(source, target):
    if "video_index" not in str(target) and next(calls) == {}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
cache_latents.main()
"""


@pytest.mark.parametrize("rename", [1, 4, 7])  # of latents.partial.json, of the third video, of latents.json
def test_a_kill_before_a_file_is_renamed_changes_no_byte_in_the_end(root, vae, cache, tmp_path, encoded, rename):
    out, finished = tmp_path / "out", max(0, rename - 2)
    process = launch(["-c", DIE_IN_RENAME.format(rename)], root, vae, out, "--with-flips")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, stderr
    assert len(list(out.rglob("*.tmp"))) == 1
    assert len(list(out.rglob("*.safetensors"))) == finished
    with pytest.raises(UserError, match="no videos found" if rename == 1 else "not complete: run cache_latents.py"):
        check_data_path(out)
    run(root, vae, out, "--with-flips")
    assert content(out) == content(cache)
    assert len(encoded) == 5 - finished


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_a_cache_that_is_killed_halfway_ends_with_the_same_bytes(tmp_path, vae, encoded, kind):
    root, vae = tmp_path / "videos", vae if kind == "latents" else "none"
    for video_index in range(24):
        write_video(root / f"{video_index}.avi", 60, size=(320, 240))
    process = launch([SOURCE / "cache_latents.py"], root, vae, tmp_path / "out")
    while len(list((tmp_path / "out").glob("*.safetensors"))) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert 4 <= len(finished) < 24
    run(root, vae, tmp_path / "out")
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert kind == "pixels" or len(encoded) == 24 - len(finished)
    run(root, vae, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) == 25
    data = open_source(tmp_path / "whole", 16)  # unlabelled
    assert data.scan.classes == ["all"] and data.videos()[0].key == "all/0"


def test_two_ranks_write_the_bytes_of_one_and_encode_nothing_twice(root, vae, cache, tmp_path):
    count = """
import cache_latents
from runtime import cli, distributed
encode_video = cache_latents.encode_video
def spy(*args):
    with open(f"{__file__}.{distributed.rank()}", "a") as file:
        print(args[3].path, file=file)
    return encode_video(*args)
cache_latents.encode_video, cache_latents.ROUND = spy, 1
cli.LINE_SECONDS = 0
cache_latents.main()
"""
    (tmp_path / "count.py").write_text(count)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "count.py"]
    process = launch(torchrun, root, vae, tmp_path / "out", "--with-flips")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    own = [(tmp_path / f"count.py.{rank}").read_text().splitlines() for rank in range(2)]
    assert all(own) and sorted(own[0] + own[1]) == sorted(NAMES)
    assert content(tmp_path / "out") == content(cache)
    assert "127 of 127 frames" in stderr  # the bar counts the frames of both

"""cache_latents.py in real processes: killed and run again, and on two ranks."""
# ruff: noqa: F811 (imported fixtures)

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cache_latents
from runtime.cli import UserError
from test_cache_latents import NAMES, cache, content, flags, root, run, spy_on_encode, vae  # noqa: F401
from tiny_videos import write_video
from video.index import check_data_path, scan_videos

SOURCE = Path(cache_latents.__file__).parent


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The last bits of what a CPU computes depend on the number of threads; the processes below use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(command, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, *map(str, command), *flags(*arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


DIE_IN_RENAME = """
import os, signal, cache_latents
replace, targets = os.replace, []
def replace_or_die(source, target):
    targets.extend([target] * ("video_index" not in str(target)))
    if len(targets) == {}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
cache_latents.main()
"""


@pytest.mark.parametrize("rename", [1, 4, 7])  # of latents.partial.json, of the third video, of latents.json
def test_killed_while_a_temporary_file_exists_and_run_again_it_writes_the_same_bytes(
    root, vae, cache, tmp_path, monkeypatch, rename
):
    out, finished = tmp_path / "out", max(0, rename - 2)
    process = launch(["-c", DIE_IN_RENAME.format(rename)], root, vae, out, "--with-flips")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, stderr
    assert len(list(out.rglob("*.tmp"))) == 1
    assert len(list(out.rglob("*.safetensors"))) == finished
    with pytest.raises(UserError, match="no video found" if rename == 1 else "not complete: run cache_latents.py"):
        check_data_path(out)
    encoded = spy_on_encode(monkeypatch)
    run(monkeypatch, root, vae, out, "--with-flips")
    assert content(out) == content(cache)
    assert len(encoded) == 5 - finished


def test_killed_from_outside_half_way_and_run_again_it_writes_the_same_bytes(tmp_path, vae, monkeypatch):
    root = tmp_path / "videos"
    for video_index in range(24):
        write_video(root / f"{video_index}.avi", 60, size=(320, 240))
    process = launch([SOURCE / "cache_latents.py"], root, vae, tmp_path / "out")
    while len(list((tmp_path / "out").glob("*.safetensors"))) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    finished = len(list((tmp_path / "out").glob("*.safetensors")))
    assert 4 <= finished < 24
    encoded = spy_on_encode(monkeypatch)
    run(monkeypatch, root, vae, tmp_path / "out")
    assert len(encoded) == 24 - finished
    run(monkeypatch, root, vae, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) == 25
    scan = scan_videos(tmp_path / "whole")  # unlabelled
    assert scan.classes == ["all"] and scan.videos[0].key == "all/0"


def test_two_ranks_write_the_bytes_of_one_and_encode_nothing_twice(root, vae, cache, tmp_path):
    count = """
import cache_latents
from runtime import cli, distributed
encode_video = cache_latents.encode_video
def spy(*args):
    with open(f"{__file__}.{distributed.rank()}", "a") as file:
        print(args[-1].path, file=file)
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
    encoded = [(tmp_path / f"count.py.{rank}").read_text().splitlines() for rank in range(2)]
    assert all(encoded) and sorted(encoded[0] + encoded[1]) == sorted(NAMES)
    assert content(tmp_path / "out") == content(cache)
    assert "127 of 127 frames" in stderr  # the bar counts the frames of both

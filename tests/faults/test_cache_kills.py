"""cache_latents.py in real processes: killed and run again, and on two ranks."""
# ruff: noqa: F811 (imported fixtures)

import signal
import sys

import pytest

from process import ENGINE, end, spawn
from runtime.cli import UserError
from test_cache_latents import NAMES, cache, content, flags, root, run, vae  # noqa: F401
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


@pytest.mark.parametrize(
    (
        "vae_name",
        "rename",
    ),  # the first, fourth and last rename: latents.partial.json, the third video, latents.json
    [("tiny", 1), ("tiny", 4), ("tiny", 7), ("none", 4)],
)
def test_a_cache_that_is_killed_and_run_again_has_the_same_bytes(
    vae_name, rename, root, vae, cache, tmp_path
):
    arguments = (root, vae, tmp_path / "out", "--with-flips")
    expected = cache
    if vae_name == "none":
        arguments = (root, "none", tmp_path / "out")
        expected = tmp_path / "expected"
        run(root, "none", expected)
    process = launch(["-c", DIE_IN_RENAME.format(rename)], *arguments)
    end(process, -signal.SIGKILL)
    assert len(list((tmp_path / "out").rglob("*.tmp"))) == 1
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(finished) == max(0, rename - 2)
    with pytest.raises(
        UserError, match="no videos found" if rename == 1 else "not complete: run cache_latents.py"
    ):
        check_data_path(tmp_path / "out")
    run(*arguments)
    assert content(tmp_path / "out") == content(expected)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


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
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "count.py",
    ]
    process = launch(torchrun, root, vae, tmp_path / "out", "--with-flips")
    output = end(process, timeout=120)
    own = [(tmp_path / f"count.py.{rank}").read_text().splitlines() for rank in range(2)]
    assert all(own) and sorted(own[0] + own[1]) == sorted(NAMES)
    assert content(tmp_path / "out") == content(cache)
    assert "127 of 127 frames" in output  # the bar counts the frames of both

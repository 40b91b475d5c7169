"""cache_latents.py in forks of this process: killed and run again, and on two ranks."""
# ruff: noqa: F811 (imported fixtures)

import itertools
import os
import signal

import pytest

import cache_latents
from process import fork, run_ranks
from runtime import cli
from runtime.cli import UserError
from test_cache_latents import NUM_FRAMES, cache, content, root, run, vae  # noqa: F401
from video import source
from video.source import check_data_path


def die_in_rename(number, root, vae, out):
    """Run cache_latents.py, which is killed before it renames its number-th file."""
    replace = os.replace
    calls = itertools.count(1)

    def replace_or_die(old, new):
        if "video_index" not in str(new) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = replace_or_die
    source.THREADS = 1
    run(root, vae, out)


# Of latents.partial.json, of the third video, of latents.json
@pytest.mark.parametrize("kind, rename", [("VAE", 1), ("VAE", 4), ("VAE", 7), ("none", 4)])
def test_a_cache_that_is_killed_and_run_again_has_the_same_bytes_and_writes_none_of_them_twice(
    kind, rename, root, vae, tmp_path
):
    vae = vae if kind == "VAE" else kind
    run(root, vae, tmp_path / "whole")
    out = tmp_path / "out"
    process = fork(die_in_rename, rename, root, vae, out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(out.rglob("*.tmp"))) == 1
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(finished) == max(0, rename - 2)
    refusal = "no videos found" if rename == 1 else "not complete: run cache_latents.py"
    with pytest.raises(UserError, match=refusal):
        check_data_path(out)
    run(root, vae, out)
    assert content(out) == content(tmp_path / "whole")
    for path, time in finished.items():
        assert path.stat().st_mtime_ns == time


def test_two_ranks_write_the_bytes_of_one_and_encode_nothing_twice(root, vae, cache, tmp_path):
    out = tmp_path / "out"

    def encode_and_count():
        encode_video = cache_latents.encode_video
        paths = []

        def counted(video, **settings):
            paths.append(video.path)
            return encode_video(video=video, **settings)

        cache_latents.encode_video = counted
        cache_latents.ROUND = 1
        cli.LINE_SECONDS = 0
        run(root, vae, out, "--with-flips")
        return paths

    (first, second), printed = run_ranks(encode_and_count)
    assert first
    assert second
    assert sorted(first + second) == sorted(NUM_FRAMES)
    assert content(out) == content(cache)
    assert "127 of 127 frames" in printed  # the bar counts the frames of both

"""Loader processes: how they start, what they get, what they leave to the rank."""

import multiprocessing
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch

from runtime.cli import one_line_errors
from runtime.signals import STOP_SIGNALS
from tiny_videos import clips_of, write_equal_videos
from training import differences, error_of
from video.clips import Clips
from video.loader import batches_of, make_loader
from video.source import open_source

KEYS = [[(4, 0), (4, 1)], [(8, 2), (8, 3)], [(4, 4), (4, 5)], [(8, 6), (8, 7)], [(4, 8), (4, 9)]]


def test_loader_processes_get_no_scan(tmp_path):
    source = open_source(write_equal_videos(tmp_path), 16)
    clips = Clips(source, source.videos()[:1], 4)
    sent = pickle.dumps(clips)
    assert source.videos()[1].path.encode() not in sent
    assert differences(pickle.loads(sent)[0], clips[0]) == []


def test_loader_processes_are_no_forks_leave_signals_to_the_rank_and_end_with_a_line(tmp_path):
    root = write_equal_videos(tmp_path)
    source = open_source(root, 16)
    loader = make_loader(
        clips={n: clips_of(source, n, frame_interval=(1, 2)) for n in (4, 8)},
        batches=KEYS,
        num_workers=2,
        timeout=0,
        device=torch.device("cpu"),
    )
    before = set(multiprocessing.active_children())
    batches = batches_of(loader)
    children = set(multiprocessing.active_children()) - before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
    indices = [batch["indices"].tolist() for batch in batches]
    assert indices == [[index for _, index in keys] for keys in KEYS]
    assert len(children) == 2
    for process in children:
        folder = Path("/proc", str(process.pid))
        assert "spawn_main" in (folder / "cmdline").read_text()
        (mask,) = re.findall(r"SigBlk:\s+(\w+)", (folder / "status").read_text())
        for number in STOP_SIGNALS:
            assert int(mask, 16) >> (number - 1) & 1, number.name
    for video in source.videos():
        (root / video.path).unlink()
    line = error_of(list, batches_of(loader))
    assert line.startswith(f"--data-path {root}: 4 corrupt files in a row, the first is ")


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()]
)
def test_a_process_that_is_killed_while_it_hands_over_a_batch_is_named(error, capsys):
    class Loader(list):
        num_workers = 0

        def __iter__(self):
            yield "a batch"
            raise error

    batches = batches_of(Loader())
    assert next(batches) == "a batch"
    with pytest.raises(SystemExit), one_line_errors():
        next(batches)
    assert "a loader process has ended" in capsys.readouterr().err

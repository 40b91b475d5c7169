"""Loader processes: how they start, what they get, what they leave to the rank."""

import multiprocessing
import pickle
import signal
from pathlib import Path

import pytest
import torch

from runtime.cli import one_line_errors
from runtime.signals import STOP_SIGNALS
from tiny_videos import clips_of, write_equal_videos
from training import differences
from video.clips import Clips
from video.index import CorruptDataError
from video.loader import batches_of, make_loader
from video.source import open_source

KEYS = [[(4, 0), (4, 1)], [(8, 2), (8, 3)], [(4, 4), (4, 5)], [(8, 6), (8, 7)], [(4, 8), (4, 9)]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What there is to see of a loader with two processes: a dict."""
    root = write_equal_videos(tmp_path_factory.mktemp("videos"))
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
    processes = [Path("/proc", str(process.pid)) for process in children]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    indices = [batch["indices"].tolist() for batch in batches]
    assert indices == [[index for _, index in keys] for keys in KEYS]
    commands = [(process / "cmdline").read_text() for process in processes]
    statuses = [(process / "status").read_text() for process in processes]
    for video in source.videos():
        (root / video.path).unlink()
    with pytest.raises(CorruptDataError) as error:
        list(batches_of(loader))
    return {
        "blocked here": blocked,
        "commands": commands,
        "statuses": statuses,
        "error": str(error.value),
        "root": root,
    }


def test_loader_processes_get_no_scan(tmp_path):
    source = open_source(write_equal_videos(tmp_path), 16)
    clips = Clips(source, source.videos()[:1], source.scan.classes, 4)
    sent = pickle.dumps(clips)
    assert source.videos()[1].path.encode() not in sent
    assert differences(pickle.loads(sent)[0], clips[0]) == []


def test_loader_processes_are_no_forks_and_leave_stop_signals_to_the_rank(seen):
    assert len(seen["commands"]) == 2
    assert all("spawn_main" in command for command in seen["commands"])
    assert not seen["blocked here"] & set(STOP_SIGNALS)
    for status in seen["statuses"]:
        (line,) = [line for line in status.splitlines() if line.startswith("SigBlk:")]
        mask = int(line.split()[1], 16)
        for number in STOP_SIGNALS:
            assert mask >> (number - 1) & 1, number.name


def test_an_error_in_a_loader_process_is_one_line_without_its_traceback(seen):
    (line,) = seen["error"].splitlines()
    assert line.startswith(f"--data-path {seen['root']}: 4 corrupt files in a row, the first is ")


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

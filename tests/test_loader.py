"""Loader processes and the list of videos that they share."""

import multiprocessing
import signal
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from runtime.cli import UserError, explain
from runtime.signals import STOP_SIGNALS
from tiny_videos import make_video, write_equal_videos
from training import differences
from video.clips import Clips
from video.files import probe
from video.index import scan_videos
from video.loader import SharedVideos, batches_of, make_loader

KEYS = [[(4, 0), (4, 1)], [(8, 2), (8, 3)], [(4, 4), (4, 5)], [(8, 6), (8, 7)], [(4, 8), (4, 9)]]


def test_shared_videos_equal_the_list_they_were_made_from():
    names = ("Tai Chi/Übung 1, 太极 🙂", "a'b\"c/d\\e", "A/line\nbreak\x1b[0m\x7f", "B/ ", "B/x.y")
    videos = [*map(make_video, names), probe("", "C", "C/image.png"), make_video("C/long" * 500)]
    shared = SharedVideos(videos)
    assert list(shared) == [shared[index] for index in range(len(videos))] == videos
    assert len(shared) == len(videos) and [shared.index(video) for video in videos] == list(range(len(videos)))
    assert videos[3] in shared and make_video("other") not in shared
    with pytest.raises(IndexError):
        shared[len(videos)]


def test_shared_videos_are_not_copied_for_a_process():
    videos = [make_video(f"A/{number}") for number in range(10_000)]
    few, many = (len(ForkingPickler.dumps(SharedVideos(videos[:count]))) for count in (10, 10_000))
    resource_sharer.stop()
    assert abs(many - few) < 100


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What there is to see of a loader with two processes: a dict."""
    root = write_equal_videos(tmp_path_factory.mktemp("videos"))
    scan = scan_videos(root)

    def loader(num_workers):
        clips = {n: Clips(root, scan.videos, scan.classes, n, 16, frame_interval=(1, 2)) for n in (4, 8)}
        return make_loader(clips, KEYS, num_workers, 0, torch.device("cpu"))

    two, before = loader(2), set(multiprocessing.active_children())
    batches = batches_of(two)
    processes = [Path("/proc", str(process.pid)) for process in set(multiprocessing.active_children()) - before]
    found = {"blocked here": signal.pthread_sigmask(signal.SIG_BLOCK, []), "batches": list(batches)}
    found["commands"] = [(process / "cmdline").read_text() for process in processes]
    found["statuses"] = [(process / "status").read_text() for process in processes]
    found["batches without"] = list(batches_of(loader(0)))
    for video in scan.videos:
        (root / video.path).unlink()
    with pytest.raises(UserError) as error:
        list(batches_of(two))
    return found | {"error": str(error.value), "root": root}


def test_loader_processes_change_nothing(seen):
    for batch, expected, keys in zip(seen["batches"], seen["batches without"], KEYS, strict=True):
        assert batch["indices"].tolist() == [index for _, index in keys]
        assert batch["clips"].shape[2] == keys[0][0]
        assert differences(batch, expected) == []


def test_loader_processes_start_as_new_ones_and_are_no_forks(seen):
    assert len(seen["commands"]) == 2 and all("spawn_main" in command for command in seen["commands"])


def test_stop_signals_are_blocked_in_loader_processes_and_not_here(seen):
    assert not seen["blocked here"] & set(STOP_SIGNALS)
    for status in seen["statuses"]:
        (mask,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:")]
        assert [number.name for number in STOP_SIGNALS if not mask >> (number - 1) & 1] == []


def test_an_error_in_a_loader_process_is_one_line_without_its_traceback(seen):
    (line,) = seen["error"].splitlines()
    assert line.startswith(f"--data-path {seen['root']}: 4 files in a row are bad, the first is ")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_loader_process_that_is_killed_while_it_hands_over_a_batch_is_named_as_such(error):
    class Loader(list):
        num_workers = 0

        def __iter__(self):
            yield "a batch"
            raise error

    batches = batches_of(Loader())
    assert next(batches) == "a batch"
    with pytest.raises(RuntimeError) as raised:
        next(batches)
    assert "a loader process exited unexpectedly" in explain(raised.value)

"""Real processes that are stopped and killed for real: nothing is lost, nothing hangs, everything
says one line.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from shlex import split

import pytest

import sample_gd
import train
import train_vae
from faults import kill_something, stop_launcher, storm
from process import descendants, end, free_port, kill, ranks, spawn, wait_gone, wait_until
from tiny_videos import decode
from training import (
    ANY_LENGTH,
    FEW_STEPS,
    PYTHON,
    ROOT,
    TINY,
    TINY_VAE,
    TORCHRUN,
    Training,
    compare,
    content,
    on_two_ranks,
    refused,
    run_main,
    sample_here,
)

OFTEN = split("""
    --log-every 1
    --val-every 5
    --ckpt-every 10
    --sample-every 0
""")
WORKERS = [*OFTEN, "--num-workers", 1]


@pytest.fixture
def make(shapes, tmp_path):
    """A function that makes a Training of so many steps in a folder of its own; 10,000 steps never
    end.
    """

    def make(steps=10_000, launcher=PYTHON, flags=OFTEN, name="r", data=shapes):
        return Training(data, tmp_path / name, steps, launcher, flags)

    return make


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    """A function that returns a run of two ranks, with more flags, that nothing has disturbed."""

    @functools.cache
    def undisturbed(*flags):
        results = tmp_path_factory.mktemp("undisturbed") / "r"
        training = Training(shapes, results, 100, TORCHRUN, [*OFTEN, *flags])
        on_two_ranks(train, *training.command_flags())
        return training

    return undisturbed


def sabotaged(what, launcher=PYTHON):
    return [*launcher, Path(__file__).with_name("sabotage.py"), what]


def error_of(output):
    """The one line that says what went wrong."""
    (line,) = [line for line in output.splitlines() if "train.py: error:" in line]
    assert 'train.py", line' not in output, output  # a traceback, which may only be torchrun's own
    return line


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_ends_a_single_process_with_status_0(number, make):
    training = make(flags=WORKERS)
    process = training.start(until=3)
    # The loader's processes get it, too, as from a terminal or a cluster
    os.killpg(process.pid, number)
    output = end(process)
    saved = training.saved()["step"]
    assert f"stopped by {number.name} and saved at step {saved}" in output
    assert output.count("with --resume") == 1
    assert "Traceback" not in output
    assert saved >= training.last_step()  # nothing is lost


def test_a_second_interrupt_ends_the_process_at_once(make):
    process = make(flags=[*OFTEN, "--global-batch-size", 512]).start(until=1)  # slow steps
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert "stopped by" not in end(process, -signal.SIGINT)


@pytest.mark.parametrize(
    "script, base, number",
    [
        ("train.py", TINY, signal.SIGINT),
        ("train.py", TINY, signal.SIGUSR1),
        ("train_vae.py", TINY_VAE, signal.SIGINT),
    ],
)
def test_the_ranks_save_and_end_when_their_torchrun_gets_a_signal(script, base, number, make):
    training = replace(make(launcher=TORCHRUN, flags=["--log-every", 1]), script=script, base=base)
    process = training.start(until=3)
    left = descendants(process.pid)
    kill(process.pid, number)  # torchrun itself dies of SIGUSR1
    output = end(process, None)
    wait_gone(left)
    assert output.count("and saved at step") == output.count("with --resume") == 1
    assert f'{script}", line' not in output  # a traceback, which may only be torchrun's own
    assert training.saved()["step"] >= training.last_step()  # nothing is lost


def test_a_signal_to_one_rank_of_a_sharded_run_ends_all_during_samples(make):
    flags = "--val-every 1 --sample-every 1 --num-samples 2 --num-sampling-steps 1000 --shard"
    training = make(launcher=TORCHRUN, flags=split(flags))
    process = training.start()
    wait_until(lambda: list(training.results.glob("*/config.json")), process)
    time.sleep(3)  # into the thousand evaluations
    kill(ranks(process)[1], signal.SIGTERM)
    assert "stopped by a signal to another rank and saved at step 1" in end(process)
    assert training.saved()["step"] == 1


def test_a_signal_and_the_end_of_a_run_wait_for_the_save_under_way(make):
    usual = make(30, name="usual")
    run_main(train, *usual.command_flags())
    training = make(30, sabotaged("slow_disk"))
    process = training.start(until=12)  # the save of step 10 goes on
    process.send_signal(signal.SIGTERM)
    output = end(process)
    saved = training.saved()["step"]
    assert f"saved at step {saved}" in output
    assert saved >= 12
    training.run("--resume")
    assert compare(usual, training) == []


# Kills --------------------------------------------------------------------------------------------


def test_sigkills_and_sigterms_at_random_moments_change_nothing(undisturbed, tmp_path):
    usual = undisturbed("--precision", "bf16", "--optimizer", "muon")
    loading = ["--num-workers", 1, "--cache-frames"]  # which changes nothing either
    training = replace(usual, results=tmp_path / "r", flags=[*usual.flags, *loading])
    # With this seed: SIGTERM of torchrun, SIGKILL of a rank, of all processes, and of a torchrun
    # that starts
    seen = storm(training, [stop_launcher, *3 * [kill_something]], seed=110, from_step=0.5)
    assert seen[0]["lost"] == 0  # a fast machine may finish early
    assert compare(usual, training) == []


def test_a_kill_of_a_vae_run_changes_nothing_and_two_ranks_equal_one(make):
    flags = split("--log-every 1 --val-every 10 --save-minutes 0.001")
    whole = make(20, TORCHRUN, flags, "whole")
    whole = replace(whole, base=TINY_VAE, script="train_vae.py")
    killed = replace(whole, results=whole.results.with_name("killed"))
    one = replace(whole, results=whole.results.with_name("one"))
    on_two_ranks(train_vae, *whole.command_flags())
    assert storm(killed, [kill_something], seed=5, from_step=0.1)
    assert compare(whole, killed) == []
    run_main(train_vae, *one.command_flags())
    for alone, shared in zip(one.rows(), whole.rows(), strict=True):
        assert alone == pytest.approx(shared, rel=2e-2)  # up to rounding


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_it(make):
    usual = make(20, name="usual")
    run_main(train, *usual.command_flags())
    training = make(20, sabotaged("killed_in_save"))
    training.run(status=-signal.SIGKILL)
    assert [path.name for path in training.folder.rglob("*.tmp")] == ["latest.pt.tmp"]
    assert training.saved()["step"] == 5
    replace(training, launcher=PYTHON).run("--resume")
    assert compare(usual, training) == []


def test_a_kill_while_a_sharded_checkpoint_is_gathered_leaves_the_one_before_it(make, undisturbed):
    usual = undisturbed("--shard")
    launcher = sabotaged("killed_while_gathering", TORCHRUN)
    training = replace(usual, results=make().results, launcher=launcher)
    line = error_of(training.run(status=1))
    assert "another rank has ended" in line
    assert "all checkpoints are intact" in line
    assert training.saved()["step"] == 5
    replace(training, launcher=TORCHRUN).run("--resume")
    assert compare(usual, training) == []


def test_saving_by_the_clock_does_not_change_the_result(make):
    flags = split("""
        --log-every 7
        --val-every 1000
        --ckpt-every 1000
        --sample-every 0
    """)
    usual = make(200, TORCHRUN, flags, "usual")
    on_two_ranks(train, *usual.command_flags())
    training = make(200, sabotaged("votes_often", TORCHRUN), [*flags, "--save-minutes", 0.002])
    process = training.start(until=7)
    saved = set()
    while process.poll() is None:  # there is no other reason to save before the end
        if list(training.results.glob("*/checkpoints/latest.pt")):
            saved.add(training.saved()["step"])
        time.sleep(0.05)
    end(process)
    assert len(saved - {200}) > 2
    assert compare(usual, training) == []


def test_a_starting_loader_process_ends_when_its_rank_is_killed(make):
    process = make(10, sabotaged("killed_while_it_starts_a_loader"), WORKERS).start()
    end(process, -signal.SIGKILL)  # until nobody holds the other end of the pipe


def test_killed_samples_are_no_half_file_and_the_next_call_cleans_up(places, tmp_path):
    folder = tmp_path / "s"
    sampling = ["--video", "--ckpt", places / "pixels.pt", "--folder", folder, *FEW_STEPS]
    process = spawn(*PYTHON, ROOT / "EqM/sample_gd.py", *sampling, "--num-frames", 4000)  # endless
    film = folder / "000000.mp4"
    wait_until(lambda: film.exists() and film.stat().st_size > 4000, process)
    process.kill()
    end(process, -signal.SIGKILL)
    assert (folder / "samples.unfinished").exists()
    assert not [name for name in content(folder) if name.endswith((".gif", ".npz", ".json"))]
    frames, _ = decode(film)  # what there is of it
    assert 0 < len(frames) < 4000
    clips, _ = sample_here(places / "pixels.pt", folder)
    assert clips.shape[:2] == (2, 8)
    assert not [name for name in content(folder) if name.endswith((".tmp", ".unfinished"))]


def test_a_second_writer_is_refused_and_the_first_continues(make):
    training = make()
    process = training.start(until=3)
    assert "another process writes to it" in error_of(training.run("--resume", status=2))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    end(process)
    assert len(list(training.results.glob("[0-9]*"))) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A function that returns a file system of so many MB, which only root may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(megabytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={1000 * megabytes:.0f}k", "tmpfs", disk]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("can't mount a file system")
        return disk

    yield mount
    subprocess.run(["umount", "--lazy", disk], capture_output=True)


@pytest.mark.parametrize(
    "megabytes, flags, words",
    [
        (1, "--sample-every 1 --num-samples 8 --num-sampling-steps 2", ["samples/"]),
        (0.2, "--log-every 1", ["metrics.jsonl"]),
        (18, "--ckpt-every 2", ["/latest.pt", "MB free, the file needs", "delete 0000002.pt"]),
    ],
)
def test_a_full_disk_is_one_line_that_names_it(megabytes, flags, words, small_disk, make):
    disk = small_disk(megabytes)
    far = split("--ckpt-every 10000 --val-every 10000")
    training = replace(make(flags=[*OFTEN, *far, *split(flags)]), results=disk / "r")
    line = error_of(training.run(status=1))
    assert all(word in line for word in words)
    assert f"No space left on device; the disk {disk} has" in line
    assert not list(training.folder.rglob("*.tmp"))
    if "--ckpt" in flags:
        assert training.saved()["step"] >= 4


def test_samples_on_a_full_disk_are_one_line(small_disk, places, capsys):
    disk = small_disk(0.1)
    flags = split("""
        --video
        --num-samples 64
        --stepsize 0.1
        --num-sampling-steps 3
    """)
    paths = ["--ckpt", places / "plain.pt", "--folder", disk / "s"]
    line = refused(capsys, sample_gd, *flags, *paths, status=1)
    assert f"samples.npz can't be written (No space left on device; the disk {disk}" in line


# Data under fire ----------------------------------------------------------------------------------


def test_a_killed_loader_process_is_one_line_about_memory(make):
    process = make(flags=WORKERS).start(until=2)
    for pid in descendants(process.pid):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():  # a loader
            kill(pid)
            break
    assert "lack of memory" in error_of(end(process, 1))


def test_loader_processes_that_start_right_after_a_collective_do_not_hang(make):
    # Each phase starts two on each of two ranks
    flags = split("--val-every 1 --loader-timeout 60 --frames-schedule 4:2:4,5:4:4")
    training = make(None, TORCHRUN, [*WORKERS, *flags])
    replace(training, base=ANY_LENGTH).run()
    assert training.last_step() == 4


def test_a_decoder_that_hangs_is_named(make, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    flags = [*WORKERS, "--loader-timeout", 10]
    training = make(100_000, sabotaged("hanging_decoder"), flags, data=data)
    process = training.start(until=2)
    for video in data.glob("*/*.avi"):
        video.with_name(video.name + ".hang").touch()
    line = error_of(end(process, 1))
    assert "--loader-timeout 10" in line
    assert ".avi" in line


@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN])
def test_a_bug_ends_the_processes_while_loaders_work(launcher, make):
    process = make(launcher=sabotaged("bug_in_a_step", launcher), flags=WORKERS).start()
    # With its traceback: nobody knows what it means
    assert "RuntimeError: a bug" in end(process, 1)


def test_a_loss_that_is_not_finite_names_step_rank_files_and_norms(make, shapes):
    flags = [*OFTEN, *split("--log-every 4 --val-every 100")]
    training = make(20, sabotaged("nan_on_rank_1", TORCHRUN), flags)
    line = error_of(training.run(status=1))
    pattern = r"train_loss of step 3 is not finite, on rank 1, of (.+?); .*up to it: (.+?); "
    files, norms = re.search(pattern, line).groups()
    files = files.split(", ")
    assert len(files) <= 2
    for file in files:
        assert (shapes / file).exists()
    *finite, last = norms.split(", ")
    assert len(finite) == 2
    assert min(map(float, finite)) > 0
    assert last == "nan"


# More than one machine ----------------------------------------------------------------------------


def agents(training, *flags):
    """Two torchrun agents of one rank each, which meet on the loopback address."""
    launcher = [
        *PYTHON,
        *split("-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d"),
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--local-addr=127.0.0.1",
        *flags,
    ]
    return [replace(training, launcher=launcher).start() for _ in range(2)]


@pytest.mark.parametrize("flags, is_killed", [(["--shard"], False), ([], True)])
def test_two_nodes_equal_one_node_bit_for_bit_also_when_their_ranks_restart(
    flags, is_killed, undisturbed, tmp_path
):
    one = undisturbed(*flags)
    two = replace(one, results=tmp_path / "two")
    processes = agents(two, "--rdzv-id=job", "--max-restarts=2")
    if is_killed:
        wait_until(lambda: two.last_step() > 6, processes[0])
        kill(ranks(processes[0])[0])
    for process in processes:
        end(process, timeout=240)
    assert compare(one, two) == []


def test_two_nodes_without_rdzv_id_are_refused(make):
    training = make(60)
    outputs = [end(process, None, timeout=120) for process in agents(training, "--max-restarts=0")]
    assert "--rdzv-id" in error_of(outputs[0])
    assert not training.results.exists()

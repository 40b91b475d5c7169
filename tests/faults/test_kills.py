"""Real processes that are stopped and killed for real: nothing is lost, nothing hangs, everything says one line."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from faults import GONE_WITHIN, descendants, kill, kill_something, loaders, ranks, stop_launcher, storm, wait_gone
from training import PYTHON, ROOT, TORCHRUN, Training, compare

OFTEN = ["--log-every", 1, "--val-every", 5, "--ckpt-every", 10, "--sample-every", 0]
WORKERS = [*OFTEN, "--num-workers", 1]
SABOTAGE = [*PYTHON, Path(__file__).with_name("sabotage.py")]


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """A run of two ranks that nothing has disturbed."""
    training = Training(shapes, tmp_path_factory.mktemp("whole") / "r", 60, TORCHRUN, OFTEN)
    training.run()
    return training


def errors(output):
    return [line for line in output.splitlines() if "train.py: error:" in line]


def last_saved(training):
    return torch.load(training.folder / "checkpoints/latest.pt", weights_only=True)["step"]


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_ends_a_single_process_with_status_0(number, shapes, tmp_path):
    training = Training(shapes, tmp_path / "r", 10_000, PYTHON, WORKERS)
    process = training.start()
    training.wait_for(3, process)
    os.killpg(process.pid, number)  # the loader's processes get it, too, as from a terminal or a cluster
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 0, output
    assert f"stopped by {number.name} and saved at step {last_saved(training)}" in output
    assert "--resume continues" in output
    assert "Traceback" not in output
    assert last_saved(training) >= training.rows()[-1]["step"]


def test_a_second_interrupt_ends_the_process_at_once(shapes, tmp_path):
    training = Training(shapes, tmp_path / "r", 10_000, PYTHON, [*OFTEN, "--global-batch-size", 512])  # slow steps
    process = training.start()
    training.wait_for(1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == -signal.SIGINT
    assert "stopped by" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_torchrun_passes_signals_on_and_no_step_is_lost(number, shapes, tmp_path):
    training = Training(shapes, tmp_path / "r", 10_000, TORCHRUN, OFTEN)
    process = training.start()
    training.wait_for(3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert "and saved at step" in output  # also when torchrun itself dies of it, as of SIGUSR1
    assert process.returncode != 0
    assert last_saved(training) >= training.rows()[-1]["step"]


def test_the_ranks_of_a_torchrun_that_is_killed_save_and_end(shapes, tmp_path):
    training = Training(shapes, tmp_path / "r", 10_000, TORCHRUN, WORKERS)
    process = training.start()
    training.wait_for(3, process)
    left = descendants(process.pid)
    kill(process.pid)
    wait_gone(left)
    assert "stopped by SIGTERM and saved" in process.communicate()[0]
    assert last_saved(training) >= training.rows()[-1]["step"]


# Kills ----------------------------------------------------------------------------------------------------------------


def test_sigkills_and_sigterms_at_random_moments_change_nothing(whole, tmp_path):
    flags = [*OFTEN[:2], *OFTEN[4:], "--val-every", 50]
    whole = replace(whole, results=tmp_path / "whole", steps=250, flags=flags)
    whole.run()
    moments = {"from_start": 6, "from_step": 0.5}
    whole.flags += ["--num-workers", 1]
    killed = replace(whole, results=tmp_path / "killed")
    seen = storm(killed, 3, kill_something, seed=1, **moments)
    assert seen and compare(whole, killed) == [], seen
    stopped = replace(whole, results=tmp_path / "stopped")
    seen = storm(stopped, 2, stop_launcher, seed=2, **moments)
    assert seen and compare(whole, stopped) == [], seen
    assert not any(one["lost"] for one in seen)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_the_ranks_and_they_go_on_by_themselves(rank, whole, tmp_path):
    launcher = [*TORCHRUN, "--max-restarts=2"]
    training = replace(whole, results=tmp_path / "r", launcher=launcher)
    process = training.start()
    training.wait_for(7, process)
    kill(ranks(process)[rank])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert compare(whole, training) == []


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_it(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", 20, PYTHON, OFTEN)
    whole.run()
    training = replace(whole, results=tmp_path / "r", launcher=[*SABOTAGE, "killed_in_save"])
    training.run(status=-signal.SIGKILL)
    assert [path.name for path in training.folder.rglob("*.tmp")] == ["latest.pt.tmp"]
    assert last_saved(training) == 5
    replace(training, launcher=PYTHON).run("--resume")
    assert compare(whole, training) == []


def test_a_rank_that_is_killed_while_a_checkpoint_is_gathered_leaves_the_one_before_it(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", 20, TORCHRUN, [*OFTEN, "--shard"])
    whole.run()
    launcher = [*TORCHRUN, *SABOTAGE[1:], "killed_while_gathering"]
    training = replace(whole, results=tmp_path / "r", launcher=launcher)
    (line,) = errors(training.run(status=1))
    assert "another rank has ended" in line and "all checkpoints are intact" in line
    assert last_saved(training) == 5
    replace(training, launcher=TORCHRUN).run("--resume")
    assert compare(whole, training) == []


def test_a_signal_to_one_rank_of_a_sharded_run_ends_all_while_they_validate_and_sample(shapes, tmp_path):
    flags = ["--log-every", 1, "--val-every", 1, "--sample-every", 1, "--num-samples", 2, "--shard"]
    training = Training(shapes, tmp_path / "r", 10_000, TORCHRUN, [*flags, "--num-sampling-steps", 1000])
    process = training.start()
    while not list(training.results.glob("*/config.json")) and process.poll() is None:
        time.sleep(0.1)
    time.sleep(3)  # into the thousand points
    kill(ranks(process)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 0, output
    assert "stopped by a signal to another rank and saved at step 1" in output
    assert last_saved(training) == 1


def test_a_signal_and_the_end_of_a_run_wait_for_the_checkpoint_that_is_being_written(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", 300, PYTHON, OFTEN)
    whole.run()
    training = replace(whole, results=tmp_path / "r", launcher=[*SABOTAGE, "slow_disk"])
    process = training.start()
    training.wait_for(12, process)  # the save of step 10 goes on
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 0, output
    assert f"saved at step {last_saved(training)}" in output and last_saved(training) >= 12
    training.run("--resume")
    assert compare(whole, training) == []


def test_a_run_that_saves_by_the_clock_loses_no_more_and_ends_as_one_that_does_not(shapes, tmp_path):
    flags = ["--log-every", 7, "--val-every", 1000, "--ckpt-every", 1000, "--sample-every", 0]
    whole = Training(shapes, tmp_path / "whole", 200, TORCHRUN, flags)
    whole.run()
    training = replace(whole, results=tmp_path / "r", flags=[*flags, "--save-minutes", 0.005])
    process, saved = training.start(), set()
    training.wait_for(7, process)
    while len(saved) < 3 and process.poll() is None:  # there is no other reason to save before the end
        if list(training.results.glob("*/checkpoints/latest.pt")):
            saved.add(last_saved(training))
        time.sleep(0.05)
    for pid in [process.pid, *descendants(process.pid)]:
        kill(pid)
    process.communicate()
    assert len(saved) == 3 and max(saved) < 200
    training.run("--resume")
    assert compare(whole, training) == []


def test_a_loader_process_whose_rank_is_killed_before_it_begins_ends_as_well(shapes, tmp_path):
    launcher = [*SABOTAGE, "killed_while_it_starts_a_loader"]
    process = Training(shapes, tmp_path / "r", 10, launcher, WORKERS).start()
    process.communicate(timeout=GONE_WITHIN)  # until nobody holds the other end of the pipe
    assert process.returncode == -signal.SIGKILL


def test_readers_can_open_latest_and_best_at_any_time(shapes, tmp_path):
    flags = ["--log-every", 1, "--val-every", 1, "--ckpt-every", 1, "--sample-every", 0, "--keep-last", 2]
    training = Training(shapes, tmp_path / "r", 60, PYTHON, flags)
    process, loaded = training.start(), []
    training.wait_for(2, process)
    while process.poll() is None:
        for name in ("latest.pt", "best.pt"):
            loaded.append(torch.load(training.folder / "checkpoints" / name, weights_only=True)["step"])
    assert process.communicate()[0] and process.returncode == 0
    assert len(set(loaded)) > 5


def test_a_second_writer_is_refused_and_the_first_goes_on(shapes, tmp_path):
    training = Training(shapes, tmp_path / "r", 10_000, PYTHON, OFTEN)
    process = training.start()
    training.wait_for(3, process)
    output = training.run("--resume", status=2)
    assert len(errors(output)) == 1 and "another process writes to it" in errors(output)[0]
    assert "Traceback" not in output
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 0
    assert len(list(training.results.glob("[0-9]*"))) == 1


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(shapes, tmp_path):
    small = Training(shapes, tmp_path / "r", 10, PYTHON, OFTEN)
    small.run()
    size = (small.folder / "checkpoints/latest.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # no file may be larger; children inherit it
    try:
        output = replace(small, steps=20).run("--resume", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(errors(output)) == 1 and "can't be written" in errors(output)[0]
    assert "Traceback" not in output
    assert last_saved(small) == 10
    assert not list(small.folder.rglob("*.tmp"))


# Data under fire ------------------------------------------------------------------------------------------------------


def test_a_loader_process_that_is_killed_is_one_line_that_speaks_of_memory(shapes, tmp_path):
    training = Training(shapes, tmp_path / "r", 10_000, PYTHON, WORKERS)
    process = training.start()
    training.wait_for(2, process)
    kill(loaders(process.pid)[0])
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 1, output
    assert len(errors(output)) == 1 and "ran out of memory" in errors(output)[0]
    assert "Traceback" not in output


def test_loader_processes_that_start_right_after_a_collective_do_not_hang(shapes):
    command = [*TORCHRUN, Path(__file__).with_name("starts.py"), "--data-path", shapes, "--rounds", 4]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=400)
    assert "16 loader processes started, none hung" in done.stdout, done.stderr


def test_a_decoder_that_hangs_is_named(shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    launcher = [*SABOTAGE, "hanging_decoder"]
    training = Training(data, tmp_path / "r", 100_000, launcher, [*WORKERS, "--loader-timeout", 10])
    process = training.start()
    training.wait_for(2, process)
    for video in data.glob("*/*.avi"):
        video.with_name(video.name + ".hang").touch()
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 1, output
    (line,) = errors(output)
    assert "--loader-timeout 10" in line and ".avi" in line
    assert "Traceback" not in output


@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN])
def test_a_bug_ends_the_processes_though_the_loaders_are_at_work(launcher, shapes, tmp_path):
    launcher = [*launcher, *SABOTAGE[1:], "bug_in_a_step"]
    training = Training(shapes, tmp_path / "r", 10_000, launcher, [*OFTEN, "--num-workers", 2])
    process = training.start()
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 1
    assert "RuntimeError: a bug" in output  # with its traceback: nobody knows what it means


def test_files_that_vanish_while_training_are_counted_like_corrupt_ones(shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    flags = [*OFTEN, "--max-bad-fraction", 0.5]
    training = Training(data, tmp_path / "r", 10_000, PYTHON, flags)
    process = training.start()
    training.wait_for(2, process)
    for video in sorted(data.glob("*/*.avi"))[:6]:
        video.unlink()
    until = time.monotonic() + 60
    while not (bad := training.rows()[-1]["bad_videos"]) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 0 and 0 < bad <= 6, output
    assert "can't be decoded; other clips take its place" in output


def test_a_loss_that_is_not_finite_names_step_rank_files_and_the_norms_before(shapes, tmp_path):
    launcher = [*TORCHRUN, *SABOTAGE[1:], "nan_on_rank_1"]
    training = Training(shapes, tmp_path / "r", 20, launcher, [*OFTEN, "--log-every", 4, "--val-every", 100])
    output = training.run(status=1)
    (line,) = errors(output)
    assert "train_loss of step 3 is not finite, on rank 1, of " in line
    files = line.split(", of ")[1].split("; ")[0].split(", ")
    assert 0 < len(files) <= 2 and all((shapes / file).exists() for file in files)
    norms = line.split("gradient norms up to it: ")[1].split("; ")[0].split(", ")
    assert len(norms) == 3 and norms[2] == "nan" and all(float(norm) > 0 for norm in norms[:2])
    assert 'train.py", line' not in output  # the only traceback is torchrun's own
    assert training.run("--skip-nonfinite", 2, status=1).count("is not finite") == 1


# More than one machine ------------------------------------------------------------------------------------------------


def agents(training, name="job"):
    """Two torchrun agents of one rank each, which meet on the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=2",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    launcher += [f"--rdzv-id={name}"] if name else ["--max-restarts=0"]
    return [replace(training, launcher=launcher).start() for _ in range(2)]


def finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


def test_two_nodes_of_one_rank_equal_one_node_of_two_bit_for_bit(whole, tmp_path):
    training = replace(whole, results=tmp_path / "r")
    finish(agents(training))
    assert compare(whole, training) == []


def test_two_nodes_that_shard_equal_one_node_that_does_bit_for_bit(whole, tmp_path):
    one = replace(whole, results=tmp_path / "one", flags=[*whole.flags, "--shard"])
    one.run()
    two = replace(one, results=tmp_path / "two")
    finish(agents(two))
    assert compare(one, two) == []


def test_two_nodes_without_a_name_for_the_run_are_refused(whole, tmp_path):
    training = replace(whole, results=tmp_path / "r")
    (first, output), _ = ((process, process.communicate(timeout=120)[0]) for process in agents(training, name=None))
    assert first.returncode != 0 and "--rdzv-id" in "".join(errors(output))
    assert not training.results.exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_two_nodes_survive_the_kill_of_the_rank_of_one(victim, whole, tmp_path):
    training = replace(whole, results=tmp_path / "r")
    processes = agents(training)
    training.wait_for(7, processes[0])
    kill(ranks(processes[victim])[0])
    finish(processes)
    assert compare(whole, training) == []


# Scripts --------------------------------------------------------------------------------------------------------------


def wait_until(condition, process, timeout=120):
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)


def start_script(name, tree, settings, *flags):
    environment = os.environ | {key: str(value) for key, value in settings.items()} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", str(tree / "scripts" / name), *map(str, flags)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """A copy of what the scripts run, so that results stay here."""
    for folder in ("EqM", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_progressive_script_saves_on_a_signal_and_the_same_command_goes_on(number, shapes, tree):
    settings = {
        "PATH": PATH, "DATA": shapes, "GPUS": 2, "MODEL": "EqM-Ti/4", "EXP": "E", "CACHE": 0, "STEPS_1": 4,
        "STEPS_2": 2000, "STEPS_3": 2001, "BATCH_1": 4, "BATCH_2": 4, "BATCH_3": 4,
    }  # fmt: skip
    flags = ["--depth", 1, "--vae", "none", "--image-size", 16, "--num-workers", 0, "--log-every", 1, "--val-clips", 4]
    process = start_script("train_progressive.sh", tree, settings, *flags)
    second = tree / "results/E/001-EqM-Ti-4-f8-rope"
    wait_until(lambda: (second / "metrics.jsonl").exists() and (second / "metrics.jsonl").read_text(), process)
    left = descendants(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 143
    assert "and saved at step" in output and output.rstrip().endswith("interrupted; the same command continues")
    wait_gone(left)
    step = torch.load(second / "checkpoints/latest.pt", weights_only=True)["step"]
    process = start_script("train_progressive.sh", tree, settings | {"STEPS_2": step + 1, "STEPS_3": step + 2}, *flags)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    names = ["000-EqM-Ti-4-f4-rope", "001-EqM-Ti-4-f8-rope", "002-EqM-Ti-4-f16-rope"]
    assert sorted(path.name for path in (tree / "results/E").glob("[0-9]*")) == names


def test_the_script_for_slurm_saves_before_the_time_is_up_and_queues_the_job_again(shapes, tree):
    """With stand-ins for srun, which runs its command here, scancel, which signals that, and scontrol."""
    tools = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ >srun.pid; exec "$@"',
        "scancel": '[[ $* == "--signal=TERM 7" ]] && kill -TERM "$(cat srun.pid)"',
        "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "scontrol: $*"; fi',
    }
    for name, body in tools.items():
        (tree / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tree / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "PATH": f"{tree}{os.pathsep}{PATH}", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": 1, "SLURM_JOB_ID": 7,
        "SLURM_SUBMIT_DIR": tree, "GPUS": 2, "PORT": port,
    }  # fmt: skip
    training = Training(shapes, tree / "results", 10_000, flags=OFTEN)
    process = start_script("train_slurm.sh", tree, settings, *training.command_flags())
    training.wait_for(3, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM and saved" in output and "scontrol: requeue 7" in output
    saved = last_saved(training)
    again = replace(training, steps=saved + 2)
    output, _ = start_script("train_slurm.sh", tree, settings, *again.command_flags()).communicate(timeout=120)
    assert f"steps {saved} to {saved + 2}" in output
    assert again.rows()[-1]["step"] == saved + 2

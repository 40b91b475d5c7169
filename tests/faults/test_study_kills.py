"""The study in real processes: it is killed and continues, and two of them share its runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

import arms
import study
from test_study import MINIATURES, lines_of


def start(out):
    command = [sys.executable, study.__file__, "--miniature", "--out", out, "--only", *MINIATURES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for(process, pattern, out):
    until = time.monotonic() + 120
    while not list(out.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"{pattern} did not come"
        time.sleep(0.02)


def test_a_study_that_is_killed_continues_and_runs_nothing_twice(tmp_path):
    process = start(tmp_path)
    wait_for(process, "study/4-8-16*/*/log.txt", tmp_path)  # the second run has begun
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = lines_of(tmp_path / "study.csv")
    assert {row["arm"] for row in first} == {MINIATURES[0]}
    (log,) = tmp_path.glob("study/16-fixed*/train.log")
    before = log.stat().st_mtime_ns
    process = start(tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    rows = lines_of(tmp_path / "study.csv")
    assert rows[: len(first)] == first and log.stat().st_mtime_ns == before
    keys = [tuple(row[name] for name in ("arm", "kind", "step", "frames")) for row in rows]
    assert len(set(keys)) == len(keys)
    made = [(name, str(frames)) for name in MINIATURES for frames in arms.BY_NAME[name].lengths]
    assert [(key[0], key[3]) for key in keys if key[1] == "sample"] == made
    assert len(list(tmp_path.glob("study/4-8-16*/*/metrics.jsonl"))) == 1  # the same run continued
    flops = [float(row["flops"]) for row in rows if row["kind"] == "train" and row["arm"] == MINIATURES[0]]
    assert max(flops) == pytest.approx(arms.phases_of(arms.BY_NAME[MINIATURES[0]], 1.0, arms.MINIATURE)[1], rel=1e-4)


def test_two_processes_at_once_share_the_runs_and_lose_no_row(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("all is done" in output for output in outputs)
    started = [line for output in outputs for line in output.splitlines() if " runs to do; " in line]
    assert len(started) == len(MINIATURES)  # none of them twice
    rows = lines_of(tmp_path / "study.csv")
    assert {row["arm"] for row in rows if row["kind"] == "sample"} == set(MINIATURES)
    assert len({tuple(row[name] for name in ("arm", "kind", "step", "frames")) for row in rows}) == len(rows)

"""The studies in real processes: one is killed and continues, two share its runs, the quickstart is a tiny one."""

import signal
import sys

import seeds
import study
from faults import wait_until
from process import spawn
from test_studies import SAMPLED, TWO_ARMS, lines_of


def start(script, out, *flags):
    return spawn(sys.executable, script.__file__, "--miniature", "--out", out, *flags)


def finish(*processes):
    """What they print; they have to end well."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return outputs


def rows_of(out):
    """The rows of study.csv, none of which has come twice."""
    rows = lines_of(out / "study.csv")
    assert len({tuple(row[name] for name in ("arm", "kind", "step", "frames")) for row in rows}) == len(rows)
    return rows


def test_a_study_that_is_killed_continues_and_runs_nothing_twice(tmp_path):
    process = start(study, tmp_path, "--only", *TWO_ARMS)
    wait_until(lambda: list(tmp_path.glob("study/4-8-16*/*/log.txt")), process, timeout=240)  # the second run begins
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first, (log,) = rows_of(tmp_path), tmp_path.glob("study/16-fixed*/train.log")
    assert {row["arm"] for row in first} == {TWO_ARMS[0]}
    before = log.stat().st_mtime_ns
    finish(start(study, tmp_path, "--only", *TWO_ARMS))
    rows = rows_of(tmp_path)
    assert rows[: len(first)] == first and log.stat().st_mtime_ns == before
    assert [(row["arm"], row["frames"]) for row in rows if row["kind"] == "sample"] == SAMPLED
    assert len(list(tmp_path.glob("study/4-8-16*/*/metrics.jsonl"))) == 1  # the same run continued


def test_two_processes_at_once_share_the_runs_and_lose_no_row(tmp_path):
    outputs = finish(*(start(study, tmp_path, "--only", *TWO_ARMS) for _ in range(2)))
    assert all("all is done" in output for output in outputs)
    started = [line for output in outputs for line in output.splitlines() if " runs to do; " in line]
    assert len(started) == len(TWO_ARMS)  # none of them twice
    assert {row["arm"] for row in rows_of(tmp_path) if row["kind"] == "sample"} == set(TWO_ARMS)


def test_a_tiny_quickstart_is_trained_and_scored(tmp_path):
    (output,) = finish(start(seeds, tmp_path, "--seeds", 0))
    assert "| frames | lowest direction accuracy (%) | median |" in output
    assert len(list(tmp_path.glob("seeds/seed0/samples-f*/motion.json"))) == len(seeds.LENGTHS)

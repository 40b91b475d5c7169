"""The studies in real processes: some share the runs, one of them is killed, and the quickstart is
a tiny one.
"""

import signal
import sys

import seeds
import study
from process import end, spawn, wait_until
from test_studies import SAMPLED, TWO_ARMS, lines_of


def start(script, out, *flags):
    return spawn(sys.executable, script.__file__, "--miniature", "--out", out, *flags)


def test_processes_at_once_share_the_runs_also_of_a_killed_one_and_run_nothing_twice(tmp_path):
    killed, other = (start(study, tmp_path, "--only", *TWO_ARMS) for _ in range(2))
    wait_until(
        lambda: len(list(tmp_path.glob("study/*/*/log.txt"))) == 2, killed
    )  # each of them trains a run
    killed.kill()
    again = start(study, tmp_path, "--only", *TWO_ARMS)
    outputs = [
        end(killed, -signal.SIGKILL),
        *(end(process, timeout=600) for process in (other, again)),
    ]
    assert all("all is done" in output for output in outputs[1:])
    started = [
        line for output in outputs for line in output.splitlines() if " runs to do; " in line
    ]
    assert len(started) == len(TWO_ARMS) + 1
    rows = lines_of(tmp_path / "study.csv")
    assert len(
        {tuple(row[name] for name in ("arm", "kind", "step", "frames")) for row in rows}
    ) == len(rows)
    assert sorted((row["arm"], row["frames"]) for row in rows if row["kind"] == "sample") == sorted(
        SAMPLED
    )
    assert len(list(tmp_path.glob("study/*/*/metrics.jsonl"))) == len(
        TWO_ARMS
    )  # the killed run continued


def test_a_tiny_quickstart_is_trained_and_scored(tmp_path):
    output = end(start(seeds, tmp_path, "--seeds", 0), timeout=600)
    assert "| frames | lowest direction accuracy (%) | median |" in output
    assert len(list(tmp_path.glob("seeds/seed0/samples-f*/motion.json"))) == len(seeds.LENGTHS)

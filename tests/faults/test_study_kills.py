"""The studies in real processes: some share the runs, one of them is killed, and the quickstart is
a tiny one.
"""

import json
import signal
import sys

import seeds
import study
from process import end, spawn, wait_until
from test_studies import SEED, TWO_ARMS


def start(script, out, *flags):
    return spawn(sys.executable, script.__file__, "--miniature", "--out", out, *flags)


def test_processes_at_once_share_the_runs_also_of_a_killed_one_and_run_nothing_twice(tmp_path):
    killed, other = (start(study, tmp_path, "--only", *TWO_ARMS, *SEED) for _ in range(2))
    # Each of them trains a run
    wait_until(lambda: len(list(tmp_path.glob("runs/*/*/log.txt"))) == 2, killed)
    killed.kill()
    again = start(study, tmp_path, "--only", *TWO_ARMS, *SEED)
    output = end(killed, -signal.SIGKILL)
    for process in (other, again):
        output_of_process = end(process, timeout=600)
        assert "all is done" in output_of_process
        output += output_of_process
    assert output.count(" runs to do; ") == len(TWO_ARMS) + 1
    rows = json.loads((tmp_path / "study.json").read_text())
    assert sorted(row["arm"] for row in rows) == sorted(TWO_ARMS)
    # The killed run continued
    assert len(list(tmp_path.glob("runs/*/*/metrics.jsonl"))) == len(TWO_ARMS)


def test_a_tiny_quickstart_is_trained_and_scored(tmp_path):
    output = end(start(seeds, tmp_path, "--seeds", 0), timeout=600)
    assert "| frames | lowest direction accuracy (%) | median |" in output
    assert len(list(tmp_path.glob("runs/quickstart/0/*/motion.json"))) == len(seeds.LENGTHS)

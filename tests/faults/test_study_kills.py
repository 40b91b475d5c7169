"""The studies in real processes: some share the runs, one of them is killed, and the quickstart is
a tiny one.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import lab
import seeds
import study
from process import descendants, end, spawn, wait_gone, wait_until
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


def test_the_commands_of_a_shell_script_end_with_a_killed_study(tmp_path):
    script = tmp_path / "long.sh"
    script.write_text("sleep 100\ntrue\n")
    code = f"""
import lab
run = lab.Run(lab.Path({str(tmp_path / "rows.json")!r}), {{"seed": 0}})
run.folder.mkdir(parents=True)
run.script({str(script)!r})
"""
    path = {"PYTHONPATH": str(Path(lab.__file__).parent)}
    killed = spawn(sys.executable, "-c", code, environment=path, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(descendants(killed.pid)) == 3, killed)  # a fork, bash, sleep
    commands = descendants(killed.pid)
    killed.kill()
    wait_gone(commands)
    assert killed.wait() == -signal.SIGKILL


def test_a_study_that_measured_with_several_threads_runs_more_scripts(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text("import torch\ntorch.ones(2_000_000).exp()\nprint(torch.get_num_threads())")
    code = f"""
import lab, torch
class Measured(lab.Run):
    def row(self):
        torch.ones(2_000_000).exp()
        return self.about | {{"values": {{"": {{}}}}}}
run = Measured(lab.Path({str(tmp_path / "rows.json")!r}), {{"seed": 0}})
run.folder.mkdir(parents=True)
lab.finish([run])
run.script({str(script)!r})
"""
    environment = {"PYTHONPATH": str(Path(lab.__file__).parent), "OMP_NUM_THREADS": "2"}
    end(spawn(sys.executable, "-c", code, environment=environment), timeout=60)
    assert (tmp_path / "runs/0/threads.log").read_text() == "2\n"


def test_a_tiny_quickstart_is_trained_and_scored(tmp_path):
    output = end(start(seeds, tmp_path, "--seeds", 0), timeout=600)
    assert "| frames | training shift | lowest direction accuracy (%) | median |" in output
    for shift in seeds.SHIFTS:
        scores = [*tmp_path.glob(f"runs/quickstart/0-{shift}/*/motion.json")]
        assert len(scores) == len(seeds.LENGTHS)

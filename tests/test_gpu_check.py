"""The parts of scripts/gpu_check.py that decide: errors, limits, verdicts, kills. Nothing here runs all of it."""

import math
import select
import signal
import subprocess
import sys
import tempfile
from copy import deepcopy

import pytest
import torch

import gpu_check
from models import model_config
from training import run_main


def test_a_relative_error_is_the_norm_of_the_difference_over_that_of_the_reference():
    reference = torch.tensor([3.0, 4.0])
    assert gpu_check.relative_error(torch.tensor([3.0, 4.5]).bfloat16(), reference) == pytest.approx(0.1)


@pytest.mark.parametrize("what", ["nothing", "positions", "one bias"])
def test_the_limits_of_bf16_pass_rounding_and_no_mistake(what):
    size = {"num_classes": 3, "num_frames": 6, "temporal_patch_size": 4, "depth": 2, "input_size": 8, "use_rope": True}
    network = gpu_check.random_network(model_config("EqM-Ti/4", **size))
    torch.manual_seed(0)
    x, direction = (torch.randn(1, 4, 6, 8, 8, dtype=torch.float64) for _ in range(2))
    inputs = x, torch.tensor([1]), torch.tensor([0.04]), direction
    reference = gpu_check.outputs_and_gradients(network, *inputs, "fp32")
    wrong = deepcopy(network)
    if what == "positions":
        wrong.rope.theta = 1.0
    if what == "one bias":
        wrong.blocks[1].attn.proj.bias.data.zero_()
    output, gradients = gpu_check.network_errors(wrong, reference, inputs, "bf16")
    limits = gpu_check.ERRORS["bf16"]
    assert (output <= limits[0] and gradients <= limits[1]) == (what == "nothing")


def test_a_row_above_its_limit_or_without_a_value_fails_and_is_named(capsys):
    checks = gpu_check.Checks("title")
    for what, value in (("equal", 0.1), ("above", 0.11), ("missing", math.nan)):
        checks.add(what, value, 0.1)
    assert checks.failed == ["above", "missing"]
    assert checks.summary() == "2 of 3 checks FAILED: above; missing"
    assert "FAILED: above: 0.11, at most 0.1" in capsys.readouterr().out


def test_each_row_has_as_many_cells_as_its_header():
    checks = gpu_check.Checks("title")
    checks.part("Part", "what it does")
    checks.add("a", 1e-7, 1e-5, "note")
    checks.part("Other part", "what it does", "| what | s | |\n|---|---|---|")
    checks.show("b", 1.5, "note")
    table, other = ([line.count("|") for line in part.splitlines() if "|" in line] for part in split(checks))
    assert table == [6] * 3
    assert other == [4] * 3


def split(checks):
    return "\n".join(checks.lines).split("## ")[1:]


@pytest.mark.parametrize(
    ("row", "other", "wanted"),
    [
        ({"a": 1.1, "b": 4.0}, {"a": 1.0, "b": 2.0}, 1.0),
        ({"a": 2.0, "b": 0}, {"a": 2.0, "b": 0}, 0.0),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, math.nan),  # a value is missing
        ({"a": 1.0, "b": None}, {"a": 1.0, "b": None}, math.nan),  # it was not finite
        ({}, {}, math.nan),  # neither run has ended well
    ],
)
def test_two_rows_differ_by_their_worst_value_and_a_missing_one_is_not_equal(row, other, wanted):
    assert gpu_check.distance(row, other, ["a", "b"]) == pytest.approx(wanted, nan_ok=True)


def test_of_a_log_our_first_error_counts_and_leaves_the_table_whole():
    torchrun = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\n"
    assert gpu_check.error_line(f"start\ntrain.py: error: a | b\n{torchrun}") == "train.py: error: a / b"
    assert gpu_check.error_line(f"Traceback\n  code\nRuntimeError: first\n{torchrun}") == "RuntimeError: first"
    assert gpu_check.error_line("start\rend\n\n") == "end"
    assert gpu_check.error_line("") == "no output"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_failed_row_gives_status_1_and_is_named(value, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "check_outputs", lambda checks, args: checks.add("the row", value, 0.5))
    monkeypatch.setattr(gpu_check, "make_runs", lambda root, args: None)
    for part in ("flags", "ranks", "resume", "speed", "save"):
        monkeypatch.setattr(gpu_check, f"check_{part}", lambda *_: {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the logs stay if a row failed
    run_main(gpu_check, 2, "--out", tmp_path / "new" / "gpu.md", status=int(value))
    text = (tmp_path / "new" / "gpu.md").read_text()
    if value:
        assert "1 of 1 checks FAILED: the row" in text
        assert "gpu_check.py: error: 1 of 1 checks FAILED: the row; the logs" in capsys.readouterr().err
    else:
        assert "All 1 checks are ok" in text


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_kill_takes_the_children_in_sessions_of_their_own_as_well():
    child = "import time; print(1, flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
    parent += "import time; time.sleep(600)"  # it does not end by itself when the child does
    command = [sys.executable, "-c", parent]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
    assert process.stdout.readline() == b"1\n"  # the child has started, and holds the pipe as long as it lives
    gpu_check.kill_all(process)
    assert process.returncode == -signal.SIGKILL
    ready, _, _ = select.select([process.stdout], [], [], 30)
    assert ready and process.stdout.read() == b""

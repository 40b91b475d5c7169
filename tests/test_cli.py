"""Flags, and messages of one line."""

import argparse
import pickle
import re
import shutil
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from process import end, python, spawn
from runtime import cli
from runtime.atomic import link
from runtime.cli import UserError, number
from runtime.runs import make_run_folder
from training import ROOT, record_calls
from video.index import CorruptDataError

# Flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, values",
    [
        ([], {}),
        (["--steps=3"], {"steps": 3}),
        (["--names", "a"], {"names": ["a"]}),  # typed, though it is the default
        (["--no-fast"], {"fast": False}),
    ],
)
def test_flags_are_frozen_and_know_which_were_typed(words, values):
    parser = cli.ArgumentParser()
    parser.add_argument("--steps", type=number(int, least=1))
    parser.add_argument("--names", nargs="+", default=["a"])
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True)
    parser.set_defaults(kind="x")
    flags = parser.parse_args(words)
    expected = {"steps": None, "names": ["a"], "fast": True, "kind": "x"} | values
    changes = {"steps": 5, "window": 1}
    resolved = flags.resolve(**changes)
    copy = pickle.loads(pickle.dumps(resolved))  # as one that rank 0 sends to the others
    for result, result_values in (
        (flags, expected),
        (resolved, expected | changes),
        (copy, expected | changes),
    ):
        assert vars(result) == result_values
        assert result.typed == values.keys()
        with pytest.raises(AttributeError, match="steps: flags are frozen"):
            result.steps = 6


# bf16: whether the GPU has it, None: no GPU; kept: the precision of the resumed run
@pytest.mark.parametrize(
    "bf16, energy, kept, typed, expected",
    [
        (True, False, None, None, "bf16"),
        (True, True, None, None, "fp32"),  # the gradient of an energy stays exact
        (False, False, None, None, "fp32"),
        (None, False, None, None, "fp32"),
        (True, False, "fp32", None, "fp32"),  # a resumed run keeps its own
        (True, True, "bf16", "tf32", "tf32"),  # what is typed comes first
        (False, False, "bf16", None, "Tesla T4; use fp32 or fp16"),
        (False, False, None, "tf32", "Tesla T4; use fp32 or fp16"),
        (None, False, None, "fp16", "a machine without a GPU; use fp32 or bf16"),
    ],
)
def test_the_flag_the_run_or_the_device_sets_the_precision(
    bf16, energy, kept, typed, expected, monkeypatch, capsys
):
    for name, function in {
        "is_available": lambda: bf16 is not None,
        "is_bf16_supported": lambda including_emulation: bf16 or including_emulation,
        "get_device_name": lambda device: "Tesla T4",
        "device": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    if " " in expected:
        with pytest.raises(UserError, match=f"^--precision {typed or kept}.*{expected}$"):
            cli.resolve_precision(typed, energy, kept)
        return
    assert cli.resolve_precision(typed, energy, kept) == expected
    printed = capsys.readouterr().out
    assert ("fp16 is faster" in printed) == (bf16 is False)  # a GPU without bf16
    assert printed.count("\n") <= 1


# Messages -----------------------------------------------------------------------------------------


# If another rank still runs after ten seconds, it reports
@pytest.mark.parametrize("rank, before", [("0", []), ("1", [(10, "")])])
def test_an_error_is_one_line_and_other_ranks_give_rank_0_ten_seconds(
    rank, before, monkeypatch, capsys
):
    slept = []

    def sleep(seconds):
        slept.append((seconds, capsys.readouterr().err))

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.sys, "argv", ["/some/where/train.py"])
    monkeypatch.setattr(cli.time, "sleep", sleep)
    with pytest.raises(SystemExit, match="2"):
        cli.fail("--lr:\n  too high")
    assert slept == before
    assert capsys.readouterr() == ("", "train.py: error: --lr: too high\n")


def test_only_rank_0_prints_logs_and_reports_an_interrupt(monkeypatch, capsys, tmp_path):
    log = tmp_path / "log.txt"
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        cli.say(f"hello from {rank}", log)
        cli.say("not for the log")
    assert log.read_text() == "hello from 0\n"
    with pytest.raises(SystemExit, match="130"), cli.one_line_errors():
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("hello from 0\nnot for the log\n", "")


def test_warnings_are_lines_and_the_log_has_the_earlier_ones(capsys, tmp_path):
    with cli.one_line_errors():
        warnings.warn("narrow\nmodel", stacklevel=1)
        cli.warnings_as_lines(tmp_path / "log.txt")
        warnings.warn("later", stacklevel=1)
    assert capsys.readouterr() == ("note: narrow\\nmodel\nnote: later\n", "")
    assert (tmp_path / "log.txt").read_text() == "note: narrow\\nmodel\nnote: later\n"


@pytest.mark.parametrize(
    "error, status, words",
    [
        (KeyboardInterrupt(), 130, "error: stopped by SIGINT: run the same command again"),
        (UserError("wrong\nflag"), 1, "wrong flag"),
        (CorruptDataError("2 of 6 files"), 2, "2 of 6 files"),  # as when found before training
        (
            OSError(28, "No space left on device", __file__),
            1,
            f"error: {__file__} can't be written (No space left on",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            1,
            "lower --num-workers",
        ),
        (RuntimeError("[1] Connection closed by peer [2]"), 1, "another rank has ended"),
        (RuntimeError("[gloo/x] Timed out waiting 3000ms"), 1, "waited too long for the others"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory\nat"),
            1,
            "too little memory (DefaultCPUAllocator",
        ),
        (torch.distributed.DistNetworkError("timed out"), 1, "the ranks can't reach each other"),
    ],
)
@pytest.mark.parametrize("has_traceback", [False, True])
def test_a_failure_is_one_line_and_a_traceback_with_eqm_traceback(
    error, status, words, has_traceback, monkeypatch, capsys
):
    monkeypatch.setenv("EQM_TRACEBACK", str(int(has_traceback)))
    with pytest.raises(SystemExit, match=str(status)), cli.one_line_errors():
        raise error
    *traceback, line = capsys.readouterr().err.splitlines()
    assert words in line
    assert bool(traceback) == has_traceback
    assert ("raise error" in "".join(traceback)) == has_traceback


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), cli.one_line_errors():
        raise RuntimeError("a bug")


def after(cause, error):
    """An error that is raised while another one is handled."""
    error.__context__ = cause
    return error


FULL = OSError(28, "No space left on device")
IN_TORCH = after(FULL, RuntimeError("unexpected pos 768 vs 662"))
IN_SAFETENSORS = ValueError("I/O error (os error 28)")


@pytest.mark.parametrize("error", [FULL, IN_TORCH, IN_SAFETENSORS])
def test_a_full_disk_is_named_with_the_checkpoints_to_delete(error, tmp_path):
    folder = make_run_folder(tmp_path, "a") / "checkpoints"
    for step in (1, 2, 3):
        (folder / f"{step:07d}.pt").write_bytes(bytes(2000))
    link(folder / "0000003.pt", "latest.pt")
    disk = next(path for path in folder.parents if path.is_mount())
    words = (
        rf"latest.pt can't be written \(No space left on device; the disk {disk} .*B free\); "
        r".* delete 0000001.pt to 0000002.pt \(0.004 MB"
    )
    with pytest.raises(UserError, match=words), cli.writing(folder / "latest.pt"):
        raise error
    shutil.rmtree(folder.parent)
    with pytest.raises(UserError, match=f"^{folder.parent} was deleted or moved"):
        cli.append(folder.parent / "log.txt", ["a line"])


@pytest.mark.parametrize(
    "error, text",
    [
        (OSError(13, "Permission denied"), r"a can't be written \(Permission denied\)$"),
        (RuntimeError("a bug"), "^a bug$"),
        (
            after(OSError(5, "Input/output error"), UserError("--given x: can't be read")),
            "^--given x: can't be read$",
        ),
    ],
)
def test_other_errors_of_a_write_keep_their_meaning(error, text, tmp_path):
    with pytest.raises((UserError, RuntimeError), match=text), cli.writing(tmp_path / "a"):
        raise error


def test_a_bar_in_a_file_prints_one_line_per_minute_without_escape_codes(capfd, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))  # each look at it takes 10 s
    with cli.Bar(total=20, desc="encoding", unit="frame") as bar:
        for _ in range(20):
            bar.set_postfix_str("loss 1.000")
            cli.say("a line")
            bar.update()
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == 20 * "a line\n"
    assert 3 <= len(lines) <= 8
    pattern = r"encoding: \d+ of 20 frames after \S+, \S+ left, loss 1.000"
    for line in lines:
        assert re.fullmatch(pattern, line)


@pytest.mark.parametrize("script", ["EqM/train.py", "datasets/check.py", "scripts/gallery.py"])
def test_a_script_outside_the_environment_names_setup_sh_in_one_line(script):
    process = spawn(sys.executable, "-S", ROOT / script)  # -S: without installed packages
    (line,) = end(process, 1).splitlines()
    assert line.startswith(f"{Path(script).name}: error: No module named ")
    assert "run 'bash scripts/setup.sh'" in line


@pytest.mark.parametrize("traceback, lines", [("0", 1), ("1", 3)])
def test_ctrl_c_during_imports_is_one_line(traceback, lines):
    process = python("import uncaught; raise KeyboardInterrupt", EQM_TRACEBACK=traceback)
    assert len(end(process, -signal.SIGINT).splitlines()) == lines


def test_a_second_loader_process_that_ends_does_not_hide_the_error(monkeypatch, capsys):
    def worker_failed(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, worker_failed)
    record_calls(monkeypatch, cli, "fail", lambda *_, **__: signal.raise_signal(signal.SIGCHLD))
    try:
        with pytest.raises(SystemExit, match="^1$"), cli.one_line_errors():
            worker_failed()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "a loader process has ended" in capsys.readouterr().err

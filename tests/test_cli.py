"""Flags, and messages of one line."""

import argparse
import re
import warnings
from contextlib import nullcontext

import pytest
import torch

from process import python
from runtime import cli
from runtime.cli import UserError, number

# Flags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bounds", "good", "bad"),
    [
        (int, {"least": 1}, ["1", "7"], ["0", "-3"]),
        (float, {"above": 0}, ["0.001", "1e9"], ["0", "-1", "nan"]),
        (float, {"least": 0, "most": 1}, ["0", "1", "0.5"], ["-0.1", "1.1", "nan"]),
        (float, {"most": 1}, ["-5", "1"], ["2", "nan"]),
    ],
)
def test_a_number_keeps_within_its_bounds(kind, bounds, good, bad):
    parse = number(kind, **bounds)
    for text in good:
        assert parse(text) == kind(text)
        assert type(parse(text)) is kind
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"found {text}, wanted a number "):
            parse(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps", "found 0", "at least 1"]),
        (["--steps", "many"], ["--steps", "many", "int"]),
        (["--steps"], ["--steps"]),
        (["--stpes", "3"], ["--stpes"]),
        (["--step", "3"], ["--step"]),  # no abbreviations
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(arguments, words, capsys):
    parser = cli.ArgumentParser()
    parser.add_argument("--steps", type=number(int, least=1))
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert vars(parser.parse_args(["--steps", "3"])) == {"steps": 3}


def test_a_folder_that_can_be_written_is_found_without_making_it(tmp_path):
    cli.check_writable("--folder", tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--folder .*file is not a writable folder"):
            cli.check_writable("--folder", folder)


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch report a GPU with or without bf16, or none."""

    def pretend(bf16=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bf16 is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    return pretend


@pytest.mark.parametrize(
    ("bf16", "energy", "kept", "given", "settled"),
    [
        (True, False, None, None, "bf16"),
        (True, True, None, None, "fp32"),  # the gradient of an energy stays exact
        (False, False, None, None, "fp32"),
        (None, False, None, None, "fp32"),  # without a GPU
        (True, False, "fp32", None, "fp32"),  # a resumed run keeps its own
        (None, False, "bf16", None, "bf16"),
        (True, False, "bf16", "tf32", "tf32"),  # what is given comes first
        (True, True, None, "bf16", "bf16"),
    ],
)
def test_the_precision_that_is_left_out_is_that_of_the_run_else_what_suits_device_and_model(
    bf16, energy, kept, given, settled, gpu, capsys
):
    gpu(bf16)
    args = argparse.Namespace(precision=given)
    cli.settle_precision(args, energy, kept)
    assert args.precision == settled
    printed = capsys.readouterr().out
    assert ("fp16 is faster" in printed) == (bf16 is False)  # a GPU without bf16
    assert printed.count("\n") <= 1


@pytest.mark.parametrize(
    ("bf16", "precision", "words"),
    [
        (False, "bf16", ["--precision bf16", "Tesla T4", "fp16 or fp32"]),
        (False, "tf32", ["--precision tf32", "Tesla T4", "fp16 or fp32"]),
        (None, "fp16", ["--precision fp16", "needs a GPU"]),
        (None, "tf32", ["--precision tf32", "needs a GPU"]),
    ],
)
@pytest.mark.parametrize("source", ["given", "kept"])
def test_a_precision_that_the_machine_lacks_is_one_line(source, bf16, precision, words, gpu):
    gpu(bf16)
    args = argparse.Namespace(precision=precision if source == "given" else None)
    with pytest.raises(UserError) as error:
        cli.settle_precision(args, energy=False, kept=precision)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


# Messages -----------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_an_exit_status_and_of_two_ranks_only_rank_0_reports_it():
    code = "from runtime import cli\ncli.RANK_0_SPEAKS_FIRST = 3600\n"
    code += "cli.fail(f'rank {cli.rank()} of 2:\\n  too few')\nprint('alive')"
    ranks = [python(code, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    assert ranks[0].communicate() == ("", "train.py: error: rank 0 of 2: too few\n")
    assert ranks[0].returncode == 2
    assert ranks[1].poll() is None  # still waiting; torchrun ends it now
    ranks[1].kill()
    assert ranks[1].communicate() == ("", "")


@pytest.mark.parametrize("status", [1, 2])  # 1: went wrong while running
@pytest.mark.parametrize(
    ("rank", "expected"),
    [("0", []), ("1", [("sleep", 10, "")])],  # nothing was printed before, but if it still runs, it reports
)
def test_rank_0_reports_at_once_and_another_leaves_it_ten_seconds(rank, expected, status, monkeypatch, capsys):
    events = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.time, "sleep", lambda s: events.append(("sleep", s, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as ended:
        cli.fail("wrong", status)
    assert events == expected
    assert capsys.readouterr().err.endswith("error: wrong\n")
    assert ended.value.code == status


def test_only_rank_0_says_and_logs(monkeypatch, capsys, tmp_path):
    log = tmp_path / "log.txt"
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        cli.say(f"hello from {rank}", log)
        cli.say("not for the log")
    assert log.read_text() == "hello from 0\n"
    assert capsys.readouterr().out == "hello from 0\nnot for the log\n"


def test_warnings_are_lines_and_those_before_there_was_a_log_are_in_it_too(capsys, tmp_path):
    with cli.one_line_errors():
        warnings.warn("narrow\nmodel", stacklevel=1)
        cli.warnings_as_lines(tmp_path / "log.txt")
        warnings.warn("later", stacklevel=1)
    assert capsys.readouterr() == ("note: narrow\\nmodel\nnote: later\n", "")
    assert (tmp_path / "log.txt").read_text() == "note: narrow\\nmodel\nnote: later\n"


def test_an_interrupt_before_training_has_begun_is_one_line_and_the_status_of_a_shell(capsys):
    with pytest.raises(SystemExit) as ended, cli.one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    error = capsys.readouterr().err
    assert "error: interrupted" in error and error.count("\n") == 1


def test_a_bar_in_a_file_is_a_line_a_minute_without_escape_codes(capfd, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))  # each look at it takes 10 s
    with cli.Bar(total=20, desc="encoding", unit="frame") as bar:
        for _ in range(20):
            bar.set_postfix_str("loss 1.000")
            cli.say("a line")
            bar.update()
    out, err = capfd.readouterr()
    assert out == 20 * "a line\n"
    lines = err.splitlines()
    assert 3 <= len(lines) <= 8
    assert all(re.fullmatch(r"encoding: \d+ of 20 frames after \S+, \S+ left, loss 1.000", line) for line in lines), err

"""Flags, and messages of one line."""

import argparse

import pytest

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
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words)


def test_a_folder_that_can_be_written_is_found_without_making_it(tmp_path):
    cli.check_writable("--folder", tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--folder .*file is not a writable folder"):
            cli.check_writable("--folder", folder)


# Messages -----------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_an_exit_status():
    process = python("from runtime import cli\ncli.fail('--num-frames 2:\\n  too few')\nprint('alive')")
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert err == "train.py: error: --num-frames 2: too few\n"


def test_what_goes_wrong_while_running_has_another_status(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as exit_:
        cli.fail("disk full", status=1)
    assert exit_.value.code == 1


def noted_failure(monkeypatch, capsys, rank):
    """What fail() does, in order: how long it sleeps, what it prints, how it exits."""
    events = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.time, "sleep", lambda s: events.append(("sleep", s, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as exit_:
        cli.fail("wrong")
    return events, capsys.readouterr().err, exit_.value.code


def test_rank_0_reports_at_once(monkeypatch, capsys):
    events, err, status = noted_failure(monkeypatch, capsys, "0")
    assert events == []
    assert err.endswith("error: wrong\n")
    assert status == 2


def test_another_rank_leaves_rank_0_ten_seconds_before_it_reports(monkeypatch, capsys):
    events, err, status = noted_failure(monkeypatch, capsys, "1")
    assert events == [("sleep", 10, "")]  # nothing was printed before
    assert err.endswith("error: wrong\n")  # but if it still runs, it reports
    assert status == 2


def test_of_two_ranks_that_fail_only_rank_0_reports():
    code = "from runtime import cli\ncli.RANK_0_SPEAKS_FIRST = 3600\ncli.fail(f'wrong on {cli.rank()}')"
    ranks = [python(code, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    _, err = ranks[0].communicate()
    assert err == "train.py: error: wrong on 0\n"
    assert ranks[1].poll() is None  # still waiting; torchrun ends it now
    ranks[1].kill()
    assert ranks[1].communicate() == ("", "")


def test_only_rank_0_says_and_logs(monkeypatch, capsys, tmp_path):
    log = tmp_path / "log.txt"
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        cli.say(f"hello from {rank}", log)
        cli.say("not for the log")
    assert log.read_text() == "hello from 0\n"
    assert capsys.readouterr().out == "hello from 0\nnot for the log\n"

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import cli, distributed
from runtime.cli import UserError, number
from runtime.rng import generator, normal, uniform

ENGINE = Path(distributed.__file__).parents[1]


def draw(*key):
    return torch.rand(4, generator=generator(*key)).tolist()


def python(code, **environment):
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = '/some/where/train.py'\n{code}"]
    environment = os.environ | {"PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )


# Random draws -------------------------------------------------------------------------------------------------------


def test_a_draw_is_a_function_of_its_key_alone():
    first = draw(0, "noise", 5, 17)
    torch.rand(100)
    draw(0, "noise", 5, 18)
    assert draw(0, "noise", 5, 17) == first


@pytest.mark.parametrize(
    "other", [(1, "noise", 5, 17), (0, "flip", 5, 17), (0, "noise", 6, 17), (0, "noise", 5, 18), (0, "noise", 51, 7)]
)
def test_another_seed_purpose_or_number_is_another_draw(other):
    assert draw(*other) != draw(0, "noise", 5, 17)


def test_a_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    uniform(0, "gamma", 0, range(3))
    normal(0, "noise", 0, range(3), (2, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_the_same_in_another_process():
    code = "import torch\nfrom runtime.rng import generator\n"
    code += "print(torch.rand(4, generator=generator(0, 'noise', 3)).tolist())"
    out, err = python(code, PYTHONHASHSEED="123").communicate()
    assert out.strip() == str(draw(0, "noise", 3)), err


def test_noise_of_a_sample_does_not_depend_on_who_else_is_drawn():
    together = normal(0, "noise", 7, [4, 9, 2], (3, 2, 5))
    assert together.shape == (3, 3, 2, 5)
    assert together.dtype == torch.float32
    for row, sample in zip(together, [4, 9, 2], strict=True):
        assert torch.equal(row, normal(0, "noise", 7, [sample], (3, 2, 5))[0])


def test_noise_is_standard_normal_within_and_across_samples():
    noise = normal(0, "noise", 0, range(400), (100,))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)  # 4 standard errors
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean(dim=1).std().item() == pytest.approx(0.1, abs=0.02)  # samples are independent


def test_uniform_numbers_fill_the_interval_from_zero_to_one():
    u = uniform(0, "gamma", 0, range(1000))
    assert u.shape == (1000,)
    assert u.dtype == torch.float32
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u, bins=10, min=0, max=1)
    assert (counts - 100).abs().max() < 45  # 4.7 standard deviations
    assert torch.equal(u[[3, 500]], uniform(0, "gamma", 0, [3, 500]))


def test_no_samples_need_no_noise():
    assert normal(0, "noise", 0, [], (3, 2)).shape == (0, 3, 2)


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
        with pytest.raises(UserError, match=r"--folder .*file is not a folder"):
            cli.check_writable("--folder", folder)


# Errors -------------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_an_exit_status():
    process = python("from runtime import distributed\ndistributed.fail('--num-frames 2:\\n  too few')\nprint('alive')")
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
    monkeypatch.setattr(distributed.time, "sleep", lambda s: events.append(("sleep", s, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as exit_:
        cli.fail("wrong")
    return events, capsys.readouterr().err, exit_.value.code


def test_rank_0_speaks_at_once(monkeypatch, capsys):
    events, err, status = noted_failure(monkeypatch, capsys, "0")
    assert events == []
    assert err.endswith("error: wrong\n")
    assert status == 2


def test_another_rank_leaves_rank_0_ten_seconds_before_it_speaks(monkeypatch, capsys):
    events, err, status = noted_failure(monkeypatch, capsys, "1")
    assert events == [("sleep", 10, "")]  # nothing was printed before
    assert err.endswith("error: wrong\n")  # but if it still lives, it does speak
    assert status == 2


def test_of_two_ranks_that_fail_only_rank_0_is_heard():
    code = "from runtime import distributed as d\nd.PATIENCE = 3600\nd.fail(f'wrong on {d.rank()}')"
    ranks = [python(code, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    _, err = ranks[0].communicate()
    assert err == "train.py: error: wrong on 0\n"
    assert ranks[1].poll() is None  # still patient; torchrun ends it now
    ranks[1].kill()
    assert ranks[1].communicate() == ("", "")


# Ranks --------------------------------------------------------------------------------------------------------------


def test_alone_there_is_one_rank_and_nothing_to_exchange(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.broadcast({"a": 1}) == {"a": 1}
    assert distributed.gather("x") == ["x"]
    assert distributed.own_indices(4) == [0, 1, 2, 3]
    assert distributed.average(torch.tensor(3.0)) == 3
    assert distributed.collect([2, 0, 1], torch.tensor([20, 0, 10])).tolist() == [0, 10, 20]
    distributed.stop()


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_whole(count, world_size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    shares = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(distributed.own_indices(count))
    assert sorted(sum(shares, [])) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_only_rank_0_says_and_logs(monkeypatch, capsys, tmp_path):
    log = tmp_path / "log.txt"
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        cli.say(f"hello from {rank}", log)
        cli.say("not for the log")
    assert log.read_text() == "hello from 0\n"
    assert capsys.readouterr().out == "hello from 0\nnot for the log\n"


TWO_RANKS = """
import torch
from runtime.distributed import *
start()
mine = share(3)
print([
    broadcast(["from", rank()]),
    gather(rank() * 10),
    average(torch.tensor([1.0, 3.0]) * (1 + rank())).tolist(),
    None if (all := collect(mine, torch.tensor(mine) * 10)) is None else all.tolist(),
    None if (first := collect(share(1), normal(0, "noise", 0, share(1), (2,)))) is None else first.shape[0],
])
stop()
"""


def test_two_ranks_exchange_what_they_hold():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [python(TWO_RANKS, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in (0, 1)]
    shared = "[['from', 0], [0, 10], [1.5, 4.5], "
    for process, collected in zip(ranks, ("[0, 10, 20], 1]", "None, None]"), strict=True):
        out, err = process.communicate()
        assert out.strip() == shared + collected, err
        assert process.returncode == 0

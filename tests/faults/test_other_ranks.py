"""Runs of real processes that differ in ranks, machines or ways to compute, and learn the same."""

import os
import shutil
from dataclasses import replace
from shlex import split

import pytest

import train
from process import end, free_port, spawn
from training import OFTEN, PYTHON, ROOT, TINY, TORCHRUN, Training, on_two_ranks, run_here

STEPS = 7


def test_two_machines_may_have_checkpoint_and_data_on_their_own_disks(shapes, tmp_path):
    first = Training(shapes, tmp_path / "first", 2, flags=OFTEN)
    run_here(first)
    ranks_meet = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    paths = split("""
        --data-path shapes
        --results-dir results
        --ckpt start.pt
        --max-steps 4
    """)
    command = [*PYTHON, ROOT / "EqM/train.py", *TINY, *OFTEN, *paths]
    ranks = []
    for rank in (0, 1):
        machine = tmp_path / f"machine-{rank}"
        shutil.copytree(shapes, machine / "shapes")
        shutil.copyfile(first.folder / "checkpoints/latest.pt", machine / "start.pt")
        os.utime(machine / "start.pt", (rank, rank))  # copied at another time
        ranks.append(spawn(*command, cwd=machine, environment=ranks_meet | {"RANK": str(rank)}))
    for process in ranks:
        end(process, timeout=240)
    assert replace(first, results=tmp_path / "machine-0/results").saved()["step"] == 4


def test_causal_runs_learn_the_same_compiled_recomputed_and_sharded(shapes, tmp_path):
    flags = split(
        "--causal --num-frames 8 --own-context 0.5 --lr 0.02 --precision fp32 --val-every 3 "
        "--sample-every 0"
    )
    plain = Training(shapes, tmp_path / "plain", 6, flags=[*flags, "--log-every", 1])
    plain.run()
    for number, (launcher, more) in enumerate(
        [
            (PYTHON, "--compile"),
            (PYTHON, "--compile --grad-checkpoint selective"),
            (TORCHRUN, "--grad-checkpoint --shard"),
            (TORCHRUN, "--compile --shard"),
        ]
    ):
        other = replace(plain, results=tmp_path / f"{number}", launcher=launcher)
        other.run(*more.split(), timeout=600)
        for row, same in zip(plain.rows(), other.rows(), strict=True):
            for name in {"train_loss", "grad_norm", "val_loss"} & row.keys():
                assert same[name] == pytest.approx(row[name], rel=1e-3)


def test_a_run_continues_with_other_ranks_sharded_or_not_up_to_rounding(shapes, tmp_path, capsys):
    whole = Training(shapes, tmp_path / "whole", STEPS, flags=OFTEN)
    run_here(whole)
    parts = replace(whole, results=tmp_path / "parts")
    run_here(parts, stop_after=2)
    four = replace(parts, steps=4).command_flags("--resume")
    on_two_ranks(train, *four)  # a step with all that is done at the end of a run
    on_two_ranks(train, *replace(parts, steps=6).command_flags("--shard", "--resume"))
    capsys.readouterr()
    run_here(parts, "--resume", "--shard")
    assert "note: --shard: with one rank, nothing is sharded" in capsys.readouterr().out
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one == pytest.approx(other, rel=1e-3)

"""A run of real processes that is interrupted and continues with other numbers of workers and ranks."""

import os
import shutil
import socket
import subprocess
from dataclasses import replace

import pytest
import torch

from training import OFTEN, PYTHON, ROOT, TINY, TORCHRUN, Training, compare, run_here

STEPS = 7


@pytest.mark.parametrize("flags", [["--precision", "fp32"], ["--precision", "bf16"], ["--optimizer", "muon"]])
def test_two_ranks_resume_bit_for_bit_also_with_other_workers(flags, shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", STEPS, TORCHRUN, [*OFTEN, *flags])
    whole.run()
    parts = replace(whole, results=tmp_path / "parts")
    process = parts.start("--resume", "--num-workers", 2)
    parts.wait_for(2, process)
    process.terminate()
    assert "stopped by SIGTERM and saved" in process.communicate()[0]
    parts.run("--resume")
    assert compare(whole, parts) == []


def test_a_run_continues_with_another_number_of_ranks_up_to_rounding(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", STEPS, flags=OFTEN)
    run_here(whole)
    parts = replace(whole, results=tmp_path / "parts", launcher=TORCHRUN)
    run_here(parts, stop_after=2)
    parts.run("--resume")
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_two_machines_may_have_the_checkpoint_and_the_data_on_disks_of_their_own(shapes, tmp_path):
    first = Training(shapes, tmp_path / "first", 2, flags=OFTEN)
    run_here(first)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    flags = ["--data-path", "shapes", "--results-dir", "results", "--max-steps", 4, "--ckpt", "start.pt", *OFTEN]
    ranks = []
    for rank in (0, 1):
        machine = tmp_path / f"machine-{rank}"
        shutil.copytree(shapes, machine / "shapes")
        shutil.copyfile(first.folder / "checkpoints/latest.pt", machine / "start.pt")
        os.utime(machine / "start.pt", (rank, rank))  # copied at another time
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        command = [str(part) for part in [*PYTHON, ROOT / "EqM/train.py", *TINY, *flags]]
        ranks.append(subprocess.Popen(command, cwd=machine, env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    (saved,) = tmp_path.glob("machine-0/results/*/checkpoints/latest.pt")
    assert torch.load(saved, weights_only=True)["step"] == 4


def test_a_run_goes_on_sharded_and_back_and_says_that_one_rank_shards_nothing(shapes, tmp_path, capsys):
    whole = Training(shapes, tmp_path / "whole", 7, flags=OFTEN)
    run_here(whole)
    parts = replace(whole, results=tmp_path / "parts", launcher=TORCHRUN)
    run_here(parts, stop_after=2)
    replace(parts, steps=4).run("--shard", "--resume")
    capsys.readouterr()
    run_here(parts, "--resume", "--shard")
    assert "note: --shard: there is one rank, so nothing is sharded" in capsys.readouterr().out
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_two_ranks_share_a_cache_and_train_as_two_without(shapes, tmp_path):
    plain = Training(shapes, tmp_path / "plain", STEPS, TORCHRUN)
    plain.run()
    cached = replace(plain, results=tmp_path / "cached")
    cached.run("--cache-frames", "--num-workers", 1)
    assert compare(plain, cached) == []

"""train_vae.py in real processes that are killed and stopped for real."""

import signal
from dataclasses import replace

import pytest

from faults import descendants, end, kill_something, last_saved, start, storm, wait_gone
from training import PYTHON, TINY_VAE, TORCHRUN, Training, compare

OFTEN = ["--log-every", 1, "--val-every", 10, "--save-minutes", 0.001]


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    """A run of two ranks that nothing has disturbed."""
    results = tmp_path_factory.mktemp("undisturbed") / "r"
    training = Training(shapes, results, 20, TORCHRUN, OFTEN, TINY_VAE, script="train_vae.py")
    training.run()
    return training


def test_kills_lose_only_the_steps_since_the_last_checkpoint(undisturbed, tmp_path):
    killed = replace(undisturbed, results=tmp_path / "killed")
    storm(killed, 2, kill_something, seed=1)
    assert compare(undisturbed, killed) == []


def test_a_signal_to_torchrun_saves_and_ends_all_processes(undisturbed, tmp_path):
    stopped = replace(undisturbed, results=tmp_path / "stopped", steps=10_000)
    process = start(stopped, 3)
    others = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, saved = end(process, None), last_saved(stopped)
    assert f"and saved at step {saved}: to continue, run the same command with --resume" in output
    assert 'train_vae.py", line' not in output  # torchrun has a traceback of its own
    assert saved >= stopped.rows()[-1]["step"]
    wait_gone(others)


def test_two_ranks_equal_one_up_to_rounding(undisturbed, tmp_path):
    one = replace(undisturbed, results=tmp_path / "one", launcher=PYTHON)
    one.run()
    for alone, shared in zip(one.rows(), undisturbed.rows(), strict=True):
        assert alone == pytest.approx(shared, rel=2e-2)

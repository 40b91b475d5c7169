"""train_vae.py in real processes that are killed and stopped for real."""

from dataclasses import replace

import pytest

from faults import kill_something, storm
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


def test_two_ranks_equal_one_up_to_rounding(undisturbed, tmp_path):
    one = replace(undisturbed, results=tmp_path / "one", launcher=PYTHON)
    one.run()
    for alone, shared in zip(one.rows(), undisturbed.rows(), strict=True):
        assert alone == pytest.approx(shared, rel=2e-2)

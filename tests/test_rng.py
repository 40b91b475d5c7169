"""Random draws depend on (seed, purpose, stream, index) and on nothing else; test_distributed.py: on no process."""

import pytest
import torch

from runtime.rng import generator, normal, uniform


def random_numbers(*key):
    return torch.rand(4, generator=generator(*key)).tolist()


def test_a_draw_is_a_function_of_its_key_alone():
    first = random_numbers(0, "noise", 5, 17)
    torch.rand(100)
    random_numbers(0, "noise", 5, 18)
    assert random_numbers(0, "noise", 5, 17) == first


@pytest.mark.parametrize(
    "other", [(1, "noise", 5, 17), (0, "flip", 5, 17), (0, "noise", 6, 17), (0, "noise", 5, 18), (0, "noise", 51, 7)]
)
def test_another_seed_purpose_or_index_gives_other_random_numbers(other):
    assert random_numbers(*other) != random_numbers(0, "noise", 5, 17)


def test_a_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    uniform(0, "gamma", 0, range(3))
    normal(0, "noise", 0, range(3), (2, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_a_sample_does_not_depend_on_which_other_samples_are_drawn():
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

"""Random draws depend on (seed, purpose, stream, index) and on nothing else; test_distributed.py:
on no process.
"""

import pytest
import torch

from runtime.rng import generator, normal, uniform

KEY = (0, "noise", 5, 17)
OTHERS = [
    (1, "noise", 5, 17),
    (0, "flip", 5, 17),
    (0, "noise", 6, 17),
    (0, "noise", 5, 18),
    (0, "noise", 51, 7),
]


def test_a_draw_is_a_function_of_its_key_alone():
    def draw(key):
        return torch.rand(4, generator=generator(*key)).tolist()

    state = torch.get_rng_state()
    first = draw(KEY)
    assert all(draw(other) != first for other in OTHERS)
    uniform(0, "gamma", 0, range(3))
    normal(0, "noise", 0, range(3), (2, 2))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.rand(100)
    assert draw(KEY) == first


def test_noise_is_standard_normal_and_that_of_a_sample_does_not_depend_on_other_samples():
    together = normal(0, "noise", 7, [4, 9, 2], (3, 2, 5))
    assert together.shape == (3, 3, 2, 5)
    assert together.dtype == torch.float32
    for row, sample in zip(together, [4, 9, 2], strict=True):
        assert torch.equal(row, normal(0, "noise", 7, [sample], (3, 2, 5))[0])
    assert normal(0, "noise", 0, [], (3, 2)).shape == (0, 3, 2)
    noise = normal(0, "noise", 0, range(400), (100,))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)  # 4 standard errors
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean(dim=1).std().item() == pytest.approx(0.1, abs=0.02)  # samples are independent

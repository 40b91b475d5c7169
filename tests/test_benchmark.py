import argparse
import itertools

import numpy as np
import pytest
import torch

import benchmark
from rope import RotaryEmbedding3D, apply_rotary

ARGS = argparse.Namespace(
    model="EqM-Ti/4", num_frames=8, batch_size=2, precision="fp32", compile=False, pairs=3, grad_checkpoint=False
)


def test_our_rotation_and_the_one_it_is_measured_against_agree():
    grid, head_dim = (2, 3, 4), 18
    q = torch.randn(2, 3, 24, head_dim, generator=torch.Generator().manual_seed(0))
    n = head_dim // 3
    # It pairs channel j of an axis with j + n/2, ours pairs neighbours: reorder, rotate, reorder back.
    pairs = itertools.product(range(3), range(n // 2), range(2))
    order = torch.tensor([axis * n + half * n // 2 + j for axis, j, half in pairs])
    cos, sin = RotaryEmbedding3D(head_dim)(grid, torch.full((2,), 0.04))
    ours = apply_rotary(q[..., order], cos, sin)
    torch.testing.assert_close(benchmark.rotate_per_axis(q, grid)[..., order], ours, atol=1e-5, rtol=1e-5)


def test_the_two_sides_alternate_and_the_ratios_are_those_of_their_seconds(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark, "seconds_of", lambda side: side() or {"a": 3.0, "b": 2.0}[calls[-1]])
    values, seconds_a, seconds_b = benchmark.measure_ratios(
        lambda: calls.append("a"), lambda: calls.append("b"), 4, warm_up=1
    )
    assert calls == list("ab") + list("abbaabba")
    assert values.tolist() == [1.5] * 4
    assert (seconds_a, seconds_b) == (3.0, 2.0)


def test_the_flops_of_a_step_are_those_of_its_layers_and_attention_with_a_backward_pass_of_twice_the_forward_pass():
    step = benchmark.Step(ARGS)
    D, depth, tokens = 192, 6, 2 * 2 * 8 * 8
    product_flops, run = step.products()
    assert product_flops == 3 * 2 * tokens * 12 * D * D
    run()
    conditions = 3 * 2 * 2 * (6 * depth + 2) * D * D  # adaLN, of 2 clips
    patches = (3 + 2) * 2 * tokens * 256 * D  # output and input of 4 x 4 x 4 x 4 values; the clip needs no gradient
    layers = depth * product_flops + conditions + patches
    attention = depth * 2 * 2 * 128 * 128 * D * 2  # q k^T and the product with v, of 2 clips
    others = 3 * 2 * 2 * (256 + D) * D + 3 * 2 * 2 * 2 * D  # TimeScaleEmbedder
    assert step.flops() == pytest.approx(layers + 3 * attention + others, rel=1e-3)


def test_a_report_has_medians_quartiles_and_goals(capsys):
    report = benchmark.Report()
    report.add("a / b", np.array([1.0, 2.0, 3.0, 4.0, 10.0]), "<= 3", "note")
    report.add("c / d", 2.0)
    assert report.rows[0]["median"] == 3
    assert report.rows[0]["quartiles"] == [2, 4]
    assert report.markdown().splitlines()[2:] == ["| a / b | 3 | 2 - 4 | <= 3 | note |", "| c / d | 2 | 2 - 2 |  |  |"]


@pytest.mark.parametrize("part", ["step", "positions", "forcing", "energy", "optimizer", "sampling"])
def test_every_part_measures_something(part):
    report = benchmark.Report()
    benchmark.PARTS[part](argparse.Namespace(**vars(ARGS) | {"num_frames": 4, "batch_size": 1}), report)
    assert len(report.rows) >= 1
    assert all(0 < row["median"] < 100 for row in report.rows)


def test_a_cache_of_random_latents_has_the_frames_of_its_videos(shapes, tmp_path):
    benchmark.write_random_cache(shapes, tmp_path)
    scan = benchmark.scan_videos(tmp_path)
    clips = benchmark.Clips(tmp_path, scan.videos, scan.classes, 16, 256, flip=False)
    assert clips[0]["clip"].shape == (2, 4, 16, 32, 32)
    assert len(clips) == 24


def test_a_step_with_muon_changes_every_weight():
    step = benchmark.Step(ARGS, optimizer="muon")
    for optimizer in step.optimizers:
        optimizer.param_groups[0]["lr"] = 0.1
    before = [weight.clone() for weight in step.model.parameters()]
    step()
    assert len(step.optimizers) == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in step.model.parameters())


def test_a_size_halves_its_clips_until_they_fit(monkeypatch):
    tried = []

    def time_step(args):
        tried.append(args.batch_size)
        if args.batch_size > fits:
            raise torch.OutOfMemoryError("too much")
        return {"clips": args.batch_size, "seconds": 0.5, "tflops": 3.0, "mfu": 0.25, "memory": None}

    monkeypatch.setattr(benchmark, "time_step", time_step)
    fits = 3
    row = benchmark.time_size(ARGS, tokens=12 * 128)  # 8 frames are 2 x 8 x 8 tokens
    assert tried == [12, 6, 3]
    fits = 0
    never = benchmark.time_size(ARGS, tokens=1)
    lines = benchmark.sizes_table([row, never]).splitlines()
    assert lines[2] == "| EqM-Ti/4 | 8 | 3 | 0.5 | 6 | 3 | 25.0% | - |"
    assert lines[3].startswith("| EqM-Ti/4 | 8 | does not fit |")
    assert {line.count("|") for line in lines} == {9}


def test_a_timed_step_has_the_flops_of_its_clips():
    row = benchmark.time_step(ARGS)
    flops = 2 * benchmark.Step(ARGS).model.config.training_flops(8)
    assert row["tflops"] * row["seconds"] == pytest.approx(flops / 1e12)
    assert row["clips"] == 2

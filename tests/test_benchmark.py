import argparse
import math
import re
from copy import deepcopy

import numpy as np
import pytest
import torch

import benchmark

ARGS = argparse.Namespace(
    model="EqM-Ti/4",
    num_frames=4,
    batch_size=1,
    precision="fp32",
    compile=False,
    pairs=1,
)


def test_the_two_sides_alternate_and_a_row_has_the_spread_of_their_ratios(monkeypatch, capsys):
    calls = []

    def seconds_of(side):
        side()
        return {"a": 3.0, "b": 2.0}[calls[-1]]

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    report = benchmark.Report()
    report.compare("a / b", lambda: calls.append("a"), lambda: calls.append("b"), 4, "<= 3")
    assert calls == list("abab") + list("abbaabba")
    report.add("c / d", np.array([1.0, 2.0, 3.0, 4.0, 10.0]))
    assert report.markdown().splitlines()[2:] == [
        "| a / b | 1.5 | 1.5 - 1.5 | <= 3 | 3.000 and 2.000 s |",
        "| c / d | 3 | 2 - 4 |  |  |",
    ]
    assert report.rows[1]["quartiles"] == [2, 4]


@pytest.mark.parametrize("part", ["step", "positions", "forcing", "energy", "sampling"])
def test_every_part_measures_something(part):
    report = benchmark.Report()
    benchmark.PARTS[part](ARGS, report)
    assert report.rows
    for row in report.rows:
        assert 0 < row["median"] < math.inf


def test_a_step_changes_every_weight():
    step = benchmark.Step(ARGS)
    step.optimizers[0].param_groups[0]["lr"] = 0.1
    before = deepcopy(step.model)
    step()
    for old, new in zip(before.parameters(), step.model.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.grad is None


def test_the_products_of_the_floor_are_those_of_a_block():
    step = benchmark.Step(ARGS)
    flops, run = step.products()
    run()
    assert flops == 3 * 2 * (1 * 8 * 8) * 12 * 192**2
    assert step.flops == step.model.config.training_flops(4) > 6 * flops


def test_a_timed_step_has_the_rate_of_its_flops():
    cells = benchmark.time_step(ARGS)
    assert re.fullmatch(r"1 \| .* \| - \| -", cells)
    seconds, rate, tflops = map(float, cells.split(" | ")[1:4])
    assert rate == pytest.approx(1 / seconds, rel=0.01)
    flops = benchmark.model_config("EqM-Ti/4", num_classes=101).training_flops(4)
    assert tflops * seconds == pytest.approx(flops / 1e12, rel=0.02)


def test_a_size_halves_its_clips_until_they_fit(monkeypatch, capsys):
    def step(args):
        if args.batch_size > (3 if args.num_frames == 4 else 0):
            raise torch.OutOfMemoryError("too much")
        return f"{args.batch_size} | a | b | c | d | e"

    monkeypatch.setattr(benchmark, "time_step", step)
    monkeypatch.setattr(benchmark.gc, "collect", list)  # takes seconds in a process of many tests
    monkeypatch.setattr(benchmark, "SIZES", {"EqM-Ti/4": 12 * 64})
    monkeypatch.setattr(benchmark, "FRAMES", (4, 8))
    benchmark.measure_sizes(ARGS, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in lines] == [9] * 4
    assert lines[2] == "| EqM-Ti/4 | 4 | 3 | a | b | c | d | e |"
    assert lines[3] == "| EqM-Ti/4 | 8 | does not fit | - | - | - | - | - |"

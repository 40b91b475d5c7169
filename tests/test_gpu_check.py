"""What decides in scripts/gpu_check.py and tests/gpu_checks.py: limits, verdicts. Nothing here runs
all of it.
"""

import math
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest

import gpu_check
import gpu_checks
from models import model_config
from runtime.untrusted import read_json
from training import run_main


@pytest.mark.parametrize("what", ["nothing", "positions", "one bias"])
def test_the_limits_of_bf16_pass_rounding_and_no_mistake(what):
    config = model_config(
        "EqM-Ti/4", num_classes=3, temporal_patch_size=4, depth=2, input_size=8, use_rope=True
    )
    network = gpu_checks.random_network(config)
    inputs = gpu_checks.random_inputs(config, 6)
    reference = gpu_checks.outputs_and_gradients(network, *inputs)
    wrong = deepcopy(network)
    if what == "positions":
        wrong.rope.theta = 1.0
    if what == "one bias":
        wrong.blocks[1].attn.proj.bias.data.zero_()
    errors = np.array(gpu_checks.network_errors(wrong, reference, inputs, "bf16"))
    assert (errors <= gpu_checks.ERRORS["bf16"]).all() == (what == "nothing")


def test_with_several_gpus_sharded_runs_are_compared_compiled_and_not(monkeypatch):
    monkeypatch.setattr(gpu_checks, "ON_GPU", True)
    monkeypatch.setattr(gpu_checks, "RANKS", 2)
    monkeypatch.setattr(gpu_checks, "PRECISIONS", ["fp32"])
    monkeypatch.setattr(gpu_checks, "distance", lambda run, *_: run)
    runs = []
    rows = {}

    def run(name, *flags, ranks):
        assert ranks == 2
        runs.append(flags)
        return name

    gpu_checks.test_ranks(
        "plain", "all ranks", run, lambda what, value, limit: rows.update({what: value})
    )
    assert rows == {
        "2 ranks / 1": "all ranks",
        "2 ranks, --shard / 1": "--shard",
        "2 ranks, --compile --shard / 1": "--compile --shard",
    }
    assert ("--precision", "fp32", "--compile", "--shard") in runs


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.11, math.nan]])
def test_a_value_above_its_limit_or_missing_gives_status_1_and_is_named(
    values, monkeypatch, tmp_path, capsys
):
    def run_pytest(command, plugins):
        for value in values:
            rows = []
            failed = False
            try:
                check = gpu_checks.checker(
                    lambda *row, rows=rows: rows.append(row), "What it does."
                )
                check(f"row {value}", value, 0.1, "note")
            except AssertionError:
                failed = True
            report = {
                "when": "call",
                "failed": failed,
                "user_properties": rows,
                "nodeid": f"x.py::test {value}",
            }
            plugins[0].pytest_runtest_logreport(SimpleNamespace(**report))

    monkeypatch.setattr(gpu_check.pytest, "main", run_pytest)
    monkeypatch.setattr(gpu_check, "measure_speed", lambda rows: None)
    monkeypatch.setenv("GPUS", "")
    out = tmp_path / "new/gpu.md"
    run_main(gpu_check, 2, "--out", out, status=int(len(values) > 1))
    text = out.read_text()
    (made,) = read_json(out.with_suffix(".json"))
    assert (
        f" 2 --out {out}" in made["command"] and made["code"] and made["machine"] and made["date"]
    )
    assert "**What it does.**" in text
    assert "| row 0.1 | 0.1 | 0.1 | ok | note |" in text
    assert len({line.count("|") for line in text.splitlines() if "|" in line}) == 1
    if len(values) > 1:
        assert "| row nan | nan | 0.1 | FAILED | note |" in text
        assert (
            "gpu_check.py: error: FAILED: test 0.11; test nan; the reasons"
            in capsys.readouterr().err
        )
    assert ("All checks are ok." in text) == (len(values) == 1)

"""A run of real processes that is interrupted and continues with other numbers of workers and ranks."""

from dataclasses import replace

import pytest

from training import OFTEN, TORCHRUN, Training, compare, run_here

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

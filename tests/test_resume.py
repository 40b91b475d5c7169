"""A run that is interrupted anywhere and resumed ends as one that was not, bit for bit."""

import sys
from dataclasses import replace

import pytest

import cache_latents
import checkpoint
from tiny_data import make_images, make_vae
from training import Training, compare, run_here

STEPS = 7


@pytest.fixture(scope="module")
def latents(shapes, tmp_path_factory):
    """A cache of the shapes, and the VAE it was made with."""
    root = tmp_path_factory.mktemp("latents")
    make_vae(root / "vae")
    flags = ["--data-path", shapes, "--out", root / "cache", "--vae", root / "vae", "--image-size", 16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cache_latents.py", *map(str, flags)])
        cache_latents.main()
    return root / "cache", root / "vae"


KINDS = {
    "fp32": [],
    "bf16": ["--precision", "bf16"],
    "muon, decay and warm-up": ["--optimizer", "muon", "--lr-decay", 0.5, "--warmup-steps", 3],
    "accumulation": ["--grad-accum", 2, "--disp"],
    "fixed frame interval": ["--frame-interval", 1],
    "an energy": ["--ebm", "dot", "--forcing", 0.5],
    "forcing": ["--forcing", 0.5, "--precision", "bf16", "--gamma-shift", 3, "--temporal-patch-size", 3],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_after_every_single_step_ends_as_one_that_was_not(kind, shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", STEPS, flags=KINDS[kind])
    assert run_here(whole) == STEPS
    parts = replace(whole, results=tmp_path / "parts")
    for number in range(STEPS):
        workers = ["--num-workers", 1] if number == 4 else []
        assert run_here(parts, "--resume", *workers, stop_after=1) == 1
    assert run_here(parts, "--resume") == 0
    assert compare(whole, parts) == []


def check_in_parts(whole, results, stops):
    """An uninterrupted run, and one stopped after so many steps each time (None = not at all), end the same."""
    run_here(whole)
    parts = replace(whole, results=results)
    for steps in stops:
        run_here(parts, "--resume", stop_after=steps)
    assert compare(whole, parts) == []


def test_training_from_a_cache_resumes_bit_for_bit(latents, tmp_path):
    cache, vae = latents
    flags = ["--vae", vae, "--num-workers", 0, "--forcing", 0.5, "--disp"]
    whole = Training(cache, tmp_path / "whole", STEPS, flags=flags)
    check_in_parts(whole, tmp_path / "parts", (2, 3, None))


def test_images_resume_bit_for_bit(tmp_path):
    flags = ["--model", "EqM-Ti/4", "--depth", 1, "--vae", "none", "--image-size", 16, "--global-batch-size", 4]
    data = make_images(tmp_path / "images", 8)
    whole = Training(data, tmp_path / "whole", STEPS, base=[*flags, "--num-workers", 0])
    check_in_parts(whole, tmp_path / "parts", (1, 4, None))


@pytest.mark.parametrize("where", ["latents_of", "sample_ema", "validate"])
def test_what_a_signal_interrupts_is_done_again_after_the_resume(where, shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", STEPS)
    run_here(whole)
    parts = replace(whole, results=tmp_path / "parts")
    steps = run_here(parts, "--resume", stop_in=where)
    assert steps == (5 if where == "sample_ema" else 2)
    state = checkpoint.load(parts.folder / "checkpoints/latest.pt")
    assert state["step"] == steps
    assert parts.rows() == whole.rows()[: len(parts.rows())]
    assert all(row["step"] < steps for row in parts.rows())
    run_here(parts, "--resume")
    assert compare(whole, parts) == []


def test_a_signal_during_the_last_validation_leaves_a_run_that_is_not_finished(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", 1)
    run_here(whole)
    parts = replace(whole, results=tmp_path / "parts")
    run_here(parts, stop_in="validate")
    assert sorted(path.name for path in (parts.folder / "checkpoints").iterdir()) == ["latest.pt"]
    run_here(parts, "--resume")
    assert compare(whole, parts) == []


def test_no_step_is_logged_twice_when_a_run_that_was_stopped_is_then_killed(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", STEPS, flags=["--num-workers", 0, "--log-every", 1])
    run_here(whole, "--log-every", 1)
    parts = replace(whole, results=tmp_path / "parts")
    run_here(parts, "--log-every", 1, stop_after=3)  # step 3 is not logged yet
    latest = parts.folder / "checkpoints/latest.pt"
    saved = latest.read_bytes()
    run_here(parts, "--resume", "--log-every", 1)
    for path in latest.parent.glob("*.pt"):
        path.unlink()
    latest.write_bytes(saved)  # as if that had been killed before it saved
    run_here(parts, "--resume", "--log-every", 1)
    assert [row["step"] for row in parts.rows()] == list(range(1, STEPS + 1))
    assert parts.rows() == whole.rows()


def test_chained_phases_that_are_interrupted_end_as_those_that_are_not(shapes, tmp_path):
    ends = []
    for name, stops in (("whole", [None]), ("parts", [2, 1, None])):
        ckpt = []
        for frames, steps in ((4, 4), (8, STEPS)):
            phase = Training(shapes, tmp_path / name / str(frames), steps, )
            for stop in stops:
                run_here(phase, "--num-frames", frames, "--resume", *ckpt, stop_after=stop)
            ckpt = ["--ckpt", phase.folder / f"checkpoints/{steps:07d}.pt"]
        ends.append(phase)
    assert compare(*ends) == []


def test_a_checkpoint_that_was_not_given_all_its_names_gets_them(shapes, tmp_path):
    whole = Training(shapes, tmp_path / "whole", STEPS)
    run_here(whole)
    names = {path.name: path.read_bytes() for path in (whole.folder / "checkpoints").iterdir()}
    for name in (f"{STEPS:07d}.pt", "latest.pt"):
        (whole.folder / "checkpoints" / name).unlink()
        run_here(whole, "--resume")
        assert {path.name: path.read_bytes() for path in (whole.folder / "checkpoints").iterdir()} == names


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(shapes, tmp_path, capsys):
    whole = Training(shapes, tmp_path / "whole", STEPS)
    run_here(whole)
    parts = replace(whole, results=tmp_path / "parts")
    run_here(parts, stop_after=5)
    latest = parts.folder / "checkpoints/latest.pt"
    latest.write_bytes(latest.read_bytes()[:-1000])
    capsys.readouterr()
    run_here(parts, "--resume")
    assert "latest.pt: damaged" in capsys.readouterr().out
    assert compare(whole, parts) == []
    for path in (parts.folder / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    run_here(parts, "--resume")  # from the beginning, in the same folder
    assert compare(whole, parts) == []

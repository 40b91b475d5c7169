"""A schedule of frames in one run: how it is parsed, its phases, and that it equals the chain of its phases."""

import argparse

import pytest
import torch

import checkpoint
import train
from runtime.cli import UserError
from schedule import Phase, current_phase, fill_batches, frames_of_steps, is_due, parse_schedule
from training import TINY, Training, differences, run_here


def test_a_schedule_says_frames_the_last_step_and_the_batch_of_each_phase():
    phases = parse_schedule("4:20000:256,8:30000:128,16:40000")
    assert phases == [Phase(4, 20_000, 256), Phase(8, 30_000, 128), Phase(16, 40_000, None)]


BAD = ["", "4", "4:x", "4:10:2:1", "4:10,", "4:10;8:20", "0:10", "4:0", "4:10:0", "4:10,8:10", "4:10,8:5", "-4:10"]
BAD += ["4.5:10", "4:10:\u0664", "4:" + "9" * 12]


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_a_schedule_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_schedule(text)


def test_phases_without_a_batch_have_as_many_tokens_a_step_as_the_first():
    filled = fill_batches(parse_schedule("4:10,8:20,16:30,16:40:6"), 32, tokens=lambda n: 64 * (n // 4), parts=2)
    assert [phase.batch_size for phase in filled] == [32, 16, 8, 6]
    filled = fill_batches(parse_schedule("4:10:64,8:20"), 32, tokens=lambda n: n, parts=1)
    assert [phase.batch_size for phase in filled] == [64, 32]


@pytest.mark.parametrize("text", ["4:10,12:20", "4:10:3", "4:10,8:20,16:30:5"])
def test_batches_that_do_not_divide_are_refused(text):
    with pytest.raises(UserError, match="not a multiple of 4"):
        fill_batches(parse_schedule(text), 32, tokens=lambda n: n, parts=4)


def test_a_checkpoint_continues_in_the_phase_that_holds_its_step():
    phases = parse_schedule("4:10,8:20,16:30")
    assert [current_phase(phases, step).num_frames for step in (0, 9, 10, 19, 20, 29)] == [4, 4, 8, 8, 16, 16]


def test_a_share_of_the_later_steps_has_the_frames_of_an_earlier_phase():
    phases = parse_schedule("4:1000,8:2000,16:5000")
    assert frames_of_steps(phases, phases[0], step=0, first_step=0, mix=0.3, seed=0) == [4] * 1000
    frames = frames_of_steps(phases, phases[2], step=2000, first_step=2000, mix=0.3, seed=0)
    assert len(frames) == 3000
    for earlier in (4, 8):
        assert frames.count(earlier) / 3000 == pytest.approx(0.15, abs=0.03)
    later = frames_of_steps(phases, phases[2], step=2500, first_step=2000, mix=0.3, seed=0)
    assert later == frames[500:]  # wherever it was interrupted


def test_something_is_due_every_so_many_steps_and_at_the_end_of_a_phase():
    assert [step for step in range(1, 12) if is_due(step, 11, 4)] == [4, 8, 11]
    assert [step for step in range(1, 12) if is_due(step, 11, 4, 0, 6)] == [4, 6, 8, 11]
    assert [step for step in range(1, 12) if is_due(step, 11, 0)] == [11]


SCHEDULE = "4:3:8,8:5,16:7:2"
# The learning rate falls from step 4 on, in the second of three phases, as that of the quickstart does
FLAGS = ["--num-workers", 0, "--lr-decay", 0.6, "--warmup-steps", 2, "--val-frames", 4]


def run_schedule(data, results, *flags, stops=(None,)):
    """A run of the schedule that is stopped after so many steps at a time."""
    base = list(TINY)
    at = base.index("--num-frames")
    del base[at : at + 2]
    training = Training(data, results, None, flags=[*FLAGS, "--frames-schedule", SCHEDULE, *flags], base=base)
    for stop in stops:
        run_here(training, "--resume", stop_after=stop)
    return training


@pytest.fixture(scope="module")
def chain(shapes, tmp_path_factory):
    """The three phases as runs of their own."""
    results, ckpt, phases = tmp_path_factory.mktemp("chain"), [], []
    for frames, steps, batch in ((4, 3, 8), (8, 5, 4), (16, 7, 2)):
        phase = Training(shapes, results / str(frames), steps, flags=FLAGS)
        run_here(phase, "--num-frames", frames, "--global-batch-size", batch, "--lr-decay-end", 7, *ckpt)
        ckpt = ["--ckpt", phase.folder / f"checkpoints/{steps:07d}.pt"]
        phases.append(phase)
    return phases


def without_flops(rows):
    """They count from the beginning of a run folder."""
    return [{name: value for name, value in row.items() if name != "flops"} for row in rows]


@pytest.mark.parametrize("stops", [(None,), (1, 1, 1, 1, 1, 1, 1, None), (3, 2, None)])
def test_a_schedule_equals_the_chain_of_its_phases_bit_for_bit_also_when_it_is_interrupted(
    stops, chain, shapes, tmp_path
):
    training = run_schedule(shapes, tmp_path / "r", stops=stops)
    assert training.folder.name == "000-EqM-Ti-4-f4-8-16-rope"
    expected = [row for phase in chain for row in phase.rows()]
    assert without_flops(training.rows()) == without_flops(expected)
    for phase in chain:
        name = f"{phase.steps:07d}.pt"
        states = [checkpoint.load(run.folder / "checkpoints" / name) for run in (phase, training)]
        for state in states:
            assert state["config"]["training"]["num_frames"] == int(phase.results.name)
            state.pop("config")
            for amount in ("seconds", "flops"):
                state["phase"].pop(amount)
        assert differences(*states) == []
    state = checkpoint.load(training.folder / "checkpoints/best.pt")
    assert state["step"] > 5  # the best of the last phase


def test_a_run_beyond_the_end_of_its_phase_continues_with_the_next(shapes, tmp_path):
    """As after a resume with a schedule whose first phase is shorter than what was trained."""
    schedules = ["4:6:2,8:8:2", 4], ["4:3:2,8:8:2", None]
    base = list(TINY)
    at = base.index("--num-frames")
    del base[at : at + 2]
    for schedule, stop in schedules:
        flags = ["--num-workers", 0, "--frames-schedule", schedule]
        training = Training(shapes, tmp_path / "r", None, flags=flags, base=base)
        run_here(training, "--resume", stop_after=stop)
    state = checkpoint.load(training.folder / "checkpoints/latest.pt")
    assert (state["step"], state["phase"]["first_step"]) == (8, 4)
    assert [row["step"] for row in training.rows()] == [2, 3, 4, 5, 6, 8]


def test_phases_that_end_are_kept_and_mixing_trains_on_shorter_clips_too(shapes, tmp_path, monkeypatch):
    seen, training_losses = [], train.training_losses

    def noting(network, vae, batch, *rest):
        seen.append(batch["clips"].shape[2])
        return training_losses(network, vae, batch, *rest)

    monkeypatch.setattr(train, "training_losses", noting)
    monkeypatch.setattr(train, "validate", lambda *_: ({"val_loss": 1.0}, []))
    training = run_schedule(shapes, tmp_path / "r", "--keep-last", 1, "--ckpt-every", 1, "--mix", 0.6, "--forcing", 0.5)
    names = {path.name for path in (training.folder / "checkpoints").iterdir()}
    assert {"0000003.pt", "0000005.pt", "0000007.pt"} <= names
    assert seen[:3] == [4, 4, 4]
    assert set(seen[3:5]) <= {4, 8} and set(seen[5:]) <= {4, 8, 16} and len(set(seen[3:])) > 1
    state = checkpoint.load(training.folder / "checkpoints/latest.pt")
    config, batches = checkpoint.config_of("x", state), [8] * 3 + [4] * 2 + [2] * 2
    flops = sum(batch * config.training_flops(frames) for batch, frames in zip(batches, seen, strict=True))
    assert state["phase"]["flops"] == flops


def test_the_flops_of_longer_clips_are_counted(chain):
    state = checkpoint.load(chain[1].folder / "checkpoints/latest.pt")
    config = checkpoint.config_of("x", state)
    assert state["phase"]["flops"] == 2 * 4 * config.training_flops(8)
    assert torch.tensor(state["phase"]["seconds"]) > 0

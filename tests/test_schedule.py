"""Frame schedules: parsing, phases, and a run that equals the chain of its phases."""

from shlex import split

import pytest

import train
from models import EqMConfig
from schedule import frames_of_steps, parse_schedule
from training import ANY_LENGTH, Training, differences, names, refused, run_here


def test_a_share_of_the_later_steps_has_the_frames_of_an_earlier_phase():
    phases = parse_schedule("4:1000,8:2000,16:5000")
    first, _, last = phases

    def frames_from(step):
        frames = frames_of_steps(
            phases,
            last,
            step=step,
            first_step=2000,
            mix=0.3,
            seed=0,
        )
        return list(frames)

    of_first = frames_of_steps(phases, first, step=0, first_step=0, mix=0.3, seed=0)
    assert list(of_first) == [4] * 1000
    frames = frames_from(2000)
    assert len(frames) == 3000
    for earlier in (4, 8):
        assert frames.count(earlier) / 3000 == pytest.approx(0.15, abs=0.03)
    assert frames_from(2500) == frames[500:]  # after an interruption, too


PHASES = [(4, 3, 8), (8, 5, 4), (16, 7, 2)]  # frames, last step, batch
SCHEDULE = "4:3:8,8:5,16:7:2"
# The learning rate falls from step 4 on, in the second of three phases, as in the quickstart
FLAGS = split("--lr-decay 0.6 --warmup-steps 2 --val-frames 4")


def run_schedule(schedule, data, results, *flags, stops=(None,)):
    """Train with a schedule; each start of the run stops after so many steps."""
    training = Training(data, results, None, base=ANY_LENGTH)
    for stop in stops:
        run_here(training, "--frames-schedule", schedule, "--resume", *flags, stop_after=stop)
    return training


def saved(training, name):
    """(checkpoint of a run, without its settings and measured time; its settings)."""
    state = training.saved(name)
    state["phase"].pop("seconds")
    return state, state.pop("config")


def test_a_schedule_equals_a_chain_of_runs_bit_for_bit_even_if_both_are_stopped(shapes, tmp_path):
    ckpt = []
    chain = []
    for frames, steps, batch in PHASES:  # separate runs
        phase = Training(shapes, tmp_path / str(frames), steps, flags=FLAGS)
        flags = ["--num-frames", frames, "--global-batch-size", batch, "--lr-decay-end", 7, *ckpt]
        if frames < 16:
            run_here(phase, *flags, stop_after=1)
        run_here(phase, *flags, "--resume")
        ckpt = ["--ckpt", phase.folder / f"checkpoints/{steps:07d}.pt"]
        chain.append(phase)
    training = run_schedule(SCHEDULE, shapes, tmp_path / "r", *FLAGS, stops=(2, 1, 3, None))
    assert training.folder.name == "000-EqM-Ti-4-f4-8-16-rope"
    rows = training.rows()
    expected = [row for phase in chain for row in phase.rows()]
    for row in (*rows, *expected):
        row.pop("flops")  # counted per run folder
    assert rows == expected
    total = 0
    for phase, (frames, last_step, batch) in zip(chain, PHASES, strict=True):
        alone, config = saved(phase, f"{last_step:07d}.pt")
        state, scheduled = saved(training, f"{last_step:07d}.pt")
        assert config["training"]["num_frames"] == scheduled["training"]["num_frames"] == frames
        clips = (last_step - alone["phase"]["first_step"]) * batch
        flops = clips * EqMConfig(**config["model"]).training_flops(frames)
        total += flops
        assert alone["phase"].pop("flops") == flops
        assert state["phase"].pop("flops") == total
        assert differences(alone, state) == []
    best, _ = saved(training, "best.pt")
    assert best["step"] > 5  # the best of the last phase


def test_a_run_beyond_the_end_of_its_phase_continues_with_the_next(shapes, tmp_path, capsys):
    run_schedule("4:6:2,8:8:2", shapes, tmp_path / "r", stops=[4])
    training = run_schedule("4:3:2,8:8:2", shapes, tmp_path / "r")  # a shorter first phase
    state, _ = saved(training, "latest.pt")
    assert state["step"] == 8
    assert state["phase"]["first_step"] == 4
    assert [row["step"] for row in training.rows()] == [2, 3, 4, 5, 6, 8]
    shorter = training.command_flags("--frames-schedule", "4:2:2,8:4:2", "--resume")
    line = refused(capsys, train, *shorter)
    assert "--frames-schedule to step 4: the checkpoint is at step 8 already" in line


def test_phase_ends_are_kept_and_mix_also_trains_on_shorter_clips(shapes, tmp_path):
    text = "4:3:2,8:5:2,16:7:2"
    schedule = parse_schedule(text)
    first_step = 0
    expected = []
    total = 0
    for phase in schedule:
        expected += frames_of_steps(
            schedule,
            phase,
            step=first_step,
            first_step=first_step,
            mix=0.6,
            seed=0,
        )
        first_step = phase.last_step
    flags = split("""
        --log-every 1
        --ckpt-every 1
        --keep-last 1
        --mix 0.6
        --forcing 0.5
    """)
    training = run_schedule(text, shapes, tmp_path / "r", *flags)
    kept = names(training.folder / "checkpoints")
    assert kept == ["0000003.pt", "0000005.pt", "0000007.pt", "best.pt", "latest.pt"]
    _, config = saved(training, "latest.pt")
    for row, frames in zip(training.rows(), expected, strict=True):
        total += 2 * EqMConfig(**config["model"]).training_flops(frames)
        assert row["flops"] == total
    assert len(set(expected[3:5])) + len(set(expected[5:])) > 2  # some are mixed

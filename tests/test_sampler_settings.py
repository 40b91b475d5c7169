"""The settings of the sampler: a flag wins, then what the checkpoint was trained with, then the default."""

import json
from dataclasses import replace

import pytest

import checkpoint
import sample_gd
import train
from generation import SAMPLER
from published import write_export
from tiny_data import make_state
from training import Training, run_main

TUNED = {"sampler": "ngd", "num_sampling_steps": 3, "stepsize": 0.05, "mu": 0.2, "stop_below": 0.5, "cfg_scale": 1.5}
SHAPE = {"depth": 1, "hidden_size": 48, "num_heads": 2, "num_frames": 4, "temporal_patch_size": 4}


@pytest.fixture
def settings_of(tmp_path):
    """settings_of(ckpt, flags): the settings with which sample_gd.py samples."""

    def sample(ckpt, *flags, **expected):
        shared = ["--video", "--num-samples", 1, "--folder", tmp_path / "s"]
        run_main(sample_gd, "--ckpt", ckpt, *shared, *flags, **expected)
        flags = {} if expected else json.loads((tmp_path / "s/samples.json").read_text())["flags"]
        return {name: flags.get(name) for name in SAMPLER}

    return sample


def make_checkpoint(path, **settings):
    state = make_state(**SHAPE)
    state["config"]["training"] |= settings
    checkpoint.save(path, state)
    return state


def test_a_checkpoint_and_its_export_sample_as_they_were_trained_with_unless_a_flag_says_otherwise(
    tmp_path, settings_of, capsys
):
    state = make_checkpoint(tmp_path / "a.pt", **TUNED)
    assert settings_of(tmp_path / "a.pt") == TUNED
    assert "ngd, 2 evaluations of step size 0.05, guidance 1.5" in capsys.readouterr().out
    write_export(tmp_path / "exported", state)
    assert settings_of(tmp_path / "exported") == TUNED
    changed = settings_of(tmp_path / "a.pt", "--cfg-scale", 2, "--mu", 0.1, "--stop-below", 0)
    assert changed == TUNED | {"cfg_scale": 2.0, "mu": 0.1, "stop_below": None}
    assert settings_of(tmp_path / "a.pt", "--sampler", "heun") == TUNED | {"sampler": "heun", "stop_below": None}


def test_a_checkpoint_without_settings_samples_as_the_default_says(tmp_path, settings_of):
    make_checkpoint(tmp_path / "old.pt")
    assert settings_of(tmp_path / "old.pt", "--num-sampling-steps", 3, "--stepsize", 0.1) == SAMPLER | {
        "num_sampling_steps": 3, "stepsize": 0.1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "points", "size"),
    [
        ({"--num-sampling-steps": 6}, 6, 0.02),  # of a path of 2 x 0.05
        ({"--stepsize": 0.01}, 11, 0.01),
        ({"--stepsize": 0.03}, 4, 0.03),  # as near as whole steps come
        ({"--stepsize": 5.0}, 2, 5.0),  # one evaluation at least
        ({"--stepsize": 0.01, "--num-sampling-steps": 4}, 4, 0.01),
        ({"--num-sampling-steps": 6, "--sampler": "euler"}, 6, 0.05),  # has no step size
        ({}, 3, 0.05),
    ],
)
def test_the_length_of_the_path_stays_if_only_one_of_steps_and_step_size_is_given(
    tmp_path, settings_of, capsys, flags, points, size
):
    make_checkpoint(tmp_path / "a.pt", **TUNED)
    found = settings_of(tmp_path / "a.pt", *(word for pair in flags.items() for word in pair), "--stop-below", 0)
    assert (found["num_sampling_steps"], found["stepsize"]) == (points, pytest.approx(size))
    step = "" if "--sampler" in flags else f" of step size {size:g}"
    assert f"{points - 1} evaluations{step}, guidance" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "points", "size"), [([], 250, 0.0017), (["--num-sampling-steps", 4], 4, 0.1411)])
def test_a_descent_of_a_model_sampled_by_a_solver_has_the_usual_path(tmp_path, settings_of, flags, points, size):
    make_checkpoint(tmp_path / "a.pt", **TUNED | {"sampler": "euler", "stop_below": None})
    found = settings_of(tmp_path / "a.pt", "--sampler", "gd", *flags)
    assert (found["num_sampling_steps"], found["stepsize"]) == (points, pytest.approx(size))


def test_a_step_size_that_would_take_forever_is_one_line(tmp_path, settings_of, capsys):
    make_checkpoint(tmp_path / "a.pt", **TUNED)
    settings_of(tmp_path / "a.pt", "--stepsize", 1e-9, status=2)
    assert "--stepsize 1e-09: a path of length 0.1 takes 1e+08 evaluations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "adam"}, "sampler is adam"),
        ({"num_sampling_steps": 1}, "num_sampling_steps is 1"),
        ({"num_sampling_steps": "9"}, "num_sampling_steps is 9, wanted int"),
        ({"stepsize": float("nan")}, "stepsize is nan"),
        ({"mu": None}, "mu is None, wanted float"),
        ({"stop_below": -1.0}, "stop_below is -1.0"),
        ({"cfg_scale": float("inf")}, "cfg_scale is inf"),
        ({"stepsize": 0.0}, "stepsize is 0.0"),
    ],
)
def test_settings_that_no_sampler_has_are_one_line(tmp_path, settings_of, capsys, settings, words):
    make_checkpoint(tmp_path / "a.pt", **settings)
    settings_of(tmp_path / "a.pt", status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.pt: no settings of a sampler" in line and words in line
    assert not (tmp_path / "s").exists()


def test_a_threshold_that_the_sampler_of_the_checkpoint_can_not_have_is_one_line(tmp_path, settings_of, capsys):
    make_checkpoint(tmp_path / "a.pt", **TUNED | {"sampler": "heun", "stop_below": None})
    settings_of(tmp_path / "a.pt", "--stop-below", 0.5, status=2)
    assert "--stop-below 0.5: heun has a fixed number of steps" in capsys.readouterr().err


def test_training_keeps_the_settings_over_a_resume_and_gives_them_to_the_next_phase(shapes, tmp_path):
    def settings_of(run):
        training = json.loads((run.folder / "config.json").read_text())["training"]
        return {name: training[name] for name in SAMPLER}

    flags = [word for name, value in TUNED.items() for word in (f"--{name.replace('_', '-')}", value)]
    first = Training(shapes, tmp_path / "first", 2)
    shared = ["--sample-every", 9, "--num-workers", 0]
    run_main(train, *first.command_flags(*shared, *flags))
    assert settings_of(first) == TUNED
    longer = replace(first, steps=3)
    run_main(train, *longer.command_flags(*shared, "--resume"))
    assert settings_of(first) == TUNED
    second = Training(shapes, tmp_path / "second", 4, flags=["--ckpt", first.folder / "checkpoints/0000003.pt"])
    run_main(train, *second.command_flags(*shared, "--cfg-scale", 3))
    assert settings_of(second) == TUNED | {"cfg_scale": 3.0}

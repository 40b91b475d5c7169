"""Clips of a plan, batch by batch and window by window, sampler settings, and weights that are cast
once.
"""

import re
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from tqdm import tqdm

import generation
from generation import cast_products, generate
from models import model_config
from plans import SAMPLER, Plan, choose_labels, choose_windows, resolve_sampler
from runtime import distributed
from runtime.rng import normal
from test_models import clip, labels, tiny
from training import error_of, record_calls
from transport import OBJECTIVES
from vae import VAE

SETTINGS = {
    "method": "ngd",
    "num_steps": 6,
    "step_size": 0.01,
    "momentum": 0.3,
    "shift": None,
    "stop_below": None,
    "guidance": 4.0,
    "precision": "fp32",
}
TUNED = {
    "sampler": "ngd",
    "num_sampling_steps": 3,
    "stepsize": 0.05,
    "mu": 0.2,
    "solver_shift": None,
    "stop_below": 0.5,
    "cfg_scale": 1.5,
}


class Identity:
    """A VAE whose latents are the pixels."""

    downsample = 1

    def encode(self, clips):
        return clips.float()

    def decode(self, x):
        return x.permute(0, 2, 3, 4, 1)


class Quadratic:
    """The field -(1 + y) 25 t x and its energy. It has no sums, so the batch changes no bit."""

    config = model_config("EqM-Ti/4", in_channels=2, input_size=4, num_classes=10)

    def __call__(self, x, y, time_scale):
        assert x.dtype == torch.float32 and not torch.is_grad_enabled()
        return -((1 + y) * 25 * time_scale).reshape(-1, 1, 1, 1, 1) * x

    def energy(self, x, y, time_scale):
        return (1 + y) * 25 * time_scale * x.square().flatten(1).sum(dim=1) / 2


def make_plan(model=None, vae=None, count=5, **changes):
    """A plan of clips of 3 frames, each with its own class and frame rate."""
    plan = {
        "time_scales": torch.linspace(0.04, 0.2, count).tolist(),
        "num_frames": 3,
        "conditions": torch.arange(count),
    }
    return Plan(
        model or Quadratic(),
        vae or Identity(),
        list("ABCDEFGHIJ"),
        time_scale=0.04,
        **plan | changes,
    )


def windows_of(num_frames, window=None, overlap=0):
    """A plan of a small network that samples in windows."""
    return make_plan(
        tiny(in_channels=3),
        VAE("none"),
        count=3,
        conditions=torch.tensor([0, 1, 0]),
        num_frames=num_frames,
        window=window,
        overlap=overlap,
    )


def parts_of(plan, batch_size=16, **changes):
    """What `generate` yields; changes replace SETTINGS or are arguments of `generate`."""
    settings = {name: changes.pop(name, value) for name, value in SETTINGS.items()}
    parts = generate(
        plan,
        range(len(plan.conditions)),
        seed=0,
        device="cpu",
        settings=settings,
        batch_size=batch_size,
        **changes,
    )
    return list(parts)


def run(plan, batch_size=16, **changes):
    """(clips, evaluations of the first window, energies or None) of all samples."""
    clips = defaultdict(list)
    evaluations = []
    energies = []
    for indices, first, videos, spent, energy, _ in parts_of(plan, batch_size, **changes):
        clips[indices[0]].append(videos)
        if first == 0:
            evaluations.append(spent)
            energies.append(energy)
    return (
        torch.cat([torch.cat(windows, dim=1) for windows in clips.values()]),
        torch.cat(evaluations),
        torch.cat(energies) if changes.get("energy") else None,
    )


def clips_of(plan, batch_size=16, **changes):
    clips, _, _ = run(plan, batch_size, **changes)
    return clips


def start_noise(indices, shape=(2, 3, 4, 4), window=0):
    return normal(0, "sample", window, indices, shape)


def square_sum(x):
    return x.square().flatten(1).sum(dim=1)


@pytest.mark.parametrize("stop_below", [None, 60])
def test_samples_do_not_depend_on_the_batch_size_or_on_other_frame_rates(stop_below):
    plan = make_plan()
    expected, spent, _ = run(plan, stop_below=stop_below)
    assert (len(set(spent.tolist())) > 1) == (stop_below is not None)
    for batch_size in (1, 2):
        clips, evaluations, _ = run(plan, batch_size, stop_below=stop_below)
        assert torch.equal(clips, expected)
        assert torch.equal(evaluations, spent)
    one_rate = replace(plan, time_scales=None)  # all have that of the plan, 0.04
    clips = clips_of(one_rate, stop_below=stop_below)
    assert torch.equal(clips[0], expected[0])
    assert not torch.equal(clips[4], expected[4])


def test_a_batch_without_a_condition_has_no_guidance(monkeypatch):
    sizes = record_calls(monkeypatch, Quadratic, "__call__", lambda self, x, *others: len(x))
    plan = make_plan(count=4, conditions=torch.tensor([-1, -1, -1, 2]))
    plain = clips_of(plan, batch_size=3, guidance=1.0)
    assert sizes == [3] * 5 + [1] * 5
    sizes.clear()
    guided = clips_of(plan, batch_size=3, guidance=9.0)
    assert sizes == [3] * 5 + [2] * 5  # only the last batch also without its condition
    assert torch.equal(plain[:3], guided[:3])
    assert not torch.equal(plain[3], guided[3])


@pytest.mark.parametrize(
    "method, stop_below, most", [("gd", None, 5), ("ngd", 1e9, 5), ("heun", None, 9)]
)
def test_one_progress_bar_counts_evaluations_even_if_samples_stop_early(
    method, stop_below, most, monkeypatch
):
    bars = []
    before = []

    def make_bar(**about):
        bars.append(tqdm(**about | {"disable": False}))
        return bars[-1]

    monkeypatch.setattr(generation, "Bar", make_bar)
    parts = parts_of(  # 3 batches of 2 windows
        make_plan(num_frames=5, window=3, overlap=1),
        batch_size=2,
        method=method,
        stop_below=stop_below,
        before_evaluation=lambda: before.append(bars[0].n),
    )
    spent = 1 if stop_below else most
    assert len(parts) == 6
    for _, _, _, evaluations, *_ in parts:
        assert (evaluations == spent).all()
    (bar,) = bars
    assert bar.total == bar.n == 6 * most
    assert bar.unit == "evaluation"
    assert re.search(r"^\d running, [\d.e+]+ frames/s$", bar.postfix)
    assert before == [part * most + number for part in range(6) for number in range(1, spent + 1)]


def test_nonfinite_samples_are_an_error_but_only_a_note_in_training(capsys):
    assert "--sampler ngd: samples are not finite" in error_of(run, make_plan(), step_size=1e30)
    assert len(clips_of(make_plan(), step_size=1e30, strict=False)) == 5
    assert "note: --sampler" in capsys.readouterr().out


@pytest.mark.parametrize(
    "guidance, num_steps, stop_below", [(1.0, 9, None), (4.0, 9, None), (1.0, 60, 0.5)]
)
def test_recorded_energies_equal_the_closed_form_at_each_point(guidance, num_steps, stop_below):
    settings = {"num_steps": num_steps, "step_size": 0.02, "guidance": guidance, "method": "gd"}
    settings["stop_below"] = stop_below
    clips, evaluations, energies = run(make_plan(), 2, energy=True, **settings)
    # Of the guided field; 11 without a class
    rate = (11 + guidance * (torch.arange(5) - 10)) * torch.arange(1, 6)
    points = torch.arange(num_steps)
    shrinking = (1 - 0.02 * rate)[:, None] ** (2 * points)
    expected = (rate / 2 * square_sum(start_noise(range(5))))[:, None] * shrinking
    if stop_below:  # a point per evaluation; the last one made no step
        expected[points >= evaluations[:, None]] = torch.nan
        assert len(set(evaluations.tolist())) == 5
    else:
        assert evaluations.tolist() == [8] * 5
    assert_close(energies, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(clips, clips_of(make_plan(), 2, **settings))  # recording changes nothing


def test_a_solver_starts_at_the_gamma_of_its_init_clips_which_are_read_batch_by_batch():
    batches = []

    def init(indices):
        batches.append(list(indices))
        black = torch.zeros(len(indices), 2, 3, 4, 4)
        return black, None

    clips = clips_of(
        make_plan(),
        batch_size=2,
        method="euler",
        num_steps=2,
        guidance=1.0,
        init=init,
        init_gamma=0.5,
    )
    assert batches == [[0, 1], [2, 3], [4]]
    rate = torch.arange(1, 6) ** 2 / 4  # f / c(0.5) = -rate x; one step from 0.5 to 1
    x = (1 - rate / 2).reshape(5, 1, 1, 1, 1) * start_noise(range(5)) / 2
    assert_close(clips, Identity().decode(x))


@pytest.mark.parametrize("overlap", [1, 7])
def test_a_longer_video_begins_with_the_shorter_one_bit_for_bit(overlap):
    plan = windows_of(19, 8, overlap)
    clips = clips_of(plan, step_size=0.1)
    assert clips.shape[1] == 19
    for num_frames in (8, 9, 18):
        shorter = clips_of(replace(plan, num_frames=num_frames), step_size=0.1)
        assert torch.equal(shorter, clips[:, :num_frames])
    assert torch.equal(clips_of(windows_of(8), step_size=0.1), clips[:, :8])  # without windows


def test_each_window_has_its_own_noise_after_the_end_of_the_previous_one(monkeypatch):
    plan = windows_of(14, 8, 5)
    points = record_calls(monkeypatch, plan.model, "forward", lambda x, *others: x[:3])
    parts = parts_of(plan, step_size=0.1, num_steps=4)
    new_frames = [(first, videos.shape[1]) for _, first, videos, *_ in parts]
    assert new_frames == [(0, 8), (8, 3), (11, 3)]
    clips = torch.cat([videos for _, _, videos, *_ in parts], dim=1)
    for window in range(3):
        start, *later = points[3 * window : 3 * window + 3]
        first = 5 if window else 0
        noise = start_noise(range(3), shape=(3, 8, 4, 4), window=window)
        assert torch.equal(start[:, :, first:], noise[:, :, first:])
        given = start[:, :, :first]
        for point in later:
            assert torch.equal(point[:, :, :first], given)
        shown = clips[:, 3 * window : 3 * window + first].permute(0, 4, 1, 2, 3)
        assert torch.equal(shown, ((given + 1) * 127.5).round().clamp(0, 255).byte())


def test_a_fully_given_window_needs_no_evaluation():
    plan = windows_of(14, 6, 2)  # windows begin at 0, 4, 8
    clips = torch.randint(256, (3, 3, 14, plan.image_size, plan.image_size)).byte()
    is_given = torch.arange(14).expand(3, 14) < 10
    parts = parts_of(plan, step_size=0.1, given=lambda indices: (clips, is_given))
    assert [evaluations.tolist() for *_, evaluations, _, _ in parts] == [[0] * 3, [0] * 3, [5] * 3]
    shown = torch.cat([videos for _, _, videos, *_ in parts], dim=1)
    assert torch.equal(shown[:, :10], clips[:, :, :10].permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize(
    "trained, longest, scale, window",
    [
        (16, 0.04, 0.04, 16),
        (16, 0.08, 0.04, 32),
        (15, 0.08, 0.04, 28),  # of 30, whole patches of 4
        (16, 0.04, 0.05, 16),  # a slower frame rate than training had: as many frames
    ],
)
def test_the_default_window_lasts_as_long_as_the_longest_training_clip(
    trained, longest, scale, window
):
    def choose(use_rope=True, forcing=0.5, rope_scale="none", window=None, overlap=None):
        return choose_windows(
            SimpleNamespace(rope_scale=rope_scale, window=window, overlap=overlap),
            replace(Quadratic.config, num_frames=trained, use_rope=use_rope),
            num_frames=99,
            trained_frames=trained,
            data={"longest_time_scale": longest},
            time_scale=scale,
            forcing=forcing,
        )

    assert choose() == (window, window // 2)
    assert choose(use_rope=False) == (trained, trained // 2)
    for all_at_once in (choose(forcing=0.0), choose(rope_scale="linear")):
        assert all_at_once == (99, 0)
    assert choose(window=10, overlap=3) == (10, 3)
    assert choose(window=10, overlap=3, forcing=0.0) == (10, 3)


def test_classes_are_sampled_in_turn_and_a_name_wins_over_an_index():
    def choose(*classes):
        flags = SimpleNamespace(classes=classes, num_samples=4)
        return choose_labels(flags, ["1", "10", "2"]).tolist()

    assert choose() == [0, 1, 2, 0]
    assert choose("10", "none") == [1, -1, 1, -1]
    assert choose("1", "0", "2") == [0, 0, 2, 0]


def resolve(training, **typed):
    return resolve_sampler(
        SimpleNamespace(**dict.fromkeys(SAMPLER) | typed), training, OBJECTIVES["eqm"]
    )


def test_flags_of_another_sampler_are_noted(capsys):
    """They may be of a recipe, so they are no errors."""
    resolve({}, sampler="euler", stepsize=0.1, mu=0.5)
    resolve({}, sampler="gd", stepsize=0.1, mu=0.5)
    resolve(TUNED, mu=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "note: --stepsize 0.1: applies to gd and ngd, not to euler",
        "note: --mu 0.5: applies to ngd, not to euler",
        "note: --mu 0.5: applies to ngd, not to gd",
    ]


def test_flags_override_training_settings_which_override_defaults():
    assert resolve({}) == SAMPLER | {"guidance_chosen": False}  # such as a published model
    # A training default, which the user did not set
    assert resolve(TUNED) == TUNED | {"guidance_chosen": False}
    assert resolve(TUNED, sampler="euler", solver_shift=3.0)["solver_shift"] == 3.0
    changes = {"cfg_scale": 2.0, "mu": 0.1}
    expected = TUNED | changes | {"stop_below": None, "guidance_chosen": True}
    assert resolve(TUNED, **changes, stop_below=0.0) == expected


@pytest.mark.parametrize(
    "kept, typed, steps, size",
    [
        ("ngd", {"num_sampling_steps": 6}, 6, 0.02),  # of a path of 2 x 0.05
        ("ngd", {"stepsize": 0.03}, 4, 0.03),  # rounded to whole steps
        ("ngd", {"stepsize": 5.0}, 2, 5.0),  # one evaluation at least
        ("ngd", {"stepsize": 0.01, "num_sampling_steps": 4}, 4, 0.01),
        ("ngd", {"sampler": "euler", "num_sampling_steps": 6}, 6, 0.05),  # has no step size
        ("euler", {"sampler": "gd"}, 250, 0.0017),  # solvers have no path length to keep
        ("euler", {"sampler": "gd", "num_sampling_steps": 4}, 4, 0.1411),
    ],
)
def test_the_path_length_stays_if_only_steps_or_step_size_is_set(kept, typed, steps, size):
    settings = resolve(TUNED | {"sampler": kept}, **typed)
    assert settings["num_sampling_steps"] == steps
    assert settings["stepsize"] == pytest.approx(size)


def field_of(model, x):
    with torch.no_grad(), distributed.autocast(x.device, "bf16"):
        return model(x, labels(len(x)), torch.full((len(x),), 0.05))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"position_table": "space", "rope_speed": 0.5},
        {"use_rope": False},
        {"ebm": "dot"},
    ],
)
def test_casting_weights_once_changes_no_bit_of_the_output(changes):
    model = tiny(**changes).requires_grad_(False)
    x = clip(model.config.num_frames, batch=3)
    expected = field_of(model, x)
    products = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv3d)]
    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
    for precision, dtype in dtypes.items():
        cast_products(model, precision)
        assert {module.weight.dtype for module in products} == {dtype}
        assert torch.equal(field_of(model, x), expected)

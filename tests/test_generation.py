"""Clips of a plan, batch by batch and window by window, sampler settings, and weights that are cast
once.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tqdm import tqdm

import generation
from generation import (
    SAMPLER,
    Plan,
    cast_products,
    choose_labels,
    choose_windows,
    generate,
    resolve_sampler,
)
from models import model_config
from runtime import distributed
from runtime.cli import UserError
from runtime.rng import normal
from test_models import clip, labels, tiny
from training import record_calls
from transport import OBJECTIVES
from vae import VAE

SETTINGS = {
    "method": "ngd",
    "num_steps": 6,
    "step_size": 0.01,
    "momentum": 0.3,
    "stop_below": None,
    "guidance": 4.0,
    "precision": "fp32",
}
TUNED = {
    "sampler": "ngd",
    "num_sampling_steps": 3,
    "stepsize": 0.05,
    "mu": 0.2,
    "stop_below": 0.5,
    "cfg_scale": 1.5,
}
LATENTS = SimpleNamespace(
    downsample=1, decode=lambda x: x.permute(0, 2, 3, 4, 1)
)  # shows latents as they are


class Quadratic:
    """The field -(1 + y) 25 t x and its energy. It has no sums, so the batch changes no bit."""

    config = model_config(
        "EqM-S/4",
        in_channels=2,
        input_size=4,
        num_classes=10,
        temporal_patch_size=1,
        use_rope=True,
    )

    def __call__(self, x, y, time_scale):
        assert x.dtype == torch.float32 and not torch.is_grad_enabled()
        return -((1 + y) * 25 * time_scale).reshape(-1, 1, 1, 1, 1) * x

    def energy(self, x, y, time_scale):
        return (1 + y) * 25 * time_scale * x.square().flatten(1).sum(dim=1) / 2


def make_plan(model, count=5, vae=LATENTS, **changes):
    """A plan of clips of 3 frames, each with its own class and frame rate."""
    time_scales = torch.linspace(0.04, 0.2, count).tolist()
    plan = {"time_scales": time_scales, "num_frames": 3, "labels": torch.arange(count)} | changes
    return Plan(model, vae, list("ABCDEFGHIJ"), time_scale=0.04, **plan)


def windows_of(num_frames, window=None, overlap=0, count=3):
    """A plan of a small network that samples in windows."""
    windows = {"num_frames": num_frames, "window": window, "overlap": overlap}
    return make_plan(
        tiny(in_channels=3), count, VAE("none"), labels=torch.arange(count) % 2, **windows
    )


def parts_of(plan, batch_size=16, **changes):
    """What `generate` yields; changes replace SETTINGS or are arguments of `generate`."""
    settings = {name: changes.pop(name, value) for name, value in SETTINGS.items()}
    return list(generate(plan, range(len(plan.labels)), 0, "cpu", settings, batch_size, **changes))


def run(plan, batch_size=16, **changes):
    """(clips, evaluations of the first window, energies or None) of all samples."""
    parts = parts_of(plan, batch_size, **changes)
    count = len(plan.window_starts)
    batches = [parts[first : first + count] for first in range(0, len(parts), count)]
    clips = torch.cat([torch.cat([part[2] for part in batch], dim=1) for batch in batches])
    evaluations, energies = zip(*(batch[0][3:] for batch in batches), strict=True)
    return clips, torch.cat(evaluations), torch.cat(energies) if changes.get("energy") else None


@pytest.mark.parametrize("stop_below", [None, 60])
def test_samples_do_not_depend_on_the_batch_size_or_on_other_frame_rates(stop_below):
    plan = make_plan(Quadratic())
    expected, spent, _ = run(plan, stop_below=stop_below)
    assert expected.shape == (5, 3, 4, 4, 2) and (len(set(spent.tolist())) > 1) == (
        stop_below is not None
    )
    for batch_size in (1, 2):
        clips, evaluations, _ = run(plan, batch_size, stop_below=stop_below)
        assert torch.equal(clips, expected) and torch.equal(evaluations, spent)
    same, _, _ = run(
        replace(plan, time_scales=None), stop_below=stop_below
    )  # all have that of the plan, 0.04
    assert torch.equal(same[0], expected[0]) and not torch.equal(same[4], expected[4])


def test_a_batch_without_a_condition_has_no_guidance(monkeypatch):
    sizes = record_calls(monkeypatch, Quadratic, "__call__", lambda self, x, *others: len(x))
    plan = make_plan(Quadratic(), count=4, labels=torch.tensor([-1, -1, -1, 2]))
    one, two = (run(plan, batch_size=3, guidance=guidance)[0] for guidance in (1.0, 9.0))
    assert torch.equal(one[:3], two[:3]) and not torch.equal(one[3], two[3])
    assert (
        sizes == [3] * 5 + [1] * 5 + [3] * 5 + [2] * 5
    )  # only the last batch also without its condition


@pytest.mark.parametrize(
    ("method", "stop_below", "most"), [("gd", None, 5), ("ngd", 1e9, 5), ("heun", None, 9)]
)
def test_one_progress_bar_counts_evaluations_even_if_samples_stop_early(
    method, stop_below, most, monkeypatch
):
    bars = []
    before = []
    plan = make_plan(Quadratic(), num_frames=5, window=3, overlap=1)
    monkeypatch.setattr(
        generation,
        "Bar",
        lambda **about: bars.append(tqdm(**about | {"disable": False})) or bars[-1],
    )
    options = {
        "method": method,
        "stop_below": stop_below,
        "before_evaluation": lambda: before.append(bars[0].n),
    }
    parts = parts_of(plan, 2, **options)  # 3 batches of 2 windows
    spent = 1 if stop_below else most
    assert len(parts) == 6 and all((evaluations == spent).all() for *_, evaluations, _ in parts)
    assert [(bar.total, bar.n, bar.unit) for bar in bars] == [(6 * most, 6 * most, "evaluation")]
    assert before == [part * most + number for part in range(6) for number in range(1, spent + 1)]


def test_nonfinite_samples_are_an_error_but_only_a_note_in_training(capsys):
    plan = make_plan(Quadratic())
    with pytest.raises(UserError, match=r"--sampler ngd: samples are not finite"):
        run(plan, step_size=1e30)
    assert (
        len(run(plan, step_size=1e30, strict=False)[0]) == 5
        and "note: --sampler" in capsys.readouterr().out
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_recorded_energies_equal_the_closed_form_at_each_point(guidance):
    plan = make_plan(Quadratic())
    changes = {"num_steps": 9, "step_size": 0.001, "guidance": guidance, "method": "gd"}
    clips, evaluations, energies = run(plan, 2, energy=True, **changes)
    rate = (11 + guidance * (torch.arange(5) - 10)) * torch.arange(
        1, 6
    )  # of the guided field; 11 without a class
    start = normal(0, "sample", 0, range(5), (2, 3, 4, 4)).square().flatten(1).sum(dim=1)
    expected = (rate / 2 * start)[:, None] * (1 - 0.001 * rate)[:, None] ** (2 * torch.arange(9))
    torch.testing.assert_close(energies, expected, rtol=1e-4, atol=1e-4)
    assert evaluations.tolist() == [8] * 5
    assert torch.equal(clips, run(plan, 2, **changes)[0])  # recording changes nothing


def test_the_energies_of_a_sample_end_where_it_stops():
    changes = {
        "num_steps": 60,
        "step_size": 0.02,
        "guidance": 1.0,
        "method": "gd",
        "stop_below": 0.5,
    }
    clips, evaluations, energies = run(make_plan(Quadratic()), 2, energy=True, **changes)
    known = ~energies.isnan()
    assert (
        known.sum(dim=1).tolist() == evaluations.tolist()
    )  # a point per evaluation; the last one made no step
    assert len(set(evaluations.tolist())) == 5 and (energies.diff(dim=1)[known[:, 1:]] < 0).all()
    last = energies[torch.arange(5), evaluations - 1]
    torch.testing.assert_close(
        last, torch.arange(1, 6) ** 2 * clips.square().flatten(1).sum(dim=1) / 2
    )


def test_init_clips_are_read_one_batch_at_a_time():
    plan = make_plan(Quadratic(), vae=VAE("none"))
    asked = []

    def init(indices):
        asked.append(list(indices))
        return 40 * torch.tensor(indices).byte()[:, None, None, None, None].expand(
            -1, 2, 3, 4, 4
        ), None

    settings = SETTINGS | {"step_size": 1e-9}
    for _, _, videos, _, _ in generate(
        plan, range(5), 0, "cpu", settings, 2, init=init, init_gamma=1.0
    ):
        assert videos[:, 0, 0, 0, 0].tolist() == [40 * index for index in asked[-1]]
    assert asked == [[0, 1], [2, 3], [4]]


def test_a_solver_starts_at_the_gamma_of_its_init_clips():
    vae = SimpleNamespace(**vars(LATENTS), encode=lambda clips: clips.float())
    black = torch.zeros(5, 2, 3, 4, 4)
    init = {"init": lambda indices: (black, None), "init_gamma": 0.5, "guidance": 1.0}
    clips, _, _ = run(make_plan(Quadratic(), vae=vae), method="euler", num_steps=2, **init)
    rate = torch.arange(1, 6) ** 2 / 4  # f / c(0.5) = -rate x; one step from 0.5 to 1
    expected = (
        (1 - rate / 2).reshape(5, 1, 1, 1, 1) * normal(0, "sample", 0, range(5), (2, 3, 4, 4)) / 2
    )
    torch.testing.assert_close(clips, LATENTS.decode(expected))


@pytest.mark.parametrize("overlap", [1, 7])
def test_a_longer_video_begins_with_the_shorter_one_bit_for_bit(overlap):
    long = windows_of(19, 8, overlap)
    shown, _, _ = run(long, step_size=0.1)
    assert shown.shape[1] == 19
    for num_frames in (8, 9, 18):
        assert torch.equal(
            run(replace(long, num_frames=num_frames), step_size=0.1)[0], shown[:, :num_frames]
        )
    assert torch.equal(run(windows_of(8), step_size=0.1)[0], shown[:, :8])  # without windows


def test_each_window_has_its_own_noise_after_the_end_of_the_previous_one(monkeypatch):
    plan = windows_of(14, 8, 5)
    seen = record_calls(monkeypatch, plan.model, "forward", lambda x, *others: x[:2])
    parts = parts_of(plan, 2, step_size=0.1, num_steps=4)
    found = [(list(numbers), first, videos.shape[1]) for numbers, first, videos, _, _ in parts]
    assert found == [
        (batch, *window) for batch in ([0, 1], [2]) for window in ((0, 8), (8, 3), (11, 3))
    ]  # new frames
    assert all((evaluations == 3).all() for *_, evaluations, _ in parts)
    clips = torch.cat([videos for _, _, videos, _, _ in parts[:3]], dim=1)
    for number in range(3):
        points = seen[3 * number : 3 * number + 3]
        first = 5 if number else 0
        noise = normal(0, "sample", number, [0, 1], (3, 8, 4, 4))
        given = points[0][:, :, :first]
        assert torch.equal(points[0][:, :, first:], noise[:, :, first:])
        assert all(torch.equal(point[:, :, :first], given) for point in points)
        shown = clips[:, 3 * number : 3 * number + first].permute(0, 4, 1, 2, 3)
        assert torch.equal(shown, ((given + 1) * 127.5).round().clamp(0, 255).byte())


def test_a_fully_given_window_needs_no_evaluation():
    plan = windows_of(14, 6, 2)  # windows begin at 0, 4, 8
    clips = torch.randint(
        256, (3, 3, 14, *[plan.image_size] * 2), generator=torch.Generator().manual_seed(0)
    ).byte()
    parts = parts_of(
        plan, step_size=0.1, given=lambda indices: (clips, torch.arange(14).expand(3, 14) < 10)
    )
    assert [evaluations.tolist() for *_, evaluations, _ in parts] == [[0] * 3, [0] * 3, [5] * 3]
    shown = torch.cat([videos for _, _, videos, _, _ in parts], dim=1)
    assert torch.equal(shown[:, :10], clips[:, :, :10].permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize(
    ("trained", "longest", "scale", "window"),
    [
        (16, 0.04, 0.04, 16),
        (16, 0.08, 0.04, 32),
        (16, 0.08, 0.02, 64),
        (15, 0.04, 0.04, 15),
        (8, 0.12, 0.08, 12),
        (15, 0.08, 0.04, 28),  # of 30, whole patches of 4
        (16, 0.04, 0.05, 16),
    ],  # a slower frame rate than training had: as many frames
)
def test_the_default_window_lasts_as_long_as_the_longest_training_clip(
    trained, longest, scale, window
):
    def choose(use_rope=True, forcing=0.5, **flags):
        args = SimpleNamespace(**{"rope_scale": "none", "window": None, "overlap": None} | flags)
        config = tiny(in_channels=3, num_frames=trained, use_rope=use_rope).config
        return choose_windows(
            args, config, 99, trained, {"longest_time_scale": longest}, scale, forcing
        )

    assert choose() == (window, window // 2) and choose(use_rope=False) == (trained, trained // 2)
    assert choose(forcing=0.0) == (99, 0) == choose(rope_scale="linear")  # all frames at once
    assert choose(window=10, overlap=3) == choose(window=10, overlap=3, forcing=0.0) == (10, 3)


def test_classes_are_sampled_in_turn_and_a_name_wins_over_an_index():
    def choose(*classes):
        return choose_labels(
            SimpleNamespace(classes=classes, num_samples=4), ["1", "10", "2"]
        ).tolist()

    assert choose() == [0, 1, 2, 0] and choose("10", "none") == [1, -1, 1, -1]
    assert choose("1", "0", "2") == [0, 0, 2, 0]


def resolve(training, **typed):
    return resolve_sampler(
        SimpleNamespace(**dict.fromkeys(SAMPLER) | typed), training, OBJECTIVES["eqm"]
    )


def test_flags_override_training_settings_which_override_defaults():
    assert resolve({}) == SAMPLER | {"guidance_chosen": False}  # such as a published model
    assert resolve(TUNED) == TUNED | {
        "guidance_chosen": False
    }  # a training default, which the user did not set
    changes = {"cfg_scale": 2.0, "mu": 0.1}
    assert resolve(TUNED, **changes, stop_below=0.0) == TUNED | changes | {
        "stop_below": None,
        "guidance_chosen": True,
    }


@pytest.mark.parametrize(
    ("kept", "typed", "steps", "size"),
    [
        ("ngd", {"num_sampling_steps": 6}, 6, 0.02),  # of a path of 2 x 0.05
        ("ngd", {"stepsize": 0.01}, 11, 0.01),
        ("ngd", {"stepsize": 0.03}, 4, 0.03),  # rounded to whole steps
        ("ngd", {"stepsize": 5.0}, 2, 5.0),  # one evaluation at least
        ("ngd", {"stepsize": 0.01, "num_sampling_steps": 4}, 4, 0.01),
        ("ngd", {"sampler": "euler", "num_sampling_steps": 6}, 6, 0.05),  # has no step size
        ("euler", {}, 3, 0.05),
        ("euler", {"sampler": "gd"}, 250, 0.0017),  # solvers have no path length to keep
        ("euler", {"sampler": "gd", "num_sampling_steps": 4}, 4, 0.1411),
        ("heun", {"stop_below": 0.5}, "--stop-below 0.5: heun has a fixed number of steps", None),
        (
            "ngd",
            {"stop_below": 0.5, "sampler": "heun"},
            "--stop-below 0.5: heun has a fixed number of steps",
            None,
        ),
    ],
)
def test_the_path_length_stays_if_only_steps_or_step_size_is_set(kept, typed, steps, size):
    with nullcontext() if size else pytest.raises(UserError, match=steps):
        found = resolve(TUNED | {"sampler": kept}, **typed)
        assert (found["num_sampling_steps"], found["stepsize"]) == (steps, pytest.approx(size))


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
    for precision, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        cast_products(model, precision)
        products = [
            module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv3d)
        ]
        assert {module.weight.dtype for module in products} == {dtype}
        assert torch.equal(field_of(model, x), expected)

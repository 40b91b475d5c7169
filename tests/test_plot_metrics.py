"""Which run continues which, and what is drawn where."""

import json

import numpy as np
import pytest
from PIL import Image

import plot_metrics
from plot_metrics import COLORS, load_runs, make_curves, plot_curves, smooth
from scoring.plots import plt
from training import run_main


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_run(folder, first, last, ckpt=None, torn="", cost=(2, 1e15), **columns):
    """A run folder that logged every 10 steps from `first` on, as train.py does.

    ckpt: what config.json says. cost: seconds and FLOPs of a step, None: not logged; columns:
    {name: function of the step}."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"training": {"ckpt": ckpt and str(ckpt)}}))
    lines = []
    for step in range(first + 10, last + 1, 10):
        row = {
            "step": step,
            "train_loss": 100 / step,
            "num_frames": int(folder.name.split("-f")[1].split("-")[0]),
        }
        row |= {
            name: (step - first) * each
            for name, each in zip(("seconds", "flops"), cost or (), strict=False)
        }
        lines.append(
            json.dumps(row | {name: value(step) for name, value in columns.items()}) + "\n"
        )
    (folder / "metrics.jsonl").write_text("".join(lines) + torn)
    return folder


def make_phases(root):
    """Three phases of 100, 50 and 50 steps, each from a checkpoint of the one before. Returns their
    folder.
    """
    one = make_run(root / "000-EqM-S-4-f4-rope", 0, 100)
    two = make_run(
        root / "001-EqM-S-4-f8-rope", 100, 150, one / "checkpoints/0000100.pt", cost=(4, 3e15)
    )
    make_run(root / "002-EqM-S-4-f16-rope", 150, 200, two / "checkpoints/best.pt", cost=(8, 9e15))
    return root


def curves_of(*places):
    return make_curves(load_runs(places))


def steps(curve):
    return [[row["step"] for row in rows] for _, rows in curve.phases]


def frames(curve):
    return " ".join(name for name, _ in curve.phases)


def texts(shown):
    return [text.get_text() for text in shown]


def test_phases_are_one_curve_whose_steps_seconds_and_flops_add_up(tmp_path):
    root = make_phases(tmp_path / "EXP")
    (curve,) = curves_of(root)
    assert frames(curve) == "f4 f8 f16"
    assert steps(curve) == [
        list(range(10, 101, 10)),
        list(range(110, 151, 10)),
        list(range(160, 201, 10)),
    ]
    assert curve.label == "EXP/002-EqM-S-4-f16-rope"
    folders = sorted(root.iterdir())
    for places in (folders, folders[::-1], [*folders, root]):  # one by one, or twice
        assert curves_of(*places) == [curve]

    by_step, by_flops, by_seconds = plot_curves([curve]).axes
    every = np.arange(10, 201, 10)
    took = np.r_[every[:10] * 2, 200 + (every[10:15] - 100) * 4, 400 + (every[15:] - 150) * 8]
    spent = np.r_[every[:10] * 1.0, 100 + (every[10:15] - 100) * 3, 250 + (every[15:] - 150) * 9]
    for axes, label, x in (
        (by_step, "step", every),
        (by_seconds, "wall time (min)", took / 60),
        (by_flops, "training compute (PFLOP)", spent),
    ):
        assert axes.get_xlabel() == label
        assert np.allclose(axes.lines[0].get_xydata(), np.column_stack([x, 100 / every]))
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in by_step.patches]
    assert spans == [(10, 100), (100, 150), (150, 200)]  # phases are shaded and named
    assert len({patch.get_alpha() for patch in by_step.patches}) == 2
    assert texts(by_step.texts) == ["f4", "f8", "f16"]
    assert [text.get_position()[0] for text in by_step.texts] == [55, 125, 175]


def test_a_schedule_is_split_into_phases_and_counts_nothing_twice(tmp_path):
    scheduled = {"num_frames": lambda step: 4 if step <= 40 else 16}
    (curve,) = curves_of(make_run(tmp_path / "EXP/000-EqM-S-4-f4-16-rope", 0, 100, **scheduled))
    assert (frames(curve), curve.label) == ("f4 f16", "EXP/000-EqM-S-4-f4-16-rope")
    assert steps(curve) == [list(range(10, 41, 10)), list(range(50, 101, 10))]
    _, by_flops, by_seconds = plot_curves([curve]).axes
    assert np.allclose(by_seconds.lines[0].get_xdata(), np.arange(10, 101, 10) * 2 / 60)
    assert np.allclose(by_flops.lines[0].get_xdata(), np.arange(10, 101, 10))


def test_a_phase_from_the_middle_of_another_is_a_curve_that_branches_off(tmp_path):
    root = make_phases(tmp_path / "EXP")
    make_run(
        tmp_path / "elsewhere/EXP/000-EqM-S-4-f4-rope", 0, 100
    )  # of the same name, in another experiment
    start = "moved/EXP/000-EqM-S-4-f4-rope/checkpoints/0000060.pt"  # the experiment has moved
    make_run(root / "003-EqM-S-4-f8-rope", 60, 90, start, cost=(1, 1e15))
    make_run(root / "004-EqM-S-4-f64-rope", 0, 0)  # has not logged yet
    other, whole, fork = curves_of(tmp_path / "elsewhere/EXP", root)
    assert other.label == "EXP/000-EqM-S-4-f4-rope" and steps(whole)[0][-1] == 100
    assert steps(fork) == [list(range(10, 61, 10)), [70, 80, 90]]
    figure = plot_curves([whole, fork])
    seconds = figure.axes[2].lines[1].get_xdata()
    assert np.allclose(seconds, np.r_[np.arange(20, 121, 20), 130, 140, 150] / 60)
    assert texts(figure.legends[0].texts) == [whole.label, fork.label]
    assert [line.get_color() for line in figure.axes[0].lines[:2]] == list(COLORS[:2])
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [(set(line.get_xdata()), line.get_color()) for line in dotted] == [({60}, COLORS[1])]


def test_a_phase_whose_start_is_not_given_is_a_curve_and_a_line_says_so(tmp_path, capsys):
    root = make_phases(tmp_path / "EXP")
    (curve,) = curves_of(root / "002-EqM-S-4-f16-rope")
    assert steps(curve) == [list(range(160, 201, 10))]
    (line,) = capsys.readouterr().out.splitlines()
    assert "001-EqM-S-4-f8-rope/checkpoints/best.pt is not one of these runs" in line
    assert not plot_curves([curve]).axes[0].patches


def test_the_thin_line_is_as_logged_and_the_thick_one_a_mean_in_its_phase(tmp_path):
    one = make_run(
        tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, train_loss=lambda step: 5 + step % 20 / 10
    )
    make_run(
        tmp_path / "E/001-EqM-S-4-f8-rope",
        50,
        600,
        one / "checkpoints/0000050.pt",
        train_loss=lambda step: 1.0,
    )
    figure = plot_curves(curves_of(tmp_path / "E"))  # of 60 lines
    thin, thick = figure.axes[0].lines
    assert thin.get_linewidth() < thick.get_linewidth()
    assert np.allclose(thin.get_ydata(), [6, 5, 6, 5, 6, *[1] * 55])
    assert np.allclose(thick.get_ydata(), [5.5, 17 / 3, 16 / 3, 17 / 3, 5.5, *[1] * 55])
    assert "mean of 3 lines" in texts(figure.legends[0].texts)[-1]


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_smoothing_is_the_mean_of_the_finite_neighbors(window):
    y = np.random.default_rng(0).normal(size=20)
    y[[3, 4, 5, 17]] = np.nan
    before = window // 2
    after = window - window // 2
    windows = [y[max(0, i - before) : i + after] for i in range(20)]
    expected = [np.nanmean(part) if np.isfinite(part).any() else np.nan for part in windows]
    assert np.allclose(smooth(y, window), expected, equal_nan=True)


def test_validation_has_a_row_of_losses_that_were_finite(tmp_path):
    values = {"val_loss": lambda step: None if step == 30 else 50 / step}
    values |= {"val_loss_rel": lambda step: 5 / step, "train_loss_rel": lambda step: 10 / step}
    without = (
        '{"step": 60, "train_loss": 2.0, "train_loss_rel": 0.2}\n'  # a line without validation
    )
    every = np.arange(10, 51, 10)
    folder = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, torn=without, cost=None, **values)
    training, validation = plot_curves(curves_of(folder)).axes
    assert training.lines[0].get_xdata()[-1] == 60 and training.get_yscale() == "log"
    assert validation.get_xlabel() == "step" and training.get_ylabel() == "training loss"
    (line,) = validation.lines
    expected = np.where(every == 30, np.nan, 50 / every)
    assert np.allclose(line.get_xydata(), np.column_stack([every, expected]), equal_nan=True)
    training, validation = plot_curves(curves_of(folder), relative=True).axes
    assert np.allclose(training.lines[0].get_ydata(), [*(10 / every), 0.2])
    assert np.allclose(validation.lines[0].get_ydata(), 5 / every)
    assert "of zero" in training.get_ylabel() and "of zero" in validation.get_ylabel()


def test_validation_losses_of_one_clip_length_are_absolute_and_of_several_phases_relative(tmp_path):
    losses = {"val_loss": lambda step: 50 / step, "val_loss_rel": lambda step: 5 / step}
    one = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, **losses)
    assert "of zero" not in plot_curves(curves_of(one)).axes[3].get_ylabel()
    make_run(tmp_path / "E/001-EqM-S-4-f16-rope", 50, 90, one / "checkpoints/0000050.pt", **losses)
    validation = plot_curves(curves_of(tmp_path / "E")).axes[3]
    assert "of zero" in validation.get_ylabel()
    assert np.allclose(validation.lines[0].get_ydata(), 5 / np.arange(10, 91, 10))


def test_lines_say_what_was_not_drawn_and_odd_names_are_shown_as_they_are(tmp_path, capsys):
    folder = make_run(tmp_path / "_a$b_{$/000-EqM-S-4-f4-rope", 0, 50, torn='{"step": 60, "train')
    vae = make_run(tmp_path / "b/000-vae-f1", 0, 50, cost=(1,))
    out = tmp_path / "new/loss.png"
    run_main(plot_metrics, folder.parent, vae, "--out", out)
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / 'metrics.jsonl'}: 1 torn line skipped",
        "no flops logged, so no curves against training compute: b/000-vae-f1",
        f"{out}: 2 curves",
    ]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 1200  # two columns
    legend = plot_curves(curves_of(folder)).legends[0]
    assert not legend.texts[0].get_parse_math() and texts(legend.texts) == [
        "_a$b_{$/000-EqM-S-4-f4-rope"
    ]

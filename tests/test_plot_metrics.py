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

    ckpt: what config.json says. cost: seconds and FLOPs of a step; a cost that is missing is not
    logged. columns: {name: function of the step}.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"training": {"ckpt": ckpt and str(ckpt)}}))
    num_frames = int(folder.name.split("-f")[1].split("-")[0])
    text = ""
    for step in range(first + 10, last + 1, 10):
        row = {"step": step, "train_loss": 100 / step, "num_frames": num_frames}
        for name, each in zip(("seconds", "flops"), cost, strict=False):
            row[name] = (step - first) * each
        for name, value in columns.items():
            row[name] = value(step)
        text += json.dumps(row) + "\n"
    (folder / "metrics.jsonl").write_text(text + torn)
    return folder


def make_phases(root):
    """Three phases of 100, 50 and 50 steps, each from a checkpoint of the one before. Returns their
    folder.
    """
    one = make_run(root / "000-EqM-S-4-f4-rope", 0, 100) / "checkpoints/0000100.pt"
    two = make_run(root / "001-EqM-S-4-f8-rope", 100, 150, one, cost=(4, 3e15))
    two /= "checkpoints/best.pt"
    make_run(root / "002-EqM-S-4-f16-rope", 150, 200, two, cost=(8, 9e15))
    return root


def curves_of(*places):
    return make_curves(load_runs(places))


def steps(curve):
    """{phase: (first step, last step)}; every tenth step is logged."""
    for _, rows in curve.phases:
        assert (np.diff([row["step"] for row in rows]) == 10).all()
    return {name: (rows[0]["step"], rows[-1]["step"]) for name, rows in curve.phases}


def texts(shown):
    return [text.get_text() for text in shown]


def test_phases_are_one_curve_whose_steps_seconds_and_flops_add_up(tmp_path):
    root = make_phases(tmp_path / "EXP")
    (curve,) = curves_of(root)
    assert steps(curve) == {"f4": (10, 100), "f8": (110, 150), "f16": (160, 200)}
    assert curve.label == "EXP/002-EqM-S-4-f16-rope"
    folders = sorted(root.iterdir())
    for places in (folders, folders[::-1], [*folders, root]):  # one by one, or twice
        assert curves_of(*places) == [curve]

    by_step, by_flops, by_seconds = plot_curves([curve]).axes
    every = np.arange(10, 201, 10)
    took = np.interp(every, [0, 100, 150, 200], [0, 200, 400, 800])
    spent = np.interp(every, [0, 100, 150, 200], [0, 100, 250, 700])
    for axes, label, x in (
        (by_step, "step", every),
        (by_seconds, "wall time (min)", took / 60),
        (by_flops, "training compute (PFLOP)", spent),
    ):
        assert axes.get_xlabel() == label
        assert np.allclose(axes.lines[0].get_xdata(), x)
        assert np.allclose(axes.lines[0].get_ydata(), 100 / every)
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in by_step.patches]
    assert spans == [(10, 100), (100, 150), (150, 200)]  # phases are shaded and named
    assert texts(by_step.texts) == ["f4", "f8", "f16"]


def test_a_phase_from_the_middle_of_another_is_a_curve_that_branches_off(tmp_path):
    root = make_phases(tmp_path / "EXP")
    # of the same name, in another experiment
    make_run(tmp_path / "elsewhere/EXP/000-EqM-S-4-f4-rope", 0, 100)
    start = "moved/EXP/000-EqM-S-4-f4-rope/checkpoints/0000060.pt"  # the experiment has moved
    make_run(root / "003-EqM-S-4-f8-rope", 60, 90, start, cost=(1, 1e15))
    make_run(root / "004-EqM-S-4-f64-rope", 0, 0)  # has not logged yet
    other, whole, fork = curves_of(tmp_path / "elsewhere/EXP", root)
    assert other.label == "EXP/000-EqM-S-4-f4-rope"
    assert steps(whole)["f4"] == (10, 100)
    assert steps(fork) == {"f4": (10, 60), "f8": (70, 90)}
    figure = plot_curves([whole, fork])
    seconds = figure.axes[2].lines[1].get_xdata()
    assert np.allclose(seconds, np.r_[np.arange(20, 121, 20), 130, 140, 150] / 60)
    assert texts(figure.legends[0].texts) == [whole.label, fork.label]
    *_, dotted = figure.axes[0].lines
    assert (dotted.get_color(), dotted.get_xdata()) == (COLORS[1], [60, 60])


def test_the_log_says_where_a_phase_from_latest_pt_began(tmp_path):
    one = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 100) / "checkpoints/latest.pt"
    two = make_run(tmp_path / "E/001-EqM-S-4-f8-rope", 80, 120, one)
    (two / "log.txt").write_text("a run, steps 60 to 120\nresumed, steps 90 to 120\n")
    (curve,) = curves_of(tmp_path / "E")
    assert steps(curve) == {"f4": (10, 60), "f8": (90, 120)}


def test_a_phase_whose_start_is_not_given_is_a_curve_and_a_line_says_so(tmp_path, capsys):
    root = make_phases(tmp_path / "EXP")
    (curve,) = curves_of(root / "002-EqM-S-4-f16-rope")
    assert steps(curve) == {"f16": (160, 200)}
    (line,) = capsys.readouterr().out.splitlines()
    assert "001-EqM-S-4-f8-rope/checkpoints/best.pt is not one of these runs" in line
    assert not plot_curves([curve]).axes[0].patches


def test_a_schedule_has_phases_whose_thin_line_is_as_logged_and_the_thick_one_a_mean(tmp_path):
    columns = {
        "train_loss": lambda step: 5 + step % 20 / 10 if step <= 50 else 1,
        "num_frames": lambda step: 4 if step <= 50 else 8,
    }
    (curve,) = curves_of(make_run(tmp_path / "E/000-EqM-S-4-f4-8-rope", 0, 600, **columns))
    assert curve.label == "E/000-EqM-S-4-f4-8-rope"
    assert steps(curve) == {"f4": (10, 50), "f8": (60, 600)}
    figure = plot_curves([curve])  # of 60 lines
    by_step, by_flops, by_seconds = figure.axes
    every = np.arange(10, 601, 10)  # nothing is counted twice
    assert np.allclose(by_seconds.lines[0].get_xdata(), every * 2 / 60)
    assert np.allclose(by_flops.lines[0].get_xdata(), every)
    thin, thick = by_step.lines
    assert thin.get_linewidth() < thick.get_linewidth()
    assert np.allclose(thin.get_ydata(), [6, 5, 6, 5, 6, *[1] * 55])
    assert np.allclose(thick.get_ydata(), [5.5, 17 / 3, 16 / 3, 17 / 3, 5.5, *[1] * 55])
    assert "mean of 3 lines" in texts(figure.legends[0].texts)[-1]


@pytest.mark.parametrize("window", [4, 100])
def test_smoothing_is_the_mean_of_the_finite_neighbors(window):
    y = np.random.default_rng(0).normal(size=20)
    y[[3, 4, 5, 17]] = np.nan
    y[8] = np.inf
    means = smooth(y, window)
    for index, mean in enumerate(means):
        first = max(0, index - window // 2)
        part = y[first : index - window // 2 + window]
        part = part[np.isfinite(part)]
        assert np.allclose(mean, part.mean() if len(part) else np.nan, equal_nan=True)


def test_validation_has_a_row_of_losses_that_were_finite(tmp_path):
    columns = {
        "val_loss": lambda step: None if step == 30 else 50 / step,
        "val_loss_rel": lambda step: 5 / step,
        "train_loss_rel": lambda step: 10 / step,
    }
    last = '{"step": 60, "train_loss": 2.0, "train_loss_rel": 0.2}\n'  # without validation
    folder = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, torn=last, cost=(), **columns)
    every = np.arange(10, 51, 10)
    training, validation = plot_curves(curves_of(folder)).axes
    assert training.lines[0].get_xdata()[-1] == 60
    assert training.get_yscale() == "log"
    assert validation.get_xlabel() == "step"
    assert training.get_ylabel() == "training loss"
    assert "of zero" not in validation.get_ylabel()
    (line,) = validation.lines
    expected = np.where(every == 30, np.nan, 50 / every)
    assert line.get_xdata().tolist() == every.tolist()
    assert np.allclose(line.get_ydata(), expected, equal_nan=True)
    training, validation = plot_curves(curves_of(folder), relative=True).axes
    assert np.allclose(training.lines[0].get_ydata(), [*(10 / every), 0.2])
    assert np.allclose(validation.lines[0].get_ydata(), 5 / every)
    assert "of zero" in training.get_ylabel()
    assert "of zero" in validation.get_ylabel()


def test_validation_losses_of_several_phases_are_relative(tmp_path):
    losses = {"val_loss": lambda step: 50 / step, "val_loss_rel": lambda step: 5 / step}
    one = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, **losses)
    make_run(tmp_path / "E/001-EqM-S-4-f16-rope", 50, 90, one / "checkpoints/0000050.pt", **losses)
    validation = plot_curves(curves_of(tmp_path / "E")).axes[3]
    assert "of zero" in validation.get_ylabel()
    assert np.allclose(validation.lines[0].get_ydata(), 5 / np.arange(10, 91, 10))


def test_lines_say_what_was_not_drawn_and_odd_names_are_shown_as_they_are(tmp_path, capsys):
    folder = make_run(tmp_path / "_a$b_{$/000-EqM-S-4-f4-rope", 0, 50, torn='{"step": 60, "train')
    vae = make_run(tmp_path / "b/000-vae-f1", 0, 50, cost=(1,))
    other = make_run(folder.parent / "001-VAE-f1", 0, 50)
    for run in (vae, other):
        (run / "config.json").write_text('{"training": {}}')
    out = tmp_path / "new/loss.png"
    run_main(plot_metrics, folder.parent, vae, "--out", out)
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / 'metrics.jsonl'}: 1 torn line skipped",
        f"{other}: a run of train_vae.py is skipped; name its folder to plot it",
        "no flops logged, so no curves against training compute: b/000-vae-f1",
        f"{out}: 2 curves",
    ]
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width == 1200  # two columns
    (text,) = plot_curves(curves_of(folder)).legends[0].texts
    assert not text.get_parse_math()
    assert text.get_text() == "_a$b_{$/000-EqM-S-4-f4-rope"

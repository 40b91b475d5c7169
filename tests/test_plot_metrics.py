"""Which run continues which, and what is drawn where."""

import json

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import plot_metrics
from plot_metrics import COLORS, load_runs, make_curves, plot_curves, smooth
from training import run_main


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_run(folder, first, last, ckpt=None, every=10, torn="", **columns):
    """A run folder that logged every 10 steps from `first` on; columns: name -> function of the step.

    ckpt: what config.json says; "" = there is no config.json.
    """
    folder.mkdir(parents=True)
    if ckpt != "":
        (folder / "config.json").write_text(json.dumps({"training": {"ckpt": ckpt and str(ckpt)}}))
    columns = {"train_loss": lambda step: 100 / step, **columns}
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(first + every, last + 1, every):
            row = {"step": step} | {name: value(step) for name, value in columns.items()}
            file.write(json.dumps(row) + "\n")
        file.write(torn)
    return folder


def costs(first, seconds, flops):
    """seconds and FLOPs as train.py logs them: since the start of the run."""
    return {"seconds": lambda step: (step - first) * seconds, "flops": lambda step: (step - first) * flops}


def make_phases(root):
    """Three phases of 100, 50 and 50 steps, each from the last checkpoint of the one before. Returns their folder."""
    one = make_run(root / "000-EqM-S-4-f4-rope", 0, 100, **costs(0, 2, 1e15))
    two = make_run(root / "001-EqM-S-4-f8-rope", 100, 150, one / "checkpoints/0000100.pt", **costs(100, 4, 3e15))
    make_run(root / "002-EqM-S-4-f16-rope", 150, 200, two / "checkpoints/best.pt", **costs(150, 8, 9e15))
    return root


def curves_of(*places):
    return make_curves(load_runs(places))


def steps(curve):
    return [[row["step"] for row in rows] for _, rows in curve.phases]


def frames(curve):
    return " ".join(name for name, _ in curve.phases)


def data(line):
    return np.column_stack(line.get_data())


def texts(shown):
    return [text.get_text() for text in shown]


def test_a_run_with_a_schedule_is_split_into_phases_and_counts_nothing_twice(tmp_path):
    num_frames = {"num_frames": lambda step: 4 if step <= 40 else 16}
    run = make_run(tmp_path / "EXP/000-EqM-S-4-f4-16-rope", 0, 100, **costs(0, 2, 1e15), **num_frames)
    (curve,) = curves_of(run)
    assert frames(curve) == "f4 f16"
    assert steps(curve) == [list(range(10, 41, 10)), list(range(50, 101, 10))]
    assert curve.label == "EXP/000-EqM-S-4-f4-16-rope"
    _, by_flops, by_seconds = plot_curves([curve], window=1).axes
    assert np.allclose(by_seconds.lines[0].get_xdata(), np.arange(10, 101, 10) * 2 / 60)
    assert np.allclose(by_flops.lines[0].get_xdata(), np.arange(10, 101, 10))


def test_a_folder_of_phases_is_one_curve_in_global_steps_whose_seconds_and_flops_add_up(tmp_path):
    root = make_phases(tmp_path / "EXP")
    (curve,) = curves_of(root)
    assert frames(curve) == "f4 f8 f16"
    assert steps(curve) == [list(range(10, 101, 10)), list(range(110, 151, 10)), list(range(160, 201, 10))]
    assert curve.label == "EXP/002-EqM-S-4-f16-rope after f4, f8"
    folders = sorted(root.iterdir())
    for places in (folders, folders[::-1], [*folders, root]):  # one by one, or twice
        assert curves_of(*places) == [curve]

    by_step, by_flops, by_seconds = plot_curves([curve], window=1).axes
    every = np.arange(10, 201, 10)
    assert np.allclose(data(by_step.lines[0]), np.column_stack([every, 100 / every]))
    took = np.r_[every[:10] * 2, 200 + (every[10:15] - 100) * 4, 400 + (every[15:] - 150) * 8]
    assert np.allclose(data(by_seconds.lines[0]), np.column_stack([took / 60, 100 / every]))
    assert by_seconds.get_xlabel() == "wall time (min)"
    spent = np.r_[every[:10] * 1.0, 100 + (every[10:15] - 100) * 3, 250 + (every[15:] - 150) * 9]
    assert np.allclose(data(by_flops.lines[0]), np.column_stack([spent, 100 / every]))
    assert by_flops.get_xlabel() == "training compute (PFLOP)"

    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in by_step.patches]
    assert spans == [(10, 100), (100, 150), (150, 200)]  # phases are shaded and named
    assert len({patch.get_alpha() for patch in by_step.patches}) == 2
    assert texts(by_step.texts) == ["f4", "f8", "f16"]


def test_a_phase_that_starts_in_the_middle_of_another_is_a_curve_that_branches_off_there(tmp_path):
    root = make_phases(tmp_path / "EXP")
    start = "elsewhere/EXP/000-EqM-S-4-f4-rope/checkpoints/0000060.pt"  # the experiment has moved
    make_run(root / "003-EqM-S-4-f8-rope", 60, 90, start, **costs(60, 1, 1e15))
    whole, fork = curves_of(root)
    assert steps(whole)[0][-1] == 100
    assert steps(fork) == [list(range(10, 61, 10)), [70, 80, 90]]
    seconds = plot_curves([fork], window=1).axes[2].lines[0].get_xdata()
    assert np.allclose(seconds, np.r_[np.arange(20, 121, 20), 130, 140, 150] / 60)


def test_runs_from_scratch_are_separate_curves_in_separate_colours(tmp_path):
    for index in range(3):
        make_run(tmp_path / f"results/00{index}-EqM-S-4-f4-rope", 0, 100 * (index + 1))
    curves = curves_of(tmp_path / "results")
    assert [steps(curve)[0][-1] for curve in curves] == [100, 200, 300]
    figure = plot_curves(curves, window=1)
    assert [line.get_color() for line in figure.axes[0].lines] == list(COLORS[:3])
    assert texts(figure.legends[0].texts) == [curve.label for curve in curves]


@pytest.mark.parametrize("ckpt", ["own", ""])
def test_a_resumed_phase_and_one_without_config_continue_the_run_that_ended_last_before_them(tmp_path, ckpt):
    root = make_phases(tmp_path / "EXP")
    make_run(root / "003-EqM-S-4-f16-rope", 0, 70)
    name = "004-EqM-S-4-f32-rope"
    make_run(root / name, 200, 250, ckpt and f"results/EXP/{name}/checkpoints/latest.pt")
    make_run(tmp_path / "other/000-EqM-S-4-f16-rope", 0, 190)
    make_run(root / "005-EqM-S-4-f64-rope", 0, 0)  # has not logged yet, so it is left out
    assert list(map(frames, curves_of(root, tmp_path / "other"))) == ["f16", "f4 f8 f16 f32", "f16"]


def test_a_phase_whose_start_is_not_given_is_a_curve_of_its_own_and_a_line_says_so(tmp_path, capsys):
    root = make_phases(tmp_path / "EXP")
    (curve,) = curves_of(root / "002-EqM-S-4-f16-rope")
    assert steps(curve) == [list(range(160, 201, 10))]
    (line,) = capsys.readouterr().out.splitlines()
    assert "001-EqM-S-4-f8-rope/checkpoints/best.pt is not of these runs" in line
    assert not plot_curves([curve]).axes[0].patches


def test_an_axis_that_a_run_did_not_log_has_no_curve_of_it_and_a_line_says_so(tmp_path, capsys):
    new = make_run(tmp_path / "a/000-EqM-S-4-f4-rope", 0, 100, **costs(0, 2, 1e15))
    old = make_run(tmp_path / "b/000-EqM-S-4-f4-rope", 0, 100)
    half = make_run(tmp_path / "a/001-EqM-S-4-f8-rope", 100, 200, new / "checkpoints/0000100.pt")  # phase 2 is older
    curves = curves_of(new, old)
    plot_metrics.say_missing(curves)
    assert capsys.readouterr().out.splitlines() == [
        "no flops logged, so no curve against training compute: b/000-EqM-S-4-f4-rope",
        "no seconds logged, so no curve against wall time: b/000-EqM-S-4-f4-rope",
    ]
    assert [len(axes.lines) for axes in plot_curves(curves, window=1).axes] == [2, 1, 1]
    for folders in ([old], [new, half]):
        (axes,) = plot_curves(curves_of(*folders), window=1).axes
        assert axes.get_xlabel() == "step"


def test_the_thin_line_is_as_logged_and_the_thick_one_a_mean_within_its_phase(tmp_path):
    one = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, train_loss=lambda step: 5 + step % 20 / 10)
    make_run(tmp_path / "E/001-EqM-S-4-f8-rope", 50, 100, one / "checkpoints/0000050.pt", train_loss=lambda step: 1.0)
    figure = plot_curves(curves_of(tmp_path / "E"), window=3)
    thin, thick = figure.axes[0].lines
    assert thin.get_linewidth() < thick.get_linewidth()
    assert np.allclose(thin.get_ydata(), [6, 5, 6, 5, 6, 1, 1, 1, 1, 1])
    assert np.allclose(thick.get_ydata(), [5.5, 17 / 3, 16 / 3, 17 / 3, 5.5, 1, 1, 1, 1, 1])
    assert "mean of 3 lines" in figure.legends[0].texts[-1].get_text()


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_smoothing_is_the_mean_of_the_finite_neighbours(window):
    y = np.random.default_rng(0).normal(size=20)
    y[[3, 4, 5, 17]] = np.nan
    before, after = window // 2, window - window // 2
    windows = [y[max(0, i - before) : i + after] for i in range(20)]
    expected = [np.nanmean(part) if np.isfinite(part).any() else np.nan for part in windows]
    assert np.allclose(smooth(y, window), expected, equal_nan=True)


def test_validation_has_a_row_with_a_line_for_the_own_frames_and_one_for_each_frame_count(tmp_path):
    values = {
        "val_loss": lambda step: 50 / step,
        "val_loss_f4": lambda step: 40 / step,
        "val_loss_f16": lambda step: None if step == 30 else 60 / step,  # was not finite
        "val_loss_rel": lambda step: 5 / step,
        "train_loss_rel": lambda step: 10 / step,
    }
    folder = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50, **values)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "train_loss": 2.0, "train_loss_rel": 0.2}\n')  # a line without validation
    curves = curves_of(folder)
    figure = plot_curves(curves, window=1)
    training, validation = figure.axes
    assert training.lines[0].get_xdata()[-1] == 60
    own, four, sixteen = map(data, validation.lines)
    every = np.arange(10, 51, 10)
    assert np.allclose(own, np.column_stack([every, 50 / every]))
    assert np.allclose(four[:, 1], 40 / every)
    assert np.isnan(sixteen[2, 1])
    assert np.allclose(np.delete(sixteen, 2, axis=0)[:, 1], 60 / np.delete(every, 2))
    assert validation.lines[1].get_marker() != validation.lines[2].get_marker()
    assert texts(validation.get_legend().texts) == ["4 frames", "16 frames"]
    assert training.get_yscale() == "log"

    training, validation = plot_curves(curves, relative=True, window=1).axes
    assert np.allclose(training.lines[0].get_ydata(), [*(10 / every), 0.2])
    assert np.allclose(validation.lines[0].get_ydata(), 5 / every)
    assert "of zero" in training.get_ylabel()


def test_torn_lines_are_skipped_and_counted_and_odd_names_are_shown_as_they_are(tmp_path, capsys):
    folder = make_run(tmp_path / "_a$b_{$/000-EqM-S-4-f4-rope", 0, 50, torn='{"step": 60, "train')
    out = tmp_path / "new/loss.png"
    run_main(plot_metrics, folder.parent, "--out", out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder / 'metrics.jsonl'}: 1 torn line left out"
    assert lines[-1] == f"{out}: 1 curve"
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 500
    assert texts(plot_curves(curves_of(folder), window=1).legends[0].texts) == [r"_a\$b_{\$/000-EqM-S-4-f4-rope"]


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    good = make_run(tmp_path / "E/000-EqM-S-4-f4-rope", 0, 50)
    empty = make_run(tmp_path / "empty", 0, 0)
    odd = make_run(tmp_path / "odd", 0, 0, torn='{"loss": 1}\n')
    other = make_run(tmp_path / "other", 0, 0, torn='{"step": 1}\n')
    out, taken = tmp_path / "x/loss.png", tmp_path / "taken.png"
    taken.mkdir()
    for words, *flags in (
        ("no such folder", tmp_path / "nowhere", "--out", out),
        ("not a folder", good / "metrics.jsonl", "--out", out),
        ("no metrics.jsonl", taken, "--out", out),
        ("no line of a step", empty, "--out", out),
        ("no line of a step", odd, "--out", out),
        ("no train_loss", other, "--out", out),
        ("no train_loss_rel", good, "--out", out, "--relative"),
        (".png", good, "--out", tmp_path / "x/loss.pdf"),
        ("a folder; wanted", good, "--out", taken),
        ("is not a writable folder", good, "--out", good / "metrics.jsonl/loss.png"),
        ("--smooth", good, "--out", out, "--smooth", 0),
        ("--out", good),
    ):
        with pytest.raises(SystemExit) as ended:
            run_main(plot_metrics, *flags)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("plot_metrics.py: error: ")
        assert words in line, line
    assert not (tmp_path / "x").exists()

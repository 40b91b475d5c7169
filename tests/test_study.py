"""The study of frame curricula: a miniature of it, equal compute, learning rates, the report, bad input."""

import argparse
import csv
import json
import math
from pathlib import Path

import pytest

import arms
import make_moving_shapes
import report
import schedule
import study
import train
from schedule import Phase
from scoring import motion
from training import run_main

MINIATURES = "fixed-16", "patch 2: 8-16"  # arms of one run each in the miniature


def a_study(out, **flags):
    args = {"out": out, "data_path": None, "only": None, "miniature": False} | flags
    return study.Study(argparse.Namespace(**args))


def train_row(job, size=arms.FULL, **numbers):
    """The row of the csv for the last step of a run."""
    phases, flops = arms.phases_of(job.arm, job.share, size)
    row = dict.fromkeys(arms.COLUMNS) | {"version": arms.VERSION, "recipe": arms.fingerprint(job, size)}
    row |= {"arm": job.arm.name, "seed": job.seed, "factor": job.factor, "share": job.share, "kind": "train"}
    row |= {"step": phases[-1][1], "frames": phases[-1][0], "flops": float(flops), "seconds": 100.0, "code": "c"}
    return row | {"rope_scale": "", "val_seconds": 1.0, "machine": "m"} | numbers


def sample_row(job, right, clips=96, frames=16, rope_scale="none", size=arms.FULL):
    row = train_row(job, size, kind="sample", frames=frames, rope_scale=rope_scale, val_seconds=None)
    low, high = motion.wilson(right, clips)
    row |= {"clips": clips, "right": right, "direction": right / clips, "direction_low": low, "direction_high": high}
    return row | {"speed": 1.0, "area": 1.0, "true_speed": 0.25, "real_direction": 1.0}


def job_of(name, seed=0, factor=1.0, share=1.0):
    return arms.Job(arms.BY_NAME[name], seed, factor, share)


# ----------------------------------------------------------------------------------------------------------------------
# A miniature that is really run (killed and by two processes at once: faults/test_study_kills.py)


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The folder of a study of two runs that is done. Its scripts have run in this process."""
    out = tmp_path_factory.mktemp("miniature")

    def run_script(words, log=None):
        script, *flags = map(str, words)
        if Path(script).name == "train.py":
            run_main(train, *flags)
        else:
            make_moving_shapes.main(flags)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "run_script", run_script)
        run_main(study, "--miniature", "--out", out, "--only", *MINIATURES)
    return out


def test_a_study_has_a_row_of_each_validation_and_of_the_samples_of_each_run_and_a_report(miniature):
    rows = lines_of(miniature / "study.csv")
    made = [(row["arm"], row["frames"], row["rope_scale"]) for row in rows if row["kind"] == "sample"]
    assert made == [(name, "16", "none") for name in MINIATURES]
    for name in MINIATURES:
        phases, flops = arms.phases_of(arms.BY_NAME[name], 1.0, arms.MINIATURE)
        trained = [row for row in rows if row["kind"] == "train" and row["arm"] == name]
        assert [int(row["step"]) for row in trained] == list(range(1, phases[-1][1] + 1))
        assert float(trained[-1]["flops"]) == pytest.approx(flops, rel=1e-4)
    assert (miniature / "study.md").exists() and (miniature / "figures/study-A.png").exists()


def test_a_study_that_is_done_runs_nothing_again(miniature, capsys):
    written = (miniature / "study.csv").stat().st_mtime_ns
    run_main(study, "--miniature", "--out", miniature, "--only", *MINIATURES)
    assert "all is done" in capsys.readouterr().out
    assert (miniature / "study.csv").stat().st_mtime_ns == written
    run_main(study, "--miniature", "--out", miniature, "--only", *MINIATURES, "--list")
    assert "2 runs, 0.0 hours left" in capsys.readouterr().out


def test_no_run_is_started_that_does_not_fit(tmp_path, capsys):
    run_main(study, "--out", tmp_path, "--minutes", 0.01)
    assert "run again to continue" in capsys.readouterr().out
    assert not list(tmp_path.glob("study/*/train.log"))


# ----------------------------------------------------------------------------------------------------------------------
# Equal compute


def counted(arm, share, size):
    """The FLOPs that train.py counts for a run, step by step."""
    config, flops, first_step = arms.config_of(arm, size), 0, 0
    phases = [Phase(*phase) for phase in arms.phases_of(arm, share, size)[0]]
    for phase in phases:
        frames = schedule.frames_of_steps(phases, phase, first_step, first_step, arm.mix, seed=0)
        flops += sum(phase.batch_size * config.training_flops(num_frames) for num_frames in frames)
        first_step = phase.last_step
    return flops


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_all_arms_have_the_same_compute_and_number_of_tokens_per_step(share):
    whole = arms.FULL.steps * 8 * arms.config_of(arms.BY_NAME["16"], arms.FULL).training_flops(16)
    for arm in arms.BY_NAME.values():
        assert counted(arm, share, arms.FULL) == pytest.approx(share * whole, rel=0.02), arm.name
        for num_frames, _, batch_size in arms.phases_of(arm, share, arms.FULL)[0]:
            assert batch_size * math.prod(arms.config_of(arm, arms.FULL).grid(num_frames)) == arms.TOKENS


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates


def test_the_tuned_rate_is_the_best_of_the_grid_once_all_of_it_has_run(tmp_path):
    mine = a_study(tmp_path, only=["theta 1000"])
    jobs = mine.jobs()
    assert [(job.arm.name, job.factor) for job in jobs if job.is_tuning] == [("16", x) for x in arms.FULL.factors]
    assert {job.factor for job in jobs if not job.is_tuning} == {None}
    for factor, loss in zip(arms.FULL.factors, (0.9, math.inf, 0.7), strict=True):
        assert mine.factor("16") is None
        mine.rows.append(train_row(job_of("16", arms.TUNE_SEED, factor, arms.TUNE_SHARE), loss=loss))
    assert mine.factor("16") == arms.FULL.factors[2]
    assert {(job.arm.name, job.factor) for job in mine.jobs() if not job.is_tuning} == {("theta 1000", 2.0)}


def test_a_run_that_diverged_is_done(tmp_path):
    mine, job = a_study(tmp_path), job_of("16")
    assert not mine.is_done(job)
    mine.rows.append(train_row(job, step=7, loss=math.inf))
    assert mine.is_done(job)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_a_bump_is_gone_at_the_first_validation_that_is_no_higher_than_the_one_before():
    phases, _ = arms.phases_of(arms.BY_NAME["4-8-16 even"], 1.0, arms.FULL)
    before, after = phases[:2]
    length = after[1] - before[1]
    rows = [train_row(job_of("4-8-16 even"), step=before[1], loss=2.0, loss_rel=0.1, loss_raw=4.0)]
    for share, loss in ((0.1, 0.15), (0.25, 0.1), (0.5, 0.08)):  # with a zero predictor's loss of 40 instead of 20
        step = before[1] + round(share * length)
        rows.append(train_row(job_of("4-8-16 even"), step=step, loss=40 * loss, loss_rel=loss, loss_raw=7.0))
    found = report.bump(rows, "4-8-16 even", before, after)
    assert found["highest"] == pytest.approx(1.5)
    assert found["gone"] == pytest.approx(0.25, abs=1 / length)
    raw = report.bump(rows, "4-8-16 even", before, after, "loss_raw")
    assert (raw["highest"], raw["gone"]) == (pytest.approx(7 / 8), pytest.approx(0.1, abs=1 / length))
    assert report.bump(rows, "4-8-16 mix", before, after) is None
    assert report.bump(rows[:3], "4-8-16 even", before, after)["gone"] == pytest.approx(0.25, abs=1 / length)
    assert report.bump(rows[:2], "4-8-16 even", before, after)["gone"] == math.inf


def test_a_difference_is_paired_by_seed_and_says_whether_its_interval_contains_zero():
    text = report.difference("a", "b", "Loss", {0: 1.0, 1: 2.0, 2: 3.1}, {0: 0.5, 1: 1.5, 2: 2.5, 3: 9.0})
    # differences 0.5, 0.5, 0.6: mean 0.5333, standard error 0.0333, times 4.30
    assert text == "Loss: a minus b is +0.533 (95% +0.390 to +0.677, 3 seeds): higher."
    assert "not told apart" in report.difference("a", "b", "Loss", {0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0})
    assert "one seed" in report.difference("a", "b", "Loss", {0: 1.0}, {0: 0.0})
    assert report.difference("a", "b", "Loss", {0: 1.0}, {1: 0.0}) == "Loss, a against b: not run yet."


@pytest.fixture
def made_up(tmp_path):
    """A csv with three arms: rotary positions are better by 0.1, the even schedule is no worse at 60%."""
    rows = []
    for seed in range(3):
        for name, share, loss, right in (
            ("16", 1.0, 0.6, 80), ("fixed-16", 1.0, 0.7, 60), ("4-8-16 even", 0.6, 0.6 - 0.01 * seed, 81),
        ):  # fmt: skip
            job = job_of(name, seed, share=share)
            rows += [train_row(job, loss=loss, loss_16=loss + 0.001 * seed), sample_row(job, right)]
    rows += [sample_row(job_of("16", seed=0), 10, frames=24), sample_row(job_of("16", seed=0), 70, 96, 24, "ntk")]
    arms.write_rows(tmp_path / "study.csv", rows)
    return tmp_path


def test_a_report_of_an_incomplete_csv_says_what_was_not_run(made_up):
    run_main(study, "--report", "--out", made_up)
    text = (made_up / "study.md").read_text()
    assert "Validation loss at 16 frames: rotary minus fixed is -0.100 (95% -0.100 to -0.100, 3 seeds): lower." in text
    low, high = motion.wilson(240, 288)
    assert f"83.3% ({100 * low:.1f} - {100 * high:.1f}; 288 clips)" in text
    assert "The goal is met in the mean." in text
    assert "Goal (at most 0), 4-8-16 long at 60% against 16 at 100%: not run yet." in text
    assert "Trained on 16, sampled at 24 frames: best is ntk with 72.9% right, none has 10.4%" in text
    assert "Trained on 4, sampled at 16 frames: not run yet." in text
    assert "At 0.12 s per frame: not run yet." in text
    assert "Gamma shift at 16 frames: not run yet (1 of 4)." in text
    figures = {path.name for path in (made_up / "figures").iterdir()}
    assert figures == {f"study-{name}.png" for name in ("A", "B", "C", "C-scale", "E")}
    for name in figures:
        assert f"(figures/{name})" in text


def test_rows_are_the_same_after_writing_and_reading_the_csv(made_up):
    rows = arms.read_rows(made_up / "study.csv")
    arms.write_rows(made_up / "again.csv", rows)
    assert (made_up / "again.csv").read_bytes() == (made_up / "study.csv").read_bytes()
    assert (rows[0]["arm"], rows[0]["seed"], rows[0]["loss"], rows[0]["time_scale"]) == ("16", 0, 0.6, None)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(capsys, *flags):
    """The line on stderr of a command that ends with status 2."""
    run_main(study, *flags, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("word", ["F", "X", "AB", "17", ""])
def test_an_unknown_question_is_refused(word, tmp_path, capsys):
    line = refused(capsys, "--only", "A", word, "--out", tmp_path / "new")
    assert f"--only {word}: wanted questions (A, B, C, D, E) or arms ('fixed-16', " in line
    assert not (tmp_path / "new").exists()


BAD_CELLS = {"version": ("2", "is of version 2"), "recipe": ("0", "is of another recipe"), "arm": ("x", "arm 'x'")}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_csv_of_another_version_recipe_or_arm_is_refused(name, made_up, capsys):
    value, words = BAD_CELLS[name]
    rows = arms.read_rows(made_up / "study.csv")
    rows[3][name] = arms.parse_cell(name, value)
    arms.write_rows(made_up / "study.csv", rows)
    before = sorted(made_up.rglob("*"))
    for flag in ("--report", "--list"):
        assert words in refused(capsys, flag, "--out", made_up)
    assert words in refused(capsys, "--out", made_up)
    assert sorted(made_up.rglob("*")) == before


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "\0\n", "version\n"])
def test_a_file_that_is_not_a_csv_of_the_study_is_refused(text, tmp_path, capsys):
    (tmp_path / "study.csv").write_text(text)
    assert "move it away" in refused(capsys, "--report", "--out", tmp_path)


def test_an_incomplete_row_is_refused(made_up, capsys):
    path = made_up / "study.csv"
    path.write_text(path.read_text()[:-40])
    assert "move it away" in refused(capsys, "--report", "--out", made_up)


def test_a_study_folder_of_another_version_is_refused(tmp_path, capsys):
    (tmp_path / "study").mkdir()
    about = tmp_path / "study/study.json"
    about.write_text(json.dumps({"version": 1, "size": "miniature"}))
    assert "'miniature'" in refused(capsys, "--out", tmp_path)
    about.write_text("{")
    assert "damaged" in refused(capsys, "--out", tmp_path)


def test_bad_paths_and_flags_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, "--out", tmp_path / "file")
    assert "--out" in refused(capsys, "--report", "--out", tmp_path / "file" / "deeper")
    assert "give one of them" in refused(capsys, "--list", "--report", "--out", tmp_path)
    assert "does not exist" in refused(capsys, "--report", "--out", tmp_path)
    assert "--minutes" in refused(capsys, "--minutes", "0", "--out", tmp_path)

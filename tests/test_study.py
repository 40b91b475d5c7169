"""The study of positions and curricula: a miniature of it, equal compute, the report, bad input."""

import argparse
import csv
import json
import math
import re
from pathlib import Path

import pytest

import arms
import make_moving_shapes
import report
import schedule
import study
import train
from schedule import Phase
from training import run_main

MINIATURES = "16 fixed", "4-8-16 table"  # arms of one run each in the miniature


def a_study(out, **flags):
    args = {"out": out, "data_path": None, "only": None, "miniature": False, "compile": False} | flags
    return study.Study(argparse.Namespace(**args))


def train_row(job, size=arms.FULL, **numbers):
    """The row of the csv for the last step of a run."""
    phases, flops = arms.phases_of(job.arm, job.share, size)
    row = dict.fromkeys(arms.COLUMNS) | {"version": arms.VERSION, "recipe": arms.fingerprint(job, size)}
    row |= {"arm": job.arm.name, "seed": job.seed, "share": job.share, "kind": "train"}
    row |= {"step": phases[-1][1], "frames": phases[-1][0], "flops": float(flops), "seconds": 100.0, "code": "c"}
    return row | {"compiled": 1, "machine": "m"} | numbers


def sample_row(job, direction, frames=16, size=arms.FULL):
    row = train_row(job, size, kind="sample", frames=frames)
    row |= {"clips": 100, "right": round(100 * direction), "direction": direction}
    return row | {"speed": 1.0, "area": 1.0, "seam": 1.0, "real_direction": 1.0}


def job_of(name, seed=0, share=1.0):
    return arms.Job(arms.BY_NAME[name], seed, share)


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
    made = [(row["arm"], row["frames"]) for row in rows if row["kind"] == "sample"]
    assert made == [(name, str(frames)) for name in MINIATURES for frames in arms.BY_NAME[name].lengths]
    for name in MINIATURES:
        phases, flops = arms.phases_of(arms.BY_NAME[name], 1.0, arms.MINIATURE)
        trained = [row for row in rows if row["kind"] == "train" and row["arm"] == name]
        assert [int(row["step"]) for row in trained] == list(range(1, phases[-1][1] + 1))
        assert float(trained[-1]["flops"]) == pytest.approx(flops, rel=1e-4)
        assert trained[-1]["frames"] == "16" and trained[-1]["loss_16"] == trained[-1]["loss"]
        assert all(row["loss_16"] for row in trained)
    assert "| 16 fixed | 100% |" in (miniature / "study.md").read_text()


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
    config, flops, first_step = arms.config_of(size), 0, 0
    phases = [Phase(*phase) for phase in arms.phases_of(arm, share, size)[0]]
    for phase in phases:
        frames = schedule.frames_of_steps(phases, phase, first_step, first_step, arm.mix, seed=0)
        flops += sum(phase.batch_size * config.training_flops(num_frames) for num_frames in frames)
        first_step = phase.last_step
    return flops


@pytest.mark.parametrize("share", [0.4, 1.0, 1.6])
def test_all_arms_have_the_same_compute_and_number_of_tokens_per_step(share):
    whole = arms.FULL.steps * 8 * arms.config_of(arms.FULL).training_flops(16)
    for arm in arms.ARMS:
        assert counted(arm, share, arms.FULL) == pytest.approx(share * whole, rel=0.02), arm.name
        for num_frames, _, batch_size in arms.phases_of(arm, share, arms.FULL)[0]:
            assert batch_size * math.prod(arms.config_of(arms.FULL).grid(num_frames)) == arms.TOKENS


def test_arms_differ_in_nothing_but_what_they_compare():
    def flags(name):
        return " ".join(arms.recipe_flags(job_of(name), arms.FULL))

    assert flags("16 rotary") == flags("16 fixed").replace(" --val-frames", " --use-rope --rope-theta 100 --val-frames")
    for plain, table, moving in (("16 rotary", "16 table", "16 moving"), ("4-8-16", "4-8-16 table", "4-8-16 moving")):
        assert flags(table).replace(" --position-table space", "") == flags(plain)
        assert flags(moving).replace(" --rope-speed 0.5", "") == flags(table)
    for name in ("4-8-16 mix", "4-8-16 table mix"):
        assert "--mix 0.2" in flags(name) and "--mix 0.0" in flags(name.removesuffix(" mix"))
    # in these two, all but the schedule
    schedule = re.compile("--(frames-schedule|mix|num-frames|max-steps|global-batch-size|val-every) [^ ]*")
    one, other = (schedule.sub("", flags(name)).split() for name in ("16 moving intervals", "4-8-16 moving"))
    assert one == other


def test_every_share_of_the_compute_is_a_run_of_its_own_and_what_costs_most_and_says_least_comes_last():
    jobs = arms.all_jobs(["16 fixed", "16 table", "4-8-16 moving"], arms.FULL)
    assert {(job.share, job.seed) for job in jobs if job.arm.name == "4-8-16 moving"} == {
        (share, seed) for share in (0.4, 0.6, 1.0) for seed in range(3)
    }
    assert len(jobs) == len({job.key for job in jobs}) == 5 + 8 + 9
    rest = [(job.arm.name, job.share, job.seed) for job in jobs[-5:]]
    assert rest[:2] == [("16 fixed", 1, 4), ("16 table", 1, 4)]
    assert rest[2:] == [("16 table", 1.6, seed) for seed in range(3)]


def test_a_run_that_diverged_is_done(tmp_path):
    mine, job = a_study(tmp_path), job_of("16 rotary")
    assert not mine.is_done(job)
    mine.rows.append(train_row(job, step=7, loss=math.inf))
    assert mine.is_done(job)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_a_difference_is_paired_by_seed_and_says_whether_its_interval_contains_zero():
    text = report.difference("a", "b", "Loss", {0: 1.0, 1: 2.0, 2: 3.1}, {0: 0.5, 1: 1.5, 2: 2.5, 3: 9.0})
    # differences 0.5, 0.5, 0.6: mean 0.5333, standard error 0.0333, times 4.30
    assert text == "Loss: a minus b is +0.533 (95% +0.390 to +0.677, 3 seeds): higher."
    assert "not told apart" in report.difference("a", "b", "Loss", {0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0})
    assert "one seed" in report.difference("a", "b", "Loss", {0: 1.0}, {0: 0.0})
    assert report.difference("a", "b", "Loss", {0: 1.0}, {1: 0.0}) == "Loss, a against b: not run yet."


def test_the_compute_to_a_goal_is_interpolated_and_a_bound_where_the_goal_is_not_crossed():
    shares = [0.4, 0.6, 1.0, 1.6]
    assert report.compute_to(0.9, shares, [0.0, 0.5, 1.0, 0.8]) == (pytest.approx(0.92), "=")
    assert report.compute_to(0.9, shares, [0.0, 0.9, 0.95, 1.0]) == (pytest.approx(0.6), "=")
    assert report.compute_to(0.9, shares, [0.95, 1.0, 1.0, 1.0]) == (0.4, "<")
    assert report.compute_to(0.9, shares, [0.0, 0.1, 0.5, 0.89]) == (1.6, ">")


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ((0.6, "="), (1.2, "="), "0.50"),
        ((0.6, "="), (1.5, ">"), "at most 0.40"),
        ((0.4, "<"), (1.0, "="), "at most 0.40"),
        ((1.6, ">"), (1.0, "="), "at least 1.60"),
        ((1.6, ">"), (1.6, ">"), "both are bounds, so it is not known"),
    ],
)
def test_a_ratio_of_bounds_is_a_bound_or_not_known(first, second, text):
    assert report.ratio_text(first, second) == text


def test_a_spread_is_over_seeds():
    assert report.spread_cell({0: 0.4, 1: 0.5, 2: 0.6}, 0, 100) == "50 ± 6% (40, 50, 60)"
    assert report.spread_cell({2: 0.381}) == "0.381 (0.381)"
    assert report.spread_cell({}) == "-"


@pytest.fixture
def made_up(tmp_path):
    """A csv with some arms: loss lower by 0.1, the curriculum has motion at three quarters of the compute."""
    rows = []
    for seed in range(3):
        for name, share, loss, direction in (
            ("16 fixed", 1.0, 0.7, 0.8), ("16 moving", 1.0, 0.6, 0.75), ("16 table", 1.0, 0.7, 0.7),
            ("16 table", 1.6, 0.6, 0.8), ("16 moving intervals", 0.4, 0.9, 0.0),
            ("16 moving intervals", 0.6, 0.7, 0.8), ("16 moving intervals", 1.0, 0.6, 1.0),
            ("4-8-16 moving", 1.0, 0.5, 0.95), ("4-8-16 moving", 0.4, 0.7, 0.8), ("4-8-16 moving", 0.6, 0.65, 0.9),
        ):  # fmt: skip
            job = job_of(name, seed, share=share)
            rows += [train_row(job, loss=loss, loss_16=loss), sample_row(job, direction)]
        rows.append(sample_row(job_of("4-8-16 moving", seed), 0.9 + 0.01 * seed, frames=24))
    arms.write_rows(tmp_path / "study.csv", rows)
    return tmp_path


def test_a_report_says_what_was_found_and_what_was_not_run(made_up):
    run_main(study, "--report", "--out", made_up)
    text = (made_up / "study.md").read_text()
    assert "Loss: 16 moving minus 16 fixed is -0.100 (95% -0.100 to -0.100, 3 seeds): lower." in text
    assert "Directions right, 16 rotary against 16 fixed: not run yet." in text
    assert "| 4-8-16 moving | 24 | 91 ± 1% (90, 91, 92) | 1.00 ± 0.00 (1.00, 1.00, 1.00) |" in text
    assert "16 moving intervals: 90% of the directions, in the mean over seeds, are right at 80%" in text
    assert "of the compute (each seed: 80%; 80%; 80%)." in text
    assert "are right at 60% of the compute (each seed: 60%; 60%; 60%)." in text
    assert "Compute to motion, 4-8-16 moving / 16 moving intervals: 0.75 (each seed: 0.75; 0.75; 0.75)." in text
    assert "Compute to motion, 4-8-16 moving / 16 table: at most 0.38 (each seed: at most 0.38;" in text
    assert "Loss: 4-8-16 moving at 60% minus 16 moving intervals at 100% is +0.050" in text
    figures = {path.name for path in (made_up / "figures").iterdir()}
    assert figures == {"study-B.png", "study-C.png"}  # A waits for the rotary arm
    for name in figures:
        assert f"(figures/{name})" in text


def test_a_run_that_diverged_is_shown_and_left_out_of_the_means(made_up):
    rows = [row for row in arms.read_rows(made_up / "study.csv") if (row["arm"], row["seed"]) != ("16 moving", 2)]
    rows.append(train_row(job_of("16 moving", 2), step=7, loss=math.inf, loss_16=math.inf))
    arms.write_rows(made_up / "study.csv", rows)
    run_main(study, "--report", "--out", made_up)
    text = (made_up / "study.md").read_text()
    assert "| 16 moving | 100% | 0.600 ± 0.000 (0.600, 0.600, inf) |" in text
    assert "Loss: 16 moving minus 16 fixed is -0.100 (95% -0.100 to -0.100, 2 seeds): lower." in text


def test_rows_are_the_same_after_writing_and_reading_the_csv(made_up):
    rows = arms.read_rows(made_up / "study.csv")
    arms.write_rows(made_up / "again.csv", rows)
    assert (made_up / "again.csv").read_bytes() == (made_up / "study.csv").read_bytes()
    assert (rows[0]["arm"], rows[0]["seed"], rows[0]["loss"], rows[0]["clips"]) == ("16 fixed", 0, 0.7, None)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(capsys, *flags):
    """The line on stderr of a command that ends with status 2."""
    run_main(study, *flags, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("word", ["E", "X", "AB", "17", ""])
def test_an_unknown_question_is_refused(word, tmp_path, capsys):
    line = refused(capsys, "--only", "A", word, "--out", tmp_path / "new")
    assert f"--only {word}: wanted questions (A, B, C) or arms ('16 fixed', " in line
    assert not (tmp_path / "new").exists()


BAD_CELLS = {"version": ("1", "is of version 1"), "recipe": ("0", "is of another recipe"), "arm": ("x", "arm 'x'")}


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
    about.write_text(json.dumps({"version": 2, "size": "miniature"}))
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

"""The studies: a miniature of each, equal compute, reports of committed results, bad input."""

import csv
import importlib
import itertools
import json
import math
import re
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import arms
import cache_latents
import coverage
import disturb
import given_frames
import inflation
import lab
import no_clock
import objectives
import people
import positions
import report
import schedule
import seeds
import sprites
import study
import train
from arms import BY_NAME, FULL, MINIATURE
from schedule import Phase
from training import ROOT, counted_steps, refused, run_main

TWO_ARMS = "16 fixed", "4-8-16 table"  # of one run each in the miniature
SAMPLED = [  # in this order
    (name, str(frames)) for name in TWO_ARMS for frames in BY_NAME[name].lengths
]
SCRIPT = lab.Run.script  # in a process of its own

# Miniatures that are really run (killed, and by two processes at once: faults/test_study_kills.py)


@pytest.fixture(scope="module")
def commands():
    """The commands of the studies, run in this process. A quickstart only trains a tiny model."""
    seen = []
    made = {}  # data sets by their flags

    def script(run, *words, **variables):
        seen.append(list(map(str, words)))
        name, *flags = words
        if name == "datasets/make_moving_shapes.py":
            _, folder, *recipe = flags
            known = made.setdefault(tuple(recipe), folder)
            if known != folder:
                folder.exists() or folder.symlink_to(known)
                return
        if name == "scripts/quickstart.sh":
            name = "EqM/train.py"
            flags = arms.recipe_flags(BY_NAME["16 rotary"], variables["SEED"], 1.0, MINIATURE)
            flags += arms.sampling_flags(MINIATURE).split()
            flags += ["--data-path", variables["DATA"], "--resume"]
            flags += ["--results-dir", ROOT / "results" / variables["EXP"]]
        with pytest.MonkeyPatch.context() as patch:
            # the plots of scores take long, and are tested with these
            patch.setattr(Figure, "savefig", lambda figure, path, **settings: None)
            run_main(importlib.import_module(Path(name).stem), *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.Run, "script", script)
        yield seen


def run_miniature(script, out, *flags, **settings):
    run_main(script, "--miniature", "--out", out, *flags, **settings)


def cached(videos, out):
    """The flags of videos and of their cache of latents, which it makes in a folder."""
    flags = ["--data-path", videos]
    latents = out / "latents"
    run_main(cache_latents, *flags, "--vae", "none", "--image-size", 16, "--out", latents)
    return [*flags, "--latents", latents]


def read_results(out, name):
    """(content of NAME.json, text of NAME.md)."""
    path = out / f"{name}.json"
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """The folder of a finished study of two runs."""
    out = tmp_path_factory.mktemp("results")
    run_miniature(study, out, "--only", *TWO_ARMS)
    return out


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_writes_each_validation_and_sample_row_once(trained, commands, capsys):
    rows = lines_of(trained / "study.csv")
    sampled = lab.rows_with({"kind": "sample", "real_direction": "1"}, rows)
    assert [(row["arm"], row["frames"]) for row in sampled] == SAMPLED
    assert all(float(row["seam"]) > 0 for row in sampled)
    for name in TWO_ARMS:
        phases, flops = arms.plan(BY_NAME[name], 1.0, MINIATURE)
        validated = lab.rows_with({"kind": "train", "arm": name}, rows)
        for step, row in enumerate(validated, 1):
            assert row["step"] == str(step)
            assert row["loss_16"]
        num_frames, last_step, _ = phases[-1]
        assert (row["frames"], step) == (str(num_frames), last_step)
        assert float(row["flops"]) == pytest.approx(flops, rel=1e-4)
        assert row["loss_16"] == row["loss"]
    (made,), text = read_results(trained, "study")
    assert "| 16 fixed | 100 |" in text
    assert made["command"].endswith("--only '16 fixed' '4-8-16 table'")
    for name in ("code", "machine"):
        assert {row[name] for row in rows} == {made[name]}
    assert any(trained.glob("study/16-fixed-*/*/checkpoints/latest.pt"))
    commands.clear()
    for flags, words in ([], "all is done"), (["--list"], "2 runs, 0.0 hours left"):
        run_miniature(study, trained, "--only", *TWO_ARMS, *flags)
        assert words in capsys.readouterr().out
        assert not commands
        assert lines_of(trained / "study.csv") == rows


@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        (
            given_frames,
            "--seeds 0 --shares 0.75",
            r"^\| nothing given, 24 frames at once \| \d+.0 \|  \|  \|",
        ),
        (
            seeds,
            "--seeds 3",
            r"^\| frames \| lowest direction accuracy \(%\) \| median \| seed 3 \|$",
        ),
    ],
)
def test_a_miniature_study_writes_its_table_and_resumes(
    script, flags, line, trained, commands, capsys, monkeypatch
):
    tasks = [*given_frames.TASKS.items()]
    monkeypatch.setattr(given_frames, "TASKS", dict(tasks[1::6]))
    name = script.__name__
    run_miniature(script, trained, *flags.split())
    assert f"{name}.md, {trained / name}.json" in capsys.readouterr().out
    content, text = read_results(trained, name)
    assert re.search(line, text, re.M)
    assert content["made"]["command"].endswith(f"--miniature --out {trained} {flags}")
    scores = trained.glob(f"{name.replace('_', '-')}/*/*/[mp]*ion.json")
    next(scores).unlink()
    commands.clear()
    run_miniature(script, trained, *flags.split())
    again = [command for command, *_ in commands if command.startswith("EqM")]
    assert again == ["EqM/evaluate.py"]
    assert read_results(trained, name) == (content, text)


@pytest.fixture(scope="module")
def compared(commands, tmp_path_factory):
    """The folder of a finished comparison of the objectives eqm and flow, one seed, few tasks."""
    out = tmp_path_factory.mktemp("objectives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "COUNTS", (2,))
        patch.setattr(objectives, "LIMITS", (1,))
        patch.delitem(objectives.ARMS, "blind")
        run_miniature(objectives, out, "--seeds", 0)
    return out


def test_objectives_have_a_row_per_run_and_are_compared_by_seed(compared):
    rows, text = read_results(compared, "objectives")
    assert [(row["objective"], row["seed"]) for row in rows] == [("eqm", 0), ("flow", 0)]
    for row in rows:
        assert row["code"] and row["machine"] and row["date"]
        assert "--seeds 0" in row["command"]
    eqm, flow = (row["values"] for row in rows)
    assert eqm["until the field is below 1"]["evaluations"] <= 30
    del flow[""]  # the validation loss
    assert [values["evaluations"] for values in flow.values()] == [15, 15, 15, 2, 2]
    line = r"both right \(%\): eqm minus flow is [-+]\d+\.\d+ \(one seed, no interval\)"
    assert re.search(line, text)


def test_a_row_without_a_new_task_is_replaced(tmp_path):
    tasks = {"old": {}, "new": {}}
    out = tmp_path / "rows.json"
    run = lab.JsonRun(tmp_path, tasks=tasks, out=out, about={"seed": 0})
    for seed in (0, 1):
        lab.add_rows(out, [{"seed": seed, "values": {"old": {}}}])
    assert not run.has_row
    lab.add_rows(out, [{"seed": 0, "values": tasks}], replaces=run.about)
    assert run.has_row
    assert [row["seed"] for row in lab.read_rows(out)] == [1, 0]


def test_descents_with_few_evaluations_sample_the_same_models(compared, commands, monkeypatch):
    monkeypatch.setattr(objectives, "COMPARED", (2,))
    monkeypatch.setattr(objectives, "IDEAS", {objectives.BEST: (0.25, "--mu 0")})
    commands.clear()
    run_miniature(objectives, compared, "--seeds", 0, "--few")
    assert "EqM/train.py" not in {name for name, *_ in commands}
    guided, _ = (words for words in commands if words[0] == "EqM/sample_gd.py")
    assert " --num-sampling-steps 3 --stepsize 0.125 --mu 0 --seed " in " ".join(guided)
    _, text = read_results(compared, "few")
    assert re.search(r"^\| flow, Euler steps \| \d+.0 \| \d+.0 \|$", text, re.M)


@pytest.mark.parametrize(
    ("way", "flags"),
    [
        ("euler", "--sampler euler --num-sampling-steps 16"),
        ("heun", "--sampler heun --num-sampling-steps 9"),
        (0.6, "--sampler ngd --num-sampling-steps 16 --stepsize 0.04"),
    ],
)
def test_all_ways_to_sample_take_the_same_evaluations(way, flags):
    assert objectives.sampling(way, 15) == flags


def test_starts_without_a_clock_fill_one_table_cell_at_a_time(compared, commands, monkeypatch):
    monkeypatch.setattr(no_clock, "PARTS", {"noisy clips": (0.4,), "noisy half": (0.0,)})
    run_miniature(no_clock, compared, "--seeds", 0)
    rows, text = read_results(compared, "no_clock")
    assert len(rows) == 2 * len(no_clock.METHODS)
    for row in rows:
        assert 0 <= row["both"] <= 1
        assert row["rmse"] > 0
    assert text.count("mean over gamma: eqm minus flow, estimated is") == 4
    last = rows.pop()
    (compared / "no_clock.json").write_text(json.dumps(rows))
    commands.clear()
    run_miniature(no_clock, compared, "--seeds", 0)
    again, _ = read_results(compared, "no_clock")
    last["date"] = again[-1]["date"]
    assert again == [*rows, last]
    assert not [name for name, *_ in commands if name.startswith("EqM")]  # data sets exist


def test_the_noise_level_of_shapes_can_be_estimated():
    clips = torch.full((4, 3, 8, 16, 16), -1.0)
    clips[..., 4:9, 5:11] = 0.8
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    noise[:, :, 4:] = clips[:, :, 4:]
    for gamma in (0.2, 0.5, 0.9):
        gammas = no_clock.estimate_gammas(torch.lerp(noise, clips, gamma), 4)
        assert gammas == pytest.approx([gamma, 1], abs=0.05)


@pytest.mark.parametrize("data_set", positions.DATA_SETS)
def test_all_positions_have_equal_compute(data_set, tmp_path):
    args = Namespace(
        data_set=data_set,
        data_path="videos",
        latents="latents",
        out=tmp_path,
        miniature=False,
        compile=True,
    )
    runs = [positions.PositionsRun(args, name, 0) for name in arms.POSITIONS]
    assert all("--compile" in run.training for run in runs)
    assert [run.flops for run in runs] == pytest.approx([runs[0].flops] * 4, rel=1e-3)


@pytest.mark.parametrize("name", ["people", "bouncing"])
def test_positions_on_other_data_keep_each_finished_run(
    name, trained, commands, tmp_path, monkeypatch
):
    monkeypatch.setattr(positions, "POSITIONS", {"fixed": "", "moving": arms.MOVING})
    flags = [name, "--seeds", 0]
    if name == "people":
        flags += cached(trained / "study/moving-shapes", tmp_path)
    else:  # shorter videos, fewer clips
        data_set = positions.DATA_SETS[name]
        words, metrics = data_set.tasks[positions.LONG]
        short = replace(
            data_set,
            made=("--bounce", "--seconds", 1.4),
            tasks={positions.LONG: (words.replace("256", "24"), metrics)},
            metrics=dict.fromkeys(metrics, "--split all --num-real 4"),
        )
        monkeypatch.setitem(positions.DATA_SETS, name, short)
    run_miniature(positions, tmp_path, *flags)
    table = name
    rows, text = read_results(tmp_path, table)
    assert [(row["positions"], row["seed"]) for row in rows] == [("fixed", 0), ("moving", 0)]
    assert "): moving minus fixed is " in text
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.height > 4 * 128  # two samples of two models
    commands.clear()
    for kept in (rows, rows[:1]):  # the second is a stopped run, which continues
        (tmp_path / f"{table}.json").write_text(json.dumps(kept))
        run_miniature(positions, tmp_path, *flags)
        again, _ = read_results(tmp_path, table)
        assert not commands
        assert again[1]["values"] == rows[1]["values"]


def test_positions_on_other_data_need_its_videos(tmp_path, capsys):
    message = refused(capsys, positions, "sprites", "--out", tmp_path)
    assert "--data-path: expected the videos of sprites" in message


def test_kernels_are_compared_at_the_start_and_later(commands, monkeypatch, tmp_path):
    shapes = replace(inflation.DATA["shapes"], patches=(4,))
    monkeypatch.setitem(inflation.DATA, "shapes", shapes)
    flags = ["kernels", "--seeds", 0]
    run_miniature(inflation, tmp_path, *flags)
    rows, text = read_results(tmp_path, "inflation_kernels")
    cases = [(row["steps"], row["spread"]) for row in rows]
    assert cases == list(itertools.product((1, 2), inflation.SPREADS))
    assert len({row["val_loss"] for row in rows}) == 6
    assert "## shapes, temporal patch 4, after 2 steps" in text
    assert "- val_loss: one frame minus mean is " in text
    commands.clear()
    run_miniature(inflation, tmp_path, *flags)
    assert not commands


def test_a_start_from_images_is_compared_with_scratch_over_compute(
    shapes, commands, monkeypatch, tmp_path
):
    monkeypatch.setattr(inflation, "TASK", ("--num-frames 8 --num-samples 4", ("nearest",)))
    monkeypatch.setattr(inflation, "SCORE", "rmse_ratio")
    monkeypatch.setattr(inflation, "SHARES", {"scratch": (1.0,), "images": (0.6, 1.0)})
    flags = cached(shapes, tmp_path)
    commands.clear()
    run_miniature(inflation, tmp_path, "pay", "--seeds", 0, *flags)
    rows, text = read_results(tmp_path, "inflation_pay")
    runs = [(row["arm"], row["share"]) for row in rows]
    assert runs == [("scratch", 1.0), ("images", 0.6), ("images", 1.0)]
    assert "| images | 60 | 83 | " in text
    assert "- Seed 0: compute to " in text
    assert sum("--inflate" in words for words in commands) == 2


def test_compute_of_an_image_model_counts_once():
    needed = partial(inflation.compute_needed, valid={0.2: 0.6, 0.4: 0.7, 0.6: 0.9}, images=0.2)
    assert needed(0.8) == "0.50 free, 0.70 counted"
    assert needed(0.6) == "at most 0.20 free, 0.40 counted"
    assert needed(0.95) == "more than 0.60"


def test_a_stopped_study_resumes_and_ends_the_same(trained, tmp_path, capsys):
    flags = ["--only", TWO_ARMS[0]]
    with counted_steps(train, stop_after=2):
        run_miniature(study, tmp_path, *flags, status=1)
    assert "the training was stopped; run the same command to continue" in capsys.readouterr().err
    run_miniature(study, tmp_path, *flags)
    resumed = lines_of(tmp_path / "study.csv")
    for row, other in zip(resumed, lines_of(trained / "study.csv"), strict=False):
        assert row | {"seconds": ""} == other | {"seconds": ""}


def test_a_study_starts_no_run_that_exceeds_its_minutes(tmp_path, capsys):
    run_main(study, "--out", tmp_path, "--minutes", 0.01)
    assert "run again to continue" in capsys.readouterr().out
    assert not list(tmp_path.glob("study/*/train.log"))


# Equal compute ------------------------------------------------------------------------------------


def a_study(out, only=None):
    return study.Study(Namespace(out=out, only=only, miniature=False, compile=False))


@pytest.mark.parametrize("share", [0.4, 1.6])
def test_all_arms_have_equal_compute_and_tokens_per_step(share):
    config = arms.config_of(FULL)
    full = FULL.steps * 8 * config.training_flops(16)
    for arm in arms.ARMS:
        phases = [Phase(*phase) for phase in arms.plan(arm, share, FULL)[0]]
        flops = 0
        first_step = 0
        for phase in phases:  # as train.py counts them, step by step
            frames = schedule.frames_of_steps(
                phases, phase, first_step, first_step, arm.mix, seed=0
            )
            flops += phase.batch_size * sum(map(config.training_flops, frames))
            first_step = phase.last_step
            assert phase.batch_size * math.prod(config.grid(phase.num_frames)) == arms.TOKENS
        assert flops == pytest.approx(share * full, rel=0.02), arm.name


def test_each_share_of_compute_is_a_run_and_the_costliest_come_last(tmp_path):
    runs = a_study(tmp_path, only=["16 fixed", "16 table", "4-8-16 moving"]).runs
    assert len({run.folder for run in runs}) == len(runs) == 5 + 8 + 9
    keys = [run.key for run in runs]
    shares = itertools.product(["4-8-16 moving"], range(3), (0.4, 0.6, 1.0))
    assert set(shares) < set(keys)
    assert keys[-5:] == [
        ("16 fixed", 4, 1),
        ("16 table", 4, 1),
        ("16 table", 0, 1.6),
        ("16 table", 1, 1.6),
        ("16 table", 2, 1.6),
    ]


# Reports ------------------------------------------------------------------------------------------


OBJECTIVES = ROOT / "results/studies/objectives/objectives.json"
POSITIONS = ROOT / "results/studies/positions"
TABLES = {}  # of results/
for data_set in positions.DATA_SETS:
    TABLES[f"studies/positions/{data_set}"] = partial(positions.markdown, data_set)
TABLES |= {
    "studies/objectives/disturb": disturb.markdown,
    "studies/objectives/few": partial(objectives.few_markdown, lab.read_rows(OBJECTIVES)),
    "studies/objectives/given_frames_objectives": given_frames.markdown,
    "studies/objectives/no_clock": no_clock.markdown,
    "studies/objectives/objectives": objectives.markdown,
    "studies/objectives/tuning": objectives.tuning_markdown,
    "studies/people/people": people.markdown,
    "studies/positions/seeds": seeds.markdown,
    "studies/speed/inflation_pay": inflation.pay_markdown,
    "studies/sprites/sprites": sprites.markdown,
    "studies/statistics/coverage": coverage.markdown,
    "old/given_frames": given_frames.markdown,
    "old/inflation_kernels": inflation.kernels_markdown,
    "old/seeds": seeds.markdown,
}


@pytest.mark.parametrize("name", TABLES)
def test_committed_tables_match_the_committed_numbers(name):
    content, text = read_results(ROOT / "results", name)
    table = "\n".join(TABLES[name](content))
    assert f"{table.rstrip()}\n" == text


def test_intervals_cover_as_often_in_a_small_simulation(tmp_path):
    run_main(coverage, "--repeats", 100, "--out", tmp_path)
    made, text = read_results(tmp_path, "coverage")
    committed, _ = read_results(ROOT / "results/studies/statistics", "coverage")
    for kind, rows in made.items():
        if isinstance(rows, list):
            assert [row.keys() for row in rows] == [row.keys() for row in committed[kind]]
    assert (made["repeats_of_means"], made["repeats"]) == (100, 10)
    for row in committed["means"]:
        assert row["t"] >= 0.93 or row["values"] == "skewed"  # the goal
    assert "| 3 | 9" in text


def test_a_table_of_experiments_keeps_the_columns_of_other_runs(tmp_path):
    runs = {
        "eqm": {"psnr": "30"},
        "flow": {"psnr": "20", "objective": "flow"},
        "again": {"psnr": "31"},
    }
    table = lab.ExperimentTable(
        about="",
        name="census",
        title="",
        script="census.sh",
        read_run=lambda name: {"hours": 1, "seed": 0} | runs[name],
        rows_of=lambda run: {"PSNR": run["psnr"]},
        brackets="",
    )
    table.__file__ = "census.py"
    run_main(table, "flow", "eqm", "--out", tmp_path)
    run_main(table, "again", "--out", tmp_path)
    _, text = read_results(tmp_path, "census")
    assert "| | HOURS=1, seed 0 | HOURS=1, seed 0, flow |" in text
    assert "| PSNR | 31 | 20 |" in text


def test_several_processes_may_write_the_same_table_at_once(tmp_path):
    def write(number):
        lab.write_results(tmp_path, "table", [f"| {number} |"] * 1000, [number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    (number,), text = read_results(tmp_path, "table")
    assert set(text.split("\n")) == {f"| {number} |", ""}


def test_the_committed_report_matches_the_committed_rows(tmp_path):
    committed = (POSITIONS / "study.csv").read_bytes()
    (tmp_path / "study.csv").write_bytes(committed)
    run_main(study, "--report", "--out", tmp_path)
    assert (tmp_path / "study.md").read_text() == (POSITIONS / "study.md").read_text()
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"study-B.png", "study-C.png"}
    study.write_rows(tmp_path / "again.csv", study.read_rows(tmp_path / "study.csv"))
    assert (tmp_path / "again.csv").read_bytes() == committed


def loss_difference(values, others):
    arms = {"a": dict(enumerate(values)), "b": dict(enumerate(others))}
    return lab.difference(arms, ("a", "b"), "Loss")


# The first one, differences 0.5, 0.5, 0.6: mean 0.5333, standard error 0.0333, times 4.30; t = 16
# with two degrees of freedom, and P(|T| > t) is 1 - t / sqrt(t^2 + 2) = 0.0039
@pytest.mark.parametrize(
    ("values", "others", "text"),
    [
        (
            [1.0, 2.0, 3.1],
            [0.5, 1.5, 2.5, 9.0],
            "- Loss: a minus b is +0.533 (95% +0.390 to +0.677, 3 seeds; p 0.004, by Holm 0.004): "
            "higher.",
        ),
        ([1.0, -1.0], [0.0, 0.0], "no significant difference"),
        ([0.0, 0.0], [0.0, 0.0], "p 1.000"),
        ([0.0, 0.0], [1.0, 1.0], "p < 0.001, by Holm < 0.001): lower."),
        ([1.0], [0.0], "one seed"),
        ([], [0.0], "- Loss, a minus b: not run yet."),
    ],
)
def test_differences_are_paired_by_seed_with_the_p_value_of_students_t(values, others, text):
    (line,) = lab.difference_lines([loss_difference(values, others)])
    assert text in line


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # By hand: 4 x 0.005, 3 x 0.011, then 2 x 0.02 and 1 x 0.04
        ([0.04, 0.005, 0.02, 0.011], [0.04, 0.02, 0.04, 0.033]),
        ([0.03, 0.02, 0.9], [0.06, 0.06, 0.9]),  # never below that of a smaller p
        ([0.6, 0.7], [1, 1]),
        ([], []),
    ],
)
def test_holm_multiplies_the_smallest_p_by_their_number_the_next_by_one_less(p_values, adjusted):
    assert lab.holm(p_values) == pytest.approx(adjusted)


def test_a_difference_that_is_significant_alone_may_not_be_in_a_table_of_many():
    # t is 4 sqrt(3), so p = 1 - sqrt(48 / 50) = 0.0202, and five times that in a table of five
    gap = loss_difference([1.3, 1.4, 1.5], [1.0, 1.0, 1.0])
    other = loss_difference([1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    (alone,) = lab.difference_lines([gap])
    among, *_ = lab.difference_lines([gap] + [other] * 4)
    assert alone.endswith("p 0.020, by Holm 0.020): higher.")
    assert among.endswith("p 0.020, by Holm 0.101): no significant difference.")


def test_ratios_of_seeds_have_a_geometric_mean_and_an_interval_of_their_logarithms():
    (line,) = lab.difference_lines([report.ratio("Compute, a / b", [0.5, 1.0, 2.0])])
    # ln 2 x 4.3027 / sqrt(3) = 1.7219, and exp(1.7219) = 5.59
    assert line == (
        "- Compute, a / b: the geometric mean is 1.00 (each seed: 0.50; 1.00; 2.00; 95% 0.18 to "
        "5.59; p 1.000, by Holm 1.000): no significant difference."
    )
    assert report.ratio("Compute, a / b", [0.5]).p is None


def test_compute_to_reach_a_goal_is_interpolated_or_unknown():
    compute_to = partial(report.compute_to, 0.9, [0.4, 0.6, 1.0, 1.6])
    assert compute_to([0.0, 0.5, 1.0, 0.8]) == pytest.approx(0.92)
    assert report.share_text(compute_to([0.0, 0.9, 0.95, 1.0])) == "60%"
    for values in ([0.95, 0.5, 1, 1], [0, 0.1, 0.5, 0.89]):  # at the first share, or never
        assert report.share_text(compute_to(values)) == "an unmeasured share"


@pytest.fixture
def some_rows(tmp_path):
    """A csv of some committed rows: the arms with fixed and moving positions."""
    path = tmp_path / "study.csv"
    rows = study.read_rows(POSITIONS / "study.csv")
    study.write_rows(path, [row for row in rows if row["arm"] in ("16 fixed", "16 moving")])
    return path


def test_a_report_shows_missing_and_diverged_runs(some_rows):
    rows = study.read_rows(some_rows)
    lost_rows = lab.rows_with({"arm": "16 moving", "seed": 4, "share": 1}, rows)
    rows = [row for row in rows if row not in lost_rows]
    rows.append(lost_rows[0] | {"step": 7, "loss": math.inf, "loss_16": math.inf})
    study.write_rows(some_rows, rows)
    out = some_rows.parent
    run_main(study, "--report", "--out", out)
    runs = {run.key: run for run in a_study(out).runs}
    assert runs["16 moving", 4, 1].is_done
    text = (out / "study.md").read_text()
    for line in (
        "| 16 moving | 100 | 0.331 ± 0.003 (0.333, 0.321, 0.336, 0.333, inf) |",
        "Direction accuracy (0 to 1), 16 rotary minus 16 fixed: not run yet.",
        "| 4-8-16 | 100 | - | - | - |",
        "4-8-16 moving: not run yet.",
    ):
        assert line in text
    interval = r"\(95% -0.\d+ to -0.\d+, 4 seeds; p .*, by Holm .*\): lower"
    assert re.search(f"Loss: 16 moving minus 16 fixed is -0.0.. {interval}", text)
    assert not list(out.glob("*.png"))


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "\n2,",
            "\n1,",
            "has another version or recipe (flags, sizes); expected version 2; move the file away",
        ),
        (",16 moving,0,", ",x,0,", "arm 'x' has another version or recipe"),
        (
            "version,",
            "versions,",
            "has other columns; expected those of version 2; move the file away",
        ),
    ],
)
def test_rows_of_other_studies_are_refused(old, new, words, some_rows, capsys):
    out = some_rows.parent
    some_rows.write_text(some_rows.read_text().replace(old, new, 1))
    for flags in (["--report"], ["--list"], []):
        assert words in refused(capsys, study, *flags, "--out", out)
    assert list(out.iterdir()) == [some_rows]


def test_a_failing_script_is_a_one_line_error(tmp_path):
    message = r"sample.sh ended with status 2 \(.*error: .*word.*\); see .*log"
    with pytest.raises(lab.UserError, match=message):
        SCRIPT(lab.Run(tmp_path), "scripts/sample.sh", "word")

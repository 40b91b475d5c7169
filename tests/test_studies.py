"""The studies: statistics in closed form, committed tables, equal compute, miniatures, errors."""

import importlib
import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import control
import coverage
import disturb
import few
import lab
import people
import positions
import sample_gd
import schedule
import seeds
import shapes
import sprites
import streaming
import study
import train
import worlds
from runtime.cli import UserError
from runtime.untrusted import read_json
from schedule import Phase
from shapes import FULL, MINIATURE
from test_control import tuning_rows
from test_shapes_tracker import clip_of
from training import ROOT, counted_steps, error_of, refused, run_main

TWO_ARMS = "16 fixed", "4-8-16 table"  # of one run each in the miniature
SEED = ["--seeds", 0]
SCRIPT = lab.Run.script  # in a process of its own

# Statistics ---------------------------------------------------------------------------------------


# The first one, differences 0.5, 0.5, 0.6: mean 0.5333, standard error 0.0333, times 4.30; t = 16
# with two degrees of freedom, and P(|T| > t) is 1 - t / sqrt(t^2 + 2) = 0.0039
@pytest.mark.parametrize(
    "values, others, text",
    [
        (
            [1.0, 2.0, 3.1],
            [0.5, 1.5, 2.5, 9.0],
            "- Loss: a minus b is +0.533 (95% +0.390 to +0.677, 3 seeds; p 0.004, by Holm 0.004): "
            "higher.",
        ),
        ([0.0, 0.0], [1.0, 1.0], "is -1.000 (the same with 2 seeds, no interval)."),
        ([0.0, 0.01], [1.0, 1.01001], "p < 0.001, by Holm < 0.001): lower."),
        ([math.inf, 1.0], [0.0, 0.0], "one seed, no interval; 1 of 2 diverged"),
        ([math.nan, 1.0, 2.0], [0.0, 0.0, 0.0], "2 seeds; 1 of 3 diverged; p"),
        ([math.nan], [0.0], "- Loss, a minus b: 1 of 1 diverged."),
    ],
)
def test_differences_are_paired_by_seed_with_the_p_value_of_students_t(values, others, text):
    arms = {"a": dict(enumerate(values)), "b": dict(enumerate(others))}
    (line,) = lab.compare([(arms, ("a", "b"), "Loss", 3)])
    assert text in line


def test_cells_say_how_many_runs_diverged():
    values = [{"": {"val_loss": 3}, "task": {"score": score}} for score in (0.1, 0.3)]
    values.append({"": {"val_loss": math.inf}, "task": {}})
    rows = [{"arm": "a", "seed": seed, "values": of_run} for seed, of_run in enumerate(values)]
    rows.append({"arm": "b", "seed": 0, "values": values[-1]})
    columns = [lab.Column("score (%)", "score", task="task"), lab.Column("loss", "val_loss", 1)]
    *_, first, second, _ = lab.arm_table(rows, {"a": {"arm": "a"}, "b": {"arm": "b"}}, columns)
    assert (
        first == "| a | 20.0 (10.0 to 30.0); 1 of 3 diverged | 3.0 (3.0 to 3.0); 1 of 3 diverged |"
    )
    assert second == "| b | 1 of 1 diverged | 1 of 1 diverged |"


def test_a_table_says_with_what_its_rows_were_made():
    rows = [{"code": "0123456789ab", "machine": "a CPU", "precision": "fp32"}, {"machine": "a CPU"}]
    assert lab.made_with(rows) == "Made with precision ?, fp32; machine a CPU; code 0123456789, ?."


def test_holm_multiplies_the_smallest_p_by_their_number_the_next_by_one_less():
    # By hand: 5 x 0.01, 4 x 0.012 (never below that of a smaller p), 3 x 0.04, 2 x 0.6, 1 x 0.7
    adjusted = lab.holm([0.04, 0.6, 0.01, 0.7, 0.012])
    assert adjusted == pytest.approx([0.12, 1, 0.05, 1, 0.05])


# Committed tables ---------------------------------------------------------------------------------

TABLES = {  # in results/
    "studies/few/few": few.markdown,
    "studies/few/few_tuning": few.tuning_markdown,
    "old/sprites-2h": sprites.markdown,
    "studies/objectives/control_tuning": control.tuning_markdown,
    "studies/objectives/disturb": disturb.markdown,
    "studies/objectives/disturb-few": disturb.markdown,
    "studies/people/people": people.markdown,
    "studies/positions/bouncing": partial(positions.markdown, "bouncing"),
    "studies/positions/seeds": seeds.markdown,
    "studies/positions/sprites": partial(positions.markdown, "sprites"),
    "studies/sprites/sprites": sprites.markdown,
    "studies/statistics/coverage": coverage.markdown,
    "studies/streaming/streaming": streaming.markdown,
    "studies/streaming/streaming_tuning": streaming.tuning_markdown,
    "studies/worlds/worlds": worlds.markdown,
    "studies/worlds/worlds_tuning": worlds.tuning_markdown,
}


@pytest.mark.parametrize("name", TABLES)
def test_committed_tables_match_the_committed_numbers(name):
    path = ROOT / f"results/{name}.md"
    table = "\n".join(TABLES[name](lab.read_rows(path.with_suffix(".json"))))
    assert f"{table.rstrip()}\n" == path.read_text()


def test_intervals_cover_as_often_in_a_small_simulation(tmp_path):
    run_main(coverage, "--repeats", 100, "--out", tmp_path)
    simulated = read_json(tmp_path / "coverage.json")
    committed = lab.read_rows(ROOT / "results/studies/statistics/coverage.json")
    for kind, rows in simulated.items():
        if isinstance(rows, list):
            assert [row.keys() for row in rows] == [row.keys() for row in committed[kind]]
    assert simulated["repeats_of_means"] == 100
    assert simulated["repeats"] == 10
    for row in committed["means"]:
        assert row["t"] >= 0.93 or row["values"] == "skewed"  # the goal


def test_the_study_disturbs_only_what_it_says(monkeypatch, tmp_path):
    x = torch.rand(2, 3, 8, 16, 16)
    for name, y, labels in disturb.disturbances(x, torch.tensor([0, 11]), 12, 0):
        share = (y != x).float().mean()
        if "square" in name:
            assert share == 36 / 256, name
        elif "half" in name and "mirrored" not in name:
            assert share == pytest.approx(0.5, abs=1e-3), name
        elif name == "another class":
            assert share == 0
        assert labels.tolist() == ([1, 0] if "another" in name else [0, 11])
    for name, value in {"FIRST": 1, "AGAIN": 1, "FRAMES": 4, "LEVELS": (0.3,)}.items():
        monkeypatch.setattr(disturb, name, value)
    run_main(disturb, "--model", "demo-few", "--num-clips", 2, "--out", tmp_path)
    assert len((tmp_path / "disturb-few.md").read_text().splitlines()) == 4 + 2 + 9
    rows = read_json(tmp_path / "disturb-few.json")["rows"]
    assert rows["before"]["shape"] == [False, False]  # still noise


@pytest.fixture
def copied(tmp_path):
    """A copy of the committed rows of study.py."""
    for name in ("study.csv", "study.json", "study.md"):
        (tmp_path / name).write_bytes((ROOT / "results/studies/positions" / name).read_bytes())
    return tmp_path


def test_the_committed_report_matches_the_committed_rows(copied):
    committed = (copied / "study.md").read_text()
    measured, mark, finished = committed.partition("![")
    (copied / "study.md").write_text(mark + finished)  # A and B come from the rows
    run_main(study, "--report", "--out", copied)
    assert (copied / "study.md").read_text() == committed
    assert "| 4-8-16 moving | 32 |" in measured


def test_a_report_shows_missing_and_diverged_runs(copied):
    lines = (copied / "study.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if re.search("version|,16 (fixed|moving),", line)]
    kept = [line for line in kept if ",16 moving,4,1,sample" not in line]
    kept[-1] = re.sub(r"^(.*?,train,.*?,.*?,.*?,.*?),.*?,", r"\1,inf,", kept[-1])
    assert ",16 moving,4,1,train,2000" in kept[-1]
    (copied / "study.csv").write_text("".join(kept))
    run_main(study, "--report", "--out", copied)
    text = (copied / "study.md").read_text()
    for line in (
        "| 16 moving | 100 | 0.331 ± 0.003 (0.333, 0.321, 0.336, 0.333, inf) |",
        "Direction accuracy (0 to 1), 16 rotary minus 16 fixed: not run yet.",
        "| 4-8-16 | 100 | - | - | - |",
        "- Loss, 4-8-16 moving minus 16 moving intervals: not run yet.",
    ):
        assert line in text
    interval = r"\(95% -0.\d+ to -0.\d+, 4 seeds; 1 of 5 diverged; p .*, by Holm .*\): lower"
    assert re.search(f"Loss: 16 moving minus 16 fixed is -0.0.. {interval}", text)


def test_several_processes_may_write_the_same_table_at_once(tmp_path):
    def write(number):
        lab.write_results(tmp_path, "table", [f"| {number} |"] * 1000, [number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    (number,) = read_json(tmp_path / "table.json")
    assert set((tmp_path / "table.md").read_text().split("\n")) == {f"| {number} |", ""}


# Runs ---------------------------------------------------------------------------------------------


# The tunings that some of them read are committed.
COMMANDS = """
    study --seeds 0
    control --tune
    control --seeds 200
    few --tune
    few --seeds 0
    positions bouncing --seeds 0
    positions sprites --seeds 0 --data-path DIR --latents DIR
    streaming --tune
    streaming --seeds 0
    worlds --tune
    worlds --seeds 0
    control_sprites --data-path DIR --tune
    control_sprites --data-path DIR --seeds 0
"""


@pytest.fixture
def runs_of(monkeypatch):
    """A function that returns the runs of a command, without starting them."""
    runs = []
    monkeypatch.setattr(lab, "run_study", lambda args, of_study, _: runs.extend(of_study))
    monkeypatch.chdir(ROOT)

    def runs_of(script, *flags):
        runs.clear()
        run_main(importlib.import_module(script), *flags, "--list")
        return runs

    return runs_of


def test_scripts_take_the_flags_of_every_run(runs_of, monkeypatch):
    for command in COMMANDS.strip().splitlines():
        runs = runs_of(*command.split(), "--compile")
        assert runs, command
        for run in runs:
            assert "--compile" in run.training, command
            monkeypatch.setattr("sys.argv", ["train", *map(str, run.training)])
            train.parse_args()
            for flags, metrics in run.tasks.values():
                monkeypatch.setattr("sys.argv", ["sample_gd", "--ckpt", "FILE", *map(str, flags)])
                sample_gd.parse_args()
                assert {*metrics} <= run.metrics.keys()


def test_all_arms_have_equal_compute_and_tokens_per_step():
    config = shapes.config_of(FULL)
    full = FULL.steps * 8 * config.training_flops(16)
    for name, arm in study.ARMS.items():
        planned, counted = shapes.plan(config, arm.phases, arm.mix, FULL.steps)
        phases = [Phase(*phase) for phase in planned]
        flops = 0
        first_step = 0
        for phase in phases:  # as train.py counts them, step by step
            frames = schedule.frames_of_steps(
                phases, phase, first_step, first_step, arm.mix, seed=0
            )
            flops += phase.batch_size * sum(map(config.training_flops, frames))
            first_step = phase.last_step
            assert phase.batch_size * math.prod(config.grid(phase.num_frames)) == shapes.TOKENS
        assert flops == pytest.approx(full, rel=0.02), name
        assert flops == pytest.approx(counted, rel=0.01), name


@pytest.mark.parametrize("data_set", positions.DATA_SETS)
def test_all_positions_have_equal_compute(data_set, runs_of):
    runs = runs_of("positions", data_set, "--data-path", "DIR")
    for run in runs:
        assert ("--frames-schedule" in run.training) == (run.about["positions"] != "fixed")
        assert run.more["flops"] == pytest.approx(runs[0].more["flops"], rel=1e-3)


@pytest.mark.parametrize(
    "way, flags",
    [
        ("euler", "--sampler euler --num-sampling-steps 16"),
        ("heun", "--sampler heun --num-sampling-steps 9"),
        (0.6, "--sampler ngd --num-sampling-steps 16 --stepsize 0.04"),
    ],
)
def test_all_ways_to_sample_take_the_same_evaluations(way, flags):
    assert shapes.sampling(way, 15) == flags


# Miniatures that are really run (killed, and by two processes at once: faults/test_study_kills.py)


@pytest.fixture(scope="module")
def commands():
    """The commands of the studies, run in this process."""
    seen = []
    made = {}  # data sets by their flags

    def script(run, *words):
        seen.append(list(map(str, words)))
        name, *flags = words
        if name == "datasets/make_moving_shapes.py":
            _, folder, *recipe = flags
            known = made.setdefault(tuple(recipe), folder)
            if known != folder:
                folder.exists() or folder.symlink_to(known)
                return
        with pytest.MonkeyPatch.context() as patch:
            # the plots of scores take long, and are tested with these
            patch.setattr(Figure, "savefig", lambda figure, path, **settings: None)
            run_main(importlib.import_module(Path(name).stem), *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.Run, "script", script)
        yield seen


def run_miniature(script, out, *flags, **settings):
    run_main(script, "--miniature", "--out", out, *flags, **settings)


def numbers_of(out):
    """{arm: values} of the rows of study.py."""
    rows = read_json(out / "study.json")
    return {row["arm"]: row["values"] for row in rows}


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """The folder of a finished study of two runs."""
    out = tmp_path_factory.mktemp("results")
    run_miniature(study, out, "--only", *TWO_ARMS, *SEED)
    return out


def test_a_study_has_a_row_per_run_that_says_how_it_was_made_and_runs_once(
    trained, commands, capsys
):
    rows = read_json(trained / "study.json")
    assert [row["arm"] for row in rows] == [*TWO_ARMS]
    frames = (["16 frames"], ["16 frames", "24 frames", "32 frames"])
    for row, lengths in zip(rows, frames, strict=True):
        assert [*row["values"]] == ["", *lengths]
        assert row["seconds"] > 0
        for task in lengths:
            assert {"direction_accuracy", "seam_score"} < row["values"][task].keys()
            assert row["values"][task]["evaluations"] == 15
        arm = study.ARMS[row["arm"]]
        config = shapes.config_of(MINIATURE)
        _, flops = shapes.plan(config, arm.phases, arm.mix, MINIATURE.steps)
        assert row["flops"] == flops
    commands.clear()
    for flags, words in ([], "all is done"), (["--list"], "2 of 2 runs are done"):
        run_miniature(study, trained, "--only", *TWO_ARMS, *SEED, *flags)
        assert words in capsys.readouterr().out
        assert not commands
        assert read_json(trained / "study.json") == rows


def test_a_stopped_study_resumes_and_ends_the_same(trained, tmp_path, capsys):
    flags = ["--only", TWO_ARMS[0], *SEED]
    with counted_steps(train, stop_after=2):
        run_miniature(study, tmp_path, *flags, status=1)
    assert "the training was stopped; run the same command to continue" in capsys.readouterr().err
    (metrics,) = tmp_path.glob("runs/*/*/metrics.jsonl")
    with metrics.open("a") as file:  # as if killed between logging and saving the last step
        file.write(f'{{"step": {MINIATURE.steps}, "val_loss": 0}}\n')
    run_miniature(study, tmp_path, *flags)
    assert numbers_of(tmp_path) == {TWO_ARMS[0]: numbers_of(trained)[TWO_ARMS[0]]}


@pytest.mark.parametrize("diverges", ["train", "sample"])
def test_a_study_goes_on_after_a_diverged_run(tmp_path, monkeypatch, diverges):
    def diverge(*args):
        raise UserError("the loss is not finite, or samples are not finite")

    for step in ("make_data", "train"):
        monkeypatch.setattr(lab.Run, step, lambda run: None)
    monkeypatch.setattr(lab.Run, diverges, diverge)
    run_miniature(study, tmp_path, "--only", *TWO_ARMS, *SEED)
    losses = [values[""]["val_loss"] for values in numbers_of(tmp_path).values()]
    assert losses == [math.inf, math.inf]


def test_forced_models_complete_clips_and_only_what_is_missing_is_made_again(commands, tmp_path):
    tables = {name: tmp_path / f"control{name}.json" for name in ("", "_tuning")}
    lab.add_rows(tables["_tuning"], tuning_rows("eqm", 5, "euler"))
    flags = ["--arms", "eqm-forced", "--seeds", 200]
    run_miniature(control, tmp_path, *flags)
    (row,) = read_json(tables[""])
    for task in control.GIVEN:
        assert math.isfinite(row["values"][task]["psnr_gain"])
    gain = row["values"]["8 of 16 frames given"]["psnr_gain"]
    assert f"| eqm-forced | {gain:.1f} |" in (tmp_path / "control.md").read_text()
    tables[""].write_text("[]")
    next(tmp_path.glob("runs/*/8*/prediction.json")).unlink()
    commands.clear()
    run_miniature(control, tmp_path, *flags)
    assert {command for command, *_ in commands if command.startswith("EqM")} == {"EqM/evaluate.py"}
    (again,) = read_json(tables[""])
    assert again["values"] == row["values"]


def test_samples_of_positions_are_scored_together(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "POSITIONS", {"fixed": "", "moving": shapes.MOVING})
    data_set = positions.DATA_SETS["bouncing"]
    words, metrics = data_set.tasks[positions.LONG]
    short = replace(  # shorter videos, fewer clips
        data_set,
        made=("--bounce", "--seconds", 1.4),
        tasks={positions.LONG: (words.replace("256", "24"), metrics)},
        metrics=dict.fromkeys(metrics, "--split all --num-real 4"),
    )
    monkeypatch.setitem(positions.DATA_SETS, "bouncing", short)
    commands.clear()
    monkeypatch.chdir(tmp_path)
    run_miniature(positions, tmp_path, "bouncing", *SEED)
    scripts = [name for name, *_ in commands]
    assert scripts.count("EqM/evaluate.py") == len(metrics)
    rows = read_json(tmp_path / "bouncing.json")
    assert [row["positions"] for row in rows] == ["fixed", "moving"]
    assert "): moving minus fixed is " in (tmp_path / "bouncing.md").read_text()


def test_streams_are_compared_with_windows(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "choose", lambda rows, way: (streaming.TUNED[way][0], 1))
    monkeypatch.setitem(streaming.COMPUTE, "bouncing", 1)
    monkeypatch.setitem(streaming.MADE, "bouncing", ("--bounce", "--seconds", 1.4))  # short videos
    run_miniature(streaming, tmp_path, *SEED)
    rows = read_json(tmp_path / "streaming.json")
    arms = {*itertools.product(streaming.COLUMNS, streaming.TUNED)}
    assert {(row["data"], row["way"]) for row in rows} == arms
    assert "| causal, patch 4, shift 3, context 16" in (tmp_path / "streaming.md").read_text()
    (streamed,) = lab.rows_with({"data": "moving", "way": "causal"}, rows)
    assert 0 <= streamed["values"]["24 spans, guidance 2"]["spans_moved"] <= 1


def test_worlds_are_tuned_and_compared(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "TUNED", worlds.TUNED[:1])
    arms = ["eqm", "eqm, context 32", worlds.STUDENT]
    run_miniature(worlds, tmp_path, "--tune", "--arms", "eqm")
    run_miniature(worlds, tmp_path, *SEED, "--arms", *arms)
    rows = read_json(tmp_path / "worlds.json")
    assert [row["arm"] for row in rows] == arms
    for row in rows:
        assert 0 <= row["values"]["256 frames, 2 evaluations"]["sharp"] <= 1
    trainings = [words for words in commands if words[0] == "EqM/train.py"]
    (*trainings, student) = trainings[-3:]
    schedules = [words[words.index("--frames-schedule") + 1] for words in trainings]
    assert schedules == ["2:2:2,4:4:2", "2:2:2,4:3:2,8:4:1"]
    assert "--pairs" in student
    assert "eqm, context 32 minus eqm is" in (tmp_path / "worlds.md").read_text()


def test_all_worlds_have_about_equal_compute(runs_of):
    flops = []
    for run in runs_of("worlds", "--seeds", 0, "--arms", *worlds.ARMS):
        flops.append(run.more["flops"] / worlds.ARMS[run.about["arm"]].compute)
    assert max(flops) == pytest.approx(min(flops), rel=0.05)


def test_worlds_take_the_settings_with_the_best_mean():
    rows = []
    for settings in worlds.TUNED[1:]:
        values = {}
        for shift in worlds.SOLVER_SHIFTS:
            share = 0.9 if (settings, shift) == (worlds.TUNED[2], 3) else 0.8
            values[worlds.tuning_task(shift)] = dict.fromkeys(worlds.MEASURES, share)
        rows.append({"arm": "flow", "settings": settings.name, "values": values})
    assert "--arms flow: not tuned completely" in error_of(worlds.choose, rows, "flow")
    lost = {"": {"val_loss": math.inf}}
    rows.append({"arm": "flow", "settings": worlds.TUNED[0].name, "values": lost})
    assert worlds.choose(rows, "flow") == (worlds.TUNED[2], 3)


def test_streams_take_the_settings_with_the_best_mean_of_both_shares(runs_of, monkeypatch):
    """The best turns alone, or the best objects alone, don't decide."""
    settings = streaming.TUNED["causal"][:2]
    monkeypatch.setattr(streaming, "TUNED", {"causal": settings})
    # turns and objects of both settings, with both guidances
    shares = iter([(0.25, 0.70), (0.40, 0.50), (0.30, 0.85), (0.35, 0.90)])
    rows = []
    for run in runs_of("streaming", "--tune"):
        values = {}
        for task in run.tasks:
            values[task] = dict(zip(("turns_right", "one_object"), next(shares), strict=True))
        rows.append(run.about | {"values": values})
    assert streaming.choose(rows, "causal") == (settings[1], streaming.GUIDANCES[1])
    assert "not tuned yet" in error_of(streaming.choose, rows[1:], "causal")
    rows[1]["values"] = {"": {"val_loss": math.inf}} | dict.fromkeys(rows[1]["values"], {})
    assert streaming.choose(rows, "causal") == (settings[0], streaming.GUIDANCES[0])


@pytest.mark.parametrize("data", streaming.COLUMNS)
def test_all_settings_of_streaming_have_equal_compute(data):
    compute = streaming.COMPUTE[data]
    expected = compute * FULL.steps * 8 * shapes.config_of(FULL).training_flops(16)
    for settings in itertools.chain(*streaming.TUNED.values()):
        _, flops = streaming.plan(FULL, data, compute, settings)
        assert flops == pytest.approx(expected, rel=0.002)


def test_spans_are_right_if_the_object_moves_as_their_class_says(tmp_path, monkeypatch):
    """Objects that move right and then down, right only, and right, then slowly, then down."""
    right = [(4 + 0.5 * t, 5) for t in range(8)]
    turned = clip_of(right + [(8, 5 + 0.5 * t) for t in range(8)])
    straight = clip_of([(4 + 0.5 * t, 5) for t in range(16)])
    late = clip_of(right + [(8 + 0.25 * min(t, 3), 5 + 0.75 * max(t - 3, 0)) for t in range(8)])
    about = {"classes": ["CircleRight", "CircleDown"], "spans": [[0, 0, 1, 1]] * 3}
    read = lambda here, folder: (about, np.stack([turned, straight, late]), None)  # noqa: E731
    monkeypatch.setattr(streaming, "read_samples", read)
    assert streaming.measure_spans(tmp_path) == {"spans_straight": 4 / 6, "spans_moved": 5 / 6}
    empty = np.zeros((8, 16, 16, 3), np.uint8)
    assert not streaming.moves_mostly(empty, "CircleRight")
    assert not streaming.moves_mostly(straight[:8], "CircleLeft")


def test_a_row_without_a_new_task_is_replaced(tmp_path):
    tasks = {"old": {}, "new": {}}
    run = lab.Run(tmp_path / "rows.json", about={"seed": 0}, tasks=tasks)
    for seed in (0, 1):
        lab.add_rows(run.out, [{"seed": seed, "values": {"old": {}}}])
    assert not run.has_row
    lab.add_rows(run.out, [{"seed": 0, "size": "miniature", "values": tasks}])
    assert not run.has_row
    lab.add_rows(run.out, [{"seed": 0, "values": tasks}], replaces=run.about)
    assert run.has_row
    assert [row["seed"] for row in lab.read_rows(run.out)] == [1, 0]


def test_a_study_starts_no_run_that_exceeds_its_minutes(tmp_path, capsys):
    run_main(study, "--out", tmp_path, "--minutes", 0.01)
    assert "run again to continue" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/*/train.log"))


# Bad input ----------------------------------------------------------------------------------------


def test_rows_of_other_versions_are_refused(copied, capsys):
    path = copied / "study.csv"
    path.write_text(path.read_text().replace("loss_16", "loss", 1))
    for flags in (["--report"], ["--list"], []):
        assert "has other columns" in refused(capsys, study, *flags, "--out", copied)


def test_a_failing_script_is_a_one_line_error(tmp_path):
    run = lab.Run(tmp_path / "rows.json", about={"seed": 0})
    run.folder.mkdir(parents=True)
    message = r"weizmann.sh ended with status 2 \(.*error: .*word.*\); see .*log"
    with pytest.raises(UserError, match=message):
        SCRIPT(run, "scripts/weizmann.sh", "word")

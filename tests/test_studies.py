"""The studies: a miniature of each, equal compute, reports of committed results, bad input."""

import csv
import json
import math
import re
import shlex
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import arms
import cache_latents
import coverage
import disturb
import evaluate
import given_frames
import inflation
import lab
import make_moving_shapes
import no_clock
import objectives
import people
import positions
import report
import sample_gd
import schedule
import seeds
import sprites
import study
import train
from arms import BY_NAME, FULL, MINIATURE
from schedule import Phase
from training import ROOT, counted_steps, refused, run_main

TWO_ARMS = "16 fixed", "4-8-16 table"  # of one run each in the miniature
SAMPLED = [
    (name, str(frames)) for name in TWO_ARMS for frames in BY_NAME[name].lengths
]  # in this order
SCRIPT = lab.Run.script  # in a process of its own
SCRIPTS = {
    "EqM/train.py": train,
    "EqM/sample_gd.py": sample_gd,
    "EqM/evaluate.py": evaluate,
    "datasets/make_moving_shapes.py": make_moving_shapes,
}

# Miniatures that are really run (killed, and by two processes at once: faults/test_study_kills.py)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The commands of the studies, run in this process. A quickstart only trains a tiny model."""
    seen = []
    made = {}  # data sets by their flags

    def script(run, *words, **variables):
        seen.append([str(word) for word in words])
        if (
            words[0] == "datasets/make_moving_shapes.py"
            and made.setdefault(words[3:], words[2]) != words[2]
        ):
            words[2].exists() or words[2].symlink_to(made[words[3:]])
            return
        if words[0] == "scripts/quickstart.sh":
            flags = arms.recipe_flags(BY_NAME["16 rotary"], variables["SEED"], 1.0, MINIATURE)
            flags += [*arms.sampling_flags(MINIATURE), "--data-path", variables["DATA"], "--resume"]
            words = "EqM/train.py", *flags, "--results-dir", ROOT / "results" / variables["EXP"]
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # the plots of scores take long, and are tested with these
            patch.setattr(Figure, "savefig", lambda figure, path, **settings: None)
            run_main(SCRIPTS[words[0]], *words[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.Run, "script", script)
        yield seen


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """(folder of a finished study of two runs, flags for one of its checkpoints and its data)."""
    out = tmp_path_factory.mktemp("results")
    run_main(study, "--miniature", "--out", out, "--only", *TWO_ARMS)
    (ckpt,) = out.glob("study/16-fixed-*/*/checkpoints/latest.pt")
    return out, ["--ckpt", ckpt, "--data-path", out / "study/moving-shapes"]


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_writes_each_validation_and_sample_row_once(trained, commands, capsys):
    out, _ = trained
    rows = lines_of(out / "study.csv")
    sampled = [row for row in rows if row["kind"] == "sample"]
    assert [(row["arm"], row["frames"]) for row in sampled] == SAMPLED
    assert all(row["real_direction"] == "1" and float(row["seam"]) > 0 for row in sampled)
    for name in TWO_ARMS:
        phases, flops = arms.plan(BY_NAME[name], 1.0, MINIATURE)
        validated = [row for row in rows if row["kind"] == "train" and row["arm"] == name]
        assert [int(row["step"]) for row in validated] == list(range(1, phases[-1][1] + 1))
        assert all(row["loss_16"] for row in validated)
        last = validated[-1]
        assert float(last["flops"]) == pytest.approx(flops, rel=1e-4)
        assert last["frames"] == "16" and last["loss_16"] == last["loss"]
    assert "| 16 fixed | 100 |" in (out / "study.md").read_text()
    (made,) = json.loads((out / "study.json").read_text())
    assert made["command"].endswith(" ".join(["--only", *map(shlex.quote, TWO_ARMS)]))
    assert {row["code"] for row in rows} == {made["code"]} and {row["machine"] for row in rows} == {
        made["machine"]
    }
    commands.clear()
    for flags, words in ([], "all is done"), (["--list"], "2 runs, 0.0 hours left"):
        run_main(study, "--miniature", "--out", out, "--only", *TWO_ARMS, *flags)
        assert (
            words in capsys.readouterr().out
            and not commands
            and lines_of(out / "study.csv") == rows
        )


MINIATURES = {  # study: its flags, a line of its report
    given_frames: (
        "--seeds 0 --shares 0.75",
        r"^\| nothing given, 24 frames at once \| \d+.0 \|  \|  \|",
    ),
    seeds: ("--seeds 3", r"^\| frames \| lowest direction accuracy \(%\) \| median \| seed 3 \|$"),
}


@pytest.mark.parametrize("script", MINIATURES, ids=lambda script: script.__name__)
def test_a_miniature_study_writes_its_table_and_resumes(
    script, trained, commands, capsys, monkeypatch
):
    monkeypatch.setattr(given_frames, "TASKS", dict(list(given_frames.TASKS.items())[1::6]))
    (out, _) = trained
    (flags, line) = MINIATURES[script]
    flags = ["--miniature", "--out", out, *flags.split()]
    run_main(script, *flags)
    found = out / f"{script.__name__}.json"
    assert f"{found.with_suffix('.md')}, {found}" in capsys.readouterr().out
    assert re.search(line, found.with_suffix(".md").read_text(), re.M)
    assert json.loads(found.read_text())["made"]["command"].endswith(" ".join(map(str, flags)))
    content = found.read_text()
    folder = out / script.__name__.replace("_", "-")
    scores = [
        path for path in folder.rglob("*.json") if path.name in ("motion.json", "prediction.json")
    ]
    scores[-1].unlink()
    commands.clear()
    run_main(script, *flags)
    again = [words[0] for words in commands if not words[0].startswith(("scripts", "datasets"))]
    assert again == ["EqM/evaluate.py"] and found.read_text() == content


@pytest.fixture(scope="module")
def compared(commands, tmp_path_factory):
    """The folder of a finished comparison of the objectives eqm and flow, one seed, few tasks."""
    out = tmp_path_factory.mktemp("objectives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "COUNTS", (2,))
        patch.setattr(objectives, "LIMITS", (1,))
        two_arms = {name: objectives.ARMS[name] for name in objectives.PRIMARY}
        patch.setattr(objectives, "ARMS", two_arms)
        run_main(objectives, "--miniature", "--out", out, "--seeds", 0)
    return out


def test_objectives_have_a_row_per_run_and_are_compared_by_seed(compared):
    rows = json.loads((compared / "objectives.json").read_text())
    text = (compared / "objectives.md").read_text()
    assert [(row["objective"], row["seed"]) for row in rows] == [("eqm", 0), ("flow", 0)]
    assert all(
        row["code"] and row["machine"] and row["date"] and "--seeds 0" in row["command"]
        for row in rows
    )
    spent = {task: own["evaluations"] for task, own in rows[1]["values"].items() if task}
    assert spent == {
        objectives.MAIN: 15,
        "24 frames": 15,
        "32 frames": 15,
        "2 evaluations": 2,
        "2 evaluations, no guidance": 2,
    }
    assert rows[0]["values"]["until the field is below 1"]["evaluations"] <= 30
    assert re.search(
        r"both right \(%\): eqm minus flow is [-+]\d+\.\d+ \(one seed, no interval\)", text
    )


def test_a_row_without_a_new_task_is_replaced(tmp_path):
    run = lab.JsonRun(
        tmp_path, tasks={"old": (), "new": ()}, out=tmp_path / "rows.json", about={"seed": 0}
    )
    other = {"seed": 1, "values": {"old": {}}}
    lab.add_rows(run.out, [{"seed": 0, "values": {"old": {}}}, other])
    assert not run.has_row
    row = {"seed": 0, "values": {"old": {}, "new": {}}}
    lab.add_rows(run.out, [row], replaces=run.about)
    assert run.has_row and [kept["values"] for kept in lab.read_rows(run.out)] == [
        other["values"],
        row["values"],
    ]


def test_descents_with_few_evaluations_sample_the_same_models(compared, commands, monkeypatch):
    monkeypatch.setattr(objectives, "COMPARED", (2,))
    monkeypatch.setattr(objectives, "IDEAS", {objectives.BEST: (0.25, ("--mu", 0))})
    commands.clear()
    run_main(objectives, "--miniature", "--out", compared, "--seeds", 0, "--few")
    assert "EqM/train.py" not in {words[0] for words in commands}
    text = (compared / "objectives_few.md").read_text()
    (guided, _) = (words for words in commands if words[0] == "EqM/sample_gd.py")
    assert " --num-sampling-steps 3 --stepsize 0.125 --mu 0 --seed " in " ".join(guided)
    assert re.search(r"^\| flow, Euler steps \| \d+.0 \| \d+.0 \|$", text, re.M)


@pytest.mark.parametrize(
    ("way", "evaluations", "expected"),
    [
        ("euler", 15, ["--sampler", "euler", "--num-sampling-steps", 16]),
        ("heun", 15, ["--sampler", "heun", "--num-sampling-steps", 9]),
        (0.6, 15, ["--sampler", "ngd", "--num-sampling-steps", 16, "--stepsize", "0.04"]),
    ],
)
def test_all_ways_to_sample_take_the_same_evaluations(way, evaluations, expected):
    assert objectives.sampling(way, evaluations) == expected


def test_starts_without_a_clock_fill_one_table_cell_at_a_time(
    compared, commands, monkeypatch, tmp_path
):
    monkeypatch.setattr(no_clock, "PARTS", {"noisy clips": (0.4,), "noisy half": (0.0,)})
    run_main(no_clock, "--miniature", "--out", compared, "--seeds", 0)
    path = compared / "no_clock.json"
    rows = json.loads(path.read_text())
    text = path.with_suffix(".md").read_text()
    assert len(rows) == 2 * len(no_clock.METHODS)
    assert all(0 <= row["both"] <= 1 and row["rmse"] > 0 for row in rows)
    assert text.count("mean over gamma: eqm minus flow, estimated is") == 4
    path.write_text(json.dumps(rows[:-1]))
    commands.clear()
    run_main(no_clock, "--miniature", "--out", compared, "--seeds", 0)
    again = json.loads(path.read_text())
    assert [row | {"date": ""} for row in again] == [row | {"date": ""} for row in rows]
    assert not [
        words for words in commands if words[0].startswith("EqM")
    ]  # data sets say that they exist


def test_the_noise_level_of_shapes_can_be_estimated():
    clips = torch.full((4, 3, 8, 16, 16), -1.0)
    clips[:, :, :, 4:9, 5:11] = 0.8
    for gamma in (0.2, 0.5, 0.9):
        noisy = gamma * clips + (1 - gamma) * torch.randn(
            clips.shape, generator=torch.Generator().manual_seed(0)
        )
        noisy[:, :, 4:] = clips[:, :, 4:]
        assert no_clock.estimate_gammas(noisy, 4) == pytest.approx([gamma, 1], abs=0.05)


@pytest.mark.parametrize("data_set", positions.DATA_SETS)
def test_all_positions_have_equal_compute(data_set, tmp_path):
    flags = {"data_path": "videos", "latents": "latents", "miniature": False, "compile": True}
    args = Namespace(data_set=data_set, out=tmp_path, **flags)
    runs = [positions.PositionsRun(args, name, 0) for name in arms.POSITIONS]
    assert all("--compile" in run.training for run in runs)
    assert max(run.flops for run in runs) / min(run.flops for run in runs) < 1.001


@pytest.mark.parametrize("name", ["people", "bouncing"])
def test_positions_on_other_data_keep_each_finished_run(
    name, trained, commands, tmp_path, monkeypatch
):
    monkeypatch.setattr(positions, "POSITIONS", {"fixed": "", "moving": arms.MOVING})
    (_, model) = trained
    latents = tmp_path / "latents"
    out = tmp_path / "results"
    bouncing = positions.DATA_SETS["bouncing"]  # shorter videos, fewer clips
    (words, metrics) = bouncing.tasks[positions.LONG]
    short = {"made": ("--bounce", "--seconds", 1.4)}
    short["tasks"] = {positions.LONG: (words.replace("256", "24"), metrics)}
    short["metrics"] = dict.fromkeys(metrics, "--split all --num-real 4")
    monkeypatch.setitem(positions.DATA_SETS, "bouncing", replace(bouncing, **short))
    flags = [name, "--miniature", "--out", out, "--seeds", 0]
    if name == "people":
        run_main(cache_latents, *model[2:], "--vae", "none", "--image-size", 16, "--out", latents)
        flags += [*model[2:], "--latents", latents]
    run_main(positions, *flags)
    written = out / f"positions_{name}.md"
    report = written.read_text()
    rows = json.loads(written.with_suffix(".json").read_text())
    assert [(row["positions"], row["seed"]) for row in rows] == [("fixed", 0), ("moving", 0)]
    assert "| fixed | " in report and "): moving minus fixed is " in report
    with Image.open(out / f"figures/positions-{name}.png") as picture:
        assert picture.size[1] > 4 * 128  # two samples of two models
    commands.clear()
    run_main(positions, *flags)
    assert not commands and written.read_text() == report
    written.with_suffix(".json").write_text(json.dumps(rows[:1]))  # a stopped run continues
    run_main(positions, *flags)
    assert (
        not commands
        and json.loads(written.with_suffix(".json").read_text())[1]["values"] == rows[1]["values"]
    )


def test_positions_on_other_data_need_its_videos(tmp_path, capsys):
    assert "--data-path: expected the videos of sprites" in refused(
        capsys, positions, "sprites", "--out", tmp_path
    )


def test_kernels_are_compared_at_the_start_and_later(commands, monkeypatch, tmp_path):
    monkeypatch.setitem(inflation.DATA, "shapes", replace(inflation.DATA["shapes"], patches=(4,)))
    out = tmp_path
    run_main(inflation, "kernels", "--miniature", "--out", out, "--seeds", 0)
    rows = json.loads((out / "inflation_kernels.json").read_text())
    text = (out / "inflation_kernels.md").read_text()
    assert [(row["spread"], row["steps"]) for row in rows] == [
        (name, n) for n in (1, 2) for name in inflation.SPREADS
    ]
    assert (
        len({row["val_loss"] for row in rows}) == 6
        and "## shapes, temporal patch 4, after 2 steps" in text
    )
    assert "- val_loss: one frame minus mean is " in text
    commands.clear()
    run_main(inflation, "kernels", "--miniature", "--out", out, "--seeds", 0)
    assert not commands


def test_a_start_from_images_is_compared_with_scratch_over_compute(
    shapes, commands, monkeypatch, tmp_path
):
    monkeypatch.setattr(inflation, "TASK", ("--num-frames 8 --num-samples 4", ("nearest",)))
    monkeypatch.setattr(inflation, "SCORE", "rmse_ratio")
    monkeypatch.setattr(inflation, "SHARES", {"scratch": (1.0,), "images": (0.6, 1.0)})
    latents = tmp_path / "latents"
    out = tmp_path / "results"
    videos = ["--data-path", shapes]
    run_main(cache_latents, *videos, "--vae", "none", "--image-size", 16, "--out", latents)
    flags = ["pay", "--miniature", "--out", out, "--seeds", 0, *videos, "--latents", latents]
    commands.clear()
    run_main(inflation, *flags)
    rows = json.loads((out / "inflation_pay.json").read_text())
    text = (out / "inflation_pay.md").read_text()
    assert [(row["arm"], row["share"]) for row in rows] == [
        ("scratch", 1.0),
        ("images", 0.6),
        ("images", 1.0),
    ]
    assert "| images | 60 | 83 | " in text and "- Seed 0: compute to " in text
    assert sum("--inflate" in words for words in commands) == 2


def test_compute_of_an_image_model_counts_once():
    found = {
        ("scratch", 1.0): 0.8,
        ("images", 0.2): 0.6,
        ("images", 0.4): 0.7,
        ("images", 0.6): 0.9,
    }
    own = {"seed": 0, "val_loss": 1.0, "flops": 100.0, "image_flops": 20.0}
    lines = inflation.pay_markdown(
        [
            own | {"arm": arm, "share": share, "valid": valid}
            for (arm, share), valid in found.items()
        ]
    )
    assert lines[-1] == "- Seed 0: compute to 80.0% valid samples: 0.50 free, 0.70 counted."
    assert (
        inflation.compute_needed(0.6, {0.2: 0.6, 0.4: 0.7}, 0.1)
        == "at most 0.20 free, 0.30 counted"
    )
    assert inflation.compute_needed(0.8, {0.2: 0.6, 0.4: 0.7}, 0.1) == "more than 0.40"


def test_a_stopped_study_resumes_and_ends_the_same(trained, tmp_path, capsys):
    out, _ = trained
    flags = ["--miniature", "--out", tmp_path, "--only", TWO_ARMS[0]]
    with counted_steps(train, stop_after=2):
        run_main(study, *flags, status=1)
    assert "the training was stopped; run the same command to continue" in capsys.readouterr().err
    run_main(study, *flags)
    one, other = (lines_of(folder / "study.csv") for folder in (tmp_path, out))
    assert [row | {"seconds": ""} for row in one] == [
        row | {"seconds": ""} for row in other[: len(one)]
    ]


def test_a_study_starts_no_run_that_exceeds_its_minutes(tmp_path, capsys):
    run_main(study, "--out", tmp_path, "--minutes", 0.01)
    assert "run again to continue" in capsys.readouterr().out
    assert not list(tmp_path.glob("study/*/train.log"))


# Equal compute ------------------------------------------------------------------------------------


def a_study(out, only=None):
    args = {"out": out, "only": only, "miniature": False, "compile": False}
    return study.Study(Namespace(**args))


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
            flops += sum(
                phase.batch_size * config.training_flops(num_frames) for num_frames in frames
            )
            first_step = phase.last_step
            assert phase.batch_size * math.prod(config.grid(phase.num_frames)) == arms.TOKENS
        assert flops == pytest.approx(share * full, rel=0.02), arm.name


def test_each_share_of_compute_is_a_run_and_the_costliest_come_last(tmp_path):
    runs = a_study(tmp_path, only=["16 fixed", "16 table", "4-8-16 moving"]).runs
    assert {run.key[1:] for run in runs if run.arm.name == "4-8-16 moving"} == {
        (seed, share) for share in (0.4, 0.6, 1.0) for seed in range(3)
    }
    assert len({run.folder for run in runs}) == len(runs) == 5 + 8 + 9
    assert [run.key for run in runs[-5:]] == [
        ("16 fixed", 4, 1),
        ("16 table", 4, 1),
        *(("16 table", seed, 1.6) for seed in range(3)),
    ]


# Reports ------------------------------------------------------------------------------------------


TABLES = {
    script.__name__: script.markdown
    for script in (*MINIATURES, objectives, no_clock, disturb, people, sprites)
}
TABLES["coverage"] = coverage.markdown
TABLES |= {f"positions_{name}": partial(positions.markdown, name) for name in positions.DATA_SETS}
TABLES |= {
    "objectives_tuning": objectives.tuning_markdown,
    "given_frames_objectives": given_frames.markdown,
}
TABLES |= {
    "old/inflation_kernels": inflation.kernels_markdown,
    "inflation_pay": inflation.pay_markdown,
}
TABLES["old/seeds"] = seeds.markdown
TABLES["old/given_frames"] = TABLES.pop("given_frames")
TABLES["objectives_few"] = partial(
    objectives.few_markdown, lab.read_rows(ROOT / "results/objectives.json")
)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_committed_tables_match_the_committed_numbers(name):
    path = ROOT / f"results/{name}.json"
    made = "\n".join(TABLES[name](json.loads(path.read_text()))).rstrip()
    assert f"{made}\n" == path.with_suffix(".md").read_text()


def test_intervals_cover_as_often_in_a_small_simulation(tmp_path):
    run_main(coverage, "--repeats", 100, "--out", tmp_path)
    path = tmp_path / "coverage.json"
    made = json.loads(path.read_text())
    committed = json.loads((ROOT / "results/coverage.json").read_text())
    assert (made["repeats_of_means"], made["repeats"]) == (100, 10)
    for kind in ("means", "shares", "independent_shares", "ratios"):
        assert [row.keys() for row in made[kind]] == [row.keys() for row in committed[kind]]
    for row, other in zip(made["means"], committed["means"], strict=True):
        assert row["t"] == pytest.approx(other["t"], abs=0.08)
        assert other["t"] >= 0.93 or other["values"] == "skewed"  # the goal
    assert "| 3 | 9" in path.with_suffix(".md").read_text()


def test_a_table_of_experiments_keeps_the_columns_of_other_runs(tmp_path, monkeypatch):
    runs = {"eqm": {"psnr": 30}, "flow": {"objective": "flow", "psnr": 20}, "again": {"psnr": 31}}
    runs = {name: {"hours": 1, "seed": 0} | run for name, run in runs.items()}
    table = lab.ExperimentTable(
        about="",
        name="census",
        title="",
        script="census.sh",
        read_run=runs.__getitem__,
        rows_of=lambda run: {"PSNR": str(run["psnr"])},
        brackets="",
    )
    for names in (["flow", "eqm"], ["again"]):
        monkeypatch.setattr("sys.argv", ["census.py", *names, "--out", str(tmp_path)])
        table.main()
    lines = (tmp_path / "census.md").read_text().splitlines()
    assert lines[-3::2] == ["| | HOURS=1, seed 0 | HOURS=1, seed 0, flow |", "| PSNR | 31 | 20 |"]


def test_several_processes_may_write_the_same_table_at_once(tmp_path):
    def write(number):
        lab.write_results(tmp_path, "table", [f"| {number} |"] * 1000, [number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    (line,) = set((tmp_path / "table.md").read_text().split("\n")) - {""}
    (number,) = json.loads((tmp_path / "table.json").read_text())
    assert line == f"| {number} |"


def test_the_committed_report_matches_the_committed_rows(tmp_path):
    (tmp_path / "study.csv").write_bytes((ROOT / "results/study.csv").read_bytes())
    run_main(study, "--report", "--out", tmp_path)
    assert (tmp_path / "study.md").read_text() == (ROOT / "results/study.md").read_text()
    assert {path.name for path in tmp_path.glob("figures/*")} == {
        f"study-{letter}.png" for letter in "BC"
    }
    study.write_rows(tmp_path / "again.csv", study.read_rows(tmp_path / "study.csv"))
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "study.csv").read_bytes()


# The first one, differences 0.5, 0.5, 0.6: mean 0.5333, standard error 0.0333, times 4.30; t = 16
# with two degrees of freedom
@pytest.mark.parametrize(
    ("values", "others", "text"),
    [
        (
            [1.0, 2.0, 3.1],
            [0.5, 1.5, 2.5, 9.0],
            (
                "- Loss: a minus b is +0.533 (95% +0.390 to +0.677, 3 seeds; p 0.004, by Holm "
                "0.004): higher."
            ),
        ),
        ([1.0, -1.0], [0.0, 0.0], "no significant difference"),
        ([1.0], [0.0], "one seed"),
        ([], [0.0], "- Loss, a minus b: not run yet."),
    ],
)
def test_differences_are_paired_by_seed_and_say_if_they_may_be_zero(values, others, text):
    arms = {"a": dict(enumerate(values)), "b": dict(enumerate(others))}
    (line,) = lab.difference_lines([lab.difference(arms, ("a", "b"), "Loss")])
    assert text in line


def test_p_values_are_those_of_students_t():
    # With two degrees of freedom, P(|T| > t) is 1 - t / sqrt(t^2 + 2)
    assert lab.student_p([0.5, 0.5, 0.6]) == pytest.approx(1 - 16 / math.sqrt(16**2 + 2), rel=1e-6)
    assert lab.student_p([-1.0, -1.0]) == 0 and lab.student_p([0.0, 0.0]) == 1


def test_holm_multiplies_the_smallest_p_by_their_number_the_next_by_one_less_and_so_on():
    # By hand: 4 x 0.005, 3 x 0.011, then 2 x 0.02 and 1 x 0.04
    assert lab.holm([0.04, 0.005, 0.02, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert lab.holm([0.03, 0.02, 0.9]) == pytest.approx(
        [0.06, 0.06, 0.9]
    )  # never below that of a smaller p
    assert lab.holm([0.6, 0.7]) == [1, 1] and lab.holm([]) == []


def test_holm_rejects_what_its_definition_rejects():
    """Reject in the order of p as long as p <= level / (how many are left), and then none."""
    p_values = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)).pow(4).tolist()
    for own in p_values:
        rejected = set()
        for rank, index in enumerate(sorted(range(6), key=lambda index: own[index])):
            if own[index] > 0.05 / (6 - rank):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(lab.holm(own)) if p <= 0.05} == rejected


def test_a_difference_that_is_significant_alone_may_not_be_in_a_table_of_many():
    # t is 4 sqrt(3), so p = 1 - sqrt(48 / 50) = 0.0202, and five times that in a table of five
    values = {"a": {0: 1.3, 1: 1.4, 2: 1.5}, "b": {0: 1.0, 1: 1.0, 2: 1.0}}
    gap = lab.difference(values, ("a", "b"), "Loss")
    other = lab.difference(values | {"a": {0: 1.0, 1: 1.1, 2: 0.9}}, ("a", "b"), "Loss")
    alone = lab.difference_lines([gap])
    (among, *_) = lab.difference_lines([gap] + [other] * 4)
    assert alone[0].endswith("p 0.020, by Holm 0.020): higher.")
    assert among.endswith("p 0.020, by Holm 0.101): no significant difference.")


def test_ratios_of_seeds_have_a_geometric_mean_and_an_interval_of_their_logarithms():
    (line,) = lab.difference_lines([report.ratio("Compute, a / b", [0.5, 1.0, 2.0])])
    # ln 2 x 4.3027 / sqrt(3) = 1.7219, and exp(1.7219) = 5.59
    words = (
        "- Compute, a / b: the geometric mean is 1.00 (each seed: 0.50; 1.00; 2.00; 95% 0.18 to "
        "5.59; p 1.000, "
    )
    assert line == f"{words}by Holm 1.000): no significant difference."
    assert report.ratio("Compute, a / b", [0.5]).p is None


def test_compute_to_reach_a_goal_is_interpolated_or_unknown():
    values = [0.0, 0.5, 1.0, 0.8], [0.0, 0.9, 0.95, 1.0], [0.95, 0.5, 1, 1], [0, 0.1, 0.5, 0.89]
    found = [report.compute_to(0.9, [0.4, 0.6, 1.0, 1.6], own) for own in values]
    assert found == pytest.approx([0.92, 0.6, math.nan, math.nan], nan_ok=True)
    assert list(map(report.share_text, found[1:3])) == ["60%", "an unmeasured share"]


@pytest.fixture
def some_rows(tmp_path):
    """A folder with a csv of some committed rows: the arms with fixed and moving positions."""
    rows = [
        row
        for row in study.read_rows(ROOT / "results/study.csv")
        if row["arm"] in ("16 fixed", "16 moving")
    ]
    study.write_rows(tmp_path / "study.csv", rows)
    return tmp_path


def test_a_report_shows_missing_and_diverged_runs(some_rows):
    rows = study.read_rows(some_rows / "study.csv")
    lost_run = ("16 moving", 4, 1)
    last = {"step": 7, "loss": math.inf, "loss_16": math.inf}
    lost = next(row for row in rows if study.key_of(row) == lost_run) | last
    study.write_rows(
        some_rows / "study.csv", [*(row for row in rows if study.key_of(row) != lost_run), lost]
    )
    run_main(study, "--report", "--out", some_rows)
    text = (some_rows / "study.md").read_text()
    (run,) = [run for run in a_study(some_rows).runs if run.key == lost_run]
    assert (
        run.is_done
        and "| 16 moving | 100 | 0.331 ± 0.003 (0.333, 0.321, 0.336, 0.333, inf) |" in text
    )
    words = (
        r"Loss: 16 moving minus 16 fixed is -0.0\d\d \(95% -0.\d+ to -0.\d+, 4 seeds; "
        r"p .*, by Holm .*\): lower"
    )
    assert re.search(words, text)
    assert "Direction accuracy (0 to 1), 16 rotary minus 16 fixed: not run yet." in text
    assert "| 4-8-16 | 100 | - | - | - |" in text and "4-8-16 moving: not run yet." in text
    assert not list(some_rows.glob("figures/*"))


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
    path = some_rows / "study.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    for flags in (["--report"], ["--list"], []):
        assert words in refused(capsys, study, *flags, "--out", some_rows)
    assert list(some_rows.iterdir()) == [path]


def test_a_failing_script_is_a_one_line_error(tmp_path):
    with pytest.raises(
        lab.UserError, match=r"sample.sh ended with status 2 \(.*error: .*word.*\); see .*log"
    ):
        SCRIPT(lab.Run(tmp_path), "scripts/sample.sh", "word")

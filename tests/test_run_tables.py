"""Files of runs of scripts/weizmann.sh and scripts/sprites.sh become numbers; test_studies.py makes
tables of these.
"""

import json
from pathlib import Path

import pytest

import people
import sprites
from runtime.untrusted import read_json
from training import ROOT, run_main


def write_lines(path, *rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


MADE = "code", "command", "date", "machine", "note", "notes"  # of a committed row


def run_of(script, **changes):
    """The numbers of a committed run, with changes, without how it was made."""
    name = script.__name__
    run, *_ = read_json(ROOT / f"results/studies/{name}/{name}.json")
    return numbers_of(run) | {"minutes_of_model": 75.0} | changes


def numbers_of(run):
    return {name: value for name, value in run.items() if name not in MADE}


def tabulate(script, *names):
    """(numbers of the runs, {title: cells} of the table) that a script writes of the files of these
    runs.
    """
    run_main(script, *names, "--out", "out")
    place = Path("out", script.__name__)
    table = {}
    for line in place.with_suffix(".md").read_text().splitlines():
        if "|" in line:
            title, *cells = line.strip("|").split("|")
            table[title.strip()] = cells
    return read_json(place.with_suffix(".json")), table


def scores_of(run, tasks):
    """{task: what evaluate.py has found} of a run with these numbers."""
    scores = {task: run[task] | {"psnr_by_frame": [1]} for task in tasks if task in run}
    scores["classifier"] = {
        kind: run[f"classifier_{kind}"] | {"by_class": 1} for kind in ("real", "samples")
    }
    return scores


def write_scores(name, results, **others):
    for task, result in results.items():
        score = {"result": result, "code": "of the score"}
        write_lines(f"samples/{name}-{task}.json", score | others)


def write_people(name, run):
    """Write the files of a run of weizmann.sh with these numbers."""
    last = {"step": run["steps"], "num_frames": 16, "seconds": 60 * run["minutes_of_model"]}
    best = last | {"step": run["best_step"], "val_loss": run["val_loss"]}
    others = [
        best | {"num_frames": 8, "val_loss": 0.1},
        best | {"step": 3, "val_loss": 9},
    ]  # shorter clips, or worse
    vae = {"step": run["vae_steps"], "val_psnr": run["vae_psnr"]}
    write_lines(f"results/{name}/000-VAE-64px-f4/metrics.jsonl", vae)
    write_lines(f"results/{name}/001-EqM-S-2-f4-rope/metrics.jsonl", *others, best, last)
    settings = (
        f"HOURS={run['hours']} DATA=datasets/weizmann HOLD_OUT=7\\ 8 VAE_STEPS={run['vae_steps']}\n"
    )
    Path("results", name, "settings").write_text(settings)
    nearest = dict(run["nearest"])
    results = scores_of(run, people.PREDICTIONS)
    results["classifier"]["interval_units"] = run["interval_units"]
    kept = "rmse_ratio_interval95", "interval_units"
    results["nearest"] = {name: nearest.pop(name) for name in kept}
    write_scores(name, results, values=nearest)


def test_each_run_is_a_column_in_the_order_of_the_hours(capsys):
    long = run_of(people, hours=3.0, vae_psnr=31.414)
    short = run_of(people, hours=0.5, vae_psnr=29.0)
    write_people("long", long)
    write_people("short", short)
    runs, table = tabulate(people, "long", "short")
    assert list(map(numbers_of, runs)) == [short, long]
    command = (
        "EXP=short HOURS=0.5 DATA=datasets/weizmann HOLD_OUT=7\\ 8 VAE_STEPS=5400 bash "
        "scripts/weizmann.sh"
    )
    assert (runs[0]["command"], runs[0]["code"]) == (command, "of the score")
    assert runs[0]["date"] and runs[0]["machine"]
    assert table[""] == [" HOURS=0.5 ", " HOURS=3 "]
    assert table["VAE, PSNR of held-out people (dB)"] == [" 29.00 ", " 31.41 "]
    said = capsys.readouterr().out
    # of 8 people
    assert "| classifier: real clips, one person held out | 31 of 32, 96.9% |" in said
    assert "| 95 of 96, 99.0% (94.3 - 99.8) |" in said


def write_sprites(name, run, vae=None):
    """Write the files of a run of sprites.sh with these numbers, whose VAE may be that of another
    run.
    """
    place, used = (Path(vae).parent, f" VAE={vae}") if vae else (f"results/{name}/000-VAE-64px", "")
    rows = [{"step": 1, "val_psnr": 20.0}, {"step": run["vae_steps"], "val_psnr": run["vae_psnr"]}]
    write_lines(f"{place}/metrics.jsonl", *rows)
    last = {"step": run["steps"], "seconds": 60 * run["minutes_of_model"]}
    write_lines(f"results/{name}/001-EqM-S-4-f4-8-rope/metrics.jsonl", last)
    objective = run.get("objective", "eqm")
    settings = (
        f"HOURS={run['hours']} DATA=datasets/sprites SEED={run['seed']} OBJECTIVE={objective}{used}"
    )
    settings += f" VAE_STEPS={run['vae_steps']} SAMPLES=2592 PREDICTIONS=2664\n"
    Path("results", name, "settings").write_text(settings)
    results = scores_of(run, sprites.TASKS)
    results["census"] |= {"samples": [1], "validation": [1]}
    write_scores(name, results)


def test_each_run_is_a_column_by_hours_and_seed_and_may_share_its_vae():
    asked = {"vae_steps": 7, "steps": 8}
    short, first = (run_of(sprites, hours=hours, seed=0, **asked) for hours in (0.5, 2.0))
    second = first | {"seed": 1, "steps": 9, "objective": "flow"}
    write_sprites("first", first)
    write_sprites("second", second, vae="results/first/000-VAE-64px/vae")
    write_sprites("short", short | {"steps": 1})
    tabulate(sprites, "short", "second")
    write_sprites("short", short)
    runs, table = tabulate(sprites, "short", "first")  # the second stays, the short is replaced
    assert list(map(numbers_of, runs)) == [short, first, second]
    assert table[""] == [" HOURS=0.5, seed 0 ", " HOURS=2, seed 0 ", " HOURS=2, seed 1, flow "]
    assert table["steps of the VAE; of the model"] == [" 7; 8 ", " 7; 8 ", " 7; 9 "]
    assert table["samples; predictions"] == [" 1296; 1332 "] * 3
    command = (
        "EXP=short HOURS=0.5 DATA=datasets/sprites SEED=0 OBJECTIVE=eqm VAE_STEPS=7 SAMPLES=2592 "
    )
    command += "PREDICTIONS=2664 bash scripts/sprites.sh"
    line = f"- HOURS=0.5, seed 0: `{command}`; commit of the sco, {runs[0]['date']}, "
    assert line in Path("out/sprites.md").read_text()

"""Collect all scores of runs of scripts/weizmann.sh in one table.

    EXP=weizmann-1h HOURS=1 bash scripts/weizmann.sh
    EXP=weizmann-3h HOURS=3 bash scripts/weizmann.sh
    python scripts/studies/people.py weizmann-1h weizmann-3h --out results

It reads results/EXP and samples/EXP-*.json, and adds columns to people.md and people.json in --out.
"""

import json
import re
from pathlib import Path

import lab
from lab import cell

# value of a prediction: its words in the table
VALUES = {"psnr": "PSNR", "psnr_moving": "moving pixels"}
# suffix of a task: its words (see --keep-background)
KEPT = {"-decoded": "", "-background": ", background kept"}
PREDICTIONS = [task + end for task in ("8of16", "4of16") for end in KEPT]


def read_run(name):
    """The scores of an experiment as a plain dict. Raises FileNotFoundError."""
    hours = float(lab.read_settings(name)["HOURS"])
    vae, model = (lab.newest_metrics(name, kind) for kind in ("VAE", "EqM"))
    tasks = (*PREDICTIONS, "nearest", "classifier")
    scores = {
        task: json.loads(Path("samples", f"{name}-{task}.json").read_text()) for task in tasks
    }
    last_phase = [
        row for row in model if "val_loss" in row and row["num_frames"] == model[-1]["num_frames"]
    ]
    best = min(last_phase, key=lambda row: row["val_loss"])  # best.pt
    run = lab.experiment_made(name, "weizmann.sh", scores["8of16-decoded"]) | {
        "hours": hours,
        "vae_steps": vae[-1]["step"],
        "steps": model[-1]["step"],
        "vae_psnr": vae[-1]["val_psnr"],
        "minutes_of_model": model[-1]["seconds"] / 60,
        "best_step": best["step"],
        "val_loss": best["val_loss"],
    }
    for task in PREDICTIONS:
        kept = re.compile(r"samples_per_clip|clips|interval_units|(psnr|ssim)(?!.*by_frame)")
        run[task] = {key: value for key, value in scores[task]["result"].items() if kept.match(key)}
    for kind in ("real", "samples"):
        kept = "clips", "right", "share", "interval95", "static"
        found = scores["classifier"]["result"][kind]
        run[f"classifier_{kind}"] = {key: found[key] for key in kept if key in found}
    run["interval_units"] = scores["classifier"]["result"].get("interval_units")
    kept = "rmse_ratio_interval95", "interval_units"
    ratio = {name: scores["nearest"]["result"].get(name) for name in kept}
    return run | {"nearest": scores["nearest"]["values"] | ratio}


def share(part):
    text = f"{part['right']} of {part['clips']}, {part['share']:.1%}"
    if part["interval95"] is None:
        return text
    low, high = part["interval95"]
    return f"{text} ({100 * low:.1f} - {100 * high:.1f})"


def rows_of(run):
    """{row of the table: text} for a run."""
    rows = {
        "steps of the VAE; of the model": f"{run['vae_steps']}; {run['steps']}",
        "VAE, PSNR of held-out people (dB)": f"{run['vae_psnr']:.2f}",
        "step of the checkpoint that is scored, best.pt": f"{run['best_step']}",
    }
    for value, words in VALUES.items():
        for end, kept in KEPT.items():
            eight = run["8of16" + end]
            above = f"8 of 16 given, {words} above repeating (dB){kept}"
            rows[f"{above}: a sample"] = cell(eight, f"{value}_gain", 2)
            rows[f"{above}: the average of {eight['samples_per_clip']}"] = cell(
                eight, f"{value}_average_gain", 2
            )
        rows[f"8 of 16 given, {words} of repeating (dB)"] = cell(eight, f"{value}_repeated", 2)
    for value, words in VALUES.items():
        for end, kept in KEPT.items():
            four = run["4of16" + end]
            for kind, title in {
                "": "mean of",
                "_best": "best of",
                "_average": "average of",
            }.items():
                what = f"4 of 16 given, {words} (dB){kept}: {title} {four['samples_per_clip']}"
                rows[what] = f"{four[value + kind]:.2f}"
        rows[f"4 of 16 given, {words} of repeating (dB)"] = f"{four[f'{value}_repeated']:.2f}"
    nearest = run["nearest"]
    samples = run["classifier_samples"]
    return rows | {
        "classifier: real clips, one person held out": share(run["classifier_real"]),
        "classifier: samples that show the class that was asked for": share(samples),
        "samples that move less than any real clip": (
            f"{len(samples['static'])} of {samples['clips']}"
        ),
        "nearest training clip, RMSE: samples / held-out": cell(nearest, "rmse_ratio", 2),
        "samples nearer than 19 of 20 held-out clips": f"{nearest['nearer_than_95_percent']:.1%}",
    }


BRACKETS = (
    "Brackets hold 95% intervals. Each sample is a unit, and so are all clips of a person. The "
)
BRACKETS += (
    "classifier's real clips and the ratio have no interval, as they show fewer than 10 people."
)
TABLE = lab.ExperimentTable(
    __doc__, "people", "Real people", "weizmann.sh", read_run, rows_of, BRACKETS
)
parse_args = TABLE.parse_args
markdown = TABLE.markdown
main = TABLE.main

if __name__ == "__main__":
    main()

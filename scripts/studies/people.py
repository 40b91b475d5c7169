"""Collect all scores of runs of scripts/weizmann.sh in one table.

    EXP=weizmann-1h HOURS=1 bash scripts/weizmann.sh
    EXP=weizmann-3h HOURS=3 bash scripts/weizmann.sh
    python scripts/studies/people.py weizmann-1h weizmann-3h

It reads results/EXP and samples/EXP-*.json, and adds columns to people.md and people.json in
results/studies/people.
"""

import re
from operator import itemgetter

from experiments import ExperimentTable, begin_run, newest_metrics
from scoring.stats import cell

# value of a prediction: its words in the table
VALUES = {"psnr": "PSNR", "psnr_moving": "moving pixels"}
# suffix of a task: its words (see --keep-background)
KEPT = {"-decoded": "", "-background": ", background kept"}
PREDICTIONS = [task + end for task in ("8of16", "4of16") for end in KEPT]


def read_run(name):
    """The scores of an experiment as a plain dict. Raises FileNotFoundError."""
    run, scores = begin_run(name, "weizmann.sh", [*PREDICTIONS, "nearest", "classifier"])
    rows = newest_metrics(name, "EqM")
    last_phase = [row for row in rows if row["num_frames"] == rows[-1]["num_frames"]]
    validated = [row for row in last_phase if "val_loss" in row]
    best = min(validated, key=itemgetter("val_loss"))  # best.pt
    run |= {"best_step": best["step"], "val_loss": best["val_loss"]}
    kept = re.compile(r"samples_per_clip|clips|interval_units|(psnr|ssim)(?!.*by_frame)")
    for task in PREDICTIONS:
        result = scores[task]["result"]
        run[task] = {key: result[key] for key in result if kept.match(key)}
    run["interval_units"] = scores["classifier"]["result"].get("interval_units")
    nearest = scores["nearest"]
    run["nearest"] = nearest["values"]
    for key in ("rmse_ratio_interval95", "interval_units"):
        run["nearest"][key] = nearest["result"].get(key)
    return run


def share(part):
    text = f"{part['right']} of {part['clips']}, {part['share']:.1%}"
    if part["interval95"] is None:
        return text
    low, high = (f"{100 * end:.1f}" for end in part["interval95"])
    return f"{text} ({low} - {high})"


def number(result, name):
    return f"{result[name]:.2f}"


def rows_of(run):
    """{row of the table: text} for a run."""
    rows = {
        "steps of the VAE; of the model": f"{run['vae_steps']}; {run['steps']}",
        "VAE, PSNR of held-out people (dB)": f"{run['vae_psnr']:.2f}",
        "step of the checkpoint that is scored, best.pt": f"{run['best_step']}",
    }
    for value, words in VALUES.items():
        for end, kept in KEPT.items():
            eight = run[f"8of16{end}"]
            above = f"8 of 16 given, {words} above repeating (dB){kept}"
            average = f"{above}: the average of {eight['samples_per_clip']}"
            rows[f"{above}: a sample"] = cell(eight, f"{value}_gain", 2)
            rows[average] = cell(eight, f"{value}_average_gain", 2)
        rows[f"8 of 16 given, {words} of repeating (dB)"] = cell(eight, f"{value}_repeated", 2)
    for value, words in VALUES.items():
        for end, kept in KEPT.items():
            four = run[f"4of16{end}"]
            what = f"4 of 16 given, {words} (dB){kept}"
            count = four["samples_per_clip"]
            rows[f"{what}: mean of {count}"] = number(four, value)
            rows[f"{what}: best of {count}"] = number(four, f"{value}_best")
            rows[f"{what}: average of {count}"] = number(four, f"{value}_average")
        rows[f"4 of 16 given, {words} of repeating (dB)"] = number(four, f"{value}_repeated")
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


TABLE = ExperimentTable(
    about=__doc__,
    name="people",
    title="Real people",
    script="weizmann.sh",
    read_run=read_run,
    rows_of=rows_of,
    brackets="Brackets hold 95% intervals. Each sample is a unit, and so are all clips of a "
    "person. The classifier's real clips and the ratio have no interval, as they show fewer than "
    "10 people.",
)
parse_args = TABLE.parse_args
markdown = TABLE.markdown
main = TABLE.main

if __name__ == "__main__":
    main()

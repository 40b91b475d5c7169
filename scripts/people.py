"""What runs of scripts/weizmann.sh are worth: all their scores in one table.

    EXP=weizmann-1h HOURS=1 bash scripts/weizmann.sh && EXP=weizmann-3h HOURS=3 bash scripts/weizmann.sh
    python scripts/people.py weizmann-1h weizmann-3h --out results

Reads results/EXP and samples/EXP-*.json; writes people.md and people.json into --out.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from runtime.atomic import atomic_write
from runtime.cli import ArgumentParser, UserError, check_writable, fail, one_line_errors, say
from scoring.prediction import with_interval

GIVEN = {"psnr": "PSNR", "psnr_moving": "moving pixels"}  # of predictions: name of a value, in words
KEPT = {"-decoded": "", "-background": ", background kept"}  # end of a task's name, in words: see --keep-background
PREDICTIONS = tuple(task + end for task in ("8of16", "4of16") for end in KEPT)
TASKS = (*PREDICTIONS, "nearest", "judge")


def parse_args():
    parser = ArgumentParser(description="The scores of runs of scripts/weizmann.sh: a table.")
    parser.add_argument("runs", nargs="+", metavar="EXP", help="experiments that weizmann.sh has finished")
    parser.add_argument("--out", default="results", metavar="DIR", help="folder for people.md and people.json")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# From the files of a run to its scores


def read_run(name):
    """The scores of an experiment, a plain dict. Raises UserError."""
    settings, wanted = Path("results", name, "settings"), f"{name}: not a finished run of scripts/weizmann.sh"
    try:
        hours = float(re.match(r"HOURS=(\S+)", settings.read_text())[1])
        vae, model = (read_metrics(name, kind) for kind in ("VAE", "EqM"))
        made = {task: json.loads(Path("samples", f"{name}-{task}.json").read_text()) for task in TASKS}
    except FileNotFoundError as error:
        raise UserError(f"{wanted}: {error.filename} is missing; run it again with EXP={name}") from error
    last_phase = [row for row in model if "val_loss" in row and row["num_frames"] == model[-1]["num_frames"]]
    best = min(last_phase, key=lambda row: row["val_loss"])  # best.pt
    result = {
        "hours": hours,
        "vae_steps": vae[-1]["step"],
        "steps": model[-1]["step"],
        "minutes_of_model": model[-1]["seconds"] / 60,
        "vae_psnr": vae[-1]["val_psnr"],
        "best_step": best["step"],
        "val_loss": best["val_loss"],
    }
    for task in PREDICTIONS:
        found = made[task]["result"]
        kept = ("samples_per_clip", "clips", *(name for name in found if re.match("psnr|ssim", name)))
        result[task] = {name: found[name] for name in kept if not name.endswith("by_frame")}
    judge, nearest = made["judge"]["result"], made["nearest"]
    shares = ("clips", "right", "share", "interval95")
    result["judge_real"] = {name: judge["real"][name] for name in shares}
    (asked,) = judge["samples"].values()
    result["judge_samples"] = {name: asked[name] for name in shares} | {"still": asked.get("still")}
    ratio = {"rmse_ratio_interval95": nearest["result"]["rmse_ratio_interval95"]}
    return result | {"nearest": nearest["values"] | ratio}


def read_metrics(name, kind):
    """The rows of the newest VAE or model of an experiment. Raises FileNotFoundError."""
    folders = sorted(Path("results", name).glob(f"[0-9][0-9][0-9]-{kind}-*"))
    path = Path(folders[-1] if folders else Path("results", name, f"*-{kind}-*"), "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Table


def share(part):
    low, high = part["interval95"]
    return f"{part['right']} of {part['clips']}, {part['share']:.1%} ({100 * low:.1f} - {100 * high:.1f})"


def rows_of(run):
    """{what: text} of a run, the rows of its column."""
    nearest, asked = run["nearest"], run["judge_samples"]
    still = asked["still"]  # None: judged before they were counted
    rows = {
        "steps of the VAE; of the model": f"{run['vae_steps']}; {run['steps']}",
        "VAE, PSNR of held-out people (dB)": f"{run['vae_psnr']:.2f}",
        "step of the checkpoint that is scored, best.pt": f"{run['best_step']}",
    }
    for value, words in GIVEN.items():
        for end, kept in KEPT.items():
            eight, above = run["8of16" + end], f"8 of 16 given, {words} above repeating (dB){kept}"
            rows[f"{above}: a sample"] = with_interval(eight, f"{value}_gain", 2)
            rows[f"{above}: the average of {eight['samples_per_clip']}"] = with_interval(
                eight, f"{value}_average_gain", 2
            )
        rows[f"8 of 16 given, {words} of repeating (dB)"] = with_interval(eight, f"{value}_repeated", 2)
    kinds = {"": "mean of", "_best": "best of", "_average": "average of"}
    for value, words in GIVEN.items():
        for end, kept in KEPT.items():
            four = run["4of16" + end]
            for kind, title in kinds.items():
                what = f"4 of 16 given, {words} (dB){kept}: {title} {four['samples_per_clip']}"
                rows[what] = with_interval(four, value + kind, 2).split()[0]
        rows[f"4 of 16 given, {words} of repeating (dB)"] = with_interval(four, f"{value}_repeated", 2).split()[0]
    return rows | {
        "judge: real clips, one person left out": share(run["judge_real"]),
        "judge: samples that show what was asked for": share(asked),
        "samples that move less than any real clip": "-" if still is None else f"{len(still)} of {asked['clips']}",
        "nearest training clip, RMSE: samples / held-out": with_interval(nearest, "rmse_ratio", 2),
        "samples nearer than 19 of 20 held-out clips": f"{nearest['nearer_than_95_percent']:.1%}",
    }


def markdown(runs):
    columns = [rows_of(run) for run in runs]
    titles = [f"HOURS={run['hours']:g}" for run in runs]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (1 + len(runs)) + "|"]
    for what in dict.fromkeys(what for column in columns for what in column):
        lines.append(f"| {what} | {' | '.join(column.get(what, '-') for column in columns)} |")
    about = "Made by `scripts/people.py` from runs of `scripts/weizmann.sh`. 95% intervals by clip."
    return "\n".join(["# Real people", "", about, "", *lines]) + "\n"


@one_line_errors()
def main():
    args = parse_args()
    try:
        check_writable("--out", args.out)
        runs = sorted(map(read_run, args.runs), key=lambda run: run["hours"])
    except UserError as error:
        fail(error)
    out, text = Path(args.out), markdown(runs)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("people.md", text), ("people.json", json.dumps(runs, indent=1) + "\n")):
        with atomic_write(out / name) as file:
            file.write(content.encode())
    for line in text.splitlines()[4:]:
        say(line)


if __name__ == "__main__":
    main()

"""Collect all scores of runs of scripts/sprites.sh in one table.

    EXP=sprites-half HOURS=0.5 bash scripts/sprites.sh
    EXP=sprites-0 bash scripts/sprites.sh
    EXP=sprites-1 SEED=1 bash scripts/sprites.sh
    python scripts/studies/sprites.py sprites-half sprites-0 sprites-1

It reads results/EXP and samples/EXP-*.json, and adds columns to sprites.md and sprites.json in
results/studies/sprites.
"""

from experiments import ExperimentTable, begin_run, read_settings
from scoring.stats import cell
from sprites_census import ATTRIBUTES, PERCENTS

TASKS = "census", "classifier", "predicted", "predicted-census"
LONG = "samples", "validation"  # of --metric census: an entry per clip
SHARES = {  # of --metric census: words in the table
    "valid": "valid samples (%)",
    "class_right": "samples that show the requested class (%)",
    "body": "samples with one body in all frames (%)",
    "bottomwear": "with one bottomwear (%)",
    "topwear": "with one topwear (%)",
    "hair": "with one hair (%)",
    "held_out": "valid samples of characters that never trained (%)",
    "train_valid": "training clips that set the limits and pass (%)",
    "real_valid": "real test clips that are valid (%)",
    "attribute_switched": "accepted with an attribute switched in a frame (%)",
    "frames_swapped": "accepted with frames swapped (%)",
    "frame_shifted": "accepted with a frame shifted (%)",
}
SHARES |= {
    f"{name}_blended_{percent}": f"accepted with {percent}% of another {name} in all frames (%)"
    for name in ATTRIBUTES
    for percent in PERCENTS
}


def read_run(name):
    """The scores of an experiment as a plain dict. Raises FileNotFoundError."""
    run, scores = begin_run(name, "sprites.sh", TASKS)
    settings = read_settings(name)
    run["seed"] = int(settings["SEED"])
    objective = settings.get("OBJECTIVE", "eqm")
    if objective != "eqm":
        run["objective"] = objective
    for task in ("census", "predicted-census", "predicted"):
        result = scores[task]["result"]
        kept = [key for key in result if key not in LONG and "by_frame" not in key]
        run[task] = {key: result[key] for key in kept}
    return run


def percent(result, name):
    """A share and its interval, if it has one, in percent, as text.

    "-" in results of older code without the share.
    """
    if name not in result:
        return "-"
    text = f"{100 * result[name]:.1f}"
    if result[f"{name}_interval95"] is None:
        return text
    low, high = (f"{100 * end:.1f}" for end in result[f"{name}_interval95"])
    return f"{text} ({low} to {high})"


def rows_of(run):
    """{row of the table: text} for a run."""
    real = run["classifier_real"]
    samples = run["classifier_samples"]
    census = run["census"]
    if "hair_blended" in census:  # older code blended only hair, half and half
        census = dict(census)
        for end in ("", "_interval95"):
            census[f"hair_blended_50{end}"] = census[f"hair_blended{end}"]
    failures = ", ".join(map(str, census["failures"].values()))
    given = run["predicted-census"]
    predicted = run["predicted"]
    rows = {
        "steps of the VAE; of the model": f"{run['vae_steps']}; {run['steps']}",
        "samples; predictions": f"{samples['clips']}; {predicted['clips']}",
        "minutes of the model's training": f"{run['minutes_of_model']:.0f}",
        "VAE, PSNR of held-out characters (dB)": f"{run['vae_psnr']:.2f}",
    }
    for title, about in {"real test clips": real, "samples": samples}.items():
        wrong = about["clips"] - about["right"]
        rows[f"classifier: wrong {title}"] = f"{wrong} of {about['clips']}"
        rows[f"classifier: IS of {title}"] = f"{about['IS']:.4f}"
        rows[f"classifier: H(y given x) of {title}"] = f"{about['H(y|x)']:.4f}"
        rows[f"classifier: H(y) of {title}"] = f"{about['H(y)']:.4f}"
    rows |= {f"census: {title}": percent(census, name) for name, title in SHARES.items()}
    return rows | {
        "census: held-out characters expected without bias (%)": (
            f"{100 * census['held_out_expected']:.1f}"
        ),
        "census: different characters among valid samples": f"{census['characters']}",
        "census: different characters expected": f"{census['characters_expected']:.0f}",
        "census: RMSE to the matched clip (gray levels)": cell(census, "rmse", 2),
        "census: the same of real test clips through the VAE": f"{census['rmse_real']:.2f}",
        "census: failed for attribute, pose, margin, RMSE": failures,
        "one frame given: all attributes kept (%)": percent(given, "true_attributes"),
        "one frame given: the true clip (%)": percent(given, "true_clip"),
        "one frame given: valid (%)": percent(given, "valid"),
        "one frame given: PSNR (dB)": cell(predicted, "psnr", 2),
        "one frame given: PSNR of repeating it (dB)": cell(predicted, "psnr_repeated", 2),
    }


TABLE = ExperimentTable(
    about=__doc__,
    name="sprites",
    title="Sprites",
    script="sprites.sh",
    read_run=read_run,
    rows_of=rows_of,
    brackets="Brackets hold 95% intervals. Each sample is a unit. All clips of a character are one "
    "unit of the predictions and of the real test clips.",
)
parse_args = TABLE.parse_args
markdown = TABLE.markdown
main = TABLE.main

if __name__ == "__main__":
    main()

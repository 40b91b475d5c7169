"""Start samplers from states whose noise level nobody tells: what does a field without a clock bring?

    python scripts/studies/no_clock.py         3 seeds; about 10 minutes of one core each, after objectives.py

"noisy clips": real clips x_gamma start the samplers. eqm descends as always. flow is told the true gamma (which is not
fair), an estimate of it, or takes the clip for clean data and noises it again to a gamma that it knows, as SDEdit does
(arXiv 2108.01073). "noisy half": the second half of the frames of clean clips is noised. eqm descends on all frames;
flow has its true level in each temporal patch (not fair), or noises all frames again. All use the same starts, the same
evaluations and guidance. The models are those of objectives.py, for "noisy half" those with --forcing 0.75 of
given_frames.py; missing ones are trained. The script writes results/no_clock.md and .json, a row per cell at once.
"""

import json
from pathlib import Path

import torch

import given_frames
import lab
import objectives
from arms import GUIDANCE
from checkpoint import load_model
from models import Condition
from objectives import SETTINGS, USUAL
from runtime.cli import Bar, one_line_errors
from runtime.rng import normal
from samplers import guided, sample
from scoring.shapes import Truth, track
from scoring.sources import find_real
from transport import interpolate
from vae import VAE

PIXELS = VAE("none")
FRAMES, AGAIN = 16, (0.2, 0.4, 0.6, 0.8)  # of a clip; gammas to which flow noises clips again
PARTS = {"noisy clips": (0.2, 0.4, 0.6, 0.8), "noisy half": (0.0, 0.3, 0.6)}  # and their gammas
UNFAIR = "flow, told"
COLUMNS = {"both": ("both right (%)", 100, 1), "rmse": ("RMSE to the clip before the noise (gray levels)", 1, 1)}


def estimate_gamma(x):
    """Estimate the gamma of clips x_gamma (B, C, T, H, W) from the median difference of neighboring pixels.

    Most neighbors have the same color, so their difference is that of two noises of standard deviation 1 - gamma.
    """
    differences = x.diff(dim=-1).abs().median()
    return max(0.0, 1 - differences.item() / (0.6745 * 2**0.5))


def run_method(method, model, x, mask, labels, time_scale, level, seed):
    """Sample from x (B, C, T, H, W) by a method of `methods`. mask: true for clean frames, or None."""
    setting, condition = SETTINGS[model.config.objective], Condition.of(labels, model.config)
    field = guided(model, condition, torch.full((len(x),), time_scale), GUIDANCE)
    if model.config.objective == "eqm":
        return sample(field, x, "ngd", USUAL + 1, setting.way / USUAL)[0]
    masked, start = {}, level
    if method == "flow, estimated":
        start = estimate_gamma(x)
    elif method == UNFAIR:
        masked = {} if mask is None else {"given": x, "mask": mask}
    else:
        start = float(method.rpartition(" ")[2])
        again = normal(seed, "noised again", 0, range(len(x)), x.shape[1:])
        x = interpolate(x, again, torch.full((len(x),), start))
    points = (USUAL + 3) // 2 if setting.way == "heun" else USUAL + 1
    return sample(field, x, setting.way, points, start_gamma=start, objective="flow", shift=setting.shift, **masked)[0]


def methods(part):
    """{method: objective}"""
    estimated = {"flow, estimated": "flow"} if part == "noisy clips" else {}
    return {"eqm": "eqm", UNFAIR: "flow"} | estimated | {f"flow, noised again to {gamma}": "flow" for gamma in AGAIN}


def models(args, part, seed):
    """{objective: (network, seconds per frame)} of a seed; trains what is missing."""
    found = {}
    for objective in ("eqm", "flow"):
        if part == "noisy clips":
            run = objectives.main_run(args, objective, seed)
        else:
            run = given_frames.make_run(args, 0.75, seed, objective)
        run.folder.mkdir(parents=True, exist_ok=True)
        with lab.file_lock(run.folder / "lock"):
            run.make_data()
            model, config, _ = load_model(run.train())
        found[objective] = model, config["data"]["time_scale"]
    return found


def real_clips(data, count, time_scale):
    """(clips uint8 (N, 3, T, H, W), labels (N,), what each shows) of a Moving Shapes data set."""
    clips, *_ = find_real(data, "all", 0.05, FRAMES, time_scale, 16, None, images=False)
    samples, truth = [clips[index] for index in range(count)], Truth(data)
    labels = torch.tensor([sample["y"] for sample in samples])
    expected = [truth(clips.classes[label], 16, time_scale) for label in labels.tolist()]
    return torch.stack([sample["clip"] for sample in samples]), labels, expected


@torch.no_grad()
def measure(method, model, time_scale, part, level, seed, clips, labels, expected):
    """{name: value} of COLUMNS for one method and level."""
    x = PIXELS.encode(clips)
    noise, gamma, mask = normal(seed, "no clock", 0, range(len(x)), x.shape[1:]), torch.full((len(x),), level), None
    if part == "noisy half":
        mask = (torch.arange(FRAMES) < FRAMES // 2).expand(len(x), -1)
        gamma = torch.where(mask, 1.0, gamma[:, None])
        mask = mask[:, None, :, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_method(method, model, interpolate(x, noise, gamma), mask, labels, time_scale, level, seed)
    videos = PIXELS.decode(found)
    tracks = [track(video) for video in videos.numpy()]
    pairs = zip(tracks, expected, strict=True)
    right = [own.direction == true.direction and own.shape == true.shape for own, true in pairs]
    error = (videos.permute(0, 4, 1, 2, 3).float() - clips).square().mean().sqrt()
    return {"both": sum(right) / len(right), "rmse": error.item()}


def markdown(rows):
    about = "`scripts/studies/no_clock.py` wrote these tables. Cells hold the mean over seeds, and the range."
    lines = ["# Without a clock", "", about, ""]
    for part, levels in PARTS.items():
        for name, (title, factor, digits) in COLUMNS.items():
            found = {method: values_of(rows, part, method, name, factor) for method in methods(part)}
            cells = [
                [method, *(lab.mean_cell([*own.get(level, {}).values()], digits) for level in (*levels, "mean"))]
                for method, own in found.items()
            ]
            lines += [f"## {part}: {title}", "", *lab.table(["gamma", *map(str, levels), "mean"], cells)]
            if name == "both":
                others = {key: own["mean"] for key, own in found.items() if key not in ("eqm", UNFAIR) and own["mean"]}
                if others and found["eqm"]["mean"]:
                    best = max(others, key=lambda key: sum(others[key].values()) / len(others[key]))
                    gap = lab.difference("eqm", best, f"{part}, mean over gamma", found["eqm"]["mean"], others[best], 1)
                    lines += [f"The best fair baseline is {best}.", "", gap, ""]
    return lines


def values_of(rows, part, method, name, factor):
    """{gamma: {seed: value}}, with the mean over all gammas of the part as "mean"."""
    found = {level: {} for level in PARTS[part]}
    for row in rows:
        if (row["part"], row["method"]) == (part, method):
            found[row["gamma"]][row["seed"]] = factor * row[name]
    whole = set.intersection(*map(set, found.values()))  # seeds with all gammas
    found["mean"] = {seed: sum(own[seed] for own in found.values()) / len(found) for seed in sorted(whole)}
    return found


parse_args = lab.study_parser(__doc__, seeds=[0, 1, 2]).parse_args


@one_line_errors()
def main():
    args = parse_args()
    out = Path(args.out, "no_clock.json")
    cases = [
        {"part": part, "seed": seed, "gamma": level, "method": method}
        for seed in args.seeds for part, levels in PARTS.items() for level in levels for method in methods(part)
    ]  # fmt: skip
    opened = {}
    for case in Bar(cases, desc="no clock", unit="cell"):
        rows, part, seed = lab.read_rows(out), case["part"], case["seed"]
        if any(case.items() <= row.items() for row in rows):
            continue
        if (part, seed) not in opened:
            opened = {(part, seed): models(args, part, seed)}
        model, time_scale = opened[part, seed][methods(part)[case["method"]]]
        _, test = objectives.data_sets(args)
        own = real_clips(test, 4 if args.miniature else 144, time_scale)
        row = case | measure(case["method"], model, time_scale, part, case["gamma"], seed, *own)
        lab.write_file(out, json.dumps([*rows, row], indent=1).encode() + b"\n")
    lab.write_results(args.out, "no_clock", markdown(lab.read_rows(out)))


if __name__ == "__main__":
    main()

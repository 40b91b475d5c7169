"""Sample from noisy clips of unknown noise level: does it help that EqM needs no level?

    python scripts/studies/no_clock.py    3 seeds; about 15 minutes of one core each, after
                                          objectives.py

"noisy clips": samplers start from real clips x_gamma. eqm descends as usual. flow is told the true
gamma (an upper bound), or an estimate, or treats the clip as clean and adds noise to a chosen
gamma, as SDEdit does (arXiv 2108.01073). "noisy half": only the second half of the frames is noisy.
eqm descends on all frames; flow has a level per temporal patch, true or estimated, and keeps clean
patches; or it adds noise to all frames. The noisy clips, evaluations and guidance are the same. An
estimate pools one patch of all clips, which favors flow. We use real clips, not samples of either
model, which would favor its own objective.

The models are those of objectives.py, for "noisy half" those with --forcing 0.75 of
given_frames.py; missing ones are trained. The script writes results/no_clock.md and .json, and
saves each cell when it is done. Several processes can share the cells.
"""

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
from scoring.sources import find_real
from shapes_tracker import Truth, track
from transport import interpolate
from vae import VAE

PIXELS = VAE("none")
# of a clip; gammas to which flow adds noise to a noisy clip
FRAMES = 16
AGAIN = (0.2, 0.4, 0.6, 0.8)
PARTS = {"noisy clips": (0.2, 0.4, 0.6, 0.8), "noisy half": (0.0, 0.3, 0.6)}  # and their gammas
CLEAN = 0.95  # patches with a higher estimate count as clean
FAIR = "flow, estimated"  # the fair baseline that we expect to be best
METHODS = {"eqm": "eqm", "flow, told": "flow", FAIR: "flow"}  # {method: objective}
METHODS |= {f"flow, noised again to {gamma}": "flow" for gamma in AGAIN}
COLUMNS = {
    "both": ("both right (%)", 100, 1),
    "rmse": ("RMSE to the clean clip (gray levels)", 1, 1),
}


def estimate_gammas(x, patch):
    """Estimate gamma of each temporal patch of x_gamma (B, C, T, H, W) from neighboring pixels.

    Most neighbors have the same color, so their difference is that of two noises of standard
    deviation 1 - gamma, and its median absolute value 0.6745 sqrt(2) times that.
    """
    medians = [part.diff(dim=-1).abs().median().item() for part in x.split(patch, dim=2)]
    return [max(0.0, 1 - median / (0.6745 * 2**0.5)) for median in medians]


def start_of(method, x, level, is_clean, patch, seed):
    """(start, its gamma, which frames (T,) are kept) of a method of METHODS for flow."""
    if method == "flow, told":
        return x, level, is_clean
    if method == FAIR:
        gammas = estimate_gammas(x, patch)
        clean = torch.tensor([gamma > CLEAN for gamma in gammas]).repeat_interleave(patch)[
            : x.shape[2]
        ]
        noisy = [gamma for gamma in gammas if gamma <= CLEAN]
        return x, sum(noisy) / max(1, len(noisy)), clean
    gamma = float(method.rpartition(" ")[2])
    again = normal(seed, "noised again", 0, range(len(x)), x.shape[1:])
    return interpolate(x, again, torch.full((len(x),), gamma)), gamma, torch.zeros_like(is_clean)


def run_method(method, model, x, is_clean, labels, time_scale, level, seed):
    """Sample from x (B, C, T, H, W) by a method of METHODS.

    is_clean (T,): the frames without noise.
    """
    setting = SETTINGS[model.config.objective]
    condition = Condition.of(labels, model.config)
    field = guided(model, condition, torch.full((len(x),), time_scale), GUIDANCE)
    if model.config.learns.has_equilibria:
        return sample(field, x, "ngd", USUAL + 1, setting.way / USUAL)[0]
    x, gamma, clean = start_of(method, x, level, is_clean, model.config.temporal_patch_size, seed)
    masked = (
        {"given": x, "mask": clean.expand(len(x), 1, -1)[..., None, None]} if clean.any() else {}
    )
    points = (USUAL + 3) // 2 if setting.way == "heun" else USUAL + 1
    flow = {"objective": model.config.learns, "shift": setting.shift, "start_gamma": gamma}
    return sample(field, x, setting.way, points, **flow, **masked)[0]


def open_models(args, part, seed):
    """{objective: (network, seconds per frame)} of a seed.

    Trains what is missing, and makes the test videos.
    """
    found = {}
    for objective in ("eqm", "flow"):
        run = objectives.main_run(args, objective, seed)
        run.make_data()
        if part == "noisy half":
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
    samples = [clips[index] for index in range(count)]
    truth = Truth(data)
    labels = torch.tensor([sample["y"] for sample in samples])
    expected = [truth(clips.classes[label], 16, time_scale) for label in labels.tolist()]
    return torch.stack([sample["clip"] for sample in samples]), labels, expected


@torch.no_grad()
def measure(method, model, time_scale, part, level, seed, clips, labels, expected):
    """{name: value} of COLUMNS for one method and level."""
    x = PIXELS.encode(clips)
    is_clean = torch.arange(FRAMES) < (FRAMES // 2 if part == "noisy half" else 0)
    noise = normal(seed, "no clock", 0, range(len(x)), x.shape[1:])
    start = interpolate(x, noise, torch.where(is_clean, 1.0, level).expand(len(x), -1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_method(method, model, start, is_clean, labels, time_scale, level, seed)
    videos = PIXELS.decode(found)
    tracks = [track(video) for video in videos.numpy()]
    pairs = zip(tracks, expected, strict=True)
    right = [own.direction == true.direction and own.shape == true.shape for own, true in pairs]
    error = (videos.permute(0, 4, 1, 2, 3).float() - clips).square().mean().sqrt()
    return {"both": sum(right) / len(right), "rmse": error.item()}


def markdown(rows):
    about = (
        "`scripts/studies/no_clock.py` wrote these tables. Cells hold the mean over seeds, and "
        "the range."
    )
    lines = ["# Unknown noise levels", "", about, ""]
    for part, levels in PARTS.items():
        for name, (title, factor, digits) in COLUMNS.items():
            found = {method: values_of(rows, part, method, name, factor) for method in METHODS}
            cells = [
                [
                    method,
                    *(
                        lab.mean_cell([*own.get(level, {}).values()], digits)
                        for level in (*levels, "mean")
                    ),
                ]
                for method, own in found.items()
            ]
            lines += [
                f"## {part}: {title}",
                "",
                *lab.table(["gamma", *map(str, levels), "mean"], cells),
            ]
            means = found["eqm"]["mean"], found[FAIR]["mean"]
            gap = lab.difference("eqm", FAIR, f"{part}, mean over gamma", *means, digits)
            lines += [*lab.difference_lines([gap]), ""]
    return lines


def values_of(rows, part, method, name, factor):
    """{gamma: {seed: value}}, with the mean over all gammas of the part as "mean"."""
    found = {level: {} for level in PARTS[part]}
    for row in rows:
        if (row["part"], row["method"]) == (part, method):
            found[row["gamma"]][row["seed"]] = factor * row[name]
    whole = set.intersection(*map(set, found.values()))  # seeds with all gammas
    found["mean"] = {
        seed: sum(own[seed] for own in found.values()) / len(found) for seed in sorted(whole)
    }
    return found


parse_args = lab.study_parser(__doc__, seeds=[0, 1, 2]).parse_args


@one_line_errors()
def main():
    args = parse_args()
    out = Path(args.out, "no_clock.json")
    locks = Path(args.out, "objectives", "no-clock")
    locks.mkdir(parents=True, exist_ok=True)
    cases = [
        {"part": part, "seed": seed, "gamma": level, "method": method}
        for seed in args.seeds
        for part, levels in PARTS.items()
        for level in levels
        for method in METHODS
    ]
    opened = {}
    for case in Bar(cases, desc="no clock", unit="cell"):
        part = case["part"]
        seed = case["seed"]
        with lab.file_lock(
            locks / f"{'-'.join(map(str, case.values()))}.lock", wait=False
        ) as is_mine:
            if not is_mine or any(case.items() <= row.items() for row in lab.read_rows(out)):
                continue
            if (part, seed) not in opened:
                opened = {(part, seed): open_models(args, part, seed)}
            model, time_scale = opened[part, seed][METHODS[case["method"]]]
            _, test = objectives.data_sets(args)
            own = real_clips(test, 4 if args.miniature else 144, time_scale)
            row = case | measure(case["method"], model, time_scale, part, case["gamma"], seed, *own)
            lab.add_rows(out, [row])
    lab.write_results(args.out, "no_clock", markdown(lab.read_rows(out)))


if __name__ == "__main__":
    main()

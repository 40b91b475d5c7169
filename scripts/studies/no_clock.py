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
given_frames.py; missing ones are trained. The script writes no_clock.md and .json in
results/studies/objectives, and saves each cell when it is done. Several processes can share
the cells.
"""

import itertools
from pathlib import Path

import torch

import given_frames
import lab
import objectives
from arms import GUIDANCE
from checkpoint import load_model
from models import Condition
from objectives import ARMS, USUAL
from runtime.cli import Bar, one_line_errors
from runtime.rng import normal
from samplers import guided, sample
from scoring.sources import find_real
from shapes_tracker import Truth, track
from transport import interpolate
from vae import VAE

PIXELS = VAE("none")
FRAMES = 16  # of a clip
AGAIN = (0.2, 0.4, 0.6, 0.8)  # gammas to which flow adds noise to a noisy clip
PARTS = {  # and their gammas
    "noisy clips": (0.2, 0.4, 0.6, 0.8),
    "noisy half": (0.0, 0.3, 0.6),
}
CLEAN = 0.95  # patches with a higher estimate count as clean
FAIR = "flow, estimated"  # the fair baseline that we expect to be best
METHODS = {  # {method: objective}
    "eqm": "eqm",
    "flow, told": "flow",
    FAIR: "flow",
}
METHODS |= {f"flow, noised again to {gamma}": "flow" for gamma in AGAIN}
COLUMNS = {
    "both right (%)": lab.Column("both", 100, 1),
    "RMSE to the clean clip (gray levels)": lab.Column("rmse", 1, 1),
}


def estimate_gammas(x, patch):
    """Estimate gamma of each temporal patch of x_gamma (B, C, T, H, W) from neighboring pixels.

    Most neighbors have the same color, so their difference is that of two noises of standard
    deviation 1 - gamma, and its median absolute value 0.6745 sqrt(2) times that.
    """
    gammas = []
    for part in x.split(patch, dim=2):
        median = part.diff(dim=-1).abs().median().item()
        gammas.append(max(0.0, 1 - median / (0.6745 * 2**0.5)))
    return gammas


def start_of(case, x, is_clean, patch):
    """(start, its gamma, which frames (T,) are kept) of a method for flow, from x (B, C, T, H, W).

    is_clean (T,): the frames without noise; patch: frames of a temporal patch.
    """
    method = case["method"]
    if method == "flow, told":
        return x, case["gamma"], is_clean
    if method == FAIR:
        gammas = estimate_gammas(x, patch)
        noisy = [gamma for gamma in gammas if gamma <= CLEAN]
        mean = sum(noisy) / max(1, len(noisy))
        is_clean = torch.tensor([gamma > CLEAN for gamma in gammas])
        is_clean = is_clean.repeat_interleave(patch)
        return x, mean, is_clean[: x.shape[2]]
    *_, gamma = method.split()
    gamma = float(gamma)
    again = normal(
        case["seed"],
        purpose="noised again",
        stream=0,
        indices=range(len(x)),
        shape=x.shape[1:],
    )
    start = interpolate(x, again, torch.full((len(x),), gamma))
    return start, gamma, torch.zeros_like(is_clean)


def run_method(case, field, x, is_clean, config):
    """Sample from x (B, C, T, H, W) by the method of a case.

    is_clean (T,): the frames without noise; config: an EqMConfig.
    """
    arm = ARMS[METHODS[case["method"]]]
    if arm.descends:
        x, _ = sample(
            field,
            x,
            "ngd",
            num_steps=USUAL + 1,
            step_size=arm.way / USUAL,
        )
        return x
    x, gamma, is_kept = start_of(
        case,
        x,
        is_clean=is_clean,
        patch=config.temporal_patch_size,
    )
    kept = {}
    if is_kept.any():
        kept["given"] = x
        kept["mask"] = is_kept.expand(len(x), 1, -1)[..., None, None]
    solver, points = objectives.solver_and_points(arm.way, USUAL)
    x, _ = sample(
        field,
        x,
        solver,
        num_steps=points,
        objective=config.learns,
        shift=arm.shift,
        start_gamma=gamma,
        **kept,
    )
    return x


def open_models(args, part, seed):
    """{objective: (network, seconds per frame)} of a seed.

    Trains what is missing, and makes the test videos.
    """
    models = {}
    for objective in ("eqm", "flow"):
        run = objectives.main_run(args, objective, seed)
        run.make_data()
        if part == "noisy half":
            run = given_frames.make_run(args, share=0.75, seed=seed, objective=objective)
        with lab.file_lock(run.folder / "lock"):
            run.make_data()
            model, config, _ = load_model(run.train())
        models[objective] = model, config["data"]["time_scale"]
    return models


def real_clips(data, count, time_scale):
    """(clips uint8 (N, 3, T, H, W), labels (N,), what each shows) of a Moving Shapes data set."""
    clips, *_ = find_real(
        data,
        split="all",
        val_fraction=0.05,
        num_frames=FRAMES,
        time_scale=time_scale,
        image_size=16,
        ckpt=None,
        images=False,
    )
    samples = [clips[index] for index in range(count)]
    truth = Truth(data)
    labels = torch.tensor([sample["y"] for sample in samples])
    expected = [truth(clips.classes[label], 16, time_scale) for label in labels.tolist()]
    return torch.stack([sample["clip"] for sample in samples]), labels, expected


@torch.no_grad()
def measure(case, model, time_scale, real):
    """{name: value} of COLUMNS. case: {part, seed, gamma, method}; real: see `real_clips`."""
    clips, labels, expected = real
    x = PIXELS.encode(clips)
    num_clean = FRAMES // 2 if case["part"] == "noisy half" else 0
    is_clean = torch.arange(FRAMES) < num_clean
    noise = normal(
        case["seed"],
        purpose="no clock",
        stream=0,
        indices=range(len(x)),
        shape=x.shape[1:],
    )
    gamma = torch.where(is_clean, 1.0, case["gamma"])
    start = interpolate(x, noise, gamma.expand(len(x), -1))
    field = guided(
        model,
        condition=Condition.of(labels, model.config),
        time_scale=torch.full((len(x),), time_scale),
        guidance=GUIDANCE,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = run_method(
            case,
            field,
            x=start,
            is_clean=is_clean,
            config=model.config,
        )
    videos = PIXELS.decode(x)
    right = 0
    for video, true in zip(videos.numpy(), expected, strict=True):
        shape = track(video)
        right += shape.direction == true.direction and shape.shape == true.shape
    error = videos.permute(0, 4, 1, 2, 3).float() - clips
    return {"both": right / len(clips), "rmse": error.square().mean().sqrt().item()}


def markdown(rows):
    lines = lab.heading(
        "Unknown noise levels",
        "`scripts/studies/no_clock.py` wrote these tables. Cells hold the mean over seeds, and "
        "the range.",
    )
    for part, gammas in PARTS.items():
        for title, column in COLUMNS.items():
            cells = []
            means = {}  # {method: {seed: mean over the gammas}}
            for method in METHODS:
                about = {"part": part, "method": method}
                by_gamma = [lab.by_seed(rows, about | {"gamma": gamma}, column) for gamma in gammas]
                means[method] = mean_over_gammas(by_gamma)
                row = [method]
                for values in (*by_gamma, means[method]):
                    row.append(lab.mean_cell(values, column.digits))
                cells.append(row)
            gap = lab.difference(
                means, ("eqm", FAIR), what=f"{part}, mean over gamma", digits=column.digits
            )
            lines += [f"## {part}: {title}", ""]
            lines += lab.table(["gamma", *map(str, gammas), "mean"], cells)
            lines += [*lab.difference_lines([gap]), ""]
    return lines


def mean_over_gammas(by_gamma):
    """{seed: mean} of a list of {seed: value}, for seeds that all of them have."""
    seeds = sorted(set.intersection(*map(set, by_gamma)))
    return {seed: sum(values[seed] for values in by_gamma) / len(by_gamma) for seed in seeds}


parse_args = lab.study_parser(__doc__, "objectives", seeds=[0, 1, 2]).parse_args


@one_line_errors()
def main():
    args = parse_args()
    out = Path(args.out, "no_clock.json")
    locks = Path(args.out, "objectives", "no-clock")
    _, test = objectives.data_sets(args)
    cases = []
    for seed, (part, gammas) in itertools.product(args.seeds, PARTS.items()):
        for gamma, method in itertools.product(gammas, METHODS):
            case = {
                "part": part,
                "seed": seed,
                "gamma": gamma,
                "method": method,
            }
            cases.append(case)
    opened = None
    for case in Bar(cases, desc="no clock", unit="cell"):
        lock = locks / f"{'-'.join(map(str, case.values()))}.lock"
        with lab.file_lock(lock, wait=False) as is_mine:
            if not is_mine or lab.rows_with(case, lab.read_rows(out)):
                continue
            if opened != (case["part"], case["seed"]):
                opened = case["part"], case["seed"]
                models = open_models(args, case["part"], case["seed"])
            model, time_scale = models[METHODS[case["method"]]]
            real = real_clips(test, 4 if args.miniature else 144, time_scale)
            lab.add_rows(out, [case | measure(case, model, time_scale, real)])
    lab.write_results(args.out, "no_clock", markdown(lab.read_rows(out)))


if __name__ == "__main__":
    main()

"""Where in the descent are the attributes of a Sprites character decided, and which sampler keeps them together?

    python scripts/studies/sprites_descent.py sprites          EXP of a finished scripts/sprites.sh; about half an hour

It samples 288 clips with several kinds of guidance and numbers of evaluations, on the same path length, and counts
valid clips (--metric census). Then it decodes the state after each evaluation and counts the clips that show one value
of an attribute in all frames, and those that show the final one. It writes sprites_descent.md and .json to --out.
Samples are in samples/EXP-descent; finished ones are not made again.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import lab
from checkpoint import load_model
from models import Condition
from runtime.cli import COUNT, Bar, fail, one_line_errors
from runtime.rng import normal
from samplers import guided, sample
from scoring import census
from scoring.sources import find_real
from vae import load_vae

PATH_LENGTH = 0.5  # evaluations x step size
GUIDANCE = 1.7  # of sprites.sh
WEAK = 1  # which of the numbered checkpoints guides there; 0 is the last one of the 4-frame clips
SETTINGS = [  # guidance, evaluations, and which of the numbered checkpoints replaces the null class
    (1, 23, None), (1.5, 23, None), (2, 23, None), (GUIDANCE, 23, WEAK), (2, 23, WEAK), (3, 23, WEAK), (2, 23, 0),
    (2, 23, 2), (1, 46, None), (2, 46, WEAK), (2, 11, WEAK),
]  # fmt: skip
SHARES = {  # of the census: title, in %
    "valid": "valid", "class_right": "right class", **{name: f"one {name}" for name in census.ATTRIBUTES},
}  # fmt: skip


def parse_args():
    parser = lab.out_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="EXP", help="a finished experiment of sprites.sh")
    add("--data-path", default="datasets/sprites", metavar="DIR", help="the data set of prepare_sprites.py")
    add("--num-samples", type=COUNT, default=288, help="clips per setting")
    return parser.parse_args()


def score_settings(args, checkpoint, numbered):
    """{name of a setting: result of the census}. numbered: the numbered checkpoints beside the checkpoint."""
    tasks = {}
    for guidance, evaluations, number in SETTINGS:
        by = "the null class" if number is None else f"step {int(numbered[number].stem)}"
        name = f"{guidance:g}" + f" from {by}" * (guidance != 1) + f", {evaluations}"
        flags = ["--num-frames", 8, "--num-samples", args.num_samples, "--precision", "bf16", "--batch-size", 32]
        flags += ["--sampler", "ngd", "--cfg-scale", guidance, "--num-sampling-steps", evaluations + 1]
        flags += ["--stepsize", PATH_LENGTH / evaluations]
        flags += [] if number is None else ["--weak-ckpt", numbered[number]]
        tasks[name] = flags, ["census"]
    metrics = {"census": ["--data-path", args.data_path, "--num-workers", 1]}
    run = lab.Run(Path("samples", f"{args.run}-descent"), tasks=tasks, metrics=metrics, ckpt=checkpoint)
    lab.run_all([run])
    return {name: run.scores(name, "census")["result"] for name in tasks}


@torch.no_grad()
def trace(args, checkpoint, weak, guidance, evaluations):
    """(shares of clips with one value of each attribute in all frames, shares of clips that show the final values).

    Both have a row for the state after each evaluation, the first one after none, and a column per attribute.
    """
    model, config, _ = load_model(checkpoint)
    data, shape, count = config["data"], model.config, args.num_samples
    clips, *_ = find_real(args.data_path, "all", 0.05, 8, data["time_scale"], data["image_size"], None, images=False)
    world = census.read_world(clips, Namespace(data_path=args.data_path, batch_size=32, num_workers=1), "cpu")
    vae, side = load_vae(None, data["vae"], checkpoint), shape.input_size
    noise = normal(0, "trace", 0, range(count), (shape.in_channels, 8, side, side))
    classes = Condition.of(torch.arange(count) % shape.num_classes, shape)
    weak, _, _ = load_model(weak)
    field, states = guided(model, classes, torch.full((count,), data["time_scale"]), guidance, weak), []
    step_size = PATH_LENGTH / evaluations
    sample(field, noise, "ngd", evaluations + 1, step_size, observe=lambda x, keep: states.append(vae.decode(x)))
    found = [census.measure(world, state, "states")["decoded"] for state in Bar(states, desc="states", unit="state")]
    found = np.stack(found)  # (states, clips, frames, attributes)
    return [(found == other).all(axis=2).mean(axis=1).tolist() for other in (found[:, :, :1], found[-1:])]


def markdown(content):
    scores, together, final = (content[name] for name in ("scores", "together", "final"))

    def cells(result):
        return [f"{100 * result[name]:.1f}" for name in SHARES] + [f"{result['rmse']:.2f}"]

    titles = ["guidance, evaluations", *(f"{title} (%)" for title in SHARES.values()), "RMSE (gray levels)"]
    names = [f"{name} (%)" for name in census.ATTRIBUTES]
    lines = ["# The descent to a Sprites character", "", "`scripts/studies/sprites_descent.py` wrote these tables.", ""]
    rows = [[name, *cells(own)] for name, own in scores.items()]
    lines += ["## Guidance and evaluations", "", *lab.table(titles, rows)]
    for title, rows in (("One value in all frames", together), ("The final value in all frames", final)):
        rows = [[str(n), *(f"{100 * share:.0f}" for share in row)] for n, row in enumerate(rows)]
        lines += [f"## {title}, by evaluations done", "", *lab.table(["evaluations", *names], rows)]
    return lines


@one_line_errors()
def main():
    args = parse_args()
    found = sorted(Path("results", args.run).glob("*-EqM-*/checkpoints/best.pt"))
    if not found:
        fail(f"results/{args.run}: no best.pt; expected a finished run of scripts/sprites.sh")
    numbered = sorted(found[-1].parent.glob("[0-9]*.pt"))
    scores = score_settings(args, found[-1], numbered)
    together, final = trace(args, found[-1], numbered[WEAK], GUIDANCE, evaluations=23)
    content = {"scores": scores, "together": together, "final": final}
    for result in scores.values():
        del result["samples"]
    lab.write_results(args.out, "sprites_descent", markdown(content), content)


if __name__ == "__main__":
    main()

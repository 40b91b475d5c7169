"""Measure which disturbances of a finished clip heal: disturb it, descend again, track the shape.

    python scripts/studies/disturb.py                       about 40 minutes of one core
    python scripts/studies/disturb.py --model demo-few      about 20, without guidance

The clips are those of the page that `scripts/export.py --html` makes of this model: 16 frames,
with the step size, momentum and guidance of the checkpoint. The script writes disturb.md and
.json (or disturb-few) in results/studies/objectives after each batch of 24 clips; run it again to
continue.
"""

import json
from pathlib import Path

import torch

import lab

# isort: split
import checkpoint
from models import Condition
from runtime.cli import COUNT, Bar, one_line_errors
from runtime.rng import generator, noise_of_samples, normal
from samplers import guided, sample
from scoring.stats import share
from shapes_tracker import track
from vae import VAE

MODELS = ("demo", "demo-few")  # folders of results
BATCH = 24
FRAMES = 16
SQUARE = 6
FIRST = 19  # evaluations before a disturbance
AGAIN = 15  # evaluations after it
LEVELS = 0.0, 0.3, 0.6  # shares of the clip that are kept
KINDS = "direction", "shape"
LEFT = "left half of every frame"


def regions(shape, batch):
    """{name: bool, broadcasts over clips (B, C, T, H, W)}, where a clip is disturbed.

    The square is anywhere.
    """
    B, _, T, H, W = shape
    tops, lefts = torch.randint(
        0,
        H - SQUARE + 1,
        (2, B, 1),
        generator=generator(0, "square", batch),
    )
    row = torch.arange(H)
    column = torch.arange(W)
    rows = (row >= tops) & (row < tops + SQUARE)  # (B, H)
    columns = (column >= lefts) & (column < lefts + SQUARE)  # (B, W)
    square = rows[:, :, None] & columns[:, None]
    return {
        "later half of the frames": (torch.arange(T) >= T / 2)[:, None, None],
        LEFT: column < W / 2,
        f"square of {SQUARE} px in every frame": square[:, None, None],
        "everything": torch.tensor(True),
    }


def blur(x):
    """Average each pixel of (B, C, T, H, W) with its neighbors, by weights 1 2 1 both ways."""
    frames = x.flatten(0, 2)[:, None]
    padded = torch.nn.functional.pad(frames, (1, 1, 1, 1), mode="replicate")
    weights = torch.tensor([1.0, 2, 1]) / 4
    kernel = weights[:, None] * weights
    blurred = torch.nn.functional.conv2d(padded, kernel[None, None])
    return blurred.view_as(x)


def disturbances(x, labels, classes, batch):
    """Yield (name, disturbed clips, classes to descend to) of finished clips x (B, C, T, H, W)."""
    noise = normal(0, "disturb", 0, range(batch, batch + len(x)), x.shape[1:])
    other = (labels + 1) % classes
    noisy = {level: level * x + (1 - level) * noise for level in LEVELS}
    masks = regions(x.shape, batch)
    for name, mask in masks.items():
        for level in LEVELS:
            yield f"{name}, keeps {level:.0%}", torch.where(mask, noisy[level], x), labels
    yield "blurred", blur(x), labels
    yield "left half mirrored", torch.where(masks[LEFT], x.flip(-1), x), labels
    yield "another class", x, other
    for level in LEVELS:
        yield f"another class, everything keeps {level:.0%}", noisy[level], other


def descend(model, x, labels, evaluations, training):
    """Follow the guided field from x for so many evaluations."""
    field = guided(
        model,
        condition=Condition.of(labels, model.config),
        time_scale=torch.full((len(x),), 0.04),
        guidance=training["cfg_scale"],
    )
    x, _ = sample(
        field,
        x,
        "ngd",
        num_steps=evaluations + 1,
        step_size=training["stepsize"],
        momentum=training["mu"],
    )
    return x


def right(x, labels, names):
    """{"direction": bools, "shape": bools}: whether clips move and look as "CircleLeft" says."""
    hits = {kind: [] for kind in KINDS}
    clips = VAE("none").decode(x).numpy()
    for clip, label in zip(clips, labels.tolist(), strict=True):
        shape = track(clip)
        name = names[label]
        hits["direction"].append(name.endswith(str(shape.direction)))
        hits["shape"].append(name.startswith(str(shape.shape)))
    return hits


@torch.no_grad()
def measure(model, config, indices):
    """{row: {"direction": bools, "shape": bools}} of the clips with these indices."""
    names = config["data"]["classes"]
    training = config["training"]
    size = model.config.input_size
    labels = torch.tensor([index % len(names) for index in indices])
    noise = noise_of_samples(0, indices, (3, FRAMES, size, size))
    x = descend(
        model,
        noise,
        labels=labels,
        evaluations=FIRST,
        training=training,
    )
    hits = {"before": right(x, labels, names)}
    cases = disturbances(
        x,
        labels=labels,
        classes=len(names),
        batch=indices[0],
    )
    for name, start, goals in cases:
        end = descend(
            model,
            start,
            labels=goals,
            evaluations=AGAIN,
            training=training,
        )
        hits[name] = right(end, goals, names)
    return hits


def cell(hits):
    part, (low, high) = share(hits)
    return f"{100 * part:.1f} ({100 * low:.1f} - {100 * high:.1f})"


def parse_args():
    parser = lab.out_parser(__doc__, "objectives", "the tables")
    parser.add_argument("--model", choices=MODELS, default="demo", help="a folder of results")
    parser.add_argument("--num-clips", type=COUNT, default=288, help="clips of 16 frames")
    return parser.parse_args()


def markdown(content):
    rows = content["rows"]
    count = len(rows["before"]["shape"])
    lines = lab.heading(
        "Disturbances",
        f"`scripts/studies/disturb.py` wrote this table from {count} clips of "
        f"results/{content['model']}: {FIRST} evaluations, a disturbance, {AGAIN} more. Brackets "
        "hold 95% intervals (Wilson).",
    )
    titles = ["", *(f"{kind} right (%)" for kind in KINDS)]
    cells = [[name, *map(cell, hits.values())] for name, hits in rows.items()]
    return lines + lab.table(titles, cells)


@one_line_errors()
def main():
    args = parse_args()
    model, config, _ = checkpoint.load_model(lab.ROOT / "results" / args.model)
    name = args.model.replace("demo", "disturb")
    path = Path(args.out, f"{name}.json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    known = len(rows["before"]["shape"]) if rows else 0
    for first in Bar(range(known, args.num_clips, BATCH), desc="disturb", unit="part"):
        indices = range(first, min(first + BATCH, args.num_clips))
        for case, hits in measure(model, config, indices).items():
            row = rows.setdefault(case, {kind: [] for kind in KINDS})
            for kind in KINDS:
                row[kind] += hits[kind]
        content = {"made": lab.made(), "model": args.model, "rows": rows}
        lab.write_results(args.out, name, markdown(content), content)


if __name__ == "__main__":
    main()

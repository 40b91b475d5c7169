"""Measure which disturbances of a finished clip heal: disturb it, descend again, track the shape.

    python scripts/studies/disturb.py                       about 40 minutes of one core

The clips are those of the page that `scripts/export.py --html` makes of results/demo: 16 frames,
with the step size, momentum and guidance of the checkpoint. The script writes results/disturb.md
and .json after each batch of 24 clips; run it again to continue.
"""

from pathlib import Path

import torch

import lab

# isort: split
import checkpoint
from models import Condition
from runtime.cli import COUNT, Bar, one_line_errors
from runtime.rng import generator, normal
from samplers import guided, sample
from scoring.stats import share
from shapes_tracker import track
from vae import VAE

DEMO = lab.ROOT / "results/demo"
BATCH, FRAMES, SQUARE = 24, 16, 6
FIRST, AGAIN = 19, 15  # evaluations before and after a disturbance
LEVELS = 0.0, 0.3, 0.6  # shares of the clip that are kept
KINDS = "direction", "shape"


def regions(shape, batch):
    """{name: bool, broadcasts over clips (B, C, T, H, W)}, where a clip is disturbed.

    The square is anywhere.
    """
    B, _, T, H, W = shape
    row, column = (torch.arange(n) for n in (H, W))
    tops, lefts = torch.randint(
        0, H - SQUARE + 1, (2, B, 1), generator=generator(0, "square", batch)
    )
    # (B, H)
    rows = (row >= tops) & (row < tops + SQUARE)
    columns = (column >= lefts) & (column < lefts + SQUARE)
    return {
        "later half of the frames": (torch.arange(T) >= T / 2)[:, None, None],
        "left half of every frame": column < W / 2,
        f"square of {SQUARE} px in every frame": (rows[:, :, None] & columns[:, None])[
            :, None, None
        ],
        "everything": torch.tensor(True),
    }


def blur(x):
    """Average each pixel of (B, C, T, H, W) with its neighbors, by weights 1 2 1 both ways."""
    padded = torch.nn.functional.pad(x.flatten(0, 2)[:, None], (1, 1, 1, 1), mode="replicate")
    weights = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
    return torch.nn.functional.conv2d(padded, weights[None, None]).view_as(x)


def disturbances(x, labels, classes, batch):
    """Yield (name, disturbed clips, classes to descend to) of finished clips x (B, C, T, H, W)."""
    noise = normal(0, "disturb", 0, range(batch, batch + len(x)), x.shape[1:])
    other = (labels + 1) % classes
    found = regions(x.shape, batch)
    for name, mask in found.items():
        for level in LEVELS:
            yield (
                f"{name}, keeps {level:.0%}",
                torch.where(mask, level * x + (1 - level) * noise, x),
                labels,
            )
    yield "blurred", blur(x), labels
    yield (
        "left half mirrored",
        torch.where(found["left half of every frame"], x.flip(-1), x),
        labels,
    )
    yield "another class", x, other
    for level in LEVELS:
        yield f"another class, everything keeps {level:.0%}", level * x + (1 - level) * noise, other


def descend(model, x, labels, evaluations, training):
    """Follow the guided field from x for so many evaluations."""
    condition = Condition.of(labels, model.config)
    scale = torch.full((len(x),), 0.04)
    field = guided(model, condition, scale, training["cfg_scale"])
    return sample(field, x, "ngd", evaluations + 1, training["stepsize"], training["mu"])[0]


def right(x, labels, names):
    """{"direction": bools, "shape": bools}: whether clips move and look as "CircleLeft" says."""
    tracks = [track(clip) for clip in VAE("none").decode(x).numpy()]
    pairs = [(one, names[label]) for one, label in zip(tracks, labels.tolist(), strict=True)]
    directions = [name.endswith(str(one.direction)) for one, name in pairs]
    return {
        "direction": directions,
        "shape": [name.startswith(str(one.shape)) for one, name in pairs],
    }


@torch.no_grad()
def measure(model, config, indices):
    """{row: {"direction": bools, "shape": bools}} of the clips with these indices."""
    names = config["data"]["classes"]
    training = config["training"]
    size = model.config.input_size
    labels = torch.tensor([index % len(names) for index in indices])
    noise = normal(0, "sample", 0, indices, (3, FRAMES, size, size))
    x = descend(model, noise, labels, FIRST, training)
    ends = {"before": (x, labels)}
    for name, start, own in disturbances(x, labels, len(names), indices[0]):
        ends[name] = descend(model, start, own, AGAIN, training), own
    return {name: right(*end, names) for name, end in ends.items()}


def cell(hits):
    part, (low, high) = share(hits)
    return f"{100 * part:.1f} ({100 * low:.1f} - {100 * high:.1f})"


def parse_args():
    parser = lab.out_parser(__doc__, "the tables")
    parser.add_argument("--num-clips", type=COUNT, default=288, help="clips of 16 frames")
    return parser.parse_args()


def markdown(content):
    rows = content["rows"]
    count = len(rows["before"]["shape"])
    about = (
        f"`scripts/studies/disturb.py` wrote this table from {count} clips of the demo model: "
        f"{FIRST} evaluations, "
    )
    about += f"a disturbance, {AGAIN} more. Brackets hold 95% intervals (Wilson)."
    cells = [[name, *(cell(own[kind]) for kind in KINDS)] for name, own in rows.items()]
    return [
        "# Disturbances",
        "",
        about,
        "",
        *lab.table(["", *(f"{kind} right (%)" for kind in KINDS)], cells),
    ]


@one_line_errors()
def main():
    args = parse_args()
    model, config, _ = checkpoint.load_model(DEMO)
    path = Path(args.out, "disturb.json")
    saved = lab.read_rows(path) if path.exists() else {}
    rows = saved.get("rows", saved)  # files of earlier versions are the rows
    known = len(rows["before"]["shape"]) if rows else 0
    for first in Bar(range(known, args.num_clips, BATCH), desc="disturb", unit="part"):
        for name, own in measure(
            model, config, range(first, min(first + BATCH, args.num_clips))
        ).items():
            row = rows.setdefault(name, {kind: [] for kind in KINDS})
            for kind in KINDS:
                row[kind] += own[kind]
        content = {"rows": rows}
        lab.write_results(args.out, "disturb", markdown(content), content)


if __name__ == "__main__":
    main()

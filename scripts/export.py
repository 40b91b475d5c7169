"""Export a checkpoint to a folder to share: its EMA weights, their configuration, and a model card (README.md).

    python scripts/export.py results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt exported --dtype fp16 \
        --scores motion.json

sample_gd.py, evaluate.py and train.py take the folder as --ckpt. In fp32 its samples are bit for bit those of the
checkpoint.
"""

import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import checkpoint
import generation
import models
import published
from models import EBMS, NAMES
from runtime.cli import ArgumentParser, UserError, check_writable, fail, one_line, one_line_errors, say
from scoring import manifest

SHOWN = 20  # classes that the card names
CARD = """# {name}

Trained with Equilibrium Matching (arXiv 2510.02300). `config.json` holds all settings; those of the sampler are used
unless flags say otherwise. `FOLDER` is this folder, `DATA` a folder of videos or images of the same classes.

| | |
|---|---|
{about}

```bash
python EqM/sample_gd.py {sample}
python EqM/train.py {train} --max-steps {steps}
```

## Scores
{scores}"""


def parse_args():
    parser = ArgumentParser(description="Export a checkpoint to a folder to share: EMA weights and configuration.")
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="a checkpoint of train.py or a published image model")
    add("folder", metavar="DIR", help="folder to write; must be new or empty")
    add("--dtype", choices=published.DTYPES, default="fp32", help="precision of the weights; fp16 halves the size")
    add("--model", choices=NAMES, metavar="NAME", help="EqM-{Ti,S,B,L,XL}/{2,4,8}; published models need it")
    scores = "manifests that evaluate.py has written for samples of this checkpoint, to be shown on the card"
    add("--scores", nargs="+", default=[], metavar="FILE", help=scores)
    add("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    flag = f"CKPT {args.ckpt}"
    try:
        check_writable("DIR", args.folder)
        if os.path.isdir(args.folder) and os.listdir(args.folder):
            raise UserError(f"DIR {args.folder}: exists and is not empty; name a new folder")
        state = checkpoint.load(args.ckpt, ["ema"], **models.model_shape(args.model), ebm=args.ebm)
        checkpoint.check_kind(flag, state, args.model)
        checkpoint.check(flag, checkpoint.config_of(flag, state), ebm=args.ebm)
        sha256 = checkpoint.weights_sha256(state["ema"]) if args.scores else None
        scores = [score_table(args.ckpt, sha256, path) for path in args.scores]
    except UserError as error:
        fail(error)
    video, rope = state["config"]["training"]["video"], state["config"]["model"]["use_rope"]
    card = CARD.format(
        name=models.model_name(**state["config"]["model"]),
        about="\n".join(f"| {key} | {one_line(str(x)).replace('|', '/')} |" for key, x in facts(state, args.dtype)),
        sample=f"{'--video ' * video}--ckpt FOLDER --num-samples 16 --folder samples",
        train=f"{'--video ' * video}{'--use-rope ' * rope}--ckpt FOLDER --data-path DATA",
        steps=state["step"] + 10_000,
        scores="".join(scores) or "\nNone were given.\n",
    )
    published.write_export(args.folder, state, args.dtype, card)
    size = sum(file.stat().st_size for file in Path(args.folder).iterdir()) / 1e6
    names = ", ".join((*published.EXPORT, published.CARD))
    say(f"{args.folder}: {names}, {size:.1f} MB; use it as --ckpt {args.folder}")


def facts(state, dtype):
    """Pairs of words for the card."""
    model, data, training = (state["config"][part] for part in ("model", "data", "training"))
    size = sum(value.numel() for value in state["ema"].values()) / 1e6
    yield "model", f"{size:.1f} M parameters, {dtype}, averaged weights of step {state['step']}"
    names = data["classes"][:SHOWN] + ["..."] * (len(data["classes"]) > SHOWN)
    yield "classes", f"{len(data['classes'])}: {', '.join(names)}"
    yield "data", os.path.basename(str(training.get("data_path") or "")) or "not recorded"
    if training["video"]:
        patch = model["temporal_patch_size"]
        yield "clips", f"{training['num_frames']} frames, {data['time_scale']:.4g} s apart; patches of {patch}"
    yield "pictures", f"{data['image_size'] or 'see config.json'} px, VAE {os.path.basename(str(data['vae']))}"
    sampler = generation.SAMPLER | {key: training[key] for key in generation.SAMPLER if key in training}
    yield "sampler", ", ".join(f"{key} {value}" for key, value in sampler.items() if value is not None)
    if math.isfinite(state["best_loss"]):
        yield "validation loss", f"{state['best_loss']:.4f}, the lowest of the last phase"


def score_table(ckpt, sha256, path):
    """The values of the manifest at a path, as a table. Raises UserError unless its weights have this SHA-256."""
    scores = manifest.read_manifest(path)
    if scores["generated"]["source"].get("weights_sha256") != sha256:
        raise UserError(f"--scores {path}: not of samples of the averaged weights of {ckpt}; score some")
    head = f"\n`{scores['protocol']}`, code {scores['code'] or 'unknown'}:\n\n| | |\n|---|---|\n"
    cells = [(key, "-" if value is None else f"{value:.4g}") for key, value in scores["values"].items()]
    return head + "".join(f"| {key} | {value} |\n" for key, value in cells)


if __name__ == "__main__":
    main()

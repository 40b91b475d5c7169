"""Export a checkpoint to a folder to share: EMA weights, config, own VAE and card (README.md).

    python scripts/export.py results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt exported \
        --dtype fp16 --scores motion.json
    python scripts/export.py results/demo --html descent.html

Pass the folder to sample_gd.py and train.py as --ckpt. An fp32 export gives the same samples as its
checkpoint, bit for bit. A VAE that was a folder is copied to `vae/`, so you can move the export to
another machine. --html writes a page that rolls clips downhill in a browser (docs/descent.md).
"""

import engine  # noqa: F401
import math
import os
from pathlib import Path

import checkpoint
import descent
import generation
import models
import published
from models import EBMS, NAMES
from runtime.atomic import write_file
from runtime.cli import (
    ArgumentParser,
    UserError,
    check_writable,
    one_line,
    one_line_errors,
    say,
    writing,
    wrong_input,
)
from scoring import manifest
from vae import REPOSITORIES, check_same, load_vae

SHOWN = 20  # classes that the card names
CARD = """# {name}

Trained with {trained_with}. `config.json` holds all settings. Sampling uses the sampler below
unless you pass other flags. Replace `FOLDER` by this folder, and `DATA` by a folder of videos or \
images of the same
classes.

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
    parser = ArgumentParser(
        description="Export a checkpoint to a folder to share: EMA weights and configuration."
    )
    add = parser.add_argument
    add(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint of train.py, an exported folder or a published image model",
    )
    add(
        "folder",
        metavar="DIR",
        nargs="?",
        help="folder to write; must be new or empty; optional with --html",
    )
    add("--html", metavar="FILE.html", help="page to write, which samples the model in a browser")
    add(
        "--dtype",
        choices=published.DTYPES,
        default="fp32",
        help="precision of the weights; fp16 halves the size",
    )
    add("--vae", metavar="DIR", help="the model's own VAE, if its folder has moved")
    add(
        "--scores",
        nargs="+",
        default=[],
        metavar="FILE",
        help="manifests of evaluate.py for samples of this checkpoint; the card shows their values",
    )
    add(
        "--model",
        choices=NAMES,
        metavar="NAME",
        help="EqM-{Ti,S,B,L,XL}/{2,4,8}; published models need it",
    )
    add("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    flag = f"CKPT {args.ckpt}"
    with wrong_input():
        check_places(args)
        state = checkpoint.load(args.ckpt, ["ema"], args.model, args.ebm)
        config = checkpoint.config_of(flag, state, args.model, ebm=args.ebm)
        if args.html:
            descent.check_runnable(flag, state, config)
        vae = own_vae(args.vae, flag, state["config"]["data"])
        sha256 = checkpoint.weights_sha256(state["ema"]) if args.scores else None
        scores = [score_table(args.ckpt, sha256, path) for path in args.scores]
    if args.folder:
        with writing(args.folder):
            published.write_export(
                args.folder, state, args.dtype, make_card(args, state, vae, scores), vae
            )
        size = sum(file.stat().st_size for file in Path(args.folder).rglob("*")) / 1e6
        names = ", ".join(
            (*published.EXPORT, published.CARD, *([f"{published.VAE_FOLDER}/"] if vae else []))
        )
        say(f"{args.folder}: {names}, {size:.1f} MB; use it as --ckpt {args.folder}")
    if args.html:
        page = descent.make_page(Path(args.ckpt).resolve().name, state, config).encode(
            "utf-8", "replace"
        )
        with writing(args.html):
            Path(args.html).parent.mkdir(parents=True, exist_ok=True)
            write_file(args.html, page)
        say(f"{args.html}: {len(page) / 1e6:.1f} MB; open it in a browser")


def check_places(args):
    """Raise UserError unless what DIR and --html name can be written."""
    if args.folder is None and args.html is None:
        raise UserError("DIR: missing; expected a new folder, or --html FILE.html")
    if args.folder is not None:
        check_writable("DIR", args.folder)
        if os.path.isdir(args.folder) and os.listdir(args.folder):
            raise UserError(f"DIR {args.folder}: exists and is not empty; name a new folder")
    elif unused := sorted(args.typed & {"dtype", "scores"}):
        raise UserError(
            f"--{unused[0]}: has no effect on a page; expected DIR too; remove the flag"
        )
    if args.html is not None:
        if not args.html or os.path.isdir(args.html):
            raise UserError(
                f"--html {args.html or repr('')}: not a file; expected the name of an HTML file"
            )
        check_writable("--html", Path(args.html).parent)


def make_card(args, state, vae, scores):
    """The model card (README.md) of an exported folder."""
    video = state["config"]["training"]["video"]
    rope = state["config"]["model"]["use_rope"]
    rows = [
        (key, one_line(str(value)).replace("|", "/"))
        for key, value in facts(state, args.dtype, vae)
    ]
    return CARD.format(
        name=models.model_name(**state["config"]["model"]),
        trained_with=models.EqMConfig(**state["config"]["model"]).learns.title,
        about="\n".join(f"| {key} | {value} |" for key, value in rows),
        sample=f"{'--video ' * video}--ckpt FOLDER --num-samples 16 --folder samples",
        train=f"{'--video ' * video}{'--use-rope ' * rope}--ckpt FOLDER --data-path DATA",
        steps=state["step"] + 10_000,
        scores="".join(scores) or "\nNo scores yet.\n",
    )


def own_vae(place, flag, data):
    """The VAE of a checkpoint if it is a folder, at `place` if it has moved.

    None for pixels and downloads.
    """
    if place is None and data["vae"] in ("none", *REPOSITORIES):
        return None
    vae = load_vae(place, data["vae"], flag)
    check_same(vae, data.get("vae_sha256"), flag)
    return vae


def facts(state, dtype, vae):
    """Yield the rows of the card's table: (name, value)."""
    model, data, training = (state["config"][part] for part in ("model", "data", "training"))
    size = sum(value.numel() for value in state["ema"].values()) / 1e6
    yield "model", f"{size:.1f} M parameters, {dtype}, averaged weights of step {state['step']}"
    names = data["classes"][:SHOWN] + ["..."] * (len(data["classes"]) > SHOWN)
    yield "classes", f"{len(data['classes'])}: {', '.join(names)}"
    yield "data", os.path.basename(str(training.get("data_path") or "")) or "not recorded"
    if training["video"]:
        patch = model["temporal_patch_size"]
        yield (
            "clips",
            (
                f"{training['num_frames']} frames, {data['time_scale']:.4g} s apart; patches of "
                f"{patch}"
            ),
        )
    yield "frame size", f"{data['image_size'] or 'see config.json'} px"
    hub = f"{REPOSITORIES.get(data['vae'])}, downloaded on first use"
    own = f"its own, in `{published.VAE_FOLDER}/`"
    yield "VAE", own if vae else "none, the model works on pixels" if data["vae"] == "none" else hub
    sampler = generation.SAMPLER | {
        key: training[key] for key in generation.SAMPLER if key in training
    }
    yield (
        "sampler",
        ", ".join(f"{key} {value}" for key, value in sampler.items() if value is not None),
    )
    if math.isfinite(state["best_loss"]):
        yield "validation loss", f"{state['best_loss']:.4f}, the lowest of the last phase"


def score_table(ckpt, sha256, path):
    """The values of a manifest as a table in Markdown.

    Raises UserError unless its weights have this SHA-256.
    """
    scores = manifest.read_manifest(path)
    if scores["generated"]["source"].get("weights_sha256") != sha256:
        advice = "sample from that checkpoint, then run evaluate.py"
        raise UserError(
            f"--scores {path}: scores of other weights; expected the EMA weights of {ckpt}; "
            f"{advice}"
        )
    head = f"\n`{scores['protocol']}`, code {scores['code'] or 'unknown'}:\n\n| | |\n|---|---|\n"
    cells = [
        (key, "-" if value is None else f"{value:.4g}") for key, value in scores["values"].items()
    ]
    return head + "".join(f"| {key} | {value} |\n" for key, value in cells)


if __name__ == "__main__":
    main()

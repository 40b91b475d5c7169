"""Export a checkpoint to a folder to share: EMA weights, config, own VAE and card (README.md).

    python scripts/export.py results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt exported \
        --dtype fp16 --scores motion.json
    python scripts/export.py results/demo --html descent.html
    python scripts/export.py CAUSAL --html world.html --given first.png

Pass the folder to sample_gd.py and train.py as --ckpt. An fp32 export gives the same samples as its
checkpoint, bit for bit. A VAE that was a folder is copied to `vae/`, so you can move the export to
another machine. --html writes a page for a browser: it rolls clips downhill (docs/descent.md), or
draws frames as you steer, if the model is causal (docs/long-videos.md).
"""

import engine  # noqa: F401
import math
import os
from pathlib import Path

import checkpoint
import descent
import published
from models import EBMS, NAMES
from runtime.atomic import write_file
from runtime.cli import (
    ArgumentParser,
    UserError,
    check_writable,
    flag_text,
    one_line,
    one_line_errors,
    say,
    writing,
    wrong_input,
)
from scoring import manifest
from vae import REPOSITORIES, check_same, load_vae
from video.inputs import find_clips
from video.samples import model_of

SHOWN = 20  # classes that the card names
CARD = """# {name}

Trained with {trained_with}. `config.json` holds all settings. Sampling uses the sampler below
unless you pass other flags. Replace `FOLDER` by this folder, and `DATA` by a folder of videos or \
images of the same
classes{and_actions}.

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
        "--given",
        nargs="+",
        metavar="FILE",
        help=(
            "videos or pictures whose first frames start the worlds on the page of a causal model; "
            "default: noise"
        ),
    )
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
        starts = open_starts(args, flag, state["config"]["data"], config)
        vae = load_vae_folder(args.vae, flag, state["config"]["data"])
        sha256 = checkpoint.weights_sha256(state["ema"]) if args.scores else None
        scores = "".join(score_table(args.ckpt, sha256, path) for path in args.scores)
    if args.folder:
        card = make_card(state, config, args.dtype, vae, scores)
        with writing(args.folder):
            published.write_export(args.folder, state, args.dtype, card, vae)
        size = sum(file.stat().st_size for file in Path(args.folder).rglob("*")) / 1e6
        names = [published.WEIGHTS, published.CONFIG, published.CARD]
        if vae:
            names.append(f"{published.VAE_FOLDER}/")
        say(f"{args.folder}: {', '.join(names)}, {size:.1f} MB; use it as --ckpt {args.folder}")
    if args.html:
        name = model_of(args.ckpt).name
        page = descent.make_page(name, state, config, starts).encode("utf-8", "replace")
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
        page = os.path.abspath(args.html)
        if args.folder and Path(os.path.abspath(args.folder)).is_relative_to(page):
            raise UserError(f"--html {args.html}: becomes the folder of DIR; name another file")


def open_starts(args, flag, data, config):
    """What the worlds of a page begin with: the first temporal patch of each clip of --given.

    Raises UserError.
    """
    if args.given and not (args.html and config.causal):
        raise UserError(
            f"{flag_text(args, 'given')}: applies to the page of a causal model; expected --html, "
            f"and {flag} to be causal; remove the flag"
        )
    starts = []
    for path in args.given or ():
        for clip in find_clips("--given", path, ("video", "image")):
            frames = range(config.temporal_patch_size)
            pixels = clip.read(frames, data["time_scale"], config.input_size)
            label = None
            if clip.class_name in data["classes"]:
                label = data["classes"].index(clip.class_name)
            starts.append({"pixels": pixels, "label": label})
    return starts


def make_card(state, config, dtype, vae, scores):
    """The model card (README.md) of an exported folder. config: its EqMConfig."""
    video = "--video " if state["config"]["training"]["video"] else ""
    rope = "--use-rope " if config.use_rope else ""
    frames = f"--num-frames {state['config']['training']['num_frames']} " if video else ""
    rows = []
    for key, value in facts(state, config, dtype, vae):
        text = one_line(value).replace("|", "/")
        rows.append(f"| {key} | {text} |")
    return CARD.format(
        name=config.name,
        trained_with=config.learns.title,
        and_actions=" and actions" if config.actions else "",
        about="\n".join(rows),
        sample=f"{video}--ckpt FOLDER --num-samples 16 --folder samples",
        train=f"{video}{frames}{rope}--ckpt FOLDER --data-path DATA",
        steps=state["step"] + 10_000,
        scores=scores or "\nNo scores yet.\n",
    )


def load_vae_folder(folder, flag, data):
    """The VAE of a checkpoint if it is a folder, at `folder` if it has moved.

    None for pixels and downloads.
    """
    if folder is None and data["vae"] in ("none", *REPOSITORIES):
        return None
    vae = load_vae(folder, data["vae"], flag)
    check_same(vae, data.get("vae_sha256"), flag)
    return vae


def facts(state, config, dtype, vae):
    """Yield the rows of the card's table: (name, value)."""
    data = state["config"]["data"]
    training = state["config"]["training"]
    classes = data["classes"]
    size = sum(value.numel() for value in state["ema"].values()) / 1e6
    yield "model", f"{size:.1f} M parameters, {dtype}, averaged weights of step {state['step']}"
    names = ", ".join(classes[:SHOWN])
    names += ", ..." if len(classes) > SHOWN else ""
    yield "classes", f"{len(classes)}: {names}"
    actions = config.action_names
    if actions:
        yield "actions", f"{len(actions)}, one per frame: {', '.join(actions)}"
    yield "data", os.path.basename(str(training.get("data_path") or "")) or "not recorded"
    if training["video"]:
        time = f"{data['time_scale']:.4g} s apart; patches of {config.temporal_patch_size}"
        yield "clips", f"{training['num_frames']} frames, {time}"
    yield "frame size", f"{data['image_size'] or 'see config.json'} px"
    if vae:
        yield "VAE", f"its own, in `{published.VAE_FOLDER}/`"
    elif data["vae"] == "none":
        yield "VAE", "none, the model works on pixels"
    else:
        yield "VAE", f"{REPOSITORIES.get(data['vae'])}, downloaded on first use"
    sampler = descent.sampler_settings(training)
    settings = [f"{name} {value}" for name, value in sampler.items() if value is not None]
    yield "sampler", ", ".join(settings)
    teacher = training.get("teacher")
    if teacher:
        name = model_of(teacher["checkpoint"]).name
        yield "student of", f"{name}, guidance {teacher['guidance']:g}"
    if math.isfinite(state["best_loss"]):
        yield "validation loss", f"{state['best_loss']:.4f}, the lowest of the last phase"


def score_table(ckpt, sha256, path):
    """The values of a manifest as a table in Markdown.

    Raises UserError unless its weights have this SHA-256.
    """
    scores = manifest.read_manifest(path)
    if scores["generated"]["source"].get("weights_sha256") != sha256:
        raise UserError(
            f"--scores {path}: scores of other weights; expected the EMA weights of {ckpt}; "
            "sample from that checkpoint, then run evaluate.py"
        )
    table = f"\n`{scores['protocol']}`, code {scores['code'] or 'unknown'}:\n\n| | |\n|---|---|\n"
    for name, value in scores["values"].items():
        cell = "-" if value is None else f"{value:.4g}"
        table += f"| {name} | {cell} |\n"
    return table


if __name__ == "__main__":
    main()

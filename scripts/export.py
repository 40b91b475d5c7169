"""Make a folder to share from a checkpoint: model.safetensors (the averaged weights) and config.json (what they are).

    python scripts/export.py results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt exported --dtype fp16

The folder is a --ckpt for sample_gd.py and train.py. In fp32 it samples bit for bit what the checkpoint samples.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import checkpoint
import models
import published
from models import EBMS, NAMES
from runtime.cli import ArgumentParser, UserError, check_writable, fail, say


def parse_args():
    parser = ArgumentParser(description="Make a folder to share from a checkpoint: weights and what they are.")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint of train.py or a published image model")
    parser.add_argument("folder", metavar="DIR", help="made if it is not there; must be empty")
    parser.add_argument("--dtype", choices=published.DTYPES, default="fp32", help="of the weights; fp16 halves them")
    parser.add_argument("--model", choices=NAMES, metavar="NAME", help="EqM-S/4 ...; published models need it")
    parser.add_argument("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        check_writable("DIR", args.folder)
        if os.path.isdir(args.folder) and os.listdir(args.folder):
            raise UserError(f"DIR {args.folder}: exists and is not empty; name a new folder")
        state = checkpoint.load(args.ckpt, **models.shape_of(args.model), ebm=args.ebm)
        checkpoint.check_name(args.ckpt, state, args.model)
        checkpoint.check(args.ckpt, checkpoint.config_of(args.ckpt, state), ebm=args.ebm)
    except UserError as error:
        fail(error)
    try:
        published.write_export(args.folder, state, args.dtype)
    except OSError as error:
        fail(error, status=1)
    size = sum(file.stat().st_size for file in Path(args.folder).iterdir()) / 1e6
    say(f"{args.folder}: {', '.join(published.EXPORT)}, {size:.1f} MB; use it as --ckpt {args.folder}")


if __name__ == "__main__":
    main()

"""Export a checkpoint to a folder to share: model.safetensors (the EMA weights) and config.json (their configuration).

    python scripts/export.py results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt exported --dtype fp16

sample_gd.py, evaluate.py and train.py take the folder as --ckpt. In fp32 its samples are bit for bit those of the
checkpoint.
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
    parser = ArgumentParser(description="Export a checkpoint to a folder to share: EMA weights and configuration.")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint of train.py or a published image model")
    parser.add_argument("folder", metavar="DIR", help="folder to write; must be new or empty")
    dtype = "precision of the weights; fp16 halves the size"
    parser.add_argument("--dtype", choices=published.DTYPES, default="fp32", help=dtype)
    name = "EqM-{Ti,S,B,L,XL}/{2,4,8}; published models need it"
    parser.add_argument("--model", choices=NAMES, metavar="NAME", help=name)
    parser.add_argument("--ebm", choices=EBMS, help="energy of the model; published models may need it")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        check_writable("DIR", args.folder)
        if os.path.isdir(args.folder) and os.listdir(args.folder):
            raise UserError(f"DIR {args.folder}: exists and is not empty; name a new folder")
        state = checkpoint.load(args.ckpt, **models.model_shape(args.model), ebm=args.ebm)
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

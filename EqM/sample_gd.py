"""Sample videos from a checkpoint by gradient descent.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --video --num-frames 16 \
        --ckpt results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt --num-samples 16 --folder samples

The checkpoint knows its architecture, latents, classes and frame rate. A flag that says them again is checked.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

import checkpoint
import distributed
import samplers
from distributed import COUNT, NATURAL, POSITIVE, ArgumentParser, UserError, check_writable, fail, normal, rank, say
from models import NAMES
from vae import load_vae
from video_io import write_samples


def parse_args():
    parser = ArgumentParser(description="Sample videos from a checkpoint by gradient descent.")
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", required=True, metavar="FILE", help="a checkpoint of train.py")
    add("--video", action="store_true", help="sample videos, which is all there is so far")
    add("--num-frames", type=COUNT, metavar="N", help="any number with rotary positions; none = as trained last")
    add("--fps", type=POSITIVE, metavar="X", help="frames per second that the clips show; none = as trained")
    add("--time-scale", type=POSITIVE, metavar="X", help="the same in seconds per frame")
    add("--classes", nargs="+", metavar="C", help="names or numbers, taken in turn; none = all")
    add("--num-samples", "--num-fid-samples", type=COUNT, default=16, metavar="N", help="number of videos")
    add("--seed", "--global-seed", type=NATURAL, default=0, metavar="N", help="decides the noise")
    add("--no-ema", action="store_true", help="use the weights as trained, not their average")

    add = parser.add_argument_group("how").add_argument
    add("--folder", default="samples", metavar="DIR", help="where the videos go")
    add("--batch-size", type=COUNT, default=16, metavar="N", help="videos per rank at a time")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is mixed precision")

    add = parser.add_argument_group("checked against the checkpoint, if given").add_argument
    add("--model", choices=NAMES, metavar="NAME", help="EqM-S/4 ...")
    add("--use-rope", action="store_true", default=None, help="the checkpoint has 3D rotary positions")
    add("--temporal-patch-size", type=COUNT, metavar="N", help="frames per patch")
    add("--image-size", type=COUNT, metavar="PX", help="height and width of the frames")
    add("--num-classes", type=COUNT, metavar="N", help="classes of the model")
    add("--vae", metavar="VAE", help="may name another place for the checkpoint's VAE")
    distributed.add_sampling_flags(parser)
    return parser.parse_args()


def load_checkpoint(args):
    """(network, data part of the checkpoint's config, VAE), after all the checks that need no GPU."""
    model, config, step = checkpoint.load_model(
        args.ckpt,
        use_ema=not args.no_ema,
        use_rope=args.use_rope,
        temporal_patch_size=args.temporal_patch_size,
        num_classes=args.num_classes,
    )
    data, training = config["data"], config["training"]
    if args.model not in (None, training["model"]):
        raise UserError(f"--model {args.model}: the checkpoint has {training['model']}: leave the flag out")
    if args.image_size not in (None, data["image_size"]):
        raise UserError(f"--image-size {args.image_size}: the checkpoint has {data['image_size']}: leave the flag out")
    vae = load_vae(args.vae or data["vae"])
    same_kind = (vae.name == "none") == (data["vae"] == "none")
    if not same_kind or (vae.channels, data["image_size"] // vae.downsample) != (
        model.config.in_channels,
        model.config.input_size,
    ):
        raise UserError(f"--vae {vae.name}: the checkpoint was trained with {data['vae']}: name a place of that one")
    args.num_frames = args.num_frames or training["num_frames"]
    try:
        model.config.check_num_frames(args.num_frames)
    except ValueError as error:
        raise UserError(f"--num-frames {args.num_frames}: {error}") from error
    name = checkpoint.model_name(**asdict(model.config))
    say(f"{args.ckpt}: {name}, step {step}, trained on {training['num_frames']} frames")
    return model, data, vae


def seconds_per_frame(args, data):
    if args.fps and args.time_scale:
        raise UserError("--fps and --time-scale say the same: give one of them")
    return args.time_scale or (1 / args.fps if args.fps else data["frame_interval"][0] / data["fps"])


def choose_labels(args, names):
    """The label of each sample, (num_samples,) int64: the classes in turn."""
    labels = []
    for word in args.classes or range(len(names)):
        if word in names:
            labels.append(names.index(word))
        elif str(word).isdecimal() and int(word) < len(names):
            labels.append(int(word))
        else:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"--classes {word}: no such class; wanted one of {known} or a number below {len(names)}")
    return torch.tensor(labels)[torch.arange(args.num_samples) % len(labels)]


def main():
    args = parse_args()
    try:
        distributed.check_devices()
        check_writable("--folder", args.folder)
        model, data, vae = load_checkpoint(args)
        time_scale = seconds_per_frame(args, data)
        labels = choose_labels(args, data["classes"])
    except UserError as error:
        fail(error)
    try:
        sample(args, model, data, vae, time_scale, labels)
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # a disk that is full, memory that is not enough
        fail(error, status=1)
    distributed.stop()


def sample(args, model, data, vae, time_scale, labels):
    """The ranks share the samples; rank 0 writes them."""
    device = distributed.start()
    config, numbers = model.config, distributed.share(args.num_samples)
    shape = (config.in_channels, args.num_frames, config.input_size, config.input_size)
    latents, _ = samplers.generate(
        model.to(device),
        normal(args.seed, "sample", 0, numbers, shape).to(device),
        labels[numbers].to(device),
        torch.full((len(numbers),), time_scale, device=device),
        null_label=config.num_classes,
        batch_size=args.batch_size,
        show=rank() == 0,
        **distributed.sampling_settings(args),
    )
    videos = distributed.collect(numbers, vae.to(device).decode(latents))
    if rank() == 0:
        names = [data["classes"][label] for label in labels.tolist()]
        write_samples(args.folder, videos.numpy(), labels, 1 / time_scale, names)
        about = {"classes": data["classes"], "time_scale": time_scale, "flags": vars(args)}
        (Path(args.folder) / "samples.json").write_text(json.dumps(about, indent=2))
        say(f"{args.folder}: {len(videos)} videos of {args.num_frames} frames, sheet.png and samples.npz")


if __name__ == "__main__":
    main()

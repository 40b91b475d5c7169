"""Score generated clips against real ones, and write the values with all that they depend on to a manifest.

    torchrun --nproc_per_node=8 EqM/evaluate.py --metric fvd --ckpt FILE --data-path datasets/ucf-101 \
        --detector i3d_torchscript.pt --out fvd.json
    python EqM/evaluate.py --metric motion --samples samples --data-path datasets/moving-shapes --out motion.json
    python EqM/evaluate.py --manifest fvd.json --out again.json

fvd          Fréchet distance of the features of whole clips; fvd2048_16f_cfg1 is the protocol of 2,048 clips of 16
             frames without guidance, which has to be chosen (--cfg-scale in training or sampling)
fid          Fréchet distance of the features of all frames, or of images
motion       Moving Shapes only, where the truth is known: direction, shape, speed and area of the moving object; of
             bouncing ones whether it stays one object, its speed, and whether it turns at the borders and only there
consistency  any videos: drift over the clip, seams at the borders of temporal patches
nearest      any videos: how near to training clips they are, beside held-out real clips: does the model only remember?
prediction   real clips of which --given-frames are given: PSNR and SSIM of those that --ckpt predicts

The generated clips are sampled from a checkpoint (--ckpt), batch by batch, or read from a folder of sample_gd.py
(--samples). The ranks share all clips by index, so the number of ranks changes the values by rounding only.
--manifest repeats a run and compares the values; if they do not agree, the exit status is 1.
"""

import itertools
import os
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import generation
from given import frame_ranges
from runtime import cli, distributed
from runtime.cli import (
    COUNT,
    NATURAL,
    NON_NEGATIVE,
    SHARE,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    one_line_errors,
    say,
)
from runtime.distributed import rank
from runtime.untrusted import file_sha256
from scoring import bounce, frechet, manifest, sources
from scoring.bounce import is_bouncing, read_bounce, score_bounce
from scoring.consistency import score_consistency
from scoring.frechet import score_frechet
from scoring.motion import read_truth, score_motion
from scoring.nearest import check_split, describe_training, score_nearest
from scoring.prediction import check_prediction, check_prediction_flags, score_prediction
from video.index import check_data_path, latents_settings

# Default number of clips
NUM_REAL = {"fvd": 2048, "fid": 2048, "motion": 96, "consistency": 256, "nearest": 256, "prediction": 256}
SPLITS = {name: "train" if name in frechet.CALLS else "val" for name in NUM_REAL}  # default split of the real clips
# Flags that may be given beside --manifest, as they do not change the values
FREE_FLAGS = {"manifest", "out", "ckpt", "samples", "data_path", "detector", "vae", "cache", "num_workers", "tolerance"}
MISSING = object()
# What earlier versions did, whose manifests lack these flags
EARLIER_FLAGS = {
    "given_frames": None, "samples_per_clip": 1, "window": None, "overlap": None, "guidance_chosen": None,
    "keep_background": True,
}  # fmt: skip


def parse_args():
    """(flags, names of those that were given)."""
    parser = ArgumentParser(description="Score generated clips against real ones.")
    add = parser.add_argument_group("clips and metric").add_argument
    add("--metric", choices=list(NUM_REAL), default="motion", help="motion is for Moving Shapes only")
    ckpt = "sample from this checkpoint of train.py, folder of scripts/export.py or published image model"
    add("--ckpt", metavar="FILE", help=ckpt + "; this or --samples")
    samples = "a folder that sample_gd.py has written, or several: --out is then a file in each; this or --ckpt"
    add("--samples", nargs="+", metavar="DIR", help=samples)
    add("--data-path", metavar="DIR", help="folder of the videos (images) of training, not a latent cache")
    detector = "TorchScript feature network, for fvd and fid only: i3d_torchscript.pt, as in StyleGAN-V and most FVD "
    detector += "code, or inception-2015-12-05.pt of StyleGAN2-ADA, or one that is called in the same way (see "
    detector += "scoring/frechet.py). TorchScript is a program: use a file from a source you trust"
    add("--detector", metavar="FILE", help=detector)
    split = "split of the real clips; default: train for fvd and fid, else val"
    add("--split", choices=["train", "val", "all"], help=split)
    given = "prediction: the frames that are given, such as 0-3,12-15; default: the first half"
    add("--given-frames", type=frame_ranges, metavar="RANGES", help=given)
    per_clip = "prediction: samples of each real clip; mean and best score, and that of their average"
    add("--samples-per-clip", type=COUNT, default=1, metavar="N", help=per_clip)
    add("--val-fraction", type=SHARE, default=0.05, metavar="F", help="share of the videos in val, as in training")
    counts = ", ".join(f"{count} for {metric}" for metric, count in NUM_REAL.items())
    add("--num-real", type=COUNT, metavar="N", help=f"number of real clips; default: {counts}")
    resamples = "bootstrap resamples for the interval of fvd (seconds for all) and fid (10 s each for 2048 clips of 16 "
    resamples += "frames on one core); 0 = no interval"
    add("--resamples", type=NATURAL, default=frechet.RESAMPLES, metavar="N", help=resamples)

    add = parser.add_argument_group("run").add_argument
    add("--out", required=True, metavar="FILE.json", help="the manifest; some metrics write pictures beside it")
    repeat = "repeat the run of this manifest; other flags may only name files and folders, --num-workers, --tolerance"
    add("--manifest", metavar="FILE", help=repeat)
    tolerance = "values of --manifest agree if they differ by at most X, or X times the value where that is above 1"
    add("--tolerance", type=NON_NEGATIVE, default=1e-3, metavar="X", help=tolerance)
    cache = "folder for statistics of the real features; default: evaluate-cache beside --out"
    add("--cache", metavar="DIR", help=cache)
    add("--batch-size", type=COUNT, default=16, metavar="N", help="clips per rank at a time")
    add("--num-workers", type=NATURAL, default=1, metavar="N", help="processes per rank that read videos; 0 = none")
    sources.add_checkpoint_flags(parser)
    args = parser.parse_args()
    blank = Namespace(**dict.fromkeys(vars(args), MISSING))
    given = {name for name, value in vars(parser.parse_args(namespace=blank)).items() if value is not MISSING}
    return args, given


# ----------------------------------------------------------------------------------------------------------------------
# Checks, before a GPU or a folder is touched


def repeat_flags(args, given):
    """(flags of --manifest and those given beside it, the manifest). Raises UserError."""
    old = manifest.read_manifest(args.manifest)
    if extra := sorted(given - FREE_FLAGS):
        flag = "--" + extra[0].replace("_", "-")
        raise UserError(f"{flag}: --manifest {args.manifest} sets it: leave it out")
    if isinstance(old["flags"], dict):
        old["flags"] = EARLIER_FLAGS | old["flags"]
    if not isinstance(old["flags"], dict) or old["flags"].keys() != vars(args).keys():
        raise UserError(f"--manifest {args.manifest}: has the flags of another version: repeat it with that code")
    try:
        generation.rope_scale(old["flags"]["rope_scale"])
    except ArgumentTypeError as error:
        raise UserError(f"--manifest {args.manifest}: was made with --rope-scale {error}") from error
    for name in ("ckpt", "samples", "detector"):
        if name in given and old["flags"][name] is None:
            raise UserError(f"--{name}: --manifest {args.manifest} was made without it: leave it out")
    own = {name: getattr(args, name) for name in given}
    flags = old["flags"] | {"manifest": args.manifest, "samples": old["flags"]["samples"] and [old["flags"]["samples"]]}
    if flags["ckpt"]:  # what was left out then is not filled in anew from the checkpoint
        about = old["generated"]
        flags |= {"window": about.get("window") or about["num_frames"], "stop_below": flags["stop_below"] or 0.0}
    flags |= own
    if len(flags["samples"] or []) > 1:
        raise UserError(f"--samples: --manifest {args.manifest} is of one folder: give one")
    return Namespace(**flags), old


def check_flags(args, given):
    """Set defaults that depend on the metric; raise UserError for flags that contradict each other or the machine."""
    cli.check_devices()
    cli.check_speed_flags(args)
    if (args.ckpt is None) == (args.samples is None):
        raise UserError("--ckpt and --samples: give one of them, where the generated clips come from")
    check_prediction_flags(args, given)
    if args.samples is not None:
        parser = ArgumentParser()
        sources.add_checkpoint_flags(parser)
        unused = vars(parser.parse_args([])).keys() - {"num_samples", "temporal_patch_size"}
        if extra := sorted(given & unused):
            flag = "--" + extra[0].replace("_", "-")
            raise UserError(f"{flag}: the clips of --samples {args.samples} are already sampled: leave it out")
    if args.data_path is None:
        raise UserError("--data-path: not given; wanted the folder of real videos")
    needs_detector = args.metric in frechet.CALLS
    if needs_detector != (args.detector is not None):
        found = "not given; wanted a TorchScript file (see --help)" if needs_detector else f"{args.detector}: not used"
        raise UserError(f"--detector: {found} for --metric {args.metric}")
    for flag, count in (("--num-real", args.num_real), ("--num-samples", args.num_samples)):
        if count == 1 and args.metric not in ("motion", "prediction"):
            raise UserError(f"{flag} 1: --metric {args.metric} needs at least 2 clips")
    if args.resamples == 1:
        raise UserError("--resamples 1: one resample has no spread; wanted 0 (no interval) or at least 2")
    args.num_real = args.num_real or NUM_REAL[args.metric]
    args.split = args.split or SPLITS[args.metric]
    if args.metric == "nearest":
        check_split(args)
    if os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: a folder; wanted the name of a JSON file")
    check_writable("--out", os.path.dirname(args.out) or ".")
    check_writable("--cache", cache_folder(args))


def cache_folder(args):
    return Path(args.cache) if args.cache else Path(args.out).parent / "evaluate-cache"


def open_generated(args):
    """The source of the generated clips (see sources.py), checked against the metric. Raises UserError."""
    place = f"--ckpt {args.ckpt}" if args.ckpt else f"--samples {args.samples}"
    if args.ckpt and args.num_samples is None:
        args.num_samples = args.num_real * args.samples_per_clip
    generated = sources.FromCheckpoint(args) if args.ckpt else sources.FromFolder(args)
    args.num_samples = len(generated.labels)
    least = 1 if args.metric in ("motion", "prediction") else 2
    if args.num_samples < least:
        raise UserError(f"{place}: has {args.num_samples} clips, --metric {args.metric} needs at least {least}")
    if generated.num_frames == 1 and args.metric != "fid":
        raise UserError(f"{place}: holds images, --metric {args.metric} needs videos of at least 2 frames")
    if args.metric in frechet.CALLS and generated.guidance is None:
        advice = "add it here" if args.ckpt else "sample again with it"
        raise UserError(
            f"{place}: --metric {args.metric} depends on the guidance, which nobody has chosen; expected --cfg-scale "
            f"in training or sampling; {advice} (1 turns guidance off)"
        )
    if args.metric == "prediction":
        check_prediction(args, generated)
    if args.metric == "motion" and (generated.labels < 0).any():
        raise UserError(f"{place}: has samples without a class, --metric motion needs one")
    if args.metric == "consistency" and generated.temporal_patch_size is None:
        raise UserError(f"{place}: samples.json has no temporal_patch_size: give --temporal-patch-size")
    return generated


def check_data(args, generated):
    """Raise UserError unless --data-path holds videos (images), and for --metric motion the truth of their classes."""
    check_data_path(args.data_path, images=generated.images)
    if latents_settings(args.data_path, generated.images) is not None:
        raise UserError(f"--data-path {args.data_path}: a latent cache; wanted the folder of its videos")
    if args.metric == "motion":
        if not shapes_json(args).exists():
            found = f"--data-path {args.data_path} has no shapes.json"
            raise UserError(f"--metric motion is for Moving Shapes, {found}: take consistency, nearest or fvd")
        check_truth(args, generated, [generated.classes[label] for label in generated.labels.unique()])


def check_truth(args, generated, names):
    """Raise UserError unless the truth about the motion of some classes is known."""
    bouncing = is_bouncing(shapes_json(args))
    if bouncing and generated.num_frames < bounce.WINDOW:
        raise UserError(f"--data-path {args.data_path}: the tracker of bouncing shapes needs {bounce.WINDOW} frames")
    for name in names:
        (read_bounce if bouncing else read_truth)(shapes_json(args), name, generated.image_size, generated.time_scale)


def shapes_json(args):
    return Path(args.data_path) / "shapes.json"


def truth_file(args):
    """The shapes.json of Moving Shapes that do not bounce, None for other data."""
    path = shapes_json(args)
    return path if path.exists() and not is_bouncing(path) else None


# ----------------------------------------------------------------------------------------------------------------------
# The manifest and the values


def protocol(args, num_frames, guidance):
    """A name such as fvd2048_16f_cfg1: metric, number of clips, frames, guidance (fvd and fid), and other choices."""
    split = "" if args.split == SPLITS[args.metric] else f"_{args.split}"
    if args.metric == "prediction":
        best = "" if args.samples_per_clip == 1 else f"_best{args.samples_per_clip}"
        return f"prediction{args.num_real}{best}{split}_{len(args.given_frames)}of{num_frames}f"
    real = "" if args.num_real == args.num_samples else f"_real{args.num_real}"
    chosen = f"_cfg{guidance:g}" if args.metric in frechet.CALLS else ""
    return f"{args.metric}{args.num_samples}{real}{split}_{num_frames}f{chosen}"


def start_manifest(args, generated, real, num_features):
    """The manifest but for its values: all that they depend on. `real` describes the real clips."""
    shared = {"num_clips": args.num_samples, "num_frames": generated.num_frames, "image_size": generated.image_size}
    detector = args.detector and {
        "path": str(args.detector),
        "sha256": file_sha256(args.detector),
        "num_features": num_features,
        "call": frechet.CALLS[args.metric],
    }
    return {
        "format": manifest.FORMAT,
        "metric": args.metric,
        "protocol": protocol(args, generated.num_frames, generated.guidance),
        "generated": generated.provenance() | shared,
        "real": real,
        "detector": detector,
        "code": manifest.code_commit(),
        "packages": manifest.packages(),
        "flags": vars(args),
    }


def score(args, generated, clips, training, key, detector, num_features, device):
    """(values, result, paths of real videos that could not be decoded); values and result are None except on rank 0."""
    bad = []
    generated.to(device)
    streams = sources.generated_stream(args, generated), sources.real_stream(args, clips, device, bad)
    if args.metric == "motion":
        score_shapes = score_bounce if is_bouncing(shapes_json(args)) else score_motion
        values, result = score_shapes(*streams, shapes_json(args))
    elif args.metric == "consistency":
        plot = Path(args.out).with_suffix(".png")
        windows = generated.window, generated.overlap
        values, result = score_consistency(*streams, generated.temporal_patch_size, plot, *windows)
    elif args.metric == "nearest":
        values, result = score_nearest(*streams, args, training, generated.time_scale, device)
    elif args.metric == "prediction":
        stream = sources.predicted_stream(args, generated, clips, device, bad)
        values, result = score_prediction(stream, args.given_frames, args.out, truth_file(args))
    else:
        cached = cache_folder(args) / f"{key}.safetensors"
        values, result = score_frechet(args, *streams, detector, num_features, cached, device)
    return values, result, sorted({path for paths in distributed.gather(bad) for path in paths})


@one_line_errors()
def main():
    args, given = parse_args()
    try:
        args, old = repeat_flags(args, given) if args.manifest else (args, None)
        runs = [prepare(own, given, old) for own in each_folder(args)]
    except UserError as error:
        fail(error)
    with one_line_errors(ValueError):  # features that are not finite
        device = distributed.start()
        difference = None  # of --manifest, which has one run
        while runs:
            difference = run(*runs.pop(0), old, device)
    distributed.stop()
    if difference:
        fail(difference, status=1)


def each_folder(args):
    """The flags for each of --samples; where there are several, --out is a file in each of these folders."""
    folders = list(dict.fromkeys(args.samples or [None]))
    is_name = Path(args.out).name == args.out and Path(args.out).stem not in ("samples", "sheet", "grid")
    if len(folders) > 1 and not is_name:
        raise UserError(f"--out {args.out}: with several --samples the name of a new file in each, such as motion.json")
    for folder in folders:
        out = args.out if len(folders) == 1 else str(Path(folder, args.out))
        yield Namespace(**vars(args) | {"samples": folder, "out": out})


def prepare(args, given, old):
    """All that `run` needs, after the checks that need no GPU. old: a manifest to repeat or None. Raises UserError."""
    real = detector = num_features = new = None
    check_flags(args, given)
    generated = open_generated(args)
    check_data(args, generated)
    if args.detector:
        detector = frechet.load_detector(args.detector)
        num_frames, size = generated.num_frames, generated.image_size
        num_features = frechet.check_detector(args.detector, detector, args.metric, num_frames, size)
    if rank() == 0:  # the others wait for it in start()
        clips, training, about, key = sources.find_real(args, generated)
        if args.metric == "prediction" and truth_file(args):
            check_truth(args, generated, clips.classes)
        if args.metric == "nearest":
            about |= describe_training(args, training, generated.num_frames)
        new = start_manifest(args, generated, about, num_features)
        real = clips, training, sources.json_sha256([key, new["detector"], frechet.CACHE_FORMAT])
        if old:
            manifest.check_same(old, new)
    return args, generated, real, detector, num_features, new


def run(args, generated, real, detector, num_features, new, old, device):
    """Score what `prepare` has found and write the manifest. Returns a line if the values are not those of `old`."""
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    values, result, bad = score(args, generated, *distributed.broadcast(real), detector, num_features, device)
    evaluations = list(itertools.chain(*distributed.gather(generated.evaluations)))
    if rank() != 0:
        return None
    new["real"] |= {"bad_videos": bad}
    new["generated"] |= {"mean_evaluations": sum(evaluations) / len(evaluations)} if evaluations else {}
    repeats = old and manifest.compare_values(args.manifest, old, values, args.tolerance)
    new |= {"values": values, "result": result, "machine": manifest.machine(device), "repeats": repeats}
    manifest.write_manifest(args.out, new)
    for path in bad:
        say(f"{path} can't be decoded; another clip took its place")
    say(f"{new['protocol']}: {args.out}")
    line = repeats and manifest.agreement_line(repeats, old, new)
    if line and repeats["agrees"]:
        say(line)
        return None
    return line


if __name__ == "__main__":
    main()

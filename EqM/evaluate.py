"""Generated clips against real ones: numbers, and a manifest of all that they depend on.

    torchrun --nproc_per_node=8 EqM/evaluate.py --metric fvd --ckpt FILE --data-path datasets/ucf-101 \
        --detector i3d_torchscript.pt --out fvd.json
    python EqM/evaluate.py --metric motion --samples samples --data-path datasets/moving-shapes --out motion.json
    python EqM/evaluate.py --manifest fvd.json --out again.json

fvd          Fréchet distance of the features of whole clips; fvd2048_16f is the protocol of 2,048 clips of 16 frames
fid          Fréchet distance of the features of all frames, or of images
motion       of Moving Shapes, whose truth is known: does the right shape move the right way, as fast, as large?
consistency  of any videos: does the picture drift over the clip, are there seams at the temporal patches?

The clips come from a checkpoint (--ckpt), batch by batch, or from a folder of sample_gd.py (--samples). The ranks share
them by their numbers, so the numbers do not depend on how many ranks there are, except by rounding. --manifest repeats
a run and says whether its values agree; if they don't, the exit status is 1.
"""

import functools
import itertools
import os
from argparse import Namespace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

import generation
from generation import sha256
from runtime import cli, distributed
from runtime.atomic import atomic_write
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
from scoring import consistency, frechet, manifest, motion, sources
from video.index import check_data_path, latents_settings

CLIPS = {"fvd": 2048, "fid": 2048, "motion": 96, "consistency": 256}  # of either kind
SPLITS = {"fvd": "train", "fid": "train", "motion": "val", "consistency": "val"}
CACHE_FORMAT = 1
MOVABLE = {"manifest", "out", "ckpt", "samples", "data_path", "detector", "vae", "cache", "num_workers", "tolerance"}
MISSING = object()


def parse_args():
    """(flags, names of those that were given)."""
    parser = ArgumentParser(description="Score generated clips against real ones.")
    add = parser.add_argument_group("what").add_argument
    add("--metric", choices=list(CLIPS), default="motion", help="motion is for Moving Shapes only")
    ckpt = "sample from this checkpoint, folder of scripts/export.py or published image model; none = see --samples"
    add("--ckpt", metavar="FILE", help=ckpt)
    add("--samples", metavar="DIR", help="a folder that sample_gd.py has written; none = see --ckpt")
    add("--data-path", metavar="DIR", help="the videos (images) that the model was trained on; no latent cache")
    detector = "for fvd i3d_torchscript.pt, which StyleGAN-V's and most FVD code uses, for fid StyleGAN2-ADA's "
    detector += "inception-2015-12-05.pt, or what is called like them (see frechet.py). TorchScript is a program: take "
    add("--detector", metavar="FILE", help=detector + "it from a source you trust; none = for motion, consistency")
    add("--split", choices=["train", "val"], help="real clips are from it; none = train for fvd and fid, else val")
    add("--val-fraction", type=SHARE, default=0.05, metavar="F", help="as in training")
    real = ", ".join(f"{count} for {metric}" for metric, count in CLIPS.items())
    add("--num-real", type=COUNT, metavar="N", help=f"real clips; none = {real}")
    resamples = "bootstrap draws for the interval of fvd (all: seconds) and fid (2048 clips of 16 frames: 10 s each on "
    resamples += "one core); 0 = no interval"
    add("--resamples", type=NATURAL, default=frechet.RESAMPLES, metavar="N", help=resamples)

    add = parser.add_argument_group("how").add_argument
    add("--out", required=True, metavar="FILE.json", help="the manifest; consistency puts a plot beside it")
    add("--manifest", metavar="FILE", help="repeat this; only places may be given beside it; none = a new run")
    tolerance = "by how much repeated values may differ, times the value where that is above 1"
    add("--tolerance", type=NON_NEGATIVE, default=1e-3, metavar="X", help=tolerance)
    cache = "for the statistics of real features; none = the folder evaluate-cache beside --out"
    add("--cache", metavar="DIR", help=cache)
    add("--batch-size", type=COUNT, default=16, metavar="N", help="clips per rank at a time")
    add("--num-workers", type=NATURAL, default=1, metavar="N", help="processes per rank that read videos; 0 = none")
    add_sampling_flags(parser)
    args = parser.parse_args()
    blank = Namespace(**dict.fromkeys(vars(args), MISSING))
    given = {name for name, value in vars(parser.parse_args(namespace=blank)).items() if value is not MISSING}
    return args, given


def add_sampling_flags(parser):
    """Flags that --ckpt alone uses, but for those that FromFolder reads."""
    add = parser.add_argument_group("sampling from --ckpt").add_argument
    add("--video", action="store_true", default=None, help="the checkpoint has videos; none = not checked")
    generation.add_what_flags(add, None, "generated clips; none = as --num-real, or all of --samples")
    generation.add_checked_flags(parser)
    cli.add_speed_flags(parser)
    generation.add_sampling_flags(parser)


# ----------------------------------------------------------------------------------------------------------------------
# Before anything is touched


def repeat(args, given):
    """(flags of --manifest, with the places that were given beside it, the manifest); raises UserError."""
    old = manifest.read(args.manifest)
    if extra := sorted(given - MOVABLE):
        flag = "--" + extra[0].replace("_", "-")
        raise UserError(f"{flag}: --manifest {args.manifest} decides it: leave it out; only places may be given")
    if not isinstance(old["flags"], dict) or old["flags"].keys() != vars(args).keys():
        raise UserError(f"--manifest {args.manifest}: its flags are not those of this code: repeat it with its own")
    for name in ("ckpt", "samples", "detector"):
        if name in given and old["flags"][name] is None:
            raise UserError(f"--{name}: --manifest {args.manifest} was made without it: leave it out")
    places = {name: getattr(args, name) for name in given}
    return Namespace(**old["flags"] | {"manifest": args.manifest} | places), old


def check_flags(args, given):
    """Settle what depends on the metric; raise UserError for flags that contradict each other or the machine."""
    cli.check_devices()
    cli.check_speed_flags(args)
    generation.check_sampling_flags(args)
    if (args.ckpt is None) == (args.samples is None):
        raise UserError("--ckpt and --samples say where generated clips come from: give one of them")
    if args.samples is not None:
        parser = ArgumentParser()
        add_sampling_flags(parser)
        idle = vars(parser.parse_args([])).keys() - {"num_samples", "temporal_patch_size"}
        if extra := sorted(given & idle):
            flag = "--" + extra[0].replace("_", "-")
            raise UserError(f"{flag}: the clips of --samples {args.samples} are made already: leave it out")
    if args.data_path is None:
        raise UserError("--data-path: not given; wanted the folder of real videos")
    wants_detector = args.metric in frechet.CALLS
    if wants_detector != (args.detector is not None):
        found = "not given; wanted a TorchScript file (see --help)" if wants_detector else f"{args.detector}: no use"
        raise UserError(f"--detector: {found} for --metric {args.metric}")
    for flag, count in (("--num-real", args.num_real), ("--num-samples", args.num_samples)):
        if count == 1 and args.metric != "motion":
            raise UserError(f"{flag} 1: --metric {args.metric} wants at least 2 clips")
    if args.resamples == 1:
        raise UserError("--resamples 1: one draw has no spread; wanted 0 (no interval) or at least 2")
    args.num_real = args.num_real or CLIPS[args.metric]
    args.split = args.split or SPLITS[args.metric]
    if os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: a folder; wanted the name of a JSON file")
    check_writable("--out", os.path.dirname(args.out) or ".")
    check_writable("--cache", cache_folder(args))


def cache_folder(args):
    return Path(args.cache) if args.cache else Path(args.out).parent / "evaluate-cache"


def open_generated(args):
    """Where generated clips come from, fit for the metric (see sources.py). Raises UserError."""
    place = f"--ckpt {args.ckpt}" if args.ckpt else f"--samples {args.samples}"
    if args.ckpt and args.num_samples is None:
        args.num_samples = args.num_real
    made = sources.FromCheckpoint(args) if args.ckpt else sources.FromFolder(args)
    args.num_samples = len(made.labels)
    if args.num_samples < (1 if args.metric == "motion" else 2):
        raise UserError(f"{place}: {args.num_samples} clips, --metric {args.metric} wants more")
    if made.num_frames == 1 and args.metric != "fid":
        raise UserError(f"{place}: holds images, --metric {args.metric} wants videos of at least 2 frames")
    if args.metric == "consistency" and made.patch is None:
        raise UserError(f"{place}: its samples.json does not say the temporal patch: give --temporal-patch-size")
    return made


def check_data(args, made):
    """Raise UserError unless --data-path has videos (images), and for --metric motion their truth."""
    check_data_path(args.data_path, images=made.images)
    if latents_settings(args.data_path, made.images) is not None:
        raise UserError(f"--data-path {args.data_path}: a latent cache; wanted the folder of its videos")
    if args.metric == "motion":
        for label in made.labels.unique():
            motion.truths(Path(args.data_path) / "shapes.json", made.classes[label], made.image_size, made.time_scale)


def protocol(args, num_frames):
    """fvd2048_16f, if there are 2,048 clips of either kind; what is not usual is in the name."""
    real = "" if args.num_real == args.num_samples else f"_real{args.num_real}"
    split = "" if args.split == SPLITS[args.metric] else f"_{args.split}"
    return f"{args.metric}{args.num_samples}{real}{split}_{num_frames}f"


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of streams of clips (sources.py): (values, result) on rank 0, (None, None) elsewhere


def in_order(found):
    """What all ranks have found, rows (number, ...), in the order of the numbers: the columns behind them."""
    rows = sorted(itertools.chain(*distributed.gather(found)), key=lambda row: row[0])
    return list(zip(*rows, strict=True))[1:]


def score_motion(args, made, real):
    """How often the tracker finds the motion and the shape that were asked for; real clips are the ceiling."""
    truths = functools.cache(functools.partial(motion.truths, Path(args.data_path) / "shapes.json"))

    def look(stream):
        found = []
        for numbers, clips, names, scales in stream:
            for number, clip, name, scale in zip(numbers, clips.cpu().numpy(), names, scales, strict=True):
                found.append((number, motion.track(clip), truths(name, clip.shape[1], scale)))
        tracks, expected = in_order(found)
        return motion.summarize(tracks, expected) | {"confusion": motion.confusion(tracks, expected)}

    result = {"generated": look(made), "real": look(real)}
    if rank() != 0:
        return None, None
    say_all(motion.report(result["generated"], result["real"]))
    names = "direction_accuracy", "shape_accuracy", "speed_ratio", "area_ratio"
    return {name: result["generated"][name] for name in names}, result


def say_all(lines):
    for line in lines:
        say(line)


def score_consistency(args, made, real, patch):
    """Drift over the clip and seams at the temporal patches; the plot lies beside --out."""

    def look(stream):
        found = []
        for numbers, clips, _, _ in stream:
            found += [(number, *consistency.measure(clip.cpu())) for number, clip in zip(numbers, clips, strict=True)]
        return [torch.stack(column) for column in in_order(found)]

    found = look(made), look(real)
    if rank() != 0:
        return None, None
    result = consistency.summarize(*found, patch)
    from scoring import plots  # matplotlib takes a while to load

    picture = Path(args.out).with_suffix(".png")
    plots.plot_consistency(picture, result["by_position"], patch)
    say_all([*consistency.report(result), f"  by position in the clip: {picture}"])
    return {name: result[name] for name in ("seam_score", "change_ratio", "largest_drift")}, result


def score_frechet(args, made, real, detector, width, cached, device):
    """FVD or FID. cached is where the moments of the real features are kept."""
    detector = detector.to(device)

    def look(stream, keep):
        """(Moments of all features on every rank, those of this rank's clips with their numbers)."""
        moments, numbers, kept = frechet.Moments.empty(width, device), [], []
        for part, clips, _, _ in stream:
            features = frechet.extract(detector, clips, args.metric, args.batch_size)
            if features.shape[-1] != width:
                raise UserError(f"--detector {args.detector}: {features.shape[-1]} features, at first it had {width}")
            moments = moments.merge(frechet.Moments.of(features.flatten(0, 1)))
            if keep:
                numbers += part
                kept.append(features.cpu())
        parts = distributed.gather(moments.to("cpu"))
        return functools.reduce(frechet.Moments.merge, parts), numbers, kept

    reference = distributed.broadcast(read_moments(cached, width) if rank() == 0 else None)
    from_cache = reference is not None
    if not from_cache:
        reference, _, _ = look(real, keep=False)
        if rank() == 0:
            write_moments(cached, reference)
    moments, numbers, kept = look(made, keep=args.resamples > 0)
    if args.resamples:
        group = moments.count // args.num_samples  # 1, or frames per clip
        kept = distributed.collect(numbers, torch.cat(kept) if kept else torch.empty(0, group, width))
    if rank() != 0:
        return None, None
    value = frechet.frechet_distance(reference.mean, reference.covariance, moments.mean, moments.covariance)
    result = {"num_features": width, "generated_members": moments.count, "real_members": reference.count}
    result |= {"real_from_cache": from_cache, "resamples": args.resamples, "standard_error": None, "interval95": None}
    if args.resamples:
        error = frechet.bootstrap_error(reference.to(device), kept.to(device), args.resamples, args.seed)
        result |= {"standard_error": error, "interval95": [max(0.0, value - 1.96 * error), value + 1.96 * error]}
    say_all(frechet.report(args.metric, value, result))
    return {args.metric: value}, result


def read_moments(path, width):
    """The Moments in a file, None where none is or it is not sound."""
    try:
        tensors = safetensors.torch.load_file(path)
        count, mean, scatter = (tensors[name] for name in ("count", "mean", "scatter"))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        say(f"{path} is damaged ({error}): computing it anew")
        return None
    return frechet.Moments(int(count), mean, scatter) if mean.shape == (width,) else None


def write_moments(path, moments):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"count": torch.tensor(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors))


# ----------------------------------------------------------------------------------------------------------------------
# The story


def pin(args, made, real, width):
    """A manifest without its numbers: all that they depend on."""
    shared = {"num_clips": args.num_samples, "num_frames": made.num_frames, "image_size": made.image_size}
    detector = args.detector and {
        "path": str(args.detector),
        "sha256": sha256(args.detector),
        "num_features": width,
        "call": frechet.CALLS[args.metric],
    }
    return {
        "format": manifest.FORMAT,
        "metric": args.metric,
        "protocol": protocol(args, made.num_frames),
        "generated": made.provenance() | shared,
        "real": real,
        "detector": detector,
        "code": manifest.code_commit(),
        "packages": manifest.packages(),
        "flags": vars(args),
    }


def score(args, made, clips, decides, detector, width, device):
    """(values, result, real videos that could not be decoded); the first two None but on rank 0."""
    bad = []
    made.to(device)
    streams = sources.generated_stream(args, made), sources.real_stream(args, clips, device, bad)
    if args.metric == "motion":
        scores = score_motion(args, *streams)
    elif args.metric == "consistency":
        scores = score_consistency(args, *streams, made.patch)
    else:
        scores = score_frechet(args, *streams, detector, width, cache_folder(args) / f"{decides}.safetensors", device)
    return *scores, sorted({path for part in distributed.gather(bad) for path in part})


def main():
    args, given = parse_args()
    real = old = detector = width = pinned = repeats = None
    try:
        if args.manifest:
            args, old = repeat(args, given)
        check_flags(args, given)
        made = open_generated(args)
        check_data(args, made)
        if args.detector:
            detector = frechet.load_detector(args.detector)
            width = frechet.check_detector(args.detector, detector, args.metric, made.num_frames, made.image_size)
        if rank() == 0:  # the others wait for it in start()
            real = sources.find_real(args, made)
            pinned = pin(args, made, real[1], width)
            real = real[0], sources.hashed([real[2], pinned["detector"], CACHE_FORMAT])
            if old:
                manifest.check_same(old, pinned)
    except UserError as error:
        fail(error)
    device = distributed.start()
    with one_line_errors(ValueError):  # features that are not finite
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        values, result, bad = score(args, made, *distributed.broadcast(real), detector, width, device)
        evaluations = list(itertools.chain(*distributed.gather(made.evaluations)))
        if rank() == 0:
            pinned["real"] |= {"bad_videos": bad}
            pinned["generated"] |= {"mean_evaluations": sum(evaluations) / len(evaluations)} if evaluations else {}
            repeats = old and manifest.compare(args.manifest, old, values, args.tolerance)
            pinned |= {"values": values, "result": result, "machine": manifest.machine(device), "repeats": repeats}
            manifest.write(args.out, pinned)
            for path in bad:
                say(f"{path} can't be decoded; another clip took its place")
            say(f"{pinned['protocol']}: {args.out}")
    distributed.stop()
    if repeats:
        line = manifest.report(repeats, old, pinned)
        if not repeats["agrees"]:
            fail(line, status=1)
        say(line)


if __name__ == "__main__":
    main()

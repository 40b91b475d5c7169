"""Score folders of samples against real clips; write values and all they depend on to a manifest.

    python EqM/evaluate.py --metric motion --samples samples --data-path datasets/moving-shapes \
        --out motion.json

docs/evaluation.md lists the metrics. The modules of scoring/ say how each is measured.
scripts/score.sh samples and scores. The number of ranks changes the values only by rounding.
"""

import uncaught  # noqa: F401
import os
import sys
from pathlib import Path

import torch

from runtime import cli, distributed
from runtime.cli import (
    COUNT,
    NATURAL,
    SHARE,
    UserError,
    number,
    one_line_errors,
    plural,
    say,
)
from scoring import (
    classifier,
    consistency,
    frechet,
    manifest,
    nearest,
    prediction,
    sources,
)
from video.source import check_data_path

# What is true of one data set only is beside its maker; only its metric imports it.
sys.path.append(str(Path(__file__).resolve().parent.parent / "datasets"))

# Default number of real clips
NUM_REAL = {
    "motion": 96,
    "fvd": 2048,
    "fid": 2048,
    "consistency": 256,
    "nearest": 256,
    "census": 1000,
}
# file names that sample_gd.py uses in its folders
OWN = {"samples", "sheet", "grid", "evaluations", "energy"}
CHOOSES = {
    "nearest": {"split"},
    "prediction": {"split", "num_real"},
    "classifier": {"split", "num_real"},
}
CHOOSES["census"] = {"split"}


def parse_args(words=None):
    parser = cli.ArgumentParser(description="Score folders of samples against real clips.")
    add = parser.add_argument_group("clips and metric").add_argument
    metrics = [*NUM_REAL, "prediction", "classifier"]
    add("--metric", choices=metrics, default="motion", help="motion: Moving Shapes only")
    add(
        "--samples",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of sample_gd.py; with several, --out is a file in each",
    )
    add(
        "--data-path",
        required=True,
        metavar="DIR",
        help="folder of the training videos or images, not a latent cache",
    )
    add(
        "--detector",
        metavar="FILE",
        help=(
            "feature network of fvd and fid: i3d_torchscript.pt of StyleGAN-V and most FVD code, "
            "or "
            "inception-2015-12-05.pt of StyleGAN2-ADA. TorchScript is a program: only use a file "
            "that you trust"
        ),
    )
    add(
        "--split",
        choices=["train", "val", "all"],
        help="real clips of motion and consistency (default: val), fvd and fid (default: train)",
    )
    add(
        "--val-fraction",
        type=SHARE,
        default=0.05,
        help="fraction of the videos in val; use the value of training",
    )
    counts = ", ".join(f"{count} for {metric}" for metric, count in NUM_REAL.items())
    add(
        "--num-real",
        type=number(int, least=2),
        help=(
            "number of real clips; census: of each split; prediction, classifier: all; default: "
            f"{counts}"
        ),
    )
    add(
        "--keep-background",
        action="store_true",
        help="prediction: accept samples of --keep-background",
    )
    test = (
        "real clips that test the classifier. groups: each group of few videos (equal file "
        "stems), held out once; "
    )
    test += (
        "val: the validation split of many videos, without mirrored windows; default: %(default)s"
    )
    add("--classifier-test", choices=[*classifier.RECIPES], default="groups", help=test)
    steps = ", ".join(f"{recipe.steps} for {test}" for test, recipe in classifier.RECIPES.items())
    add(
        "--classifier-steps",
        type=COUNT,
        help=f"training steps of classifier, 16 windows each; default: {steps}",
    )
    add(
        "--seed",
        type=NATURAL,
        default=0,
        help="seed of classifier and of the bootstrap of fvd and fid",
    )
    add(
        "--vae",
        metavar="DIR",
        help="census: new path of the VAE of the samples' model, if it was moved",
    )
    add(
        "--resamples",
        type=NATURAL,
        default=frechet.RESAMPLES,
        help=(
            "bootstrap resamples for the interval of fvd and fid (10 s each for fid of 2048 "
            "clips); 0 "
            "= none"
        ),
    )
    add = parser.add_argument_group("run").add_argument
    add(
        "--out",
        required=True,
        metavar="FILE.json",
        help="the manifest; some metrics write pictures beside it",
    )
    add(
        "--cache",
        metavar="DIR",
        help="folder for statistics of real clips; default: evaluate-cache beside --out",
    )
    add("--batch-size", type=COUNT, default=16, help="clips per rank at a time")
    add(
        "--num-workers",
        type=NATURAL,
        default=1,
        help="processes per rank that read videos; 0 = none",
    )
    return parser.parse_args(words)


def check_flags(args):
    """Raise UserError for flags that contradict each other or the machine. Touches nothing."""
    cli.check_devices()
    if (args.detector is None) == (args.metric in frechet.CALLS):
        advice = (
            "expected a TorchScript file (see --help)"
            if args.detector is None
            else "remove the flag"
        )
        raise UserError(f"--detector: {args.detector} for --metric {args.metric}; {advice}")
    if args.vae and args.metric != "census":
        raise UserError(f"--vae {args.vae}: --metric {args.metric} needs no VAE; remove the flag")
    for name in sorted(args.typed & CHOOSES.get(args.metric, set())):
        raise UserError(
            f"--{name.replace('_', '-')}: --metric {args.metric} chooses its real clips; remove "
            "the flag"
        )
    if os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: a folder; expected the name of a JSON file")
    for folder in map(Path, args.samples):
        out = Path(folder if len(args.samples) > 1 else "", args.out)
        is_own = out.stem in OWN and out.parent.resolve() == folder.resolve()
        if is_own or (len(args.samples) > 1 and Path(args.out).name != args.out):
            raise UserError(
                f"--out {args.out}: expected the name of a new file in each of --samples "
                "(motion.json)"
            )
        cli.check_writable("--out", out.parent)
    cli.check_writable("--cache", args.cache or out.parent)


def find_real(args, samples, detector):
    """(Clips of the real videos, training videos, Truth, the manifest without its values).

    Raises UserError.
    """
    metric = args.metric
    T = samples.num_frames
    images = samples.num_frames == 1
    check_data_path(args.data_path, images, cached=False)
    about = detector and frechet.check_detector(
        args.detector, detector, metric, T, samples.image_size
    )
    split = args.split or manifest.SPLITS.get(metric, "val")
    share = args.val_fraction
    count = args.num_real
    if metric == "prediction":
        split, share, count = (
            samples.about["real"][name] for name in ("split", "val_fraction", "num_clips")
        )
    elif metric == "classifier":
        T = min(T, classifier.MOST_FRAMES)
    count = count or NUM_REAL.get(metric)
    which = (split, share, T, samples.time_scale, samples.image_size)
    clips, training, real = sources.find_real(
        args.data_path, *which, samples.source.get("checkpoint"), images
    )
    if count and len(clips.videos) < count:
        advice = "" if metric == "prediction" else "; a lower --num-real is faster"
        say(
            f"note: --split {split}: {plural(count, 'clip')} from only "
            f"{plural(len(clips.videos), 'video')}{advice}"
        )
    place = f"--data-path {args.data_path}"
    if metric == "nearest" and not training:
        raise UserError(
            f"{place}: no training video is as long as the samples ({T}); sample fewer frames"
        )
    if metric in ("nearest", "census"):
        real["training_sha256"] = sources.videos_sha256(args.data_path, training)
    if metric == "census":
        import sprites_census

        sprites_census.check(samples, clips, place)
        real["vae_sha256"] = sprites_census.find_vae(samples, args.vae).sha256
    elif metric == "classifier":
        classifier.check(samples, clips, training, place, args.classifier_test)
        split = args.classifier_test  # in the name of the protocol
    elif metric == "prediction" and real["videos_sha256"] != samples.about["real"]["videos_sha256"]:
        raise UserError(
            f"{place}: not the videos that {samples.place} continues; pass the folder of those"
        )
    truth = None
    if metric in ("motion", "prediction"):
        import shapes_tracker

        truth = shapes_tracker.find_truth(metric, args.data_path, samples, clips.classes)
    return clips, training, truth, manifest.start(args, samples, split, count, real, about)


def score(args, samples, out, clips, training, truth, new, detector, device, corrupt):
    """(values, result, lines to print) on rank 0.

    Adds paths of real videos that can't be decoded to `corrupt`.
    """
    count = new["real"]["num_clips"]  # None: classifier reads entire videos instead
    real = sources.real_stream(clips, distributed.own_indices(count or 0), args, corrupt)
    streams = sources.generated_stream(samples), real
    if args.metric == "motion":
        import shapes_tracker

        return shapes_tracker.score_shapes(*streams, truth)
    if args.metric == "consistency":
        return consistency.score_consistency(*streams, samples.source)
    if args.metric == "nearest":
        return nearest.score_nearest(
            samples, real, args, training, out.with_suffix(".sheet.png"), device
        )
    if args.metric == "prediction":
        return prediction.score_prediction(samples, real, clips, out, truth)
    if args.metric == "classifier":
        return classifier.score_classifier(samples, clips, training, args, corrupt)
    if args.metric == "census":
        import sprites_census

        return sprites_census.score_census(samples, clips, training, count, args, device)
    cache = Path(args.cache or out.with_name("evaluate-cache"))
    return frechet.score_frechet(*streams, args, detector, new, clips, cache, device)


def run(args, samples, real, detector, device):
    """Score samples and write the manifest."""
    out = Path(args.out if len(args.samples) == 1 else samples.folder / args.out)
    *real, new = distributed.broadcast(real)
    out.parent.mkdir(parents=True, exist_ok=True)
    values, result, lines = score(args, samples, out, *real, new, detector, device, corrupt := [])
    corrupt = sorted({path for paths in distributed.gather(corrupt) for path in paths})
    if distributed.rank() != 0:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = {
        "device": name,
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }
    new |= {"values": values, "result": result, "machine": machine}
    new["real"]["bad_videos"] = corrupt
    manifest.write_manifest(out, new)
    lines += [f"{path} can't be decoded; it is skipped" for path in corrupt]
    for line in (*lines, f"{new['protocol']}: {out}"):
        say(line)


@one_line_errors()
def main():
    args = parse_args()
    jobs = []
    with cli.wrong_input():
        check_flags(args)
        detector = args.detector and frechet.load_detector(args.detector)
        for folder in dict.fromkeys(args.samples):
            samples = sources.Samples(folder)
            samples.check(args.metric, args.keep_background)
            # the others wait in start()
            real = find_real(args, samples, detector) if distributed.rank() == 0 else None
            jobs.append((samples, real))
    with one_line_errors(ValueError):  # features that are not finite
        device = distributed.start()
        # no TF32, which changes features and the exact sums of nearest
        distributed.set_precision("fp32")
        for samples, real in jobs:
            run(args, samples, real, detector, device)
    distributed.stop()


if __name__ == "__main__":
    main()

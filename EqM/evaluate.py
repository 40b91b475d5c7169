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
from typing import NamedTuple

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
from video.clips import Clips
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
OF_SAMPLES = {"samples", "sheet", "grid", "evaluations", "energy"}
# flags without effect, as the metric chooses its real clips
CHOOSES = {
    "nearest": {"split"},
    "prediction": {"split", "num_real"},
    "classifier": {"split", "num_real"},
    "world": {"split", "num_real"},
    "census": {"split"},
}
CONTINUED = "prediction", "world"  # metrics of samples that continue real clips


class RealClips(NamedTuple):
    """What samples are compared with. Clips of videos, training videos, perhaps a truth.

    manifest: without the values.
    """

    clips: Clips
    training: list
    truth: object
    manifest: dict


def parse_args(words=None):
    parser = cli.ArgumentParser(description="Score folders of samples against real clips.")
    add = parser.add_argument_group("clips and metric").add_argument
    add(
        "--metric",
        choices=[*NUM_REAL, "prediction", "classifier", "world"],
        default="motion",
        help="motion: Moving Shapes only; census: Sprites; world: World",
    )
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
        help="feature network of fvd and fid: i3d_torchscript.pt of StyleGAN-V and most FVD code, "
        "or inception-2015-12-05.pt of StyleGAN2-ADA. TorchScript is a program: only use a file "
        "that you trust",
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
        help="number of real clips; census: of each split; not for prediction, classifier, world; "
        f"default: {counts}",
    )
    add(
        "--keep-background",
        action="store_true",
        help="prediction: accept samples of --keep-background",
    )
    add(
        "--classifier-test",
        choices=[*classifier.RECIPES],
        default="groups",
        help="real clips that test the classifier. groups: each group of few videos (equal file "
        "stems), held out once; val: the validation split of many videos, without mirrored "
        "windows; default: %(default)s",
    )
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
        help="seed of classifier, of the real clips of census, and of the bootstrap of fvd and fid",
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
        help="bootstrap resamples for the interval of fvd and fid (10 s each for fid of 2048 "
        "clips); 0 or 1 = none",
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
    add(
        "--batch-size",
        type=COUNT,
        default=16,
        help="clips per rank at a time",
    )
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
        advice = "remove the flag"
        if args.detector is None:
            advice = "expected a TorchScript file (see --help)"
        raise UserError(f"--detector: {args.detector} for --metric {args.metric}; {advice}")
    if args.vae and args.metric != "census":
        raise UserError(f"--vae {args.vae}: --metric {args.metric} needs no VAE; remove the flag")
    for name in sorted(args.typed & CHOOSES.get(args.metric, set())):
        raise UserError(
            f"--{name.replace('_', '-')}: --metric {args.metric} chooses its real clips; remove "
            "the flag"
        )
    if os.path.isdir(args.out) or not args.out.lower().endswith(".json"):
        raise UserError(
            f"--out {args.out}: expected the name of a JSON file, such as {args.metric}.json"
        )
    has_folder = Path(args.out).name != args.out
    for folder in map(Path, args.samples):
        out = out_path(args, folder)
        is_of_samples = out.stem in OF_SAMPLES and out.parent.resolve() == folder.resolve()
        if is_of_samples or (len(args.samples) > 1 and has_folder):
            raise UserError(
                f"--out {args.out}: expected the name of a new file in each of --samples "
                "(motion.json)"
            )
        cli.check_writable("--out", out.parent)
    cli.check_writable("--cache", args.cache or out.parent)


def out_path(args, folder):
    """The path of the manifest of a sample folder. With several folders, it is in each."""
    return Path(args.out) if len(args.samples) == 1 else Path(folder, args.out)


def find_real(args, samples, detector):
    """The RealClips for samples. Raises UserError."""
    metric = args.metric
    images = samples.num_frames == 1
    check_data_path(args.data_path, images, cached=False)
    about_detector = detector and frechet.check_detector(args, detector, samples)
    split = args.split or manifest.SPLITS.get(metric, "val")
    share = args.val_fraction
    count = args.num_real or NUM_REAL.get(metric)
    num_frames = samples.num_frames
    if metric in CONTINUED:
        continued = samples.about["real"]
        split = continued["split"]
        share = continued["val_fraction"]
        if "val_fraction" in args.typed and args.val_fraction != share:
            raise UserError(
                f"--val-fraction {args.val_fraction}: the samples continue clips of a split by "
                f"{share}; remove the flag"
            )
        count = continued["num_clips"]
    elif metric == "classifier":
        num_frames = min(num_frames, classifier.MOST_FRAMES)
    clips, training, real = sources.find_real(
        data_path=args.data_path,
        split=split,
        val_fraction=share,
        num_frames=num_frames,
        time_scale=samples.time_scale,
        image_size=samples.image_size,
        ckpt=samples.source.get("checkpoint"),
        images=images,
    )
    if count and len(clips.videos) < count:
        advice = "" if metric in CONTINUED else "; a lower --num-real is faster"
        say(
            f"note: --split {split}: {plural(count, 'clip')} from only "
            f"{plural(len(clips.videos), 'video')}{advice}"
        )
    truth = check_real(
        args=args,
        samples=samples,
        clips=clips,
        training=training,
        real=real,
    )
    real["num_clips"] = count
    new = manifest.start(args, samples, real)
    new["detector"] = about_detector
    return RealClips(clips, training, truth, new)


def check_real(args, samples, clips, training, real):
    """Raise UserError if the metric can't compare Samples with these Clips. Adds to their record.

    Returns the truth: of motion or prediction a Truth or None; of world a Start.
    """
    metric = args.metric
    place = f"--data-path {args.data_path}"
    if metric == "nearest" and not training:
        raise UserError(
            f"{place}: no training video is as long as the samples ({samples.num_frames}); sample "
            "fewer frames"
        )
    if metric in ("nearest", "census"):
        real["training_sha256"] = sources.videos_sha256(clips.source, training)
    if metric == "census":
        import sprites_census

        sprites_census.check(samples, clips, place)
        real["vae_sha256"] = sprites_census.find_vae(samples, args.vae).sha256
    if metric == "classifier":
        classifier.check(
            samples=samples,
            clips=clips,
            training=training,
            args=args,
        )
    continued = samples.about.get("real", real)
    if real["videos_sha256"] != continued["videos_sha256"] and metric in CONTINUED:
        raise UserError(
            f"{place}: not the videos that {samples.place} continues; pass the folder of those"
        )
    if metric == "world":
        import world_truth

        return world_truth.find_truth(args, samples, clips)
    if metric not in ("motion", "prediction"):
        return None
    import shapes_tracker

    return shapes_tracker.find_truth(args, samples, clips.classes)


def score(args, samples, out, against, detector, device, corrupt):
    """(values, result, lines to print) of Samples against RealClips, on rank 0.

    Adds paths of real videos that can't be decoded to `corrupt`.
    """
    clips, training, truth, new = against
    count = new["real"]["num_clips"]  # None: classifier reads entire videos instead
    generated = sources.generated_stream(samples)
    real = sources.real_stream(
        clips=clips,
        indices=distributed.own_indices(count or 0),
        args=args,
        corrupt=corrupt,
    )
    if args.metric == "motion":
        import shapes_tracker

        return shapes_tracker.score_shapes(generated, real, truth)
    if args.metric == "consistency":
        return consistency.score_consistency(generated, real, samples.source)
    if args.metric == "nearest":
        windows = nearest.TrainingWindows(clips.source, training, samples)
        return nearest.score_nearest(
            samples=samples,
            real=real,
            windows=windows,
            args=args,
            sheet=out.with_suffix(".sheet.png"),
            device=device,
        )
    if args.metric == "prediction":
        return prediction.score_prediction(
            samples=samples, real=real, clips=clips, out=out, truth=truth
        )
    if args.metric == "classifier":
        return classifier.score_classifier(
            samples=samples,
            clips=clips,
            training=training,
            args=args,
            corrupt=corrupt,
        )
    if args.metric == "census":
        import sprites_census

        return sprites_census.score_census(
            samples=samples,
            clips=clips,
            training=training,
            count=count,
            args=args,
            device=device,
        )
    if args.metric == "world":
        import world_truth

        return world_truth.score_world(samples, truth)
    folder = args.cache or out.with_name("evaluate-cache")
    return frechet.score_frechet(
        generated=generated,
        real=real,
        args=args,
        detector=detector,
        cached=frechet.cache_path(folder, new, clips),
        device=device,
        corrupt=corrupt,
    )


def run(args, samples, real, detector, device):
    """Score samples and write the manifest."""
    out = out_path(args, samples.folder)
    real = distributed.broadcast(real)
    out.parent.mkdir(parents=True, exist_ok=True)
    corrupt = []
    scored = score(
        args=args,
        samples=samples,
        out=out,
        against=real,
        detector=detector,
        device=device,
        corrupt=corrupt,
    )
    corrupt = sorted(set(distributed.gather_items(corrupt)))
    if distributed.rank() != 0:
        return
    values, result, lines = scored
    new = real.manifest | {"values": values, "result": result}
    new["machine"] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }
    new["real"]["bad_videos"] = corrupt
    manifest.write_manifest(out, new)
    for line in lines:
        say(line)
    for path in corrupt:
        say(f"{path} can't be decoded; it is skipped")
    say(f"{new['protocol']}: {out}")


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
            run(
                args=args,
                samples=samples,
                real=real,
                detector=detector,
                device=device,
            )
    distributed.stop()


if __name__ == "__main__":
    main()

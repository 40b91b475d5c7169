"""Fréchet distances between sets of clips (FVD) or frames (FID).

Sources: FID, Heusel et al. (arXiv 1706.08500); FVD, Unterthiner et al. (1812.01717), in the
protocol of StyleGAN-V (Skorokhodov et al., 2112.14683). You provide the feature network
("detector") as a TorchScript file:

fvd  i3d_torchscript.pt of StyleGAN-V, which most PyTorch code for FVD uses: 400 features of x
     (B, 3, T, H, W)
fid  inception-2015-12-05.pt of StyleGAN2-ADA: 2048 features of x (B, 3, H, W)

CALLS says how they are called. x is float32 from 0 to 255, RGB; both rescale and resize it
themselves (224 and 299 px). Any other TorchScript works that takes the same call and returns
features (B, D).
"""

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from runtime import distributed
from runtime.atomic import write_file
from runtime.cli import UserError, say
from runtime.rng import generator
from runtime.untrusted import file_sha256
from scoring.sources import json_sha256
from scoring.stats import Z95

CALLS = {  # arguments of the detector of each metric
    "fvd": {
        "rescale": True,
        "resize": True,
        "return_features": True,
    },
    "fid": {"return_features": True},
}
RESAMPLES = 50  # of the bootstrap: enough for its standard deviation to 1 / sqrt(2 * 50) = 10%
CACHE_FORMAT = 3  # of files of moments


def cache_path(folder, about, clips):
    """The file of the moments of real Clips in a folder. Its name says what determines them.

    about: the manifest.
    """
    times = [clips.source.stamp(video)[1] for video in clips.videos]
    determines = {name: value for name, value in about["real"].items() if name != "data_path"}
    key = json_sha256([determines, times, about["detector"], CACHE_FORMAT])
    return Path(folder, f"{key}.safetensors")


def score_frechet(generated, real, args, detector, cached, device, corrupt):
    """Score two streams of clips with --metric fvd or fid.

    cached: the `cache_path`. Real clips are read only if this file is missing or damaged. corrupt:
    the list of corrupt real videos, to which `real`, or else this file, adds.
    """
    detector.to(device)
    reference = None
    if distributed.rank() == 0 and cached.exists():
        reference, bad_videos = read_moments(cached)
        corrupt += bad_videos
    from_cache = distributed.broadcast(reference is not None)
    if not from_cache:
        features = all_features(real, detector, args, device)
        bad_videos = sorted(set(distributed.gather_items(corrupt)))
        if distributed.rank() == 0:
            reference = moments_of(features)
            cached.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"bad_videos": json.dumps(bad_videos)}
            write_file(cached, safetensors.torch.save(reference, metadata), shared=True)
    features = all_features(generated, detector, args, device)
    if distributed.rank() != 0:
        return None
    moments = moments_of(features)
    D = features.shape[-1]
    value = frechet_distance(
        mean_a=reference["mean"],
        cov_a=reference["cov"],
        mean_b=moments["mean"],
        cov_b=moments["cov"],
    )
    members = {"generated": moments["count"].item(), "real": reference["count"].item()}
    result = {
        "num_features": D,
        "generated_members": members["generated"],
        "real_members": members["real"],
        "real_from_cache": from_cache,
        "resamples": args.resamples,
        "standard_error": None,
        "interval95": None,
    }
    line = f"  {args.metric} {value:.4f}"
    if args.resamples > 1:
        error = bootstrap_error(
            mean_a=reference["mean"].to(device),
            cov_a=reference["cov"].to(device),
            features=features.to(device),
            resamples=args.resamples,
            seed=args.seed,
        )
        low = max(0.0, value - Z95 * error)
        high = value + Z95 * error
        result |= {"standard_error": error, "interval95": [low, high]}
        line += (
            f" (95%: {low:.4g} to {high:.4g}, over generated clips; the real ones stay the same)"
        )
    lines = [line]
    for kind, count in members.items():
        if count <= D:
            lines.append(
                f"  warning: {count} {kind} members for {D} features: the distance is much too "
                "large; compare it only with distances of the same counts"
            )
    return {args.metric: value}, result, lines


def all_features(stream, detector, args, device):
    """The features (N, G, D) of the clips of all ranks' streams, on rank 0; None on the others."""
    indices = []
    parts = [torch.empty(0)]
    while batch := [*itertools.islice(stream, args.batch_size)]:
        of_batch, clips, *_ = zip(*batch, strict=True)
        indices += of_batch
        clips = torch.from_numpy(np.stack(clips)).to(device)
        parts.append(extract(detector, clips, args).cpu())
    return distributed.collect(indices, torch.cat(parts))


def read_moments(path):
    """(moments in a file, corrupt videos that others replaced); (None, []) if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            moments = {name: file.get_tensor(name) for name in ("count", "mean", "cov")}
            return moments, json.loads(file.metadata()["bad_videos"])
    except (OSError, SafetensorError) as error:
        say(f"{path} is damaged ({error}); computing it again")
        return None, []


def moments_of(features):
    """Count, mean (D,) and covariance (D, D), float64, of features (N, G, D).

    A Fréchet distance needs no more.
    """
    count = features.shape[:2].numel()
    parts = features.flatten(0, 1).split(4096)  # float64 takes twice the memory
    mean = sum(part.double().sum(dim=0) for part in parts) / count
    scatter = 0
    for part in parts:
        deviation = part.double() - mean
        scatter = scatter + deviation.T @ deviation
    return {
        "count": torch.tensor(count),
        "mean": mean,
        "cov": scatter / (count - 1),  # as the first FID and FVD code
    }


def square_root(matrix):
    """The symmetric square root of a positive semidefinite matrix (D, D).

    Negative eigenvalues (rounding) are 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * without_rounding(values).sqrt()) @ vectors.T


def without_rounding(values):
    """Eigenvalues (D,), with rounding errors set to zero: roots would magnify them 10^8 times."""
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values > rounding, values, 0.0)


def frechet_distance(mean_a, cov_a, mean_b, cov_b, root_a=None):
    """The squared Fréchet (2-Wasserstein) distance of two normal distributions, a float.

    root_a: square_root(cov_a). |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)):
    means (D,), covariances (D, D), maybe singular.
    """
    root_a = square_root(cov_a) if root_a is None else root_a
    product = root_a @ cov_b @ root_a  # symmetric, with the eigenvalues of cov_a cov_b
    cross = without_rounding(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def bootstrap_error(mean_a, cov_a, features, resamples, seed):
    """The bootstrap standard error of the distance from these moments to the moments of features
    (N, G, D).
    """
    # No quantiles: a resample repeats clips, so its covariance has a lower rank, and all distances
    # are too large
    N = len(features)
    root = square_root(cov_a)
    distances = []
    for resample in range(resamples):
        # their frames are correlated
        clips = torch.randint(N, (N,), generator=generator(seed, "bootstrap", resample))
        moments = moments_of(features[clips])
        distance = frechet_distance(
            mean_a=mean_a,
            cov_a=cov_a,
            mean_b=moments["mean"],
            cov_b=moments["cov"],
            root_a=root,
        )
        distances.append(distance)
    return torch.tensor(distances, dtype=torch.float64).std().item()


def load_detector(path):
    """The network of a TorchScript file, on the CPU.

    Raises UserError. Such a file is a program: trust its source.
    """
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but the field's detectors use it
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        got = "no such file" if isinstance(error, ValueError) else "not a TorchScript file"
        raise UserError(
            f"--detector {path}: {got}; expected i3d_torchscript.pt (fvd), inception-2015-12-05.pt "
            "(fid) or one that takes the same call"
        ) from error


def check_detector(args, detector, samples):
    """A detector's record in a manifest, after a try on black clips of the size of Samples.

    Raises UserError without features (B, D).
    """
    T = samples.num_frames if args.metric == "fvd" else 1
    size = samples.image_size
    clips = torch.zeros(2, T, size, size, 3, dtype=torch.uint8)
    try:
        features = extract(detector, clips, args)
    except (RuntimeError, ValueError, AttributeError) as error:  # AttributeError: no tensor
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"--detector {args.detector}: fails when called for --metric {args.metric}: {reason}"
        ) from error
    return {
        "path": args.detector,
        "sha256": file_sha256(args.detector),
        "num_features": features.shape[-1],
        "call": CALLS[args.metric],
    }


@torch.no_grad()
def extract(detector, clips, args):
    """Features of clips uint8 (B, T, H, W, 3), float32: (B, 1, D) of the clips for fvd, (B, T, D)
    of frames for fid.

    Raises ValueError unless the detector returns finite numbers (B, D).
    """
    inputs = clips.permute(0, 1, 4, 2, 3)  # (B, T, 3, H, W)
    if args.metric == "fvd":
        inputs = clips.permute(0, 4, 1, 2, 3)[:, None]  # (B, 1, 3, T, H, W)
    outputs = []
    for part in inputs.flatten(0, 1).split(args.batch_size):
        # TorchScript may use view()
        output = detector(part.float().contiguous(), **CALLS[args.metric])
        if output.shape != (len(part), *output.shape[-1:]):
            raise ValueError(f"returned {list(output.shape)}, expected features [{len(part)}, D]")
        outputs.append(output)
    features = torch.cat(outputs).float()
    if not features.isfinite().all():
        raise ValueError("returned features that are not finite numbers")
    return features.unflatten(0, inputs.shape[:2])

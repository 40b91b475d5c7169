"""Fréchet distances between sets of clips (FVD) or frames (FID): features, their moments, the distance.

Sources: FID, Heusel et al. (arXiv 1706.08500); FVD, Unterthiner et al. (1812.01717), in the protocol of StyleGAN-V
(Skorokhodov et al., 2112.14683). The feature networks ("detectors") are TorchScript files that the user provides:

fvd  i3d_torchscript.pt, the I3D of StyleGAN-V's evaluation code, which most PyTorch FVD code uses: 400 features;
     called as detector(x, rescale=True, resize=True, return_features=True), x (B, 3, T, H, W)
fid  inception-2015-12-05.pt, the Inception of StyleGAN2-ADA's evaluation code: 2048 features;
     called as detector(x, return_features=True), x (B, 3, H, W)

x is float32 from 0 to 255, RGB; both rescale and resize it themselves (224 and 299 px). Any TorchScript that is called
in the same way and returns features (B, D) can be used.
"""

import functools
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError

from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import UserError, say
from runtime.distributed import rank
from runtime.rng import generator

CALLS = {  # how the detector of a metric is called
    "fvd": {"rescale": True, "resize": True, "return_features": True},
    "fid": {"return_features": True},
}
RESAMPLES = 50  # of the bootstrap: they give its standard deviation to 1 / sqrt(2 * 50) = 10%
CACHE_FORMAT = 1  # of a file of moments


def score_frechet(args, generated, real, detector, num_features, cached, device):
    """Score two streams of clips (see sources.py) with --metric fvd or fid.

    cached is the file that keeps the moments of the real features; the real clips are read only if it is missing or
    damaged. Returns (values, result), plain dicts for JSON, on rank 0 and (None, None) elsewhere.
    """
    detector = detector.to(device)

    def read_features(stream, keep):
        """(Moments of the features of all ranks, indices and features (n, G, D) of the clips of this rank if kept)."""
        moments, kept_indices, kept = Moments.empty(num_features, device), [], []
        for indices, clips, _, _ in stream:
            features = extract(detector, clips, args.metric, args.batch_size)
            if features.shape[-1] != num_features:
                found = f"{features.shape[-1]} features, in the check before {num_features}"
                raise UserError(f"--detector {args.detector}: gave {found}: use one with a fixed number of features")
            moments = moments.merge(Moments.of(features.flatten(0, 1)))
            if keep:
                kept_indices += indices
                kept.append(features.cpu())
        return functools.reduce(Moments.merge, distributed.gather(moments.to("cpu"))), kept_indices, kept

    reference = distributed.broadcast(read_moments(cached, num_features) if rank() == 0 else None)
    from_cache = reference is not None
    if not from_cache:
        reference, _, _ = read_features(real, keep=False)
        if rank() == 0:
            write_moments(cached, reference)
    moments, indices, kept = read_features(generated, keep=args.resamples > 0)
    if args.resamples:
        group = moments.count // args.num_samples  # 1, or frames per clip
        kept = distributed.collect(indices, torch.cat(kept) if kept else torch.empty(0, group, num_features))
    if rank() != 0:
        return None, None
    value = frechet_distance(reference.mean, reference.covariance, moments.mean, moments.covariance)
    result = {"num_features": num_features, "generated_members": moments.count, "real_members": reference.count}
    result |= {"real_from_cache": from_cache, "resamples": args.resamples, "standard_error": None, "interval95": None}
    if args.resamples:
        error = bootstrap_error(reference.to(device), kept.to(device), args.resamples, args.seed)
        result |= {"standard_error": error, "interval95": [max(0.0, value - 1.96 * error), value + 1.96 * error]}
    for line in result_lines(args.metric, value, result):
        say(line)
    return {args.metric: value}, result


# ----------------------------------------------------------------------------------------------------------------------
# Moments and distances


@dataclass
class Moments:
    """Count, mean and scatter of a set of features: all that a Fréchet distance needs.

    mean (D,) and scatter (D, D), the sum of the outer products of the deviations from the mean, are float64.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def empty(cls, num_features, device="cpu"):
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros)

    @classmethod
    def of(cls, features):
        """The Moments of features (N, D), N >= 1."""
        features = features.double()
        mean = features.mean(dim=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def merge(self, other):
        """The Moments of both sets together (Chan et al., 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = difference.outer(difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self):
        """(D, D), divided by count - 1 as in the first code of FID and FVD; needs a count of at least 2."""
        return self.scatter / (self.count - 1)

    def to(self, device):
        return Moments(self.count, self.mean.to(device), self.scatter.to(device))


def read_moments(path, num_features):
    """The Moments in a file; None if there is no file, or it is damaged or has another number of features."""
    try:
        tensors = safetensors.torch.load_file(path)
        count, mean, scatter = (tensors[name] for name in ("count", "mean", "scatter"))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        say(f"{path} is damaged ({error}): it is computed again")
        return None
    return Moments(int(count), mean, scatter) if mean.shape == (num_features,) else None


def write_moments(path, moments):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"count": torch.tensor(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors))


def square_root(matrix):
    """The symmetric square root of a positive semidefinite matrix (D, D); eigenvalues below 0 (rounding) count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * without_rounding(values).sqrt()) @ vectors.T


def without_rounding(values):
    """Eigenvalues (D,) with those that are zero up to rounding set to zero: square roots magnify them 10^8 times."""
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values > rounding, values, 0.0)


def distance_from_root(mean_a, root_a, mean_b, cov_b):
    """frechet_distance, given the square root of cov_a."""
    product = root_a @ cov_b @ root_a  # symmetric, with the eigenvalues of cov_a cov_b
    cross = without_rounding(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """The squared Fréchet (2-Wasserstein) distance of two normal distributions, a float.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), for means (D,) and covariances (D, D), float64.
    Covariances may be singular.
    """
    return distance_from_root(mean_a, square_root(cov_a), mean_b, cov_b)


def bootstrap_error(reference, features, resamples, seed):
    """The bootstrap standard error of the distance between Moments and a set of features (N, G, D).

    Whole clips are resampled: G = 1, or the number of frames of a clip, which are correlated. Only the standard
    deviation of the resampled distances is used, not their quantiles: a resample repeats clips, so its covariance has a
    lower
    rank than that of the set, and all of its distances are too large.
    """
    N, G, D = features.shape
    root, features = square_root(reference.covariance), features.flatten(0, 1).double()
    distances = []
    for resample in range(resamples):
        clips = torch.randint(N, (N,), generator=generator(seed, "bootstrap", resample))
        weights = clips.bincount(minlength=N).repeat_interleave(G).double().to(features.device)[:, None]
        mean = (weights * features).sum(dim=0) / (N * G)
        scatter = features.T @ (weights * features) - N * G * mean.outer(mean)
        distances.append(distance_from_root(reference.mean, root, mean, scatter / (N * G - 1)))
    return torch.tensor(distances, dtype=torch.float64).std().item()


def result_lines(metric, value, result):
    """The main results, to print, with a warning where a covariance must be singular."""
    lines = [f"{metric} {value:.4f}"]
    if result["interval95"]:
        low, high = result["interval95"]
        lines[0] += f" (95%: {low:.4g} to {high:.4g}, for other generated clips and the same real ones)"
    for kind in ("generated", "real"):
        count, num_features = result[f"{kind}_members"], result["num_features"]
        if count <= num_features:
            what = "frames" if metric == "fid" else "clips"
            lines.append(
                f"warning: {count} {kind} {what} for {num_features} features: their covariance is singular and the "
                "distance much too large; compare it only with distances of the same counts"
            )
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Features


def load_detector(path):
    """The network of a TorchScript file, on the CPU. Raises UserError.

    Nothing in such a file is unpickled into Python, but TorchScript is a program: use one from a source you trust.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but the detectors of the field are in it
            return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        found = "not a TorchScript file"
        if isinstance(error, ValueError):
            found = "no such file"
        raise UserError(
            f"--detector {path}: {found}; wanted i3d_torchscript.pt (fvd) or inception-2015-12-05.pt (fid), or one "
            "called in the same way"
        ) from error


def check_detector(path, detector, metric, num_frames, size):
    """The number of features D of a detector, tried on two black clips. Raises UserError unless it gives (B, D)."""
    clips = torch.zeros(2, num_frames if metric == "fvd" else 1, size, size, 3, dtype=torch.uint8)
    try:
        features = extract(detector, clips, metric, batch_size=2)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--detector {path}: does not work when called for --metric {metric}: {reason}") from error
    return features.shape[-1]


@torch.no_grad()
def extract(detector, clips, metric, batch_size):
    """Features of clips uint8 (B, T, H, W, 3), float32: (B, 1, D) of the clips for fvd, (B, T, D) of frames for fid.

    Raises ValueError unless the detector returns finite numbers (B, D).
    """
    inputs = clips.permute(0, 4, 1, 2, 3)[:, None] if metric == "fvd" else clips.permute(0, 1, 4, 2, 3)
    B, G = inputs.shape[:2]  # (B, 1, 3, T, H, W) or (B, T, 3, H, W)
    parts = []
    with full_precision():
        for part in inputs.flatten(0, 1).split(batch_size):
            features = detector(part.float().contiguous(), **CALLS[metric])  # as TorchScript may use view()
            if not torch.is_tensor(features) or features.dim() != 2 or len(features) != len(part):
                shape = list(features.shape) if torch.is_tensor(features) else type(features).__name__
                raise ValueError(f"found {shape}, wanted features [{len(part)}, D]")
            parts.append(features.float())
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise ValueError("found features that are not finite numbers")
    return features.unflatten(0, (B, G))


@contextmanager
def full_precision():
    """No TF32, which --precision may have allowed for sampling and cuDNN allows by default: it changes features."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    distributed.set_precision("fp32")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

"""Fréchet distances between sets of clips or frames: the arithmetic, and the networks that turn pixels into features.

Sources: FID, Heusel et al. (arXiv 1706.08500); FVD, Unterthiner et al. (1812.01717), in the protocol of StyleGAN-V
(Skorokhodov et al., 2112.14683). The feature networks ("detectors") are TorchScript files that the user brings:

fvd  i3d_torchscript.pt, the I3D of StyleGAN-V's evaluation code, which most PyTorch FVD code uses: 400 features;
     called as detector(x, rescale=True, resize=True, return_features=True), x (B, 3, T, H, W)
fid  inception-2015-12-05.pt, the Inception of StyleGAN2-ADA's evaluation code: 2048 features;
     called as detector(x, return_features=True), x (B, 3, H, W)

x is float32 from 0 to 255, RGB. Both bring it to their own scale and size (224 and 299 px). Any TorchScript that is
called the same way and returns (B, D) will do.
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from runtime.cli import UserError
from runtime.rng import generator

CALLS = {  # how the detector of a metric is called
    "fvd": {"rescale": True, "resize": True, "return_features": True},
    "fid": {"return_features": True},
}
RESAMPLES = 50  # the bootstrap's: they give its standard deviation to 1 / sqrt(2 * 50) = 10%


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


@dataclass
class Moments:
    """What a Fréchet distance needs to know of a set of features; sets are merged without their members.

    count of members; mean (D,); scatter (D, D), the sum of the outer products of their deviations. Both float64.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def empty(cls, width, device="cpu"):
        zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros)

    @classmethod
    def of(cls, features):
        """Of features (N, D), N >= 1."""
        features = features.double()
        mean = features.mean(dim=0)
        away = features - mean
        return cls(len(features), mean, away.T @ away)

    def merge(self, other):
        """Of both sets together (Chan et al., 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.outer(apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self):
        """(D, D), with count - 1 below, as in FID's and FVD's first code; needs two members."""
        return self.scatter / (self.count - 1)

    def to(self, device):
        return Moments(self.count, self.mean.to(device), self.scatter.to(device))


def square_root(matrix):
    """The symmetric square root of a positive semidefinite matrix (D, D); what rounding left below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * positive(values).sqrt()) @ vectors.T


def positive(values):
    """Eigenvalues (D,), those that are zero up to rounding made zero: their roots would be 10^8 times as large."""
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values > rounding, values, 0.0)


def distance_to(mean_a, root_a, mean_b, cov_b):
    """frechet_distance, given the square root of cov_a."""
    product = root_a @ cov_b @ root_a  # its eigenvalues are those of cov_a cov_b, but it is symmetric
    cross = positive(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """The squared Fréchet (2-Wasserstein) distance of two normal distributions, a float.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), for means (D,) and covariances (D, D), float64.
    Covariances may be singular.
    """
    return distance_to(mean_a, square_root(cov_a), mean_b, cov_b)


def bootstrap_error(reference, features, resamples, seed):
    """The standard error of the distance between Moments and a set of features (N, G, D), by the bootstrap.

    Whole groups are drawn anew, with replacement: G = 1, or the frames of a clip, which are alike. The standard
    deviation of the distances is what is used of them, not their quantiles: a draw repeats members, so its covariance
    has a lower rank than that of the set, and all of its distances are too large.
    """
    N, G, D = features.shape
    root, features = square_root(reference.covariance), features.flatten(0, 1).double()
    distances = []
    for number in range(resamples):
        drawn = torch.randint(N, (N,), generator=generator(seed, "bootstrap", number))
        weights = drawn.bincount(minlength=N).repeat_interleave(G).double().to(features.device)[:, None]
        mean = (weights * features).sum(dim=0) / (N * G)
        scatter = features.T @ (weights * features) - N * G * mean.outer(mean)
        distances.append(distance_to(reference.mean, root, mean, scatter / (N * G - 1)))
    return torch.tensor(distances, dtype=torch.float64).std().item()


def report(metric, value, result):
    """What people read of a result: lines, with a warning where a covariance must be singular."""
    lines = [f"{metric} {value:.4f}"]
    if result["interval95"]:
        low, high = result["interval95"]
        lines[0] += f" (95%: {low:.4g} to {high:.4g}, the chance of the generated clips alone)"
    for kind in ("generated", "real"):
        members, width = result[f"{kind}_members"], result["num_features"]
        if members <= width:
            lines.append(
                f"warning: {members} {kind} members for {width} features: their covariance is singular, and the "
                "distance much too large; compare it with others of the same counts only"
            )
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Features


def load_detector(path):
    """The network of a TorchScript file, on the CPU; raises UserError.

    Nothing in such a file is unpickled into Python, but TorchScript is a program: take one from a source you trust.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is what the field's detectors are
            return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        found = "not a TorchScript file"
        if isinstance(error, ValueError):
            found = "no such file"
        raise UserError(
            f"--detector {path}: {found}; wanted i3d_torchscript.pt (fvd) or inception-2015-12-05.pt (fid), or one "
            "that is called in the same way"
        ) from error


def check_detector(path, detector, metric, num_frames, size):
    """The number of features D of a detector, tried on two black clips; raises UserError unless they are (B, D)."""
    clips = torch.zeros(2, num_frames if metric == "fvd" else 1, size, size, 3, dtype=torch.uint8)
    try:
        found = extract(detector, clips, metric, batch_size=2)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--detector {path}: does not work as --metric {metric} calls it: {reason}") from error
    return found.shape[-1]


@torch.no_grad()
def extract(detector, clips, metric, batch_size):
    """Features of clips uint8 (B, T, H, W, 3): (B, 1, D) of clips for fvd, (B, T, D) of their frames for fid; float32.

    Raises ValueError if the detector returns something else than finite numbers (B, D).
    """
    inputs = clips.permute(0, 4, 1, 2, 3)[:, None] if metric == "fvd" else clips.permute(0, 1, 4, 2, 3)
    B, G = inputs.shape[:2]  # (B, 1, 3, T, H, W) or (B, T, 3, H, W)
    parts = []
    with full_precision():
        for part in inputs.flatten(0, 1).split(batch_size):
            features = detector(part.float().contiguous(), **CALLS[metric])  # TorchScript may use view()
            if not torch.is_tensor(features) or features.dim() != 2 or len(features) != len(part):
                shape = list(features.shape) if torch.is_tensor(features) else type(features).__name__
                raise ValueError(f"found {shape}, wanted features [{len(part)}, D]")
            parts.append(features.float())
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise ValueError("found features that are not finite")
    return features.unflatten(0, (B, G))


@contextmanager
def full_precision():
    """No TF32, which --precision may have allowed for sampling and cuDNN allows by itself: it moves features."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

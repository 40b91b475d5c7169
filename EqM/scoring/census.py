"""Census: is a generated clip of the Sprites data set right, new and complete? All clips of this world are known.

Each sample is matched with the closest of all clips (least squared error), and each of its frames is decoded. Take the
matched frame and the same frame with one attribute changed. On the line between the two, the sample's frame has a
position s: 0 at the matched frame, 1 at the other one. Its margin is 1 - 2 s. Above 0, it is closer to the matched
frame. In the same way, the other frames of the character, in all classes, show whether the pose is right.

A sample is valid if all margins are above 0, its smallest margin is as large as those of training clips that went
through the model's VAE, and its worst frame is as close to the matched frame as theirs. Validation clips that went
through the VAE must be valid, and controls, wrong clips that are made of them, must not.
"""

import re
from itertools import product
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F

from runtime.cli import Bar, UserError
from runtime.distributed import rank
from runtime.rng import generator
from scoring.sources import real_stream
from scoring.stats import interval_units, mean_interval, report, shares
from vae import check_same, load_vae

ATTRIBUTES = "body", "bottomwear", "topwear", "hair"  # the digits of a character's name
MARGIN, RMSE = 0.001, 0.995  # the quantiles of training clips that are the limits
SHIFT = 2  # px
SAME = 3  # gray levels: frames with a smaller RMSE are the same; Slash and Spellcast begin alike for many characters
CHUNK = 2048  # clips that are matched at a time
CALIBRATED = {}  # what folders of one call share: {(VAE, data, count, seed): (World, limits, result of real clips)}
REASONS = "attribute", "pose", "margin", "rmse"  # why a clip is not valid; the first one counts
TITLES = {  # of the values
    "valid": "valid samples", "class_right": "samples that show the requested class",
    **{name: f"samples with one {name} in all frames" for name in ATTRIBUTES},
    "held_out": "valid samples whose character is in no training clip", "held_out_expected": "expected without bias",
    "true_attributes": "samples that keep the true character", "true_clip": "samples that decode to the true clip",
    "rmse": "RMSE to the matched clip, gray levels of 255", "rmse_real": "of validation clips through the VAE",
    "real_valid": "validation clips that are valid", "real_true": "validation clips that match themselves",
    "attribute_switched": "controls accepted: an attribute switched in a frame",
    "hair_blended": "controls accepted: two hair styles blended", "frames_swapped": "controls accepted: frames swapped",
    "frame_shifted": f"controls accepted: a frame shifted by {SHIFT} px",
}  # fmt: skip


def check(samples, clips, place):
    """Raise UserError unless the videos of Clips are a complete grid of clips like those of Samples."""
    samples.check_classes(clips.classes, place)
    videos, values = {video.key: video for video in clips.videos}, values_of(clips)
    wrong = sorted(videos.keys() ^ places_of(clips.classes, values).keys())
    if wrong or min(map(len, values)) < 2:
        got = f"{wrong[0]} is {'not expected' if wrong[0] in videos else 'missing'}" if wrong else "one value each"
        expected = "expected <class>/characterABCD.mkv of all characters, from datasets/prepare_sprites.py"
        raise UserError(f"{place}: not the complete Sprites data set: {got}; {expected}; pass that folder")
    expected = samples.num_frames, samples.image_size, samples.image_size
    for key, video in videos.items():
        if (got := (video.num_frames, video.height, video.width)) != expected:
            got, expected = (f"{T} frames of {H} x {W} px" for T, H, W in (got, expected))
            raise UserError(f"{samples.place}: has {expected}, {place}: {key} has {got}; sample clips like those")


def values_of(clips):
    """The values of each attribute in the names of the videos: ascending integers each."""
    names = [found[1] for video in clips.videos if (found := re.search(r"/character(\d{4})$", video.key))]
    return [sorted({int(name[a]) for name in names}) for a in range(len(ATTRIBUTES))]


def places_of(classes, values):
    """{Class/characterABCD: its place, the numbers of its class and of its character} of all clips, in order."""
    characters = [*product(*values)]
    pairs = product(enumerate(classes), enumerate(characters))
    return {f"{name}/character{''.join(map(str, who))}": (c, k) for (c, name), (k, who) in pairs}


def find_vae(samples, typed):
    """The VAE of the model that made Samples; typed: its new path or None. Raises UserError."""
    if (made := samples.source.get("vae")) in (None, "none"):
        got = "its samples.json names no VAE" if made is None else "its model has no VAE (--vae none)"
        advice = "whose loss sets the limits of --metric census; use a model with a VAE"
        raise UserError(f"{samples.place}: {got}, {advice}")
    vae = load_vae(typed, made, samples.place)
    check_same(vae, samples.source.get("vae_sha256"), samples.place)
    return vae


class World:
    """All clips. A choice is an attribute and a value; there are M. It leads from a character to another, or itself."""

    def __init__(self, classes, values, frames, device="cpu"):
        """frames: uint8 (classes, characters, T, H, W, 3), in the order of places_of."""
        self.classes, self.places, self.clips = classes, places_of(classes, values), frames
        self.frames = frames.flatten(3).to(device)  # (classes, characters, T, P)
        self.seen = torch.stack([(own != 0).any(dim=0) for own in self.frames])  # (classes, T, P): not black in all
        self.seen_once = self.seen.flatten(0, 1).any(dim=0)  # (P,)
        self.cropped = self.frames[..., self.seen_once]
        self.same = SAME**2 * self.frames.shape[-1]
        squares = [own.double().square().sum(dim=-1) for own in self.frames.flatten(0, 1)]
        self.squares = torch.stack(squares).unflatten(0, self.frames.shape[:2])  # |frame|^2
        every, choices = [*product(*values)], [(a, value) for a, own in enumerate(values) for value in own]
        changed = [[every.index((*who[:a], value, *who[a + 1 :])) for a, value in choices] for who in every]
        self.characters, self.choices, self.changed = map(torch.tensor, (every, choices, changed))
        # (characters, attributes); (M, 2); (characters, M): the number of the character after a choice


def read_world(clips, args, device):
    """The World of the videos of Clips. Raises UserError if one can't be decoded."""
    size, values, corrupt = clips.source.image_size, values_of(clips), []
    places = places_of(clips.classes, values)
    numbers = {video.path: places[video.key] for video in clips.videos}
    counts = len(clips.classes), len(places) // len(clips.classes)
    frames = torch.empty(*counts, clips.num_frames, size, size, 3, dtype=torch.uint8)
    for _, clip, *_, path in real_stream(clips, range(len(places)), args, corrupt, "reading all clips"):
        if corrupt:
            advice = "expected all clips of Sprites; make it again"
            raise UserError(f"--data-path {args.data_path}: {corrupt[0]} can't be decoded; {advice}")
        frames[numbers[path]] = torch.from_numpy(clip)
    return World(clips.classes, values, frames, device)


def match(world, clips):
    """The places (n, 2) of the closest clips to clips uint8 (n, T, P): the least |other|^2 - 2 clip.other."""
    errors = world.squares.sum(dim=-1).repeat(len(clips), 1, 1)  # (n, classes, characters)
    for name, (frames, seen) in enumerate(zip(world.frames, world.seen, strict=True)):
        for t, own in enumerate(seen):  # rounding is far below the difference of two clips
            errors[:, name] -= 2 * (clips[:, t, own].float() @ frames[:, t, own].float().T).double()
    return torch.stack(torch.unravel_index(errors.flatten(1).argmin(dim=1), errors.shape[1:]), dim=1)


def positions(error, best, others, squares, same):
    """s, and by how much the squared error to the other is smaller; (T, M) each, -inf if |other - best|^2 < same.

    The frames are best + error, both (T, P); others are (T or 1, M, P), squares |others|^2. Float64 sums are exact.
    """
    along, best_others = (torch.stack([error, best], dim=1) @ others.mT).unbind(dim=1)
    along = along - (error * best).sum(dim=-1, keepdim=True)
    length = squares - 2 * best_others + best.square().sum(dim=-1, keepdim=True)
    return [torch.where(length < same, -torch.inf, own).cpu() for own in (along / length, 2 * along - length)]


def decode(world, place, clip):
    """(smallest margins of attributes and of poses, values of attributes (T, attributes), RMSE (T,)) of the frames of a
    clip uint8 (T, P) that is matched with the clip at a place. A frame that is closer to another pose than to another
    attribute shows the attributes that it has in that pose.
    """
    (name, who), T = place, len(clip)
    clip, others = clip.double(), world.changed[who]
    cropped = clip[:, world.seen_once]

    def compare(c, t, *others):  # the clip's frames with frames t of classes c and others
        best, frames = world.cropped[c, who, t].double(), world.cropped[others].double()
        return positions(cropped - best, best, frames, world.squares[others], world.same)

    c, t, every = torch.full((T,), name), torch.arange(T), torch.arange(len(world.classes) * T)[None]
    poses, pose_gains = compare(c, t, every // T, who, every % T)
    attributes, gains = compare(c, t, c[:, None], others, t[:, None])
    (best_gain, pose), least = pose_gains.max(dim=1), gains.max(dim=1).values.clamp(min=0)
    if (moved := best_gain > least).any():
        c, t = torch.where(moved, pose // T, c), torch.where(moved, pose % T, t)
        attributes, _ = compare(c, t, c[:, None], others, t[:, None])
    decoded = world.characters[who].repeat(T, 1)
    for a in range(len(ATTRIBUTES)):
        own = world.choices[:, 0] == a
        furthest, number = attributes[:, own].max(dim=1)
        decoded[:, a] = torch.where(furthest < 0.5, decoded[:, a], world.choices[own, 1][number])
    rmse = (clip - world.frames[name, who]).square().mean(dim=-1).sqrt()
    return [1 - 2 * s.max().item() for s in (attributes, poses)], decoded.numpy(), rmse.cpu().numpy()


def measure(world, clips, title):
    """A dict of arrays about clips uint8 (n, T, H, W, 3): place (n, 2) of the matched clip; margins (n, 2), decoded
    (n, T, attributes) and rmse (n, T) of `decode`; the smallest margin, worst_rmse and clip_rmse of each clip (n,).
    """

    def rows():
        for first in range(0, len(clips), CHUNK):
            part = torch.from_numpy(np.array(clips[first : first + CHUNK])).flatten(2).to(world.frames.device)
            for place, clip in zip(match(world, part).tolist(), part, strict=True):
                yield place, *decode(world, place, clip)

    columns = zip(*Bar(rows(), desc=title, total=len(clips), unit="clip", leave=False), strict=True)
    found = dict(zip(("place", "margins", "decoded", "rmse"), map(np.array, columns), strict=True))
    rmse = {"worst_rmse": found["rmse"].max(axis=1), "clip_rmse": np.sqrt(np.square(found["rmse"]).mean(axis=1))}
    return found | {"margin": found["margins"].min(axis=1)} | rmse


def reasons(found, limits):
    """Why each clip that `measure` found is not valid, an array of REASONS; "" for valid clips."""
    unlike = found["margin"] < limits["margin"], found["worst_rmse"] > limits["rmse"]
    return np.select([*(found["margins"] <= 0).T, *unlike], REASONS, default="")


def make_controls(world, places, made, through, seed):
    """Yield (name, wrong clips like `made`): made are the clips at places after through(), which is a VAE.

    A change is drawn from those that the true frames show.
    """
    (_, T, H, W, _), is_hair, drawn = made.shape, world.choices[:, 0] == ATTRIBUTES.index("hair"), []
    moves = (0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT)  # in a frame with a border of SHIFT
    for index, (name, who) in enumerate(places.tolist()):
        true, others = world.cropped[name, who].int(), world.cropped[name, world.changed[who]].int()
        differ = ((others - true).square().sum(dim=-1) > world.same).cpu()  # (M, T)
        pairs = ((true[:, None] - true).square().sum(dim=-1) > world.same).nonzero().cpu()
        options = differ.nonzero(), (differ.any(dim=1) & is_hair).nonzero()[:, 0], pairs, range(T), moves
        drawn.append([])
        for number, own in enumerate(options):
            random = generator(seed, "census", number, index)
            drawn[-1].append(own[int(torch.randint(len(own), (), generator=random))])
    changes, styles, pairs, times, moves = zip(*drawn, strict=True)

    def clips_after(choices):  # true clips
        return world.clips[places[:, 0], world.changed[places[:, 1], choices]]

    every, (choices, frames) = range(len(places)), torch.stack(changes).T
    switched, swapped, shifted = made.clone(), made.clone(), made.clone()
    switched[every, frames] = through(clips_after(choices)[every, frames][:, None])[:, 0]
    yield "attribute_switched", switched
    yield "hair_blended", ((made.int() + through(clips_after(torch.stack(styles))) + 1) // 2).byte()
    for index, (pair, t, (down, right)) in enumerate(zip(pairs, times, moves, strict=True)):
        swapped[index, pair] = made[index, pair.flip(0)]
        bordered = F.pad(made[index, t], (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
        shifted[index, t] = bordered[down : down + H, right : right + W]
    yield "frames_swapped", swapped
    yield "frame_shifted", shifted


def calibrate(world, clips, training, count, args, vae, device):
    """(limits, a result about real clips and controls) from up to `count` clips of each split through the VAE."""

    def through(clips):
        parts = Bar(clips.split(args.batch_size), desc="real clips through the VAE", unit="part", leave=False)
        return torch.cat([vae.decode(vae.encode(part.permute(0, 4, 1, 2, 3).to(device))).cpu() for part in parts])

    def some(videos, name):  # (places, clips through the VAE)
        order = torch.randperm(len(videos), generator=generator(args.seed, "census", name))[:count].tolist()
        places = torch.tensor([world.places[videos[n].key] for n in order])
        return places, through(world.clips[*places.T])

    known = set(training)
    found = measure(world, some(training, "train")[1], "training clips")
    limits = {"margin": np.quantile(found["margin"], MARGIN), "rmse": np.quantile(found["worst_rmse"], RMSE)}
    places, made = some([video for video in clips.videos if video not in known], "val")
    found = measure(world, made, "validation clips")
    hits = {"real_valid": reasons(found, limits) == "", "real_true": (found["place"] == places.numpy()).all(axis=1)}
    for name, wrong in make_controls(world, places, made, through, args.seed):
        hits[name] = reasons(measure(world, wrong, name), limits) == ""
    keys = {place: key for key, place in world.places.items()}
    own = [keys[tuple(place)] for place in places.tolist()]  # a character may have several clips
    result = {"rmse_real": found["clip_rmse"].mean(), "num_real": len(own), "validation": own}
    return limits, shares(hits, own) | result


def score_census(samples, clips, training, count, args, device):
    """Score Samples with the videos of Clips; training: those of them that train; count: clips of a split to use."""
    if rank() != 0:
        return None, None, None
    vae = find_vae(samples, args.vae).to(device)
    key = vae.sha256, args.data_path, count, args.seed
    if key not in CALIBRATED:
        world = read_world(clips, args, device)
        CALIBRATED[key] = world, *calibrate(world, clips, training, count, args, vae, device)
    world, limits, result = CALIBRATED[key]
    found, videos, keys = measure(world, samples.clips, "samples"), samples.videos, list(world.places)
    why, rmse, (name, who) = reasons(found, limits), found["clip_rmse"], found["place"].T
    valid, known, K = why == "", {world.places[video.key][1] for video in training}, len(world.characters)
    result = result | shares({"valid": valid} | hits_of(world, samples, found), videos) | {"limits": limits}
    result |= shares({"held_out": ~np.isin(who, [*known])[valid]}, np.array(videos)[valid].tolist())
    result |= {"held_out_expected": 1 - len(known) / K, "characters": len({*who[valid].tolist()})}
    result["characters_expected"] = K * (1 - (1 - 1 / K) ** int(valid.sum()))
    result |= {"rmse": rmse.mean(), "rmse_interval95": mean_interval(rmse, videos)}
    result["failures"] = {reason: int((why == reason).sum()) for reason in REASONS}
    result["samples"] = {
        "matched": [keys[number] for number in name * K + who], "valid": valid.tolist(), "reason": why.tolist(),
        "margin": found["margin"].tolist(), "worst_rmse": found["worst_rmse"].tolist(),
    }  # fmt: skip
    values, lines = report(result, TITLES)
    values |= {name: result[name] for name in ("characters", "characters_expected")}
    result["interval_units"], line = interval_units(samples=videos, validation=result["validation"])
    lines += [
        f"  characters of the valid samples: {result['characters']}, expected {result['characters_expected']:.1f}",
        f"  not valid because of: {', '.join(f'{name} {count}' for name, count in result['failures'].items())}",
        f"  limits: margin {limits['margin']:.3f} or more, RMSE of a frame {limits['rmse']:.2f} or less", line,
    ]  # fmt: skip
    return values, result, lines


def hits_of(world, samples, found):
    """{name in TITLES: bool (n,)} of the requested class, each attribute and, if samples continue clips, the clips."""
    decoded, place = found["decoded"], found["place"]
    hits = {"class_right": place[:, 0] == [world.classes.index(name) for name in samples.names]}
    hits |= dict(zip(ATTRIBUTES, (decoded == decoded[:, :1]).all(axis=1).T, strict=True))
    keys = ["/".join(PurePosixPath(str(video)).with_suffix("").parts[-2:]) for video in samples.videos]
    if all(key in world.places for key in keys):
        true = np.array([world.places[key] for key in keys])
        hits["true_attributes"] = (decoded == world.characters.numpy()[true[:, 1], None]).all(axis=(1, 2))
        hits["true_clip"] = (place == true).all(axis=1) & (found["margins"] > 0).all(axis=1)
    return hits

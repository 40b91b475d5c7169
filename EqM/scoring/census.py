"""Census: is a generated clip of the Sprites data set right, new and complete? All clips of this world are known.

Each sample is matched with the closest of all clips (least squared error). Then each frame is decoded. Take the matched
frame and the same frame with one attribute changed. They differ in some pixels. On the line between the two, the
sample's frame has a position s: 0 at the matched frame, 1 at the other one. Its margin is 1 - 2 s: above 0, it is
closer to the matched frame. The same test with the character's other frames, of all classes, decodes the pose.

A sample is valid if all margins are above 0, the smallest one is as large as for training clips that went through the
model's VAE, and its worst frame is as close to the matched frame as theirs. Validation clips through the VAE must be
valid, and wrong clips made of them (the controls) must not.
"""

import re
from itertools import product
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler

from runtime.cli import Bar, UserError
from runtime.distributed import rank
from runtime.rng import generator
from scoring.stats import interval_units, mean_interval, report, share
from vae import check_same, load_vae
from video.loader import batches_of, make_loader

ATTRIBUTES = "body", "bottomwear", "topwear", "hair"  # the digits of a character's name
MARGIN, WORST = 0.001, 0.995  # quantiles of training clips: of the smallest margin, of the worst frame's RMSE
SHIFT = 2  # px
CHUNK = 2048  # clips that are matched at a time
REASONS = {"attribute": "attribute", "pose": "pose or order", "margin": "margin", "rmse": "RMSE"}  # the first counts
CONTROLS = {
    "attribute_switched": "one attribute switched in one frame", "hair_blended": "two hair styles blended",
    "frames_swapped": "two frames swapped", "frame_shifted": f"one frame shifted by {SHIFT} px",
}  # fmt: skip
TITLES = {  # of the values
    "valid": "valid samples", "class_right": "samples that show the requested class",
    **{name: f"samples with the same {name} in all frames" for name in ATTRIBUTES},
    "held_out": "valid samples whose character is in no training clip", "held_out_expected": "expected without bias",
    "true_attributes": "samples that keep the true character in all frames",
    "true_clip": "samples that decode to the true clip",
    "rmse": "RMSE to the matched clip, gray levels of 255", "rmse_real": "RMSE of validation clips through the VAE",
    "real_valid": "valid validation clips through the VAE", "real_true": "of them, those that decode to themselves",
    **{name: f"controls accepted: {title}" for name, title in CONTROLS.items()},
}  # fmt: skip


def check(samples, clips, place):
    """Raise UserError unless the videos of Clips are a complete grid of clips like those of Samples."""
    again = "make the data set with datasets/prepare_sprites.py"
    if unknown := set(samples.classes) - set(clips.classes):
        got = f"has class {min(unknown)}, {place} has {', '.join(clips.classes)}"
        raise UserError(f"{samples.place}: {got}; pass the data set that the model was trained on")
    videos = {video.key: video for video in clips.videos}
    if strange := [key for key in videos if not re.fullmatch(r"[^/]+/character\d{4}", key)]:
        raise UserError(f"{place}: {strange[0]}: expected <class>/characterABCD.mkv of Sprites; {again}")
    values = values_of(clips)
    if missing := [key for key in keys_of(clips.classes, values) if key not in videos]:
        raise UserError(f"{place}: {missing[0]}: not found; expected all characters in all classes; {again}")
    if any(len(own) < 2 for own in values):
        raise UserError(f"{place}: has only one {ATTRIBUTES[[*map(len, values)].index(1)]}; expected several; {again}")
    expected = samples.num_frames, samples.image_size, samples.image_size
    for key, video in videos.items():
        if (got := (video.num_frames, video.height, video.width)) != expected:
            got, expected = (f"{T} frames of {H} x {W} px" for T, H, W in (got, expected))
            raise UserError(f"{samples.place}: has {expected}, {place}: {key} has {got}; sample the same")


def values_of(clips):
    """The values of each attribute in the names of the videos: a list of ascending integers each."""
    names = [video.key[-len(ATTRIBUTES) :] for video in clips.videos]
    return [sorted(set(map(int, own))) for own in zip(*names, strict=True)]


def keys_of(classes, values):
    """Class/characterABCD of all clips, in the order of a World."""
    return [f"{name}/character{''.join(map(str, who))}" for name, who in product(classes, [*product(*values)])]


def find_vae(samples, typed):
    """The VAE of the model that made Samples; typed: its new path or None. Raises UserError."""
    if (made := samples.source.get("vae")) is None:
        raise UserError(f"{samples.place}: its samples.json does not name the VAE of the model; sample again")
    if made == "none":
        reason = "a model of pixels (--vae none), but --metric census takes its limits from real clips through the VAE"
        raise UserError(f"{samples.place}: made by {reason}; score samples of a model with a VAE")
    vae = load_vae(typed, made, samples.place)
    check_same(vae, samples.source.get("vae_sha256"), samples.place)
    return vae


class World:
    """All clips, of which only P values per frame are stored: those of the pixels that are not black in all frames.

    A place (class, character) is a pair of numbers. A choice is an attribute with a value; there are M of them.
    """

    def __init__(self, classes, values, frames, device):
        """values: of each attribute; frames: uint8 (classes, characters, T, H, W, 3), in the order of keys_of."""
        self.places = {key: divmod(n, frames.shape[1]) for n, key in enumerate(keys_of(classes, values))}
        self.classes, self.shape = classes, frames.shape[2:]
        self.inside = torch.stack([(own != 0).any(dim=-1).any(dim=0) for own in frames.flatten(0, 1)]).any(dim=0)
        self.frames = frames[..., self.inside, :].flatten(-2).to(device)  # (classes, characters, T, P)
        self.seen = torch.stack([(own != 0).any(dim=0) for own in self.frames])  # (classes, T, P): of each class
        squares = [own.double().square().sum(dim=-1) for own in self.frames.flatten(0, 1)]
        self.squares = torch.stack(squares).unflatten(0, self.frames.shape[:2])  # |frame|^2
        every, choices = [*product(*values)], [(a, value) for a, own in enumerate(values) for value in own]
        numbers = {who: number for number, who in enumerate(every)}
        changed = [[numbers[*who[:a], value, *who[a + 1 :]] for a, value in choices] for who in every]
        self.characters, self.choices, self.changed = map(torch.tensor, (every, choices, changed))
        # (characters, attributes), (M, 2), and (characters, M): the number of the character after a choice

    def pixels(self, places, frames=None):
        """The clips at places (n, 2), uint8 (n, T, H, W, 3) on the CPU. frames (n,): one frame of each, T = 1."""
        name, who = places.T
        own = self.frames[name, who] if frames is None else self.frames[name, who, frames][:, None]
        whole = torch.zeros(*own.shape[:2], *self.shape[1:], dtype=torch.uint8)
        whole[:, :, self.inside] = own.cpu().unflatten(-1, (-1, 3))
        return whole


def read_world(clips, args, device):
    """The World of the videos of Clips. Raises UserError if one can't be decoded."""
    T, size, values = clips.num_frames, clips.source.image_size, values_of(clips)
    numbers = {key: number for number, key in enumerate(keys_of(clips.classes, values))}
    frames = torch.empty(len(numbers), T, size, size, 3, dtype=torch.uint8)
    batches = BatchSampler([(T, index) for index in range(len(numbers))], args.batch_size, drop_last=False)
    loader = make_loader({T: clips}, batches, args.num_workers, timeout=0, device=torch.device("cpu"))
    with Bar(desc="reading all clips", total=len(numbers), unit="clip", leave=False) as progress:
        for batch in batches_of(loader):
            if batch["corrupt"]:
                advice = "make the data set with datasets/prepare_sprites.py"
                raise UserError(f"--data-path {args.data_path}: {batch['corrupt'][0]} can't be decoded; {advice}")
            rows = [numbers[str(PurePosixPath(path).with_suffix(""))] for path in batch["videos"]]
            frames[rows] = batch["clips"].permute(0, 2, 3, 4, 1)
            progress.update(len(rows))
    return World(clips.classes, values, frames.unflatten(0, (len(clips.classes), -1)), device)


def match(world, clips):
    """The places (n, 2) of the closest clips to clips uint8 (n, T, P): the least |other|^2 - 2 clip.other."""
    least = torch.full((len(clips),), torch.inf, dtype=torch.float64, device=clips.device)
    places = torch.zeros(len(clips), 2, dtype=torch.int64, device=clips.device)
    for name, (frames, seen) in enumerate(zip(world.frames, world.seen, strict=True)):
        errors = world.squares[name].sum(dim=-1)[None]
        for t, own in enumerate(seen):  # the class is black elsewhere; rounding is far below what clips differ by
            errors = errors - 2 * (clips[:, t, own].float() @ frames[:, t, own].float().T).double()
        found, who = errors.min(dim=1)
        places[found < least] = torch.stack([torch.full_like(who, name), who], dim=1)[found < least]
        least = torch.minimum(least, found)
    return places.cpu()


def positions(error, best, others, squares):
    """s, (T, M), of frames best + error, both (T, P), on the lines from best to others (T or 1, M, P); -inf if equal.

    squares: |others|^2 (T or 1, M). Integers as float64, so the sums of products are exact.
    """
    along, best_others = (torch.stack([error, best], dim=1) @ others.mT).unbind(dim=1)
    along = along - (error * best).sum(dim=-1, keepdim=True)
    length = squares - 2 * best_others + best.square().sum(dim=-1, keepdim=True)
    return torch.where(length > 0, along / length, -torch.inf)


def decode(world, place, clip):
    """What a clip (T, P) matched with a place shows: (smallest margin of attributes, of poses, values of the attributes
    in each frame (T, attributes), squared error of each frame (T,)).
    """
    name, who = place
    best, others, poses = world.frames[name, who].double(), world.changed[who], world.frames[:, who].flatten(0, 1)
    error, changed = clip.double() - best, world.frames[name, others].transpose(0, 1)  # (T, M, P)
    of_attributes = positions(error, best, changed.double(), world.squares[name, others].T).cpu()
    of_poses = positions(error, best, poses[None].double(), world.squares[:, who].flatten())
    decoded = world.characters[who].repeat(len(best), 1)
    for a in range(len(ATTRIBUTES)):
        own = world.choices[:, 0] == a
        furthest, number = of_attributes[:, own].max(dim=1)
        decoded[:, a] = torch.where(furthest < 0.5, decoded[:, a], world.choices[own, 1][number])
    margins = (1 - 2 * s.max().item() for s in (of_attributes, of_poses))
    return *margins, decoded.numpy(), error.square().sum(dim=-1).cpu().numpy()


def measure(world, clips, title):
    """A dict of arrays about clips uint8 (n, T, H, W, 3): place (n, 2) of the matched clip; attribute and pose, the
    smallest margins; decoded (n, T, attributes); rmse, of the clip; worst, of its worst frame.
    """
    places, rows, device = [], [], world.frames.device
    with Bar(desc=title, total=len(clips), unit="clip", leave=False) as progress:
        for first in range(0, len(clips), CHUNK):
            part = torch.from_numpy(np.array(clips[first : first + CHUNK]))
            inside = part[:, :, world.inside].flatten(2).to(device)
            places.append(match(world, inside))
            for place, clip, whole in zip(places[-1].tolist(), inside, part, strict=True):
                *found, errors = decode(world, place, clip)
                errors = errors + whole[:, ~world.inside].double().square().sum(dim=(1, 2)).numpy()
                rows.append((*found, *np.sqrt([errors.mean(), errors.max()] / np.prod(world.shape[1:]))))
                progress.update()
    names = "attribute", "pose", "decoded", "rmse", "worst"
    return {"place": torch.cat(places).numpy()} | dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))


def find_limits(real):
    """The limits of valid clips, from what `measure` found in training clips."""
    return {"margin": np.quantile(least_margin(real), MARGIN), "rmse": np.quantile(real["worst"], WORST)}


def least_margin(found):
    return np.minimum(found["attribute"], found["pose"])


def reasons(found, limits):
    """Why each clip that `measure` found is not valid, a list of names of REASONS; None: it is valid."""
    failed = {"attribute": found["attribute"] <= 0, "pose": found["pose"] <= 0}
    failed |= {"margin": least_margin(found) < limits["margin"], "rmse": found["worst"] > limits["rmse"]}
    return [next((name for name in REASONS if failed[name][n]), None) for n in range(len(found["rmse"]))]


def draw(options, *key):
    """A random item of options; the key seeds it."""
    return options[int(torch.randint(len(options), (), generator=generator(*key)))]


def make_controls(world, places, made, through, seed):
    """Yield (name in CONTROLS, wrong clips like `made`, the clips at places after through(), which is a VAE).

    A change is drawn among those that the true frames show.
    """
    (T, H, W, _), every, clips = world.shape, range(len(places)), made.clone()
    last, drawn = world.choices[:, 0] == len(ATTRIBUTES) - 1, {"attribute": [], "hair": [], "pair": []}
    for index, (name, who) in enumerate(places.tolist()):
        true = world.frames[name, who]
        seen = (world.frames[name, world.changed[who]] != true).any(dim=-1).cpu()  # (M, T)
        drawn["attribute"].append(draw(seen.nonzero(), seed, "census", "attribute", index))
        drawn["hair"].append(draw((seen.any(dim=1) & last).nonzero()[:, 0], seed, "census", "hair", index))
        drawn["pair"].append(draw((true[:, None] != true).any(dim=-1).nonzero().cpu(), seed, "census", "pair", index))

    def after(choice):  # the places of the characters after a choice
        return torch.stack([places[:, 0], world.changed[places[:, 1], choice]], dim=1)

    choice, frame = torch.stack(drawn["attribute"]).T
    clips[every, frame] = through(world.pixels(after(choice), frame))[:, 0]
    yield "attribute_switched", clips
    others = through(world.pixels(after(torch.stack(drawn["hair"]))))
    yield "hair_blended", ((made.int() + others + 1) // 2).byte()
    clips = made.clone()
    for clip, pair in zip(clips, drawn["pair"], strict=True):
        clip[pair] = clip[pair.flip(0)]
    yield "frames_swapped", clips
    clips, moves = made.clone(), [(0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT)]
    for index, clip in enumerate(clips):
        down, right = draw(moves, seed, "census", "shift", index)
        frame = clip[draw(range(T), seed, "census", "frame", index)]
        frame[:] = F.pad(frame, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))[down : down + H, right : right + W]
    yield "frame_shifted", clips


def calibrate(world, clips, training, count, args, vae, device):
    """(limits, a result about real clips and controls) from up to `count` clips of each split through the VAE."""

    def through(pixels):
        parts = Bar(pixels.split(args.batch_size), desc="real clips through the VAE", unit="batch", leave=False)
        return torch.cat([vae.decode(vae.encode(part.permute(0, 4, 1, 2, 3).to(device))).cpu() for part in parts])

    def some(videos, name):
        order = torch.randperm(len(videos), generator=generator(args.seed, "census", name))
        return torch.tensor([world.places[videos[n].key] for n in order[:count].tolist()])

    known = set(training)
    held_out = some([video for video in clips.videos if video not in known], "val")
    limits = find_limits(measure(world, through(world.pixels(some(training, "train"))), "training clips"))
    found = measure(world, made := through(world.pixels(held_out)), "validation clips")
    hits = {"real_valid": valid(found, limits), "real_true": (found["place"] == held_out.numpy()).all(axis=1)}
    for name, wrong in make_controls(world, held_out, made, through, args.seed):
        hits[name] = valid(measure(world, wrong, CONTROLS[name]), limits)
    return limits, shares(hits) | {"rmse_real": found["rmse"].mean(), "num_real": len(held_out)}


def valid(found, limits):
    return np.array([why is None for why in reasons(found, limits)])


def shares(hits, videos=()):
    """{name: share, name_interval95: its interval} of {name: bool (n,)}; None if n is 0."""
    result = {}
    for name, own in hits.items():
        result[name], result[f"{name}_interval95"] = share(own, videos) if len(own) else (None, None)
    return result


def score_census(samples, clips, training, count, args, device):
    """Score Samples of a World: the videos of Clips, of which `training` are known to the model."""
    if rank() != 0:
        return None, None, None
    vae = find_vae(samples, args.vae).to(device)
    world = read_world(clips, args, device)
    limits, real = calibrate(world, clips, training, count, args, vae, device)
    found = measure(world, samples.clips, "samples")
    why, (name, who) = reasons(found, limits), found["place"].T
    kept, asked = np.array([one is None for one in why]), np.array([*map(world.classes.index, samples.names)])
    result = shares(sample_hits(world, samples, found) | {"valid": kept, "class_right": name == asked}, samples.videos)
    known = np.zeros(len(world.characters), dtype=bool)
    known[[world.places[video.key][1] for video in training]] = True
    videos = np.array(samples.videos)[kept].tolist()
    result |= shares({"held_out": ~known[who[kept]]}, videos) | {"held_out_expected": 1 - known.mean()} | real
    K, n = len(world.characters), int(kept.sum())
    result |= {"rmse": found["rmse"].mean(), "rmse_interval95": mean_interval(found["rmse"], samples.videos)}
    result |= {"characters": len(set(who[kept])), "characters_expected": K * (1 - (1 - 1 / K) ** n), "limits": limits}
    result["failures"] = {reason: why.count(reason) for reason in REASONS}
    keys = list(world.places)
    result["samples"] = {
        "matched": [keys[number] for number in name * K + who], "valid": kept.tolist(), "reason": why,
        "margin": least_margin(found).tolist(), "worst_rmse": found["worst"].tolist(),
    }  # fmt: skip
    values, lines = report(result, TITLES)
    values |= {name: result[name] for name in ("characters", "characters_expected")}
    result["interval_units"], line = interval_units(samples=samples.videos, validation=range(real["num_real"]))
    counts = ", ".join(f"{count} {REASONS[reason]}" for reason, count in result["failures"].items())
    lines += [
        f"  characters of the {n} valid samples: {len(set(who[kept]))}, expected {result['characters_expected']:.1f}",
        f"  not valid: {counts}",
        f"  limits: margin at least {limits['margin']:.3f}, RMSE of each frame at most {limits['rmse']:.2f}", line,
    ]  # fmt: skip
    return values, result, lines


def sample_hits(world, samples, found):
    """{name of TITLES: bool (n,)}: which samples keep their attributes and, if they continue clips, show those."""
    decoded, (name, who) = found["decoded"], found["place"].T
    same = (decoded == decoded[:, :1]).all(axis=1)  # (n, attributes)
    hits = {attribute: same[:, a] for a, attribute in enumerate(ATTRIBUTES)}
    keys = ["/".join(PurePosixPath(str(video)).with_suffix("").parts[-2:]) for video in samples.videos]
    if all(key in world.places for key in keys):
        true_name, true_who = np.array([world.places[key] for key in keys]).T
        in_order = (found["attribute"] > 0) & (found["pose"] > 0)
        hits["true_attributes"] = (decoded == world.characters.numpy()[true_who][:, None]).all(axis=(1, 2))
        hits["true_clip"] = (name == true_name) & (who == true_who) & in_order
    return hits

"""Census: is a clip of the Sprites data set, whose clips are all known, right, new and complete?

Each sample is matched with the closest of all clips (least squared error), and each of its frames
is decoded: it shows the attributes of the nearest frame, among the matched frame and the same frame
with attributes changed.

Take the matched frame and the same frame with one attribute changed. On the line between the two,
the sample's frame has a position s: 0 at the matched frame, 1 at the other one. Its margin is
1 - 2 s. Two measures of each attribute come from such lines, as they find different mistakes:

- A wrong frame is closer to another one. The distance of a frame is how far it is from halfway, in
  gray levels (RMSE): half of its margin times the length of the line. Below 0, it is closer to the
  other one. The smallest distance over all frames counts.
- A blend of two values in all frames moves every frame by the same share of its line. The position
  of the entire clip (least squares over the pixels of all frames) finds it, as the noise of the VAE
  averages out. The smallest margin of the clip, over the other values, counts.

In the same way, the distances to the other frames of the character, in all classes, show whether
the pose is right.

A sample is valid if it passes ten limits: for the distance of a frame and the margin of the clip,
of each of the four attributes; for the distance of the pose; and for the RMSE of the worst frame.
The limits come from training clips that went through the model's VAE. As many of them fail each
limit. This number is the largest with which 99% pass all ten. A limit of distances is 0 at most: a
frame may be closer to another one only as far as in training clips, where few pixels differ.
Validation clips that went through the VAE must be valid, and controls, wrong clips that are made of
them, must not.
"""

import math
import re
from itertools import chain, product
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
PASS = 0.99  # the share of training clips through the VAE that the limits let pass
PERCENTS = 10, 25, 40, 50  # of another value of an attribute, blended into all frames of controls
BLENDED = 4  # one in so many validation clips is blended, as there are 16 kinds of blends
GOAL = 40, 0.05  # at 40 percent, at most this share of the controls should be accepted
SHIFT = 2  # px
# gray levels: frames with a smaller RMSE are the same; Slash and Spellcast often begin alike
SAME = 3
CHUNK = 2048  # clips that are matched at a time
# what folders of one call share: {(VAE, data, count, seed): (World, limits, result of real clips)}
CALIBRATED = {}
DISTANCES = *ATTRIBUTES, "pose"  # the smallest of a frame, in gray levels
LIMITED = *DISTANCES, *(f"{name}_of_clip" for name in ATTRIBUTES), "rmse"
REASONS = "attribute", "pose", "margin", "rmse"  # why a clip is not valid; the first one counts
TITLES = {  # of the values
    "valid": "valid samples",
    "class_right": "samples that show the requested class",
    **{name: f"samples with one {name} in all frames" for name in ATTRIBUTES},
    "held_out": "valid samples whose character is in no training clip",
    "held_out_expected": "expected without bias",
    "true_attributes": "samples that keep the true character",
    "true_clip": "samples that decode to the true clip",
    "rmse": "RMSE to the matched clip, gray levels of 255",
    "rmse_real": "of validation clips through the VAE",
    "train_valid": "training clips that set the limits and are valid",
    "real_valid": "validation clips that are valid",
    "real_true": "validation clips that match themselves",
    "attribute_switched": "controls accepted: an attribute switched in a frame",
    "frames_swapped": "controls accepted: frames swapped",
    "frame_shifted": f"controls accepted: a frame shifted by {SHIFT} px",
    **{
        f"{name}_blended_{percent}": (
            f"controls accepted: {percent}% of another {name} in all frames"
        )
        for name, percent in product(ATTRIBUTES, PERCENTS)
    },
}


def check(samples, clips, place):
    """Raise UserError unless the videos of Clips are a complete grid like those of Samples."""
    samples.check_classes(clips.classes, place)
    videos = {video.key: video for video in clips.videos}
    values = values_of(clips)
    wrong = sorted(videos.keys() ^ places_of(clips.classes, values).keys())
    if wrong or min(map(len, values)) < 2:
        got = (
            f"{wrong[0]} is {'not expected' if wrong[0] in videos else 'missing'}"
            if wrong
            else "one value each"
        )
        expected = (
            "expected <class>/characterABCD.mkv of all characters, from datasets/prepare_sprites.py"
        )
        raise UserError(
            f"{place}: not the complete Sprites data set: {got}; {expected}; pass that folder"
        )
    expected = samples.num_frames, samples.image_size, samples.image_size
    for key, video in videos.items():
        if (got := (video.num_frames, video.height, video.width)) != expected:
            got, expected = (f"{T} frames of {H} x {W} px" for T, H, W in (got, expected))
            raise UserError(
                f"{samples.place}: has {expected}, {place}: {key} has {got}; sample clips like "
                "those"
            )


def values_of(clips):
    """The values of each attribute in the names of the videos: ascending integers each."""
    names = [
        found[1] for video in clips.videos if (found := re.search(r"/character(\d{4})$", video.key))
    ]
    return [sorted({int(name[a]) for name in names}) for a in range(len(ATTRIBUTES))]


def places_of(classes, values):
    """{Class/characterABCD: place, numbers of its class and character} of all clips, in order."""
    characters = [*product(*values)]
    pairs = product(enumerate(classes), enumerate(characters))
    return {f"{name}/character{''.join(map(str, who))}": (c, k) for (c, name), (k, who) in pairs}


def find_vae(samples, typed):
    """The VAE of the model that made Samples; typed: its new path or None. Raises UserError."""
    if (made := samples.source.get("vae")) in (None, "none"):
        got = (
            "its samples.json names no VAE" if made is None else "its model has no VAE (--vae none)"
        )
        advice = "whose loss sets the limits of --metric census; use a model with a VAE"
        raise UserError(f"{samples.place}: {got}, {advice}")
    vae = load_vae(typed, made, samples.place)
    check_same(vae, samples.source.get("vae_sha256"), samples.place)
    return vae


class World:
    """All clips.

    A choice is an attribute and a value; there are M. It leads from a character to another, or
    itself.
    """

    def __init__(self, classes, values, frames, device="cpu"):
        """frames: uint8 (classes, characters, T, H, W, 3), in the order of places_of."""
        self.classes = classes
        self.places = places_of(classes, values)
        self.clips = frames
        self.frames = frames.flatten(3).to(device)  # (classes, characters, T, P)
        # (classes, T, P): not black in all
        self.seen = torch.stack([(own != 0).any(dim=0) for own in self.frames])
        self.seen_once = self.seen.flatten(0, 1).any(dim=0)  # (P,)
        self.cropped = self.frames[..., self.seen_once]
        self.same = SAME**2 * self.frames.shape[-1]
        squares = [own.double().square().sum(dim=-1) for own in self.frames.flatten(0, 1)]
        self.squares = torch.stack(squares).unflatten(0, self.frames.shape[:2])  # |frame|^2
        every = [*product(*values)]
        choices = [(a, value) for a, own in enumerate(values) for value in own]
        changed = [
            [every.index((*who[:a], value, *who[a + 1 :])) for a, value in choices] for who in every
        ]
        # (characters, attributes); (M, 2); (characters, M): the character's number after a choice
        self.characters, self.choices, self.changed = map(torch.tensor, (every, choices, changed))
        # each attribute: bool (M,)
        self.choices_of = [self.choices[:, 0] == a for a in range(len(values))]


def read_world(clips, args, device):
    """The World of the videos of Clips. Raises UserError if one can't be decoded."""
    size = clips.source.image_size
    values = values_of(clips)
    corrupt = []
    places = places_of(clips.classes, values)
    numbers = {video.path: places[video.key] for video in clips.videos}
    counts = len(clips.classes), len(places) // len(clips.classes)
    frames = torch.zeros(*counts, clips.num_frames, size, size, 3, dtype=torch.uint8)
    unread = set(numbers)
    for _, clip, *_, path in real_stream(
        clips, range(len(places)), args, corrupt, "reading all clips"
    ):
        if corrupt:
            advice = "expected all clips of Sprites; make it again"
            raise UserError(
                f"--data-path {args.data_path}: {corrupt[0]} can't be decoded; {advice}"
            )
        frames[numbers[path]] = torch.from_numpy(clip)
        unread.discard(path)
    assert not unread, f"{len(unread)} clips were not read, {min(unread)} first"
    return World(clips.classes, values, frames, device)


def match(world, clips):
    """The places (n, 2) of the closest clips to clips uint8 (n, T, P).

    They have the least |other|^2 - 2 clip.other.
    """
    errors = world.squares.sum(dim=-1).repeat(len(clips), 1, 1)  # (n, classes, characters)
    for name, (frames, seen) in enumerate(zip(world.frames, world.seen, strict=True)):
        for t, own in enumerate(seen):  # rounding is far below the difference of two clips
            errors[:, name] -= 2 * (clips[:, t, own].float() @ frames[:, t, own].float().T).double()
    return torch.stack(
        torch.unravel_index(errors.flatten(1).argmin(dim=1), errors.shape[1:]), dim=1
    )


def along_lines(error, best, others, squares, same):
    """How far frames are along the lines from the matched frames to others: (products, squares).

    The frames are best + error, both (T, P); others are (T or 1, M, P), squares |others|^2.
    products (T, M): error.(other - best); squares (T, M): |other - best|^2. Both are 0 where the
    squares are below `same`. Float64 sums are exact.
    """
    along, best_others = (torch.stack([error, best], dim=1) @ others.mT).unbind(dim=1)
    along = along - (error * best).sum(dim=-1, keepdim=True)
    length = squares - 2 * best_others + best.square().sum(dim=-1, keepdim=True)
    is_other = length >= same
    return torch.where(is_other, along, 0).cpu(), torch.where(is_other, length, 0).cpu()


def margins(products, squares):
    """The margins 1 - 2 s of the positions s; infinite without a line, where the frames are the
    same.
    """
    return torch.where(squares > 0, 1 - 2 * products / squares, torch.inf)


def gains(products, squares):
    """By how much the squared error to the other frame is smaller."""
    return 2 * products - squares


def distances(products, squares, size):
    """The distances from halfway, in gray levels, of frames of `size` values; infinite without a
    line.
    """
    found = -gains(products, squares) / (2 * (size * squares).sqrt())
    return torch.where(squares > 0, found, torch.inf)


def decode(world, place, clip):
    """Decode a clip uint8 (T, P) that is matched with the clip at a place.

    Returns its DISTANCES, the smallest margins of the clip (attributes,), the values of the
    attributes (T, attributes) and the RMSE (T,) of its frames. A frame that is closer to another
    pose than to another attribute shows the attributes that it has in that pose.
    """
    (name, who) = place
    T = len(clip)
    clip = clip.double()
    cropped = clip[:, world.seen_once]

    def compare(c, t, shown, *others):  # the clip's frames with frames at (c, shown, t) and others
        best = world.cropped[c, shown, t].double()
        frames = world.cropped[others].double()
        return along_lines(cropped - best, best, frames, world.squares[others], world.same)

    def compare_attributes(c, t, shown):
        return compare(c, t, shown, c[:, None], world.changed[shown], t[:, None])

    c = torch.full((T,), name)
    t = torch.arange(T)
    every = torch.arange(len(world.classes) * T)[None]
    shown = torch.full((T,), who)
    poses = compare(c, t, shown, every // T, who, every % T)
    attributes = compare_attributes(c, t, shown)
    best_gain, pose = gains(*poses).max(dim=1)
    if (moved := best_gain > gains(*attributes).max(dim=1).values.clamp(min=0)).any():
        c = torch.where(moved, pose // T, c)
        t = torch.where(moved, pose % T, t)
        attributes = compare_attributes(c, t, shown)
    changes = attributes
    for _ in ATTRIBUTES:  # one attribute after the other, as long as a frame gets closer
        gain, choice = gains(*changes).max(dim=1)
        if not (gain > 0).any():
            break
        shown = torch.where(gain > 0, world.changed[shown, choice], shown)
        changes = compare_attributes(c, t, shown)
    by_frame = distances(*attributes, clip.shape[-1])
    of_clip = margins(*(columns.sum(dim=0) for columns in attributes))
    smallest = [by_frame[:, choices].min() for choices in world.choices_of]
    smallest.append(distances(*poses, clip.shape[-1]).min())
    smallest_of_clip = [of_clip[choices].min() for choices in world.choices_of]
    rmse = (clip - world.frames[name, who]).square().mean(dim=-1).sqrt()
    return (
        torch.stack(smallest).clamp(max=255).numpy(),  # infinite for what no frame shows
        torch.stack(smallest_of_clip).clamp(max=1).numpy(),
        world.characters[shown].numpy(),
        rmse.cpu().numpy(),
    )


def measure(world, clips, title):
    """A dict of arrays about clips uint8 (n, T, H, W, 3): place (n, 2) of the matched clip;
    distances (n, DISTANCES), margins (n, attributes), decoded (n, T, attributes) and rmse (n, T) of
    `decode`; worst_rmse and clip_rmse (n,).
    """

    def rows():
        for first in range(0, len(clips), CHUNK):
            part = (
                torch.from_numpy(np.array(clips[first : first + CHUNK]))
                .flatten(2)
                .to(world.frames.device)
            )
            for place, clip in zip(match(world, part).tolist(), part, strict=True):
                yield place, *decode(world, place, clip)

    columns = zip(*Bar(rows(), desc=title, total=len(clips), unit="clip", leave=False), strict=True)
    found = dict(
        zip(
            ("place", "distances", "margins", "decoded", "rmse"),
            map(np.array, columns),
            strict=True,
        )
    )
    return found | {
        "worst_rmse": found["rmse"].max(axis=1),
        "clip_rmse": np.sqrt(np.square(found["rmse"]).mean(axis=1)),
    }


def limited(found):
    """What LIMITED names, of clips that `measure` found: (n, LIMITED), larger is better."""
    return np.column_stack([found["distances"], found["margins"], -found["worst_rmse"]])


def find_limits(found):
    """The limits of `limited` from training clips of `measure`; a share PASS of them passes all.

    A limit is halfway between the last clip that fails and the first that passes.
    """
    values = limited(found)
    ordered = np.sort(values, axis=0)
    most = np.full(len(LIMITED), np.inf)
    most[: len(DISTANCES)] = 0
    limits = np.minimum(ordered[0], most)
    for failing in range(1, len(values)):  # clips, by each limit
        stricter = np.minimum((ordered[failing - 1] + ordered[failing]) / 2, most)
        if (values >= stricter).all(axis=1).mean() < PASS:
            break
        limits = stricter
    return limits


def reasons(found, limits):
    """Why each clip that `measure` found is not valid, an array of REASONS; "" for valid clips."""
    fails = limited(found) < limits
    attributes, pose, margins, rmse = np.split(fails, [4, 5, 9], axis=1)
    cases = [part.any(axis=1) for part in (attributes, pose, margins, rmse)]
    return np.select(cases, REASONS, default="")


def make_controls(world, places, made, through, seed):
    """Yield (name, wrong clips like `made`); made: the clips at places after through(), a VAE.

    A change is drawn from those that the true frames show.
    """
    (_, T, H, W, _) = made.shape
    drawn = []
    # in a frame with a border of SHIFT
    moves = (0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT)
    for index, (name, who) in enumerate(places.tolist()):
        true = world.cropped[name, who].int()
        others = world.cropped[name, world.changed[who]].int()
        differ = ((others - true).square().sum(dim=-1) > world.same).cpu()  # (M, T)
        pairs = ((true[:, None] - true).square().sum(dim=-1) > world.same).nonzero().cpu()
        options = differ.nonzero(), pairs, range(T), moves
        drawn.append([])
        for number, own in enumerate(options):
            random = generator(seed, "census", number, index)
            drawn[-1].append(own[int(torch.randint(len(own), (), generator=random))])
    changes, pairs, times, moves = zip(*drawn, strict=True)

    every = range(len(places))
    (choices, frames) = torch.stack(changes).T
    others = world.clips[places[:, 0], world.changed[places[:, 1], choices]]  # true clips
    switched = made.clone()
    swapped = made.clone()
    shifted = made.clone()
    switched[every, frames] = through(others[every, frames][:, None])[:, 0]
    yield "attribute_switched", switched
    for index, (pair, t, (down, right)) in enumerate(zip(pairs, times, moves, strict=True)):
        swapped[index, pair] = made[index, pair.flip(0)]
        bordered = F.pad(made[index, t], (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
        shifted[index, t] = bordered[down : down + H, right : right + W]
    yield "frames_swapped", swapped
    yield "frame_shifted", shifted


def blendable(world, name, who, is_own):
    """The choices of an attribute that can be blended into the true clip at a place.

    Values that no frame shows can't be, nor values with a third one between: half light and half
    dark skin is medium skin, so the blend is a right clip.
    """
    changes = (
        world.cropped[name, world.changed[who, is_own]].double() - world.cropped[name, who].double()
    )
    can_be = (changes.square().sum(dim=-1) > world.same).any(dim=1)
    changes = changes.flatten(1)
    products = changes @ changes.T
    squares = products.diag()
    for percent in PERCENTS:
        share = percent / 100
        to_values = share**2 * squares[:, None] - 2 * share * products + squares  # of each blend
        to_own = min(share, 1 - share) ** 2 * squares[:, None]  # the closer one of its two
        can_be &= (to_values >= to_own * (1 - 1e-9)).all(dim=1)
    return is_own.nonzero()[can_be.cpu(), 0]


def make_blends(world, places, made, through, seed):
    """Yield (name, clips like `made`): PERCENTS of another value of an attribute, in all frames."""
    for attribute, is_own in zip(ATTRIBUTES, world.choices_of, strict=True):
        choices = []
        for index, (name, who) in enumerate(places.tolist()):
            options = blendable(world, name, who, is_own)
            random = generator(seed, "census", attribute, index)
            choices.append(options[torch.randint(len(options), (), generator=random)])
        others = through(
            world.clips[places[:, 0], world.changed[places[:, 1], torch.stack(choices)]]
        )
        for percent in PERCENTS:
            blended = (100 - percent) * made.int() + percent * others.int()
            yield f"{attribute}_blended_{percent}", ((blended + 50) // 100).byte()


def calibrate(world, clips, training, count, args, vae, device):
    """(limits, a result about real clips and controls) from up to `count` clips of each split
    through the VAE.
    """

    def through(clips):
        parts = Bar(
            clips.split(args.batch_size),
            desc="real clips through the VAE",
            unit="part",
            leave=False,
        )
        return torch.cat(
            [vae.decode(vae.encode(part.permute(0, 4, 1, 2, 3).to(device))).cpu() for part in parts]
        )

    def some(videos, name):  # (places, clips through the VAE)
        order = torch.randperm(len(videos), generator=generator(args.seed, "census", name))[
            :count
        ].tolist()
        places = torch.tensor([world.places[videos[n].key] for n in order])
        return places, through(world.clips[*places.T])

    keys = {place: key for key, place in world.places.items()}

    def keys_of(places):  # a character may have several clips
        return [keys[tuple(place)] for place in places.tolist()]

    known = set(training)
    places, made = some(training, "train")
    found = measure(world, made, "training clips")
    limits = find_limits(found)
    result = shares({"train_valid": reasons(found, limits) == ""}, keys_of(places))
    places, made = some([video for video in clips.videos if video not in known], "val")
    found = measure(world, made, "validation clips")
    hits = {"real_valid": reasons(found, limits) == ""}
    hits["real_true"] = (found["place"] == places.numpy()).all(axis=1)
    few = math.ceil(len(places) / BLENDED)
    controls = make_controls(world, places, made, through, args.seed)
    blends = make_blends(world, places[:few], made[:few], through, args.seed)
    for name, wrong in chain(controls, blends):
        hits[name] = reasons(measure(world, wrong, name), limits) == ""
    own = keys_of(places)
    for name, hit in hits.items():
        result |= shares({name: hit}, own[: len(hit)])  # blends are of the first ones
    result |= {"rmse_real": found["clip_rmse"].mean(), "num_real": len(own)}
    return limits, result | {"num_blended": few, "validation": own}


def score_census(samples, clips, training, count, args, device):
    """Score Samples with the videos of Clips; training: those of them that train; count: clips of a
    split to use.
    """
    if rank() != 0:
        return None, None, None
    vae = find_vae(samples, args.vae).to(device)
    key = vae.sha256, args.data_path, count, args.seed
    if key not in CALIBRATED:
        world = read_world(clips, args, device)
        CALIBRATED[key] = world, *calibrate(world, clips, training, count, args, vae, device)
    world, limits, result = CALIBRATED[key]
    found = measure(world, samples.clips, "samples")
    videos = samples.videos
    keys = list(world.places)
    why = reasons(found, limits)
    rmse = found["clip_rmse"]
    (name, who) = found["place"].T
    valid = why == ""
    known = {world.places[video.key][1] for video in training}
    K = len(world.characters)
    result = result | shares({"valid": valid} | hits_of(world, samples, found), videos)
    result["limits"] = dict(zip(LIMITED, [*limits[:-1].tolist(), -limits[-1]], strict=True))
    result |= shares({"held_out": ~np.isin(who, [*known])[valid]}, np.array(videos)[valid].tolist())
    result |= {"held_out_expected": 1 - len(known) / K, "characters": len({*who[valid].tolist()})}
    result["characters_expected"] = K * (1 - (1 - 1 / K) ** int(valid.sum()))
    result |= {"rmse": rmse.mean(), "rmse_interval95": mean_interval(rmse, videos)}
    result["failures"] = {reason: int((why == reason).sum()) for reason in REASONS}
    result["samples"] = {
        "matched": [keys[number] for number in name * K + who],
        "valid": valid.tolist(),
        "reason": why.tolist(),
        "distances": found["distances"].tolist(),
        "margins": found["margins"].tolist(),
        "worst_rmse": found["worst_rmse"].tolist(),
    }
    values, lines = report(result, TITLES)
    values |= {name: result[name] for name in ("characters", "characters_expected")}
    result["interval_units"], line = interval_units(samples=videos, validation=result["validation"])
    lines += [
        (
            f"  characters of the valid samples: {result['characters']}, expected "
            f"{result['characters_expected']:.1f}"
        ),
        (
            "  not valid because of: "
            f"{', '.join(f'{name} {count}' for name, count in result['failures'].items())}"
        ),
        f"  limits: {limits_line(result['limits'])}",
        line,
    ]
    lines += missed_goals(result)
    return values, result, lines


def limits_line(limits):
    """The limits in words."""
    by_frame = ", ".join(f"{name} {limits[name]:.2f}" for name in DISTANCES)
    of_clip = ", ".join(f"{name} {limits[f'{name}_of_clip']:.3f}" for name in ATTRIBUTES)
    return (
        f"distance of a frame: {by_frame}; margin of the clip: {of_clip}; "
        f"RMSE of a frame: {limits['rmse']:.2f}"
    )


def missed_goals(result):
    """A line if too many controls are accepted with much of another value, else none."""
    percent, most = GOAL
    accepted = {name: result[f"{name}_blended_{percent}"] for name in ATTRIBUTES}
    missed = [f"{name} {share:.1%}" for name, share in accepted.items() if share > most]
    goal = (
        f"of the controls with {percent}% of another value, at most {most:.0%} should be accepted"
    )
    return [f"  note: {goal}; missed for {', '.join(missed)}"] if missed else []


def hits_of(world, samples, found):
    """{name in TITLES: bool (n,)} of the requested class, each attribute and, if samples continue
    clips, the clips.
    """
    decoded = found["decoded"]
    place = found["place"]
    hits = {"class_right": place[:, 0] == [world.classes.index(name) for name in samples.names]}
    hits |= dict(zip(ATTRIBUTES, (decoded == decoded[:, :1]).all(axis=1).T, strict=True))
    keys = [
        "/".join(PurePosixPath(str(video)).with_suffix("").parts[-2:]) for video in samples.videos
    ]
    if all(key in world.places for key in keys):
        true = np.array([world.places[key] for key in keys])
        hits["true_attributes"] = (decoded == world.characters.numpy()[true[:, 1], None]).all(
            axis=(1, 2)
        )
        hits["true_clip"] = (place == true).all(axis=1) & (found["distances"] > 0).all(axis=1)
    return hits

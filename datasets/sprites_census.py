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
The limits come from training clips that went through the model's VAE. Each limit fails the same
number of them, the largest with which 99% still pass all ten. A limit of distances is 0 at most, so
a frame that is closest to the matched one passes. It is below 0 where training clips are, too, as
only few pixels differ.
Validation clips that went through the VAE must be valid, and controls, wrong clips that are made of
them, must not.
"""

import math
import re
from functools import partial
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
BLENDED = 4  # one in so many validation clips is blended, as 16 kinds of blends take long
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


def check(samples, clips, where):
    """Raise UserError unless the videos of Clips are a complete grid like those of Samples."""
    samples.check_classes(clips.classes, where)
    videos = {video.key: video for video in clips.videos}
    values = values_of(clips)
    wrong = sorted(videos.keys() ^ numbers_of(clips.classes, values).keys())
    problem = None
    if wrong:
        state = "not expected" if wrong[0] in videos else "missing"
        problem = f"{wrong[0]} is {state}"
    elif min(map(len, values)) < 2:
        problem = "one value each"
    if problem:
        raise UserError(
            f"{where}: not the complete Sprites data set: {problem}; expected "
            "<class>/characterABCD.mkv of all characters, from datasets/prepare_sprites.py; pass "
            "that folder"
        )
    size = samples.image_size
    for key, video in videos.items():
        if (video.num_frames, video.height, video.width) != (samples.num_frames, size, size):
            expected = f"{samples.num_frames} frames of {size} x {size} px"
            got = f"{video.num_frames} frames of {video.height} x {video.width} px"
            raise UserError(
                f"{samples.place}: has {expected}, {where}: {key} has {got}; sample clips like "
                "those"
            )


def values_of(clips):
    """The values of each attribute in the names of the videos: ascending integers each."""
    matches = [re.search(r"/character(\d{4})$", video.key) for video in clips.videos]
    names = [match[1] for match in matches if match]
    return [sorted({int(name[a]) for name in names}) for a in range(len(ATTRIBUTES))]


def numbers_of(classes, values):
    """{Class/characterABCD: place} of all clips, in order.

    A place is a pair of numbers: of the clip's class and of its character.
    """
    places = {}
    for c, name in enumerate(classes):
        for character, attributes in enumerate(product(*values)):
            digits = "".join(map(str, attributes))
            places[f"{name}/character{digits}"] = (c, character)
    return places


def find_vae(samples, typed):
    """The VAE of the model that made Samples; typed: its new path or None. Raises UserError."""
    made = samples.source.get("vae")
    if made in (None, "none"):
        got = "its model has no VAE (--vae none)" if made else "its samples.json names no VAE"
        raise UserError(
            f"{samples.place}: {got}, whose loss sets the limits of --metric census; use a model "
            "with a VAE"
        )
    vae = load_vae(typed, made, samples.place)
    check_same(vae, samples.source.get("vae_sha256"), samples.place)
    return vae


class World:
    """All clips.

    A choice is an attribute and a value; there are M. It leads from a character to another, or
    itself.
    """

    def __init__(self, classes, values, frames, device="cpu"):
        """frames: uint8 (classes, characters, T, H, W, 3), in the order of numbers_of."""
        self.classes = classes
        self.places = numbers_of(classes, values)
        self.clips = frames
        self.frames = frames.flatten(3).to(device)  # (classes, characters, T, P)
        # Pixels that some character shows, of each frame (classes, T, P) and of any frame (P,). The
        # others are 0, so `cropped` has the products and squares of whole frames.
        # A class at a time, as this takes memory.
        self.seen = torch.stack([(of_class != 0).any(dim=0) for of_class in self.frames])
        self.seen_once = self.seen.flatten(0, 1).any(dim=0)
        self.cropped = self.frames[..., self.seen_once]
        self.least_square = SAME**2 * self.frames.shape[-1]
        squares = [clip.double().square().sum(dim=-1) for clip in self.frames.flatten(0, 1)]
        self.squares = torch.stack(squares).unflatten(0, self.frames.shape[:2])  # |frame|^2
        characters = [*product(*values)]
        self.characters = torch.tensor(characters)  # (characters, attributes)
        choices = [(a, value) for a, of_attribute in enumerate(values) for value in of_attribute]
        changed = []
        for attributes in characters:
            for a, value in choices:
                other = (*attributes[:a], value, *attributes[a + 1 :])
                changed.append(characters.index(other))
        # (characters, M): the character's number after a choice
        self.changed = torch.tensor(changed).view(len(characters), len(choices))
        attribute_of = torch.tensor([a for a, _ in choices])
        # of each attribute: bool (M,)
        self.choices_of = [attribute_of == a for a in range(len(values))]


def read_world(clips, args, device):
    """The World of the videos of Clips. Raises UserError if one can't be decoded."""
    size = clips.source.image_size
    values = values_of(clips)
    places = numbers_of(clips.classes, values)
    numbers = {video.path: places[video.key] for video in clips.videos}
    num_characters = len(places) // len(clips.classes)
    shape = (len(clips.classes), num_characters, clips.num_frames, size, size, 3)
    frames = torch.zeros(shape, dtype=torch.uint8)
    unread = set(numbers)
    corrupt = []
    stream = real_stream(
        clips,
        indices=range(len(places)),
        args=args,
        corrupt=corrupt,
        title="reading all clips",
    )
    for _, clip, _, _, path in stream:
        if corrupt:
            raise UserError(
                f"--data-path {args.data_path}: {corrupt[0]} can't be decoded; expected all clips "
                "of Sprites; make it again"
            )
        frames[numbers[path]] = torch.from_numpy(clip)
        unread.discard(path)
    assert not unread, f"{len(unread)} clips were not read, {min(unread)} first"
    return World(
        classes=clips.classes,
        values=values,
        frames=frames,
        device=device,
    )


def match(world, clips):
    """The places (n, 2) of the closest clips to clips uint8 (n, T, P).

    They have the least |other|^2 - 2 clip.other.
    """
    errors = world.squares.sum(dim=-1).repeat(len(clips), 1, 1)  # (n, classes, characters)
    for c, frames in enumerate(world.frames):
        for t, seen in enumerate(world.seen[c]):
            # float32, as rounding is far below the difference of two clips
            others = frames[:, t, seen].float()
            products = clips[:, t, seen].float() @ others.T
            errors[:, c] -= 2 * products.double()
    closest = errors.flatten(1).argmin(dim=1)
    return torch.stack(torch.unravel_index(closest, errors.shape[1:]), dim=1)


def along_lines(world, frames, shown, others):
    """How far frames (T, P), cropped, are along the lines from `shown` to others: (products,
    squares).

    shown and others are indices of (T,) and (T or 1, M) frames of the World. With best the frame
    that is shown, products (T, M) are (frame - best).(other - best), and squares (T, M) are
    |other - best|^2. Both are 0 where the squares are below least_square. Float64 sums are exact.
    """
    best = world.cropped[shown].double()
    error = frames - best
    both = torch.stack([error, best], dim=1)
    error_others, best_others = (both @ world.cropped[others].double().mT).unbind(dim=1)
    products = error_others - (error * best).sum(dim=-1, keepdim=True)
    squares = world.squares[others] - 2 * best_others + best.square().sum(dim=-1, keepdim=True)
    is_other = squares >= world.least_square
    products = torch.where(is_other, products, 0)
    squares = torch.where(is_other, squares, 0)
    return products.cpu(), squares.cpu()


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
    levels = -gains(products, squares) / (2 * (size * squares).sqrt())
    return torch.where(squares > 0, levels, torch.inf)


def decode(world, place, clip):
    """Decode a clip uint8 (T, P) that is matched with the clip at a place.

    Returns a dict of arrays: its DISTANCES; the smallest margins of the clip (attributes,); the
    values of the attributes (T, attributes) that its frames show; their RMSE (T,). A frame that is
    closer to another pose than to another attribute shows the attributes that it has in that pose.
    """
    matched_class, who = place
    T, P = clip.shape
    clip = clip.double()
    compare = partial(along_lines, world, clip[:, world.seen_once])

    def compare_attributes(c, shown, t):  # shown: the numbers of characters, (T,)
        changed = (c[:, None], world.changed[shown], t[:, None])
        return compare((c, shown, t), changed)

    c = torch.full((T,), matched_class)
    t = torch.arange(T)
    shown = torch.full((T,), who)
    every = torch.arange(len(world.classes) * T)[None]
    poses = compare((c, shown, t), (every // T, who, every % T))
    attributes = compare_attributes(c, shown, t)
    pose_gain, pose = gains(*poses).max(dim=1)
    attribute_gain = gains(*attributes).max(dim=1).values.clamp(min=0)
    is_other_pose = pose_gain > attribute_gain
    if is_other_pose.any():
        c = torch.where(is_other_pose, pose // T, c)
        t = torch.where(is_other_pose, pose % T, t)
        attributes = compare_attributes(c, shown, t)
    changes = attributes
    for _ in ATTRIBUTES:  # one attribute after the other, as long as a frame gets closer
        gain, choice = gains(*changes).max(dim=1)
        if not (gain > 0).any():
            break
        shown = torch.where(gain > 0, world.changed[shown, choice], shown)
        changes = compare_attributes(c, shown, t)
    # of the matched character, in the pose that a frame is closest to
    products, squares = attributes
    by_frame = distances(products, squares, P)
    of_clip = margins(products.sum(dim=0), squares.sum(dim=0))
    smallest = [by_frame[:, choices].min() for choices in world.choices_of]
    smallest.append(distances(*poses, P).min())
    smallest_of_clip = [of_clip[choices].min() for choices in world.choices_of]
    rmse = (clip - world.frames[matched_class, who]).square().mean(dim=-1).sqrt()
    return {
        "distances": torch.stack(smallest).clamp(max=255).numpy(),  # infinite if no frame shows it
        "margins": torch.stack(smallest_of_clip).clamp(max=1).numpy(),
        "decoded": world.characters[shown].numpy(),
        "rmse": rmse.cpu().numpy(),
    }


def measure(world, clips, title):
    """A dict of arrays about clips uint8 (n, T, H, W, 3): place (n, 2) of the matched clip;
    distances (n, DISTANCES), margins (n, attributes), decoded (n, T, attributes) and rmse (n, T) of
    `decode`; worst_rmse and clip_rmse (n,).
    """
    rows = []
    with Bar(
        desc=title,
        total=len(clips),
        unit="clip",
        leave=False,
    ) as progress:
        for first in range(0, len(clips), CHUNK):
            part = torch.from_numpy(np.array(clips[first : first + CHUNK]))
            part = part.flatten(2).to(world.frames.device)
            places = match(world, part).tolist()
            for place, clip in zip(places, part, strict=True):
                rows.append({"place": place} | decode(world, place, clip))
                progress.update(1)
    measured = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    measured["worst_rmse"] = measured["rmse"].max(axis=1)
    measured["clip_rmse"] = np.sqrt(np.square(measured["rmse"]).mean(axis=1))
    return measured


def limited(measured):
    """What LIMITED names, of clips from `measure`: (n, LIMITED), larger is better."""
    return np.column_stack([measured["distances"], measured["margins"], -measured["worst_rmse"]])


def find_limits(measured):
    """The limits of `limited` from training clips of `measure`; a share PASS of them passes all.

    A limit is halfway between the last clip that fails and the first that passes.
    """
    values = limited(measured)
    ordered = np.sort(values, axis=0)
    most = np.full(len(LIMITED), np.inf)
    most[: len(DISTANCES)] = 0
    limits = np.minimum(ordered[0], most)
    for failing in range(1, len(values)):  # clips, by each limit
        halfway = (ordered[failing - 1] + ordered[failing]) / 2
        stricter = np.minimum(halfway, most)
        passes = (values >= stricter).all(axis=1)
        if passes.mean() < PASS:
            break
        limits = stricter
    return limits


def reasons(measured, limits):
    """Why each clip from `measure` is not valid, an array of REASONS; "" for valid clips."""
    fails = limited(measured) < limits
    attributes, pose, margins, rmse = np.split(fails, [4, 5, 9], axis=1)  # in the order of LIMITED
    cases = [part.any(axis=1) for part in (attributes, pose, margins, rmse)]
    return np.select(cases, REASONS, default="")


def draw(options, seed, *key):
    """One of the options. The seed and the key determine it."""
    random = generator(seed, "census", *key)
    number = torch.randint(len(options), (), generator=random)
    return options[int(number)]


def make_controls(world, places, made, through_vae, seed):
    """Yield (name, wrong clips like `made`); made: the clips at places after through_vae().

    Only changes that are visible in the true frames are drawn.
    """
    _, T, H, W, _ = made.shape
    # in a frame with a border of SHIFT
    moves = (0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT)
    switched = made.clone()
    swapped = made.clone()
    shifted = made.clone()
    switched_t = []  # the number of the switched frame of each clip
    frames = []
    for index, (c, who) in enumerate(places.tolist()):
        true = world.cropped[c, who].int()  # (T, P)
        others = world.cropped[c, world.changed[who]].int()  # (M, T, P)
        differ = (others - true).square().sum(dim=-1) > world.least_square  # (M, T)
        choice, t = draw(differ.nonzero().cpu(), seed, 0, index)
        switched_t.append(t)
        frames.append(world.clips[c, world.changed[who, choice], t])
        differ = (true[:, None] - true).square().sum(dim=-1) > world.least_square  # (T, T)
        pair = draw(differ.nonzero().cpu(), seed, 1, index)
        swapped[index, pair] = made[index, pair.flip(0)]
        t = draw(range(T), seed, 2, index)
        down, right = draw(moves, seed, 3, index)
        bordered = F.pad(made[index, t], (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
        shifted[index, t] = bordered[down : down + H, right : right + W]
    frames = through_vae(torch.stack(frames)[:, None])[:, 0]
    switched[range(len(places)), torch.stack(switched_t)] = frames
    yield "attribute_switched", switched
    yield "frames_swapped", swapped
    yield "frame_shifted", shifted


def blendable(world, place, is_own):
    """The choices of an attribute that can be blended into the true clip at a place.

    Values that no frame shows can't be, nor values with a third one between: half light and half
    dark skin is medium skin, so the blend is a right clip. is_own: bool (M,).
    """
    c, who = place
    others = world.cropped[c, world.changed[who, is_own]]
    changes = others.double() - world.cropped[c, who]
    can_be = (changes.square().sum(dim=-1) > world.least_square).any(dim=1)
    changes = changes.flatten(1)
    products = changes @ changes.T
    squares = products.diag()
    for percent in PERCENTS:
        share = percent / 100
        # squared distances of each blend to all values, and to the nearer of the two blended ones
        to_values = share**2 * squares[:, None] - 2 * share * products + squares
        to_nearer = min(share, 1 - share) ** 2 * squares[:, None]
        can_be &= (to_values >= to_nearer * (1 - 1e-9)).all(dim=1)
    return is_own.nonzero()[can_be.cpu(), 0]


def make_blends(world, places, made, through_vae, seed):
    """Yield (name, clips like `made`): PERCENTS of another value of an attribute, in all frames."""
    for attribute, is_own in zip(ATTRIBUTES, world.choices_of, strict=True):
        characters = []
        for index, place in enumerate(places.tolist()):
            choice = draw(blendable(world, place, is_own), seed, attribute, index)
            characters.append(world.changed[place[1], choice])
        others = through_vae(world.clips[places[:, 0], torch.stack(characters)])
        for percent in PERCENTS:
            blended = (100 - percent) * made.int() + percent * others.int()
            yield f"{attribute}_blended_{percent}", ((blended + 50) // 100).byte()


def calibrate(world, clips, training, count, args, vae):
    """(limits, a result about real clips and controls) from up to `count` clips of each split
    through the VAE.
    """

    def through_vae(clips):
        parts = []
        for part in Bar(
            clips.split(args.batch_size),
            desc="real clips through the VAE",
            unit="part",
            leave=False,
        ):
            latents = vae.encode(part.permute(0, 4, 1, 2, 3).to(world.frames.device))
            parts.append(vae.decode(latents).cpu())
        return torch.cat(parts)

    def draw_places(videos, name):
        random = generator(args.seed, "census", name)
        order = torch.randperm(len(videos), generator=random)[:count]
        return torch.tensor([world.places[videos[number].key] for number in order.tolist()])

    keys = {place: key for key, place in world.places.items()}

    def keys_of(places):  # which tell `shares` the character, the unit of intervals
        return [keys[tuple(place)] for place in places.tolist()]

    places = draw_places(training, "train")
    measured = measure(world, through_vae(world.clips[*places.T]), "training clips")
    limits = find_limits(measured)
    result = shares({"train_valid": reasons(measured, limits) == ""}, keys_of(places))
    known = set(training)
    places = draw_places([video for video in clips.videos if video not in known], "val")
    made = through_vae(world.clips[*places.T])
    measured = measure(world, made, "validation clips")
    hits = {
        "real_valid": reasons(measured, limits) == "",
        "real_true": (measured["place"] == places.numpy()).all(axis=1),
    }
    few = math.ceil(len(places) / BLENDED)
    controls = make_controls(
        world,
        places=places,
        made=made,
        through_vae=through_vae,
        seed=args.seed,
    )
    blends = make_blends(
        world,
        places=places[:few],
        made=made[:few],
        through_vae=through_vae,
        seed=args.seed,
    )
    for name, wrong in chain(controls, blends):
        hits[name] = reasons(measure(world, wrong, name), limits) == ""
    validation = keys_of(places)
    for name, hit in hits.items():
        result |= shares({name: hit}, validation[: len(hit)])  # blends are of the first ones
    return limits, result | {
        "rmse_real": measured["clip_rmse"].mean(),
        "num_real": len(validation),
        "num_blended": few,
        "validation": validation,
    }


def score_census(samples, clips, training, count, args, device):
    """Score Samples with the videos of Clips; training: those of them that train; count: clips of a
    split to use.
    """
    if rank() != 0:
        return None
    vae = find_vae(samples, args.vae).to(device)
    key = vae.sha256, args.data_path, count, args.seed
    if key not in CALIBRATED:
        world = read_world(clips, args, device)
        limits, result = calibrate(
            world,
            clips=clips,
            training=training,
            count=count,
            args=args,
            vae=vae,
        )
        CALIBRATED[key] = world, limits, result
    world, limits, result = CALIBRATED[key]
    measured = measure(world, samples.clips, "samples")
    why = reasons(measured, limits)
    valid = why == ""
    known = {world.places[video.key][1] for video in training}
    result = result | summarize(world, samples, measured, valid, known)
    result["limits"] = dict(zip(LIMITED, [*limits[:-1].tolist(), -limits[-1]], strict=True))
    result["failures"] = {reason: int((why == reason).sum()) for reason in REASONS}
    keys = [*world.places]
    matched = measured["place"] @ [len(world.characters), 1]
    result["samples"] = {
        "matched": [keys[number] for number in matched],
        "valid": valid.tolist(),
        "reason": why.tolist(),
        "distances": measured["distances"].tolist(),
        "margins": measured["margins"].tolist(),
        "worst_rmse": measured["worst_rmse"].tolist(),
    }
    values, lines = report(result, TITLES)
    for name in ("characters", "characters_expected"):
        values[name] = result[name]
    result["interval_units"], line = interval_units(
        samples=samples.videos, validation=result["validation"]
    )
    failures = ", ".join(f"{reason} {number}" for reason, number in result["failures"].items())
    lines += [
        (
            f"  characters of the valid samples: {result['characters']}, expected "
            f"{result['characters_expected']:.1f}"
        ),
        f"  not valid because of: {failures}",
        f"  limits: {limits_line(result['limits'])}",
        line,
    ]
    lines += missed_goals(result)
    return values, result, lines


def summarize(world, samples, measured, valid, known):
    """What is true of the clips of Samples, a plain dict.

    measured: from `measure`; valid: bool (n,); known: numbers of the characters that train.
    """
    videos = samples.videos
    result = shares({"valid": valid} | hits_of(world, samples, measured), videos)
    who = measured["place"][valid, 1]
    result |= shares({"held_out": ~np.isin(who, [*known])}, np.array(videos)[valid].tolist())
    K = len(world.characters)
    missed = (1 - 1 / K) ** len(who)  # by draws from all
    return result | {
        "held_out_expected": 1 - len(known) / K,
        "characters": len({*who.tolist()}),
        "characters_expected": K * (1 - missed),
        "rmse": measured["clip_rmse"].mean(),
        "rmse_interval95": mean_interval(measured["clip_rmse"], videos),
    }


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
    if not missed:
        return []
    goal = (
        f"of the controls with {percent}% of another value, at most {most:.0%} should be accepted"
    )
    return [f"  note: {goal}; missed for {', '.join(missed)}"]


def hits_of(world, samples, measured):
    """{name in TITLES: bool (n,)} of the requested class, each attribute and, if samples continue
    clips, the clips.
    """
    decoded = measured["decoded"]
    place = measured["place"]
    requested = [world.classes.index(name) for name in samples.names]
    hits = {"class_right": place[:, 0] == requested}
    is_constant = (decoded == decoded[:, :1]).all(axis=1)
    hits |= dict(zip(ATTRIBUTES, is_constant.T, strict=True))
    paths = [PurePosixPath(str(video)).with_suffix("") for video in samples.videos]
    keys = ["/".join(path.parts[-2:]) for path in paths]
    if all(key in world.places for key in keys):
        true = np.array([world.places[key] for key in keys])
        characters = world.characters.numpy()[true[:, 1], None]
        hits["true_attributes"] = (decoded == characters).all(axis=(1, 2))
        is_closest = (measured["distances"] > 0).all(axis=1)
        hits["true_clip"] = (place == true).all(axis=1) & is_closest
    return hits

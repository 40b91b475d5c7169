"""Scores of samples that continue World (make_world.py): do they obey its rules, and remember it?

A tile shows the kind whose texture is nearest. Its margin is 1 - 2 d / gap: d is its distance to
that texture, gap the distance from there to the closest other one. So the margin is 1 on a texture
and 0 halfway to another one. A tile is sharp if its margin is at least SHARP. All else is counted
in kinds of tiles, on generated frames only, and with respect to the frame before. So a sample that
drifts to another world is right as long as it obeys the rules there:

- agent: an agent in the middle and nowhere else, and it faces as the actions say
- determined: the tiles that the frame before and the action determine. The place that the agent has
  left is grass.
- moved, blocked, stayed: transitions in which an action should move the view; does not, because of
  water or a tree; or is "stay". A transition is right if its move explains more tiles than any
  other. Transitions that look the same for two moves do not count.
- neighbors, shares: how far the pairs of neighboring tiles, and the kinds of tiles, are from those
  of the real frames for the same actions (half of the sum of absolute differences).
- remembered: of the tiles that come back into view, the share that shows the same kind as before.
  Chance is what tiles score that are drawn anew to fit the neighbor in view, as the samples draw
  them. Above chance: (remembered - chance) / (1 - chance).
- psnr, in dB, to the real frame; delta_psnr (Genie, arXiv 2402.15391): minus the PSNR of the sample
  that has the same start and other actions.

The truth, world.npz, has maps and positions. So the real frames are drawn for any actions. Controls
are made of them: each must lose what it lacks.
"""

import zlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from runtime.cli import UserError
from runtime.distributed import rank
from scoring.stats import cell, interval_units, mean_interval, psnr, table
from world_rules import (
    ACTIONS,
    AGENT,
    GRASS,
    KINDS,
    MIDDLE,
    MOVES,
    SIZE,
    TEXTURES,
    TILE,
    VIEW,
    draw,
    simulate,
    views,
)

SHARP = 0.5  # the least margin of a sharp tile: a quarter of the way to another texture
MARKS = (1, 8, 16, 32, 64, 128, 256)  # generated frames; a column ends at each
LAND = AGENT + 1  # kinds without an agent
UNKNOWN = -1  # the kind of a tile that nothing determines
MEASURES = {  # of each generated frame
    "decodes": "frames in which each tile is sharp",
    "sharp": "sharp tiles",
    "agent": "agent right",
    "determined": "tiles that the past determines",
    "moved": "transitions right: moved",
    "blocked": "blocked",
    "stayed": "stayed",
    "psnr": "PSNR, dB",
    "delta_psnr": "PSNR with these minus other actions, dB",
}
DRIFT = {
    "shares": "shares of tiles, distance to real ones",
    "neighbors": "neighboring tiles, distance to real ones",
}
MEMORY = {
    "remembered": "tiles remembered",
    "chance": "by chance",
    "above_chance": "above chance, of what is possible",
}
SHOWN = ("decodes", "agent", "determined", "moved", "blocked", "above_chance", "shares")


class Truth:
    """world.npz of a data set. Raises UserError."""

    def __init__(self, root):
        self.path = Path(root, "world.npz")
        try:
            with np.load(self.path) as arrays:
                names = arrays["names"].tolist()
                self.maps = arrays["maps"].astype(int)
                self.positions = arrays["positions"].astype(int)
                self.agents = arrays["agents"].astype(int)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            BadZipFile,
            zlib.error,
        ) as error:
            raise UserError(
                f"--metric world: {self.path} can't be read ({error!r}); make the data set with "
                "datasets/make_world.py"
            ) from error
        self.numbers = {name: number for number, name in enumerate(names)}

    def play(self, episodes, frames, actions):
        """The kinds of tiles (N, 1 + G, VIEW, VIEW) in frame frames[n] of the episode with number
        episodes[n], and after each of the actions (N, G).
        """
        first = np.zeros((len(episodes), 1), int)
        positions, agents = simulate(
            self.maps[episodes],
            starts=self.positions[episodes, frames],
            agents=self.agents[episodes, frames],
            actions=np.concatenate([first, actions], axis=1),
        )
        return views(self.maps[episodes], positions, agents)


class Start(NamedTuple):
    """What N samples continue, and by which actions."""

    truth: Truth
    episodes: np.ndarray  # (N,) numbers
    frames: np.ndarray  # (N,) number of the last given frame in its episode
    actions: np.ndarray  # (N, 1 + G); entry 0 does not count


def find_truth(args, samples, clips):
    """The Start of Samples that continue Clips. Raises UserError."""
    truth = Truth(args.data_path)
    here = samples.place
    if samples.image_size != SIZE:
        raise UserError(f"{here}: has frames of {samples.image_size} px; expected {SIZE} px")
    given = len(samples.given[0])
    if samples.given[0] != tuple(range(given)):
        raise UserError(f"{here}: the given frames are not the first ones; sample again")
    names = samples.about.get("actions")
    if names is None:
        raise UserError(f"{here}: has no actions; sample a model that was trained with them")
    actions = np.zeros((len(samples), samples.num_frames), int)
    for number, of_sample in enumerate(names):
        for t in range(given, samples.num_frames):
            if of_sample[t] not in ACTIONS:
                raise UserError(
                    f"{here}: frame {t} of sample {number} has the action {of_sample[t]!r}; "
                    f"expected one of {', '.join(ACTIONS)}; sample again with --actions"
                )
            actions[number, t] = ACTIONS.index(of_sample[t])
    per_clip = samples.about["real"]["samples_per_clip"]
    episodes = []
    frames = []
    for number in range(len(samples)):
        video, frame_indices, _ = clips.draw(number // per_clip)
        if video.key not in truth.numbers:
            raise UserError(
                f"--data-path {args.data_path}: {video.path} is not in {truth.path.name}; pass the "
                "data set of the samples"
            )
        episodes.append(truth.numbers[video.key])
        frames.append(frame_indices[given - 1])
    return Start(
        truth=truth,
        episodes=np.array(episodes),
        frames=np.array(frames),
        actions=actions[:, given - 1 :],
    )


def score_world(samples, start):
    """Score Samples with their Start."""
    if rank() != 0:
        return None
    titles = MEASURES | DRIFT | MEMORY
    context = samples.source.get("context")
    real = start.truth.play(start.episodes, start.frames, start.actions[:, 1:])
    keys = [*zip(start.episodes.tolist(), start.frames.tolist(), strict=True)]
    result = summarize(
        samples.clips[:, -real.shape[1] :],
        real=real,
        actions=start.actions,
        starts=keys,
        context=context,
        videos=samples.videos,
    )
    result["context"] = context
    result["controls"] = {}
    for name, wrong, told in make_controls(real, start.actions):
        control = summarize(
            wrong,
            real=real,
            actions=told,
            starts=keys,
            context=context,
        )
        result["controls"][name] = {measure: control[measure] for measure in titles}
    values = {name: result[name] for name in titles}
    result["interval_units"], line = interval_units(lacking="", samples=samples.videos)
    return values, result, [*result_lines(result, titles), line]


def result_lines(result, titles):
    """Two tables as lines: measures by frame, and the controls."""
    parts = result["by_frame"]
    rows = [("generated frames up to", *parts, "all, 95%")]
    for name, title in titles.items():
        cells = [cell(column, name) for column in parts.values()]
        rows.append((title, *cells, cell(result, name)))
    controls = [("controls", *(titles[name] for name in SHOWN))]
    for name, control in result["controls"].items():
        controls.append((name, *(cell(control, measure) for measure in SHOWN)))
    # measures in the rows, as their titles are long
    return [*table(rows), *table([*zip(*controls, strict=True)])]


# What frames show, and what they should ----------------------------------------------------------


def decode(frames):
    """(kinds, margins) of the tiles (..., VIEW, VIEW) of frames uint8 (..., SIZE, SIZE, 3)."""
    shape = frames.shape[:-3]
    pixels = frames.reshape(*shape, VIEW, TILE, VIEW, TILE, 3).swapaxes(-4, -3)
    tiles = pixels.reshape(*shape, VIEW, VIEW, -1).astype(np.float32)
    textures = TEXTURES.reshape(len(KINDS), -1).astype(np.float32)
    distances = [np.linalg.norm(tiles - texture, axis=-1) for texture in textures]
    kinds = np.argmin(distances, axis=0)
    between = np.linalg.norm(textures[:, None] - textures, axis=-1)
    np.fill_diagonal(between, np.inf)
    gaps = between.min(axis=-1)
    return kinds, 1 - 2 * np.min(distances, axis=0) / gaps[kinds]


def shifted(tiles, move):
    """What frames show after a move (y, x), of the tiles (..., VIEW, VIEW) before; else UNKNOWN."""
    before = tiles.copy()
    before[..., MIDDLE, MIDDLE] = GRASS  # where the agent stood
    border = [(0, 0)] * (tiles.ndim - 2) + [(1, 1)] * 2
    bordered = np.pad(before, border, constant_values=UNKNOWN)
    y, x = 1 + move
    after = bordered[..., y : y + VIEW, x : x + VIEW]
    after[..., MIDDLE, MIDDLE] = UNKNOWN  # the agent
    return after


def expected_moves(tiles, actions):
    """The moves (..., 2) by actions (...) after frames with these tiles (..., VIEW, VIEW)."""
    targets = MIDDLE + MOVES[actions]
    flat = targets[..., 0] * VIEW + targets[..., 1]
    in_front = np.take_along_axis(tiles.reshape(*actions.shape, -1), flat[..., None], axis=-1)
    return MOVES[actions] * (in_front == GRASS)


def measure_transitions(tiles, actions):
    """{measure: float (N, T - 1)} of the transitions of tiles (N, T, VIEW, VIEW).

    NaN: does not count. actions: (N, T), entry t leads to frame t.
    """
    before = tiles[:, :-1]
    after = tiles[:, 1:]
    moves = expected_moves(before, actions[:, 1:])  # (N, T - 1, 2)
    outcomes = np.stack([shifted(before, move) for move in MOVES])  # (M, N, T - 1, VIEW, VIEW)
    is_known = outcomes != UNKNOWN
    agrees = (outcomes == after) & is_known
    explained = agrees.sum(axis=(3, 4)) / is_known.sum(axis=(3, 4))  # (M, N, T - 1)
    is_expected = (MOVES[:, None, None] == moves).all(axis=3)
    number = is_expected.argmax(axis=0)[None]
    determined = np.take_along_axis(explained, number, axis=0)[0]
    expected = np.take_along_axis(outcomes, number[..., None, None], axis=0)
    differs = ((outcomes != expected) & is_known & (expected != UNKNOWN)).any(axis=(3, 4))
    is_told_apart = (differs | is_expected).all(axis=0)
    is_right = determined > np.where(is_expected, -1, explained).max(axis=0)
    has_moved = moves.any(axis=2)
    acts = actions[:, 1:] > 0
    kinds = {
        "moved": has_moved,
        "blocked": acts & ~has_moved,
        "stayed": ~acts,
    }
    measured = {"determined": determined}
    for name, is_of_kind in kinds.items():
        measured[name] = np.where(is_of_kind & is_told_apart, is_right, np.nan)
    return measured


def agent_is_right(tiles, actions, facings):
    """Whether frames (N, T, VIEW, VIEW) show one agent, in the middle, that faces as told: (N, T).

    actions: (N, T), entry t leads to frame t. facings: kinds of the agents (N,) in frame 0.
    """
    times = np.arange(actions.shape[1])
    last_turn = np.maximum.accumulate(np.where(actions > 0, times, 0), axis=1)
    last_turn[:, 0] = 0
    turned = AGENT + np.take_along_axis(actions, last_turn, axis=1)
    expected = np.where(last_turn > 0, turned, facings[:, None])
    num_agents = (tiles > AGENT).sum(axis=(2, 3))
    return (tiles[:, :, MIDDLE, MIDDLE] == expected) & (num_agents == 1)


def find_entries(tiles, actions):
    """The tiles that come into view in N clips, int (n, 5).

    Columns: frame; kind of the neighbor that was in view; kind now; kind when the place was last
    seen, or UNKNOWN; frames since then. A place follows from the moves that the frames make
    possible. tiles: (N, T, VIEW, VIEW); actions: (N, T).
    """
    N, T = actions.shape
    moves = expected_moves(tiles[:, :-1], actions[:, 1:])
    corners = np.concatenate([np.zeros((N, 1, 2), int), moves.cumsum(axis=1)], axis=1)
    corners -= corners.min(axis=(0, 1))
    height, width = corners.max(axis=(0, 1)) + VIEW
    kinds_seen = np.full((N, height, width), UNKNOWN)
    times_seen = np.zeros((N, height, width), int)
    clip = np.arange(N)[:, None, None]
    place = np.arange(VIEW)
    shown = tiles.copy()
    shown[:, :, MIDDLE, MIDDLE] = GRASS
    entries = []
    for t in range(T):
        ys = corners[:, t, 0, None, None] + place[:, None]
        xs = corners[:, t, 1, None, None] + place
        if t:
            number, y, x, inner_y, inner_x = edges(moves[:, t - 1])
            where = (number, corners[number, t, 0] + y, corners[number, t, 1] + x)
            entry = [
                np.full(len(number), t),
                shown[number, t, inner_y, inner_x],
                shown[number, t, y, x],
                kinds_seen[where],
                t - times_seen[where],
            ]
            entries.append(np.stack(entry, axis=1))
        kinds_seen[clip, ys, xs] = shown[:, t]
        times_seen[clip, ys, xs] = t
    return np.concatenate(entries)


def edges(moves):
    """(clip, y, x, y of the neighbor, x of the neighbor) of the tiles, each (n,), that come into
    view by the moves (N, 2) of N clips.
    """
    number = np.flatnonzero(moves.any(axis=1)).repeat(VIEW)
    along = np.tile(np.arange(VIEW), len(number) // VIEW)
    dy, dx = moves[number].T
    y = np.where(dy, (VIEW - 1) * (dy > 0), along)
    x = np.where(dx, (VIEW - 1) * (dx > 0), along)
    return number, y, x, y - dy, x - dx


# Statistics ---------------------------------------------------------------------------------------


def measure_clips(frames, tiles, margins, real, actions, twins):
    """{measure: float (N, G)} of the generated frames of N clips; NaN: does not count.

    frames: uint8 (N, 1 + G, SIZE, SIZE, 3), of which the first is given; tiles and margins (N, 1 +
    G, VIEW, VIEW): what they show; real: the true tiles; actions: (N, 1 + G); twins: see
    `find_twins`.
    """
    is_sharp = margins[:, 1:] >= SHARP
    facings = real[:, 0, MIDDLE, MIDDLE]
    true = draw(real[:, 1:])
    from_true = psnr_of_frames(frames[:, 1:], true)
    delta = np.full(from_true.shape, np.nan)
    if twins:
        has_twin = [*twins]
        from_others = psnr_of_frames(frames[[*twins.values()], 1:], true[has_twin])
        delta[has_twin] = from_true[has_twin] - from_others
    measured = {
        "decodes": is_sharp.all(axis=(2, 3)),
        "sharp": is_sharp.mean(axis=(2, 3)),
        "agent": agent_is_right(tiles, actions, facings)[:, 1:],
        **measure_transitions(tiles, actions),
        "psnr": from_true,
        "delta_psnr": delta,
    }
    return {name: measured[name].astype(float) for name in MEASURES}


def psnr_of_frames(frames, real):
    """PSNR in dB, (N, G), of frames uint8 (N, G, SIZE, SIZE, 3); 60 if they are equal."""
    pairs = zip(frames.reshape(-1, SIZE, SIZE, 3), real.reshape(-1, SIZE, SIZE, 3), strict=True)
    return np.array([psnr(*pair) for pair in pairs]).reshape(frames.shape[:2])


def find_twins(starts, actions):
    """{number of a clip: the first one with an equal start and other actions, if there is any}."""
    clips_of = {}
    for number, start in enumerate(starts):
        clips_of.setdefault(start, []).append(number)
    twins = {}
    for number, start in enumerate(starts):
        for other in clips_of[start]:
            if (actions[other] != actions[number]).any():
                twins.setdefault(number, other)
    return twins


def remember(entries, within=None):
    """{name of MEMORY: number or None} of entries (n, 5) of all clips.

    within: the most frames since a tile was last seen.
    """
    _, inner, kinds, last, age = entries.T
    counts = np.zeros((len(KINDS), len(KINDS)))
    np.add.at(counts, (inner, kinds), 1)
    is_back = last != UNKNOWN
    if within is not None:
        is_back &= age <= within
    if not is_back.any():
        return dict.fromkeys(MEMORY) | {"returns": 0}
    drawn = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    chance = float(drawn[inner[is_back], last[is_back]].mean())
    remembered = float((kinds == last)[is_back].mean())
    above = (remembered - chance) / (1 - chance) if chance < 1 else None
    return {
        "remembered": remembered,
        "chance": chance,
        "above_chance": above,
        "returns": int(is_back.sum()),
    }


def drift(tiles, real):
    """{name of DRIFT: distance} of the statistics of frames (..., VIEW, VIEW) to real ones."""

    def distance(statistics):
        return float(np.abs(statistics(tiles) - statistics(real)).sum() / 2)

    return {"shares": distance(shares_of_kinds), "neighbors": distance(shares_of_neighbors)}


def shares_of_kinds(tiles):
    """The share of each kind, (kinds,), among the tiles around the agent of frames."""
    counts = np.bincount(tiles.ravel(), minlength=len(KINDS))
    counts -= np.bincount(tiles[..., MIDDLE, MIDDLE].ravel(), minlength=len(KINDS))
    return counts / counts.sum()


def shares_of_neighbors(tiles):
    """The share of each pair of kinds, (2 kinds^2,): of left and right, of upper and lower tiles.

    Each half adds up to 1/2.
    """
    halves = []
    for first, second in (
        (tiles[..., :-1], tiles[..., 1:]),
        (tiles[..., :-1, :], tiles[..., 1:, :]),
    ):
        pairs = (first * len(KINDS) + second).ravel()
        halves.append(np.bincount(pairs, minlength=len(KINDS) ** 2) / len(pairs) / 2)
    return np.concatenate(halves)


def columns(num_generated):
    """{mark: slice of the generated frames since the mark before}."""
    ends = [mark for mark in MARKS if mark < num_generated] + [num_generated]
    return {end: slice(start, end) for start, end in pairwise([0, *ends])}


def summarize(frames, real, actions, starts, context=None, videos=()):
    """A plain dict for JSON of N clips; arguments: see `measure_clips`.

    starts: of each clip, what tells whether another one begins alike. context: the most frames
    before a frame that the model sees; None: all. videos: those of the clips.
    """
    tiles, margins = decode(frames)
    measured = measure_clips(
        frames,
        tiles=tiles,
        margins=margins,
        real=real,
        actions=actions,
        twins=find_twins(starts, actions),
    )
    entries = find_entries(tiles, actions)
    generated = tiles[:, 1:]
    true = real[:, 1:]
    result = {}
    for name, values in measured.items():
        of_clips = means(values)
        result[name] = mean_or_none(of_clips)
        result[f"{name}_interval95"] = mean_interval(of_clips, videos)
    result |= drift(generated, true)
    result |= remember(entries, context)
    by_frame = {}
    for mark, part in columns(frames.shape[1] - 1).items():
        column = {name: mean_or_none(values[:, part]) for name, values in measured.items()}
        column |= drift(generated[:, part], true[:, part])
        in_part = (entries[:, 0] > part.start) & (entries[:, 0] <= part.stop)
        column |= remember(entries[in_part], context)
        by_frame[str(mark)] = column
    result["by_frame"] = by_frame
    result["shares_of_kinds"] = dict(zip(KINDS, shares_of_kinds(generated), strict=True))
    return result


def means(values):
    """The means of values (N, G) over the numbers of each row, NaN where there is none."""
    counts = np.isfinite(values).sum(axis=1)
    return np.where(counts, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


def mean_or_none(values):
    """The mean of the numbers among values, a float for JSON; None if there is none."""
    (mean,) = means(values.reshape(1, -1))
    return None if np.isnan(mean) else float(mean)


def make_controls(real, actions):
    """Yield (name, frames, actions) of controls, made of the true tiles (N, 1 + G, VIEW, VIEW)."""
    frames = draw(real)
    yield "real", frames, actions
    late = np.concatenate([actions[:, :1], actions[:, :-1]], axis=1)
    yield "actions_shifted", frames, late
    yield "frozen", np.repeat(frames[:, :1], frames.shape[1], axis=1), actions
    wrong = real.copy()
    N, T = wrong.shape[:2]
    number, time = np.indices((N, T - 1))
    place = (number + time) % (VIEW * VIEW - 1)
    place += place >= MIDDLE * VIEW + MIDDLE  # not the agent
    row, column = np.divmod(place, VIEW)
    kind = wrong[number, time + 1, row, column]
    wrong[number, time + 1, row, column] = (kind + 1 + time % (LAND - 1)) % LAND
    yield "wrong_tile", draw(wrong), actions
    yield "dull", draw(dull_world(real, actions)), actions


def dull_world(real, actions):
    """Tiles (N, 1 + G, VIEW, VIEW) that obey the rules, but whatever comes into view is grass."""
    tiles = real.copy()
    for t in range(1, tiles.shape[1]):
        before = tiles[:, t - 1]
        moves = expected_moves(before, actions[:, t])
        for move in MOVES:
            is_this = (moves == move).all(axis=1)
            after = shifted(before[is_this], move)
            tiles[is_this, t] = np.where(after == UNKNOWN, GRASS, after)
        tiles[:, t, MIDDLE, MIDDLE] = real[:, t, MIDDLE, MIDDLE]
    return tiles

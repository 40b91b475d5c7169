"""Make World: episodes of an agent that walks over islands, with its actions, in UCF-101's layout.

    python datasets/make_world.py --out datasets/world

world_rules.py has the rules. Each episode is on a map of its own. Episodes of the test list are for
validation, so their maps are held out. Beside each video, NAME.actions.npy holds an action per
frame, int64 (T,): entry t is what was done between frames t - 1 and t. Entry 0 is "stay".

walks.npy, int64 (2 held-out maps, T - 1), has other walks, for sample_gd.py --actions. world.npz is
the truth, for evaluate.py --metric world:

    names (V,)      Class/stem of each video        maps (V, S, S)      the kinds of its tiles
    actions (V, T)  of its frames                   positions (V, T, 2) y, x of the agent on the map
    agents (V, T)   the kind of the agent's tile

The same flags give the same bytes (with the same FFmpeg build).
"""

import json
from layout import is_made, new_data_set, write_lists, write_videos
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import label

from runtime.cli import ArgumentParser, number, one_line_errors, say, wrong_input
from runtime.rng import generator
from world_rules import ACTIONS, AGENT, GRASS, MIRROR, TREE, WATER, draw, step, views

VERSION = 1  # of the maps, the walks and the drawings
FPS = 5  # a move takes 0.2 s
MARGIN = 3  # tiles of sea at the edge of a map
SHARE = {"water": 0.3, "tree": 0.15}  # of the tiles of a map within the margin, about
ROUND = 0.5  # how much lower the middle of an edge is than the middle of a map
HILL = 4  # tiles between the random heights that a map interpolates
# The walk: the chance to repeat the last action, after a move and after a blocked one
REPEAT = 0.75
REPEAT_BLOCKED = 0.4
STAY = 0.12  # the chance of a new action to be "stay"


def draw_map(size, random):
    """The kinds of the tiles of a map, uint8 (size, size)."""
    inner = size - 2 * MARGIN
    coarse = torch.randn(1, 1, inner // HILL + 2, inner // HILL + 2, generator=random)
    heights = F.interpolate(coarse, size=(inner, inner), mode="bicubic", align_corners=True)[0, 0]
    heights = heights + 0.2 * torch.randn(inner, inner, generator=random)
    along = torch.linspace(-1, 1, inner)
    heights = heights - ROUND * (along[:, None] ** 2 + along**2) ** 2  # less land in the corners
    woods = torch.rand(inner, inner, generator=random)
    land = torch.full((inner, inner), GRASS, dtype=torch.uint8)
    land[woods < SHARE["tree"]] = TREE
    land[heights < heights.flatten().quantile(SHARE["water"])] = WATER
    return F.pad(land, (MARGIN,) * 4, value=WATER).numpy()


def draw_start(tiles, random):
    """The (y, x) of a random tile of the largest meadow of a map."""
    meadows, _ = label(tiles == GRASS)
    largest = np.bincount(meadows[meadows > 0]).argmax()
    places = np.argwhere(meadows == largest)
    return places[int(torch.randint(len(places), (), generator=random))]


def walk(maps, starts, agents, draws):
    """(actions (V, T), positions (V, T, 2), kinds of the agents (V, T)) of random walks.

    maps: (V, S, S); starts: (V, 2); agents: (V,). draws: uniform numbers (V, T, 3).
    """
    V, T, _ = draws.shape
    rows = np.arange(V)
    actions = np.zeros((V, T), int)
    positions = np.empty((V, T, 2), int)
    kinds = np.empty((V, T), int)
    positions[:, 0] = starts
    kinds[:, 0] = agents
    was_blocked = np.zeros(V, bool)
    for t in range(1, T):
        repeats, stays, choices = draws[:, t].T
        new = np.where(stays < STAY, 0, 1 + (choices * (len(ACTIONS) - 1)).astype(int))
        chance = np.where(was_blocked, REPEAT_BLOCKED, REPEAT) * (t > 1)
        actions[:, t] = np.where(repeats < chance, actions[:, t - 1], new)
        positions[:, t], kinds[:, t] = step(
            maps,
            rows=rows,
            positions=positions[:, t - 1],
            agents=kinds[:, t - 1],
            actions=actions[:, t],
        )
        was_blocked = (actions[:, t] > 0) & (positions[:, t] == positions[:, t - 1]).all(axis=1)
    return actions, positions, kinds


def play(args):
    """({name in world.npz: array}, other walks on the held-out maps)."""
    maps = []
    starts = []
    agents = []
    count = args.episodes + args.held_out
    for index in range(count):
        random = generator(args.seed, "world", index)
        maps.append(draw_map(args.map_size, random))
        starts.append(draw_start(maps[-1], random))
        agents.append(AGENT + 1 + int(torch.randint(len(ACTIONS) - 1, (), generator=random)))
    held_out = [index for index in range(args.episodes, count) for _ in range(2)]
    rows = [*range(count), *held_out]
    draws = []
    for row, index in enumerate(rows):
        random = generator(args.seed, "walk", row, index)
        draws.append(torch.rand(args.frames, 3, generator=random, dtype=torch.float64).numpy())
    maps = np.stack(maps)
    actions, positions, kinds = walk(
        maps[rows],
        starts=np.stack(starts)[rows],
        agents=np.array(agents)[rows],
        draws=np.stack(draws),
    )
    truth = {
        "names": np.array([f"world/map{index:06d}" for index in range(count)]),
        "maps": maps,
        "actions": actions[:count].astype(np.uint8),
        "positions": positions[:count].astype(np.uint8),
        "agents": kinds[:count].astype(np.uint8),
    }
    return truth, actions[count:, 1:]


def write_data_set(out, settings, args):
    """Write the data set, all or nothing."""
    truth, walks = play(args)
    files = [f"{name}.mkv" for name in truth["names"]]
    numbers = {file: number for number, file in enumerate(files)}

    def frames_of(file):
        row = [numbers[file]]
        tiles = views(truth["maps"][row], truth["positions"][row], truth["agents"][row])
        return draw(tiles)[0]

    with new_data_set(out) as folder:
        write_videos(
            folder,
            names=files,
            frames_of=frames_of,
            fps=FPS,
        )
        for name, actions in zip(truth["names"], truth["actions"], strict=True):
            np.save(folder / f"{name}.actions.npy", actions.astype(np.int64))
        np.save(folder / "walks.npy", walks)
        np.savez(folder / "world.npz", **truth)
        for name, content in (
            ("actions", {"names": ACTIONS, "mirror": MIRROR}),
            ("world", {"settings": settings}),
        ):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        write_lists(folder, files[: args.episodes], files[args.episodes :])


def parse_args(argv=None):
    parser = ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make; must be new or empty")
    count = number(int, least=1, most=100_000)
    add(
        "--episodes",
        type=count,
        default=2000,
        help="episodes that train; default: %(default)s",
    )
    add(
        "--held-out",
        type=count,
        default=64,
        help="episodes that validate, on maps of their own; default: %(default)s",
    )
    add(
        "--frames",
        type=number(int, least=2, most=100_000),
        default=129,
        help="frames of an episode; default: %(default)s",
    )
    add(
        "--map-size",
        type=number(int, least=16, most=255),
        default=32,
        help="height and width of a map in tiles; default: %(default)s",
    )
    add("--seed", type=int, default=0, help="seed of the random choices; default: 0")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings["version"] = VERSION
    with wrong_input():
        if is_made(args.out, "World", "world.json", settings):
            return
    write_data_set(args.out, settings, args)
    say(
        f"{args.out}: {args.episodes} episodes of {args.frames} frames, and {args.held_out} on "
        "held-out maps"
    )


if __name__ == "__main__":
    main()

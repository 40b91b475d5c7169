"""The rules of a small world that make_world.py plays and world_truth.py scores.

A map is a square of grass, water and trees, in a sea without end. The agent stands on a tile of
grass and looks to one side. An action other than "stay" turns it, and takes it one tile further if
that tile is grass. A frame shows the VIEW x VIEW tiles around the agent, of TILE x TILE px each.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

VIEW = 5  # tiles; odd, because the agent is in the middle
TILE = 4  # px
SIZE = VIEW * TILE  # px, of a frame
MIDDLE = VIEW // 2  # the row and the column of the agent

ACTIONS = ("stay", "left", "right", "up", "down")
# If a frame is mirrored. The textures below are symmetric for that.
MIRROR = {"left": "right", "right": "left"}
# (y, x) of the move of each action; y grows downwards
MOVES = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])
# The kinds of tiles. An agent that faces as action `a` made it is of kind AGENT + a.
GRASS = 0
WATER = 1
TREE = 2
AGENT = 2
KINDS = ("grass", "water", "tree", *(f"agent {action}" for action in ACTIONS[1:]))

COLORS = {
    ".": (124, 196, 92),  # light grass
    ",": (76, 148, 60),  # dark grass
    "~": (52, 108, 212),  # water
    "-": (124, 180, 244),  # a wave
    "t": (20, 76, 44),  # leaves
    "l": (48, 116, 60),  # leaves in the light
    "b": (116, 76, 44),  # a trunk
    "r": (212, 52, 44),  # a coat
    "f": (252, 220, 180),  # a face
}
DRAWINGS = (  # of each kind, symmetric or in pairs
    (".,,.", "....", ",..,", "...."),
    ("-~~-", "~~~~", "~--~", "~~~~"),
    (".ll.", "lttl", "tttt", ".bb."),
    ("ffr.", "ffrr", "ffrr", "ffr."),
    (".rff", "rrff", "rrff", ".rff"),
    ("ffff", "ffff", "rrrr", ".rr."),
    (".rr.", "rrrr", "ffff", "ffff"),
)
TEXTURES = np.array(  # uint8 (kinds, TILE, TILE, 3)
    [[[COLORS[pixel] for pixel in row] for row in drawing] for drawing in DRAWINGS], np.uint8
)


def simulate(maps, starts, agents, actions):
    """(positions (N, T, 2) as y, x, kinds of the agents (N, T)) of N episodes.

    maps: kinds of tiles (N, S, S), with water all around. starts: positions (N, 2) and agents: the
    kinds of the agents (N,), in frame 0. actions: (N, T) numbers of ACTIONS; entry t leads to frame
    t, and entry 0 does not count.
    """
    rows = np.arange(len(maps))
    positions = np.empty((*actions.shape, 2), int)
    kinds = np.empty(actions.shape, int)
    positions[:, 0] = starts
    kinds[:, 0] = agents
    for t in range(1, actions.shape[1]):
        positions[:, t], kinds[:, t] = step(
            maps,
            rows=rows,
            positions=positions[:, t - 1],
            agents=kinds[:, t - 1],
            actions=actions[:, t],
        )
    return positions, kinds


def step(maps, rows, positions, agents, actions):
    """(positions, kinds of the agents) after an action each. rows: the map of each agent."""
    targets = positions + MOVES[actions]
    is_free = maps[rows, targets[:, 0], targets[:, 1]] == GRASS
    positions = np.where(is_free[:, None], targets, positions)
    agents = np.where(actions > 0, AGENT + actions, agents)
    return positions, agents


def views(maps, positions, agents):
    """The kinds of the tiles that frames show, (N, T, VIEW, VIEW). Arguments: see `simulate`."""
    padded = np.pad(maps, ((0, 0), (MIDDLE, MIDDLE), (MIDDLE, MIDDLE)), constant_values=WATER)
    around = sliding_window_view(padded, (VIEW, VIEW), axis=(1, 2))  # (N, S, S, VIEW, VIEW)
    ys, xs = np.moveaxis(positions, -1, 0)
    tiles = around[np.arange(len(maps))[:, None], ys, xs]
    tiles[:, :, MIDDLE, MIDDLE] = agents
    return tiles


def draw(tiles):
    """Frames uint8 (..., SIZE, SIZE, 3) of kinds of tiles (..., VIEW, VIEW)."""
    pixels = TEXTURES[tiles]  # (..., VIEW, VIEW, TILE, TILE, 3)
    return np.swapaxes(pixels, -4, -3).reshape(*tiles.shape[:-2], SIZE, SIZE, 3)

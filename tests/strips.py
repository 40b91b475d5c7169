"""Strips of frames in the layout of MoCoGAN's copy of the Weizmann actions: a block per person that
moves by its class.

As a script it writes them into a folder: python tests/strips.py DIR [PEOPLE FRAMES]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

MOVES = {0: (1, 0), 1: (0, 1), 3: (1, 1), 4: (2, 0)}  # px per frame, down and to the right


def draw(person, number, num_frames, size=64):
    """The frames of a clip, uint8 (T, size, size, 3)."""
    frames = np.full((num_frames, size, size, 3), 40 + 20 * person, np.uint8)
    down, right = MOVES[number]
    for t, frame in enumerate(frames):
        y = (8 + down * t) % (size - 16)
        x = (8 + right * t) % (size - 16)
        frame[y : y + 16, x : x + 16] = 230, 60 + 30 * person, 20
    return frames


def write_strips(folder, people=3, num_frames=20):
    """Write data/actions/C/NNNNNNNN.jpg (PNG data) for all classes and people, and mirrored copies
    of odd number.
    """
    for action, number in enumerate(MOVES):
        action_folder = Path(folder, "data/actions", str(number))
        action_folder.mkdir(parents=True, exist_ok=True)
        for person in range(people):
            frames = draw(person, number, num_frames)
            index = person * 8 + 2 * action
            for clip in (frames, frames[:, :, ::-1]):
                strip = clip.transpose(1, 0, 2, 3).reshape(64, -1, 3)
                with open(action_folder / f"{index:08d}.jpg", "wb") as file:
                    Image.fromarray(strip).save(file, format="PNG")
                index += 1
    return folder


if __name__ == "__main__":
    write_strips(sys.argv[1], *map(int, sys.argv[2:]))

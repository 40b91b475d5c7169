"""Compose the Sprites benchmark: 1,296 characters walk, cast spells and slash, 8 frames of 64 px.

    git clone https://github.com/YingzhenLi/Sprites datasets/sprites-sheets
    python datasets/prepare_sprites.py --source datasets/sprites-sheets --out datasets/sprites

The benchmark is from Li and Mandt: Disentangled Sequential Autoencoder, ICML 2018 (arXiv
1803.02991). A character is four attributes with six values each: body, bottomwear, topwear and
hair. A sheet holds one value's tiles for all poses. The art is by the contributors of the Liberated
Pixel Cup, under CC-BY-SA 3.0 and GPL 3.0: name them with your pictures.

    OUT/<Class>/characterNNNN.mkv   lossless (FFV1), 8 fps; NNNN are the four attributes, 0 to 5
    OUT/ucfTrainTestlist/*.txt      the published split: 1,000 characters train, 296 validate

The script is safe to run again: it only makes missing videos, and writes the split again.
"""

from layout import missing_videos, write_lists, write_videos
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.cli import (
    ArgumentParser,
    UserError,
    check_writable,
    one_line_errors,
    plural,
    say,
    wrong_input,
)

SIZE = 64  # of a tile in px
FPS = 8
COLUMNS = 13  # of tiles in a sheet
ROWS = 21
VALUES = range(6)  # of an attribute
# from the lowest layer to the highest; shoes come last
ATTRIBUTES = "body", "bottomwear", "topwear", "hair"
SHOES = "shoes", 1
ORDER = {
    "Walk": (7, 0, 1, 2, 3, 4, 5, 6),
    "Spellcast": (0, 1, 2, 3, 4, 5, 4, 6),
    "Slash": (0, 1, 2, 3, 4, 5, 4, 0),
}
FIRST_TILE = {
    "WalkLeft": 118,
    "WalkFront": 131,
    "WalkRight": 144,
    "SpellcastLeft": 13,
    "SpellcastFront": 26,
    "SpellcastRight": 39,
    "SlashLeft": 169,
    "SlashFront": 182,
    "SlashRight": 195,
}


def parse_args():
    parser = ArgumentParser(
        description="Compose the videos of the Sprites benchmark, in UCF-101's layout."
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        metavar="DIR",
        help="a clone of the Sprites repository, which holds the sheets",
    )
    add(
        "--out",
        default="datasets/sprites",
        metavar="DIR",
        help="folder for the data set",
    )
    return parser.parse_args()


def read_sheets(source):
    """{(layer, value): tiles (273, 64, 64, 4), numbered row by row}. Raises UserError."""
    sheets = {}
    for layer, value in [*product(ATTRIBUTES, VALUES), SHOES]:
        path = Path(source, layer, f"{value}.png")
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGBA"))
            tiles = pixels.reshape(ROWS, SIZE, COLUMNS, SIZE, 4).swapaxes(1, 2)
        except (OSError, ValueError) as error:
            reason = "not found" if isinstance(error, FileNotFoundError) else "not a sheet"
            raise UserError(
                f"--source {source}: {layer}/{value}.png: {reason}; expected a sheet of "
                f"{COLUMNS * SIZE} x {ROWS * SIZE} px; clone the Sprites repository again"
            ) from error
        sheets[layer, value] = tiles.reshape(-1, SIZE, SIZE, 4)
    return sheets


def compose(sheets, class_name, character):
    """The frames of a character, uint8 (8, 64, 64, 3): its layers over black, the highest last."""
    layers = [*zip(ATTRIBUTES, character, strict=True), SHOES]
    (order,) = (order for action, order in ORDER.items() if action in class_name)
    frames = []
    for number in order:
        frame = Image.new("RGBA", (SIZE, SIZE), "black")
        for layer in layers:
            tile = sheets[layer][FIRST_TILE[class_name] + number]
            frame.alpha_composite(Image.fromarray(tile))
        frames.append(np.asarray(frame)[..., :3])
    return np.stack(frames)


def path_of(class_name, character):
    digits = "".join(map(str, character))
    return f"{class_name}/character{digits}.mkv"


@one_line_errors()
def main():
    args = parse_args()
    characters = list(product(VALUES, repeat=len(ATTRIBUTES)))  # character number n is the n-th
    with wrong_input():
        sheets = read_sheets(args.source)
        check_writable("--out", args.out)
        videos = {path_of(*video): video for video in product(FIRST_TILE, characters)}
        missing = missing_videos(args.out, videos)
    order = np.random.RandomState(423).permutation(len(characters)).tolist()  # as published
    training = {characters[number] for number in order[:1000]}
    train = [name for name, (_, character) in videos.items() if character in training]
    test = [name for name, (_, character) in videos.items() if character not in training]
    write_videos(
        args.out,
        names=missing,
        frames_of=lambda name: compose(sheets, *videos[name]),
        fps=FPS,
    )
    write_lists(args.out, train, test)
    say(
        f"{args.out}: {len(characters)} characters in {len(FIRST_TILE)} classes; "
        f"{plural(len(missing), 'video')} written"
    )


if __name__ == "__main__":
    main()

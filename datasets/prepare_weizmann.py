"""Convert four actions of the Weizmann data set (people who wave, jump, bend) to 64 px videos.

    git clone https://github.com/sergeytulyakov/mocogan
    python datasets/prepare_weizmann.py --source mocogan --out datasets/weizmann

The data set is from Blank, Gorelick, Shechtman, Irani, Basri: Actions as Space-Time Shapes, ICCV
2005. The repository of MoCoGAN (Tulyakov, Liu, Yang, Kautz: CVPR 2018) holds four of its actions as
strips, data/actions/C/NNNNNNNN.jpg. A strip shows all frames of a clip side by side. C is the
action, and N // 8 is the person. Odd N are mirrored copies, which the script skips. This is
research data: read its terms before you share videos, or models trained on them.

    OUT/<Class>/personN.mkv         lossless (FFV1), 25 fps, so a jumping jack takes about a second
    OUT/ucfTrainTestlist/*.txt      the split: the test list holds all clips of --hold-out

The script is safe to run again: it only makes missing videos, and writes the split again.
"""

from layout import missing_videos, write_lists, write_videos
from itertools import product
from pathlib import Path

import numpy as np
from einops import EinopsError, rearrange
from PIL import Image

from runtime.cli import (
    COUNT,
    ArgumentParser,
    UserError,
    check_writable,
    one_line_errors,
    plural,
    say,
    wrong_input,
)

# number of the folder: class
CLASSES = {
    0: "OneHandWave",
    1: "TwoHandWave",
    3: "JumpingJack",
    4: "Bend",
}
SIZE = 64
FPS = 25


def parse_args():
    parser = ArgumentParser(
        description="Convert strips of the Weizmann actions to videos, in UCF-101's layout."
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        metavar="DIR",
        help="a clone of MoCoGAN's repository, or its folder of actions",
    )
    add(
        "--out",
        default="datasets/weizmann",
        metavar="DIR",
        help="folder for the data set",
    )
    add(
        "--hold-out",
        type=COUNT,
        nargs="+",
        default=[7, 8],
        help="numbers of the people who validate and never train; the first person is 1",
    )
    return parser.parse_args()


def find_strips(source):
    """{(class, person): path of the strip}, without opening files.

    Raises UserError if a person lacks a class.
    """
    folders = Path(source, "data", "actions"), Path(source, "actions"), Path(source)
    strips = {}
    for folder, (number, class_name) in product(folders, CLASSES.items()):
        for path in folder.glob(f"{number}/[0-9]*[02468].jpg"):
            person = int(path.stem) // 8 + 1
            strips[class_name, person] = path
    people = {person for _, person in strips} or {1}
    for class_name, person in product(CLASSES.values(), people):
        if (class_name, person) not in strips:
            raise UserError(
                f"--source {source}: person {person} has no clip of {class_name}; expected a "
                "complete clone of MoCoGAN's repository; clone it again"
            )
    return strips


def read_strip(path):
    """The frames of a strip, uint8 (T, SIZE, SIZE, 3). Raises UserError."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        return rearrange(pixels, "h (t w) c -> t h w c", h=SIZE, w=SIZE)
    except (OSError, EinopsError) as error:
        raise UserError(
            f"{path}: not a strip of {SIZE} x {SIZE} px frames; clone the repository again"
        ) from error


@one_line_errors()
def main():
    args = parse_args()
    held_out = set(args.hold_out)
    with wrong_input():
        strips = find_strips(args.source)
        check_writable("--out", args.out)
        people = {person for _, person in strips}
        if not held_out < people:
            raise UserError(
                f"--hold-out {sorted(held_out)}: expected some of people 1 to {max(people)}, but "
                "not all"
            )
        videos = {}
        train = []
        test = []
        for (class_name, person), path in sorted(strips.items()):
            name = f"{class_name}/person{person}.mkv"
            videos[name] = path
            part = test if person in held_out else train
            part.append(name)
        # 30 MB of memory
        clips = {name: read_strip(videos[name]) for name in missing_videos(args.out, videos)}
    write_videos(
        args.out,
        names=clips,
        frames_of=clips.get,
        fps=FPS,
    )
    write_lists(args.out, train, test)
    numbers = " and ".join(map(str, sorted(held_out)))
    say(
        f"{args.out}: {len(CLASSES)} classes with {len(people)} people each, person {numbers} held "
        f"out; {plural(len(clips), 'video')} written"
    )


if __name__ == "__main__":
    main()

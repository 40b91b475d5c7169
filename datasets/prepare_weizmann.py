"""Arrange a part of the Weizmann action data set, people who wave, jump and bend, as videos of 64 x 64 px.

    git clone https://github.com/sergeytulyakov/mocogan
    python datasets/prepare_weizmann.py --source mocogan --out datasets/weizmann

Blank, Gorelick, Shechtman, Irani, Basri: Actions as Space-Time Shapes, ICCV 2005; the repository of MoCoGAN (Tulyakov,
Liu, Yang, Kautz: CVPR 2018) holds four of its actions as strips, data/actions/C/NNNNNNNN.jpg: all frames of a clip side
by side. C is the action, N // 8 the person; odd N are mirrored copies, which are left out. Research data: mind its
terms before you pass on videos or models that were trained on them.

    OUT/<Class>/personN.mkv           lossless (FFV1), 25 fps: a jumping jack then takes about a second
    OUT/ucfTrainTestlist/*.txt        the split: all clips of --hold-out are the test list

Safe to run again: it does only what is missing, and writes the split anew. Exit status 2: see the message.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from runtime.cli import COUNT, ArgumentParser, Bar, UserError, check_writable, fail, one_line_errors, say
from video.index import UCF_LISTS
from video.writers import write_lossless

CLASSES = {0: "OneHandWave", 1: "TwoHandWave", 3: "JumpingJack", 4: "Bend"}  # by the number of their folder
SIZE, FPS = 64, 25
LEAST_FRAMES = 16


def parse_args():
    parser = ArgumentParser(description="Arrange strips of the Weizmann actions as videos, in UCF-101's layout.")
    add = parser.add_argument
    add("--source", required=True, metavar="DIR", help="MoCoGAN's repository, or the folder of its actions")
    add("--out", default="datasets/weizmann", metavar="DIR", help="the data set")
    people = "people whose clips validate and never train, from 1; the others train"
    add("--hold-out", type=COUNT, nargs="+", default=[7, 8], metavar="N", help=people)
    return parser.parse_args()


def find_strips(source):
    """{(class, person): path of its strip}. Opens no file. Raises UserError unless each person has one per class."""
    prefix = f"--source {source}"
    folders = Path(source, "data", "actions"), Path(source, "actions"), Path(source)
    folder = next((folder for folder in folders if any(Path(folder, str(number)).is_dir() for number in CLASSES)), None)
    if folder is None:
        raise UserError(f"{prefix}: no data/actions/0 and so on; wanted a clone of the repository mocogan")
    strips, people = {}, defaultdict(set)
    for number, name in CLASSES.items():
        for path in sorted(Path(folder, str(number)).glob("*.jpg")):
            if not path.stem.isdecimal():
                raise UserError(f"{prefix}: {path}: wanted a number as its name")
            if int(path.stem) % 2 == 0:
                person = int(path.stem) // 8 + 1
                if person in people[name]:
                    raise UserError(f"{prefix}: {path}: a second clip of person {person}; wanted one: is it a copy?")
                strips[name, person] = path
                people[name].add(person)
        if not people[name]:
            raise UserError(f"{prefix}: no strips in {Path(folder, str(number))} ({name}): clone the repository again")
    everyone = set.union(*people.values())
    for name in CLASSES.values():
        if missing := everyone - people[name]:
            raise UserError(f"{prefix}: person {min(missing)} has no clip of {name}: clone the repository again")
    return strips


def read_strip(path):
    """The frames of a strip, uint8 (T, SIZE, SIZE, 3). Raises UserError."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (SIZE, T SIZE, 3)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: can't be read as an image: clone the repository again") from error
    height, width, _ = pixels.shape
    if height != SIZE or width % SIZE or width < LEAST_FRAMES * SIZE:
        wanted = f"{SIZE} px high, a multiple of {SIZE} px wide, {LEAST_FRAMES} frames at least"
        raise UserError(f"{path}: a strip of {width} x {height} px; wanted {wanted}: clone the repository again")
    return pixels.reshape(SIZE, -1, SIZE, 3).transpose(1, 0, 2, 3)


def write_split(out, strips, held_out):
    """Write UCF-101's three lists, in which the clips of `held_out` people are the test list."""
    folder, classes = Path(out, UCF_LISTS), sorted(CLASSES.values())
    folder.mkdir(exist_ok=True)
    lines = {"classInd.txt": [f"{label} {name}" for label, name in enumerate(classes, 1)]}
    for file, tests in (("testlist01.txt", True), ("trainlist01.txt", False)):  # the second says that all is there
        clips = sorted(clip for clip in strips if (clip[1] in held_out) == tests)
        lines[file] = [f"{name}/person{person}.mkv {classes.index(name) + 1}" for name, person in clips]
    for name, content in lines.items():
        Path(folder, name).write_text("\n".join(content) + "\n")


def video_path(out, name, person):
    return Path(out, name, f"person{person}.mkv")


def check_args(args, strips):
    """Raise UserError if --out holds something else, or --hold-out names nobody or everybody."""
    check_writable("--out", args.out)
    people = {person for _, person in strips}
    if others := sorted(set(args.hold_out) - people):
        raise UserError(f"--hold-out {others[0]}: the people are 1 to {max(people)}")
    if people <= set(args.hold_out):
        raise UserError("--hold-out: names everybody: leave someone to train on")
    known = {f"{name}/person{person}.mkv" for name, person in strips}
    found = {path.relative_to(args.out).as_posix() for path in Path(args.out).glob("*/*") if path.suffix != ".tmp"}
    if foreign := sorted(path for path in found - known if not path.startswith((UCF_LISTS, "."))):
        raise UserError(f"--out {args.out}: holds {foreign[0]}, which is not of this data set: name another folder")


@one_line_errors()
def main():
    args = parse_args()
    try:
        strips = find_strips(args.source)
        check_args(args, strips)
        missing = {clip: path for clip, path in strips.items() if not video_path(args.out, *clip).exists()}
        clips = {clip: read_strip(path) for clip, path in missing.items()}  # 30 MB
    except UserError as error:
        fail(error)
    for (name, person), frames in Bar(clips.items(), desc="writing", unit="video", disable=not clips):
        video = video_path(args.out, name, person)
        video.parent.mkdir(parents=True, exist_ok=True)
        write_lossless(video, frames, FPS)
    write_split(args.out, strips, set(args.hold_out))
    people, held_out = {person for _, person in strips}, " and ".join(map(str, sorted(set(args.hold_out))))
    written = f"{len(clips)} videos written"
    say(f"{args.out}: {len(CLASSES)} classes of {len(people)} people, {written}; person {held_out} held out")


if __name__ == "__main__":
    main()

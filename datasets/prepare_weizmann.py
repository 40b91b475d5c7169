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
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from layout import class_lines, missing_videos, video_lines, write_lists
from runtime.cli import COUNT, ArgumentParser, Bar, UserError, check_writable, fail, one_line_errors, say
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
    prefix, strips = f"--source {source}", {}
    places = Path(source, "data", "actions"), Path(source, "actions"), Path(source)
    folder = next((place for place in places if any((place / str(number)).is_dir() for number in CLASSES)), None)
    if folder is None:
        raise UserError(f"{prefix}: no data/actions/0 and so on; expected a clone of the repository mocogan")
    for number, name in CLASSES.items():
        for path in sorted((folder / str(number)).glob("*.jpg")):
            if not path.stem.isdecimal():
                raise UserError(f"{prefix}: {path}: expected a number as its name")
            clip = name, int(path.stem) // 8 + 1
            if int(path.stem) % 2 == 0 and strips.setdefault(clip, path) is not path:
                raise UserError(f"{prefix}: {path}: a second clip of person {clip[1]}; expected one: is it a copy?")
    people = {person for _, person in strips}
    for clip in [(name, person) for name in CLASSES.values() for person in sorted(people) or [1]]:
        if clip not in strips:
            raise UserError(f"{prefix}: person {clip[1]} has no clip of {clip[0]}: clone the repository again")
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
        expected = f"{SIZE} px high, a multiple of {SIZE} px wide, {LEAST_FRAMES} frames at least"
        raise UserError(f"{path}: a strip of {width} x {height} px; expected {expected}: clone the repository again")
    return pixels.reshape(SIZE, -1, SIZE, 3).transpose(1, 0, 2, 3)


def check_people(strips, held_out):
    """Raise UserError if --hold-out names nobody or everybody."""
    people = {person for _, person in strips}
    if others := sorted(held_out - people):
        raise UserError(f"--hold-out {others[0]}: the people are 1 to {max(people)}")
    if people <= held_out:
        raise UserError("--hold-out: names everybody: leave someone to train on")


@one_line_errors()
def main():
    args = parse_args()
    held_out, classes = set(args.hold_out), sorted(CLASSES.values())
    try:
        strips = find_strips(args.source)
        check_writable("--out", args.out)
        check_people(strips, held_out)
        videos = {f"{name}/person{person}.mkv": path for (name, person), path in sorted(strips.items())}
        clips = {name: read_strip(videos[name]) for name in missing_videos(args.out, videos)}  # 30 MB
    except UserError as error:
        fail(error)
    for name, frames in Bar(clips.items(), desc="writing", unit="video", disable=not clips):
        Path(args.out, name).parent.mkdir(parents=True, exist_ok=True)
        write_lossless(Path(args.out, name), frames, FPS)
    tests = {f"{name}/person{person}.mkv" for name, person in strips if person in held_out}
    train, test = (video_lines([name for name in videos if (name in tests) == held], classes) for held in (False, True))
    write_lists(args.out, {"classInd": class_lines(classes), "testlist01": test, "trainlist01": train})
    people, numbers = len(strips) // len(classes), " and ".join(map(str, sorted(held_out)))
    written = f"{len(clips)} videos written"
    say(f"{args.out}: {len(classes)} classes of {people} people, {written}; person {numbers} held out")


if __name__ == "__main__":
    main()

"""What the scripts in this folder share: UCF-101's lists, and which videos a folder holds, lacks or should not have."""

from pathlib import Path

from runtime.cli import UserError
from video.files import has_suffix
from video.index import UCF_LISTS


def write_lists(out, lists):
    """Write OUT/ucfTrainTestlist/NAME.txt for each name: lines. Put trainlist01 last: it says that the set is complete.

    classInd has a line `1 Class` per class; trainlist01 and testlist01 name the videos.
    """
    folder = Path(out, UCF_LISTS)
    folder.mkdir(exist_ok=True)
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def class_lines(classes):
    """The lines of classInd."""
    return [f"{number} {name}" for number, name in enumerate(classes, 1)]


def video_lines(names, classes):
    """The lines of trainlist01 for names such as `Class/video.avi`: each with the number of its class."""
    return [f"{name} {classes.index(name.split('/')[0]) + 1}" for name in names]


def missing_videos(out, names):
    """Those of the videos `names` that OUT lacks. Raises UserError if it holds others."""
    found = {path.relative_to(out).as_posix() for path in Path(out).rglob("*") if has_suffix("video", path)}
    if foreign := sorted(found - set(names)):
        raise UserError(f"--out {out}: holds {foreign[0]}, which is not of this data set: name another folder")
    return [name for name in names if name not in found]

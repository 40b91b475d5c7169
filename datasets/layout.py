"""Shared code of the scripts beside this module: path of EqM/, UCF-101's lists, missing videos."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import uncaught  # noqa: F401

from runtime.cli import Bar, UserError, plural, say
from video.files import has_suffix
from video.index import UCF_LISTS
from video.source import THREADS, in_threads
from video.writers import write_lossless


def write_lists(out, train, test):
    """Write UCF-101's lists for videos `Class/name.avi`. trainlist01 comes last and marks the data
    set as complete.
    """
    folder = Path(out, UCF_LISTS)
    classes = sorted({name.split("/")[0] for name in (*train, *test)})
    folder.mkdir(exist_ok=True)
    lists = {
        "classInd": [f"{number} {name}" for number, name in enumerate(classes, 1)],
        "testlist01": test,
    }
    lists["trainlist01"] = [f"{name} {classes.index(name.split('/')[0]) + 1}" for name in train]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def missing_videos(out, names):
    """The names of videos that are missing in OUT. Raises UserError if OUT holds other videos."""
    found = {
        path.relative_to(out).as_posix()
        for path in Path(out).rglob("*")
        if has_suffix("video", path)
    }
    if foreign := sorted(found - set(names)):
        raise UserError(
            f"--out {out}: holds {foreign[0]}, which does not belong to this data set; name "
            "another folder"
        )
    return [name for name in names if name not in found]


def write_missing(out, names, frames_of, fps, train, test, about):
    """Write the missing videos `Class/name.mkv` of a data set, frames_of(name) each, then the lists
    of all videos.
    """

    def write(name):
        Path(out, name).parent.mkdir(parents=True, exist_ok=True)
        write_lossless(Path(out, name), frames_of(name), fps)

    for _ in Bar(
        in_threads(write, names, THREADS),
        total=len(names),
        desc="writing",
        unit="video",
        disable=not names,
    ):
        pass
    write_lists(out, train, test)
    say(f"{out}: {about}; {plural(len(names), 'video')} written")

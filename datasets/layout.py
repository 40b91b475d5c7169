"""Shared code of the scripts beside this module: path of EqM/, UCF-101's lists, what is missing."""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import uncaught  # noqa: F401

from runtime.cli import Bar, UserError, check_writable, say, writing
from runtime.untrusted import read_json
from video.files import has_suffix
from video.index import UCF_LISTS
from video.source import THREADS, in_threads
from video.writers import write_lossless


def write_lists(out, train, test):
    """Write UCF-101's lists for videos `Class/name.avi`. trainlist01 comes last and marks the data
    set as complete.
    """
    folder = Path(out, UCF_LISTS)
    folder.mkdir(exist_ok=True)
    classes = sorted({name.split("/")[0] for name in (*train, *test)})
    numbers = {name: number for number, name in enumerate(classes, 1)}
    lists = {
        "classInd": [f"{number} {name}" for name, number in numbers.items()],
        "testlist01": test,
        "trainlist01": [f"{name} {numbers[name.split('/')[0]]}" for name in train],
    }
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def is_made(out, title, file, settings):
    """True, which it says, if `out` holds a data set with these settings, False if it is new or
    empty and can be written.

    title: the name of the data set; file: its JSON file with the settings. Raises UserError
    otherwise.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        check_writable("--out", out)
        return False
    advice = "expected a new or empty folder, or the same data set; name another folder"
    try:
        made_with = read_json(out / file)["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out {out}: holds files that are not {title}; {advice}") from error
    if made_with != settings:
        raise UserError(f"--out {out}: holds {title} made with other flags ({made_with}); {advice}")
    say(f"{out} already exists, made with the same flags")
    return True


@contextmanager
def new_data_set(out):
    """A temporary folder beside `out`, which becomes `out` when the body ends without an error."""
    out = out.resolve()  # if it is a link, what it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary,
        writing(out),
    ):
        folder = Path(temporary, out.name)
        yield folder
        os.replace(folder, out)


def missing_videos(out, names):
    """The names of videos that are missing in OUT. Raises UserError if OUT holds other videos."""
    paths = [path for path in Path(out).rglob("*") if has_suffix("video", path)]
    existing = {path.relative_to(out).as_posix() for path in paths}
    foreign = sorted(existing - set(names))
    if foreign:
        raise UserError(
            f"--out {out}: holds {foreign[0]}, which does not belong to this data set; name "
            "another folder"
        )
    return [name for name in names if name not in existing]


def write_videos(out, names, frames_of, fps):
    """Write videos `Class/name.mkv` of a data set, frames_of(name) each."""

    def write(name):
        path = Path(out, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lossless(path, frames_of(name), fps)

    written = in_threads(write, names, THREADS)
    for _ in Bar(
        written,
        total=len(names),
        desc="writing",
        unit="video",
        disable=not names,
    ):
        pass

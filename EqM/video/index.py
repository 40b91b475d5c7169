"""The files of a data folder, `ROOT/<Class>/<video>.mp4`, or images (one frame), and their splits.

Files directly in ROOT form one class, "all". Code that treats videos and images alike says video
for both.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime.cli import Bar, UserError, plural, say
from runtime.untrusted import read_json
from video.files import SUFFIXES, UnreadableError, Video, has_suffix, probe
from video.samples import folders_of_samples

UNLABELLED = "all"  # the class of files directly in ROOT
UCF_LISTS = "ucfTrainTestlist"
INDEX_FILE = ".video_index-{}.json"  # with a hash of the data's path; in the folder of the runs
INDEX_FORMAT = 3
SPARES = 100  # most training videos that may replace validation videos


class CorruptDataError(UserError):
    """Too many corrupt files: the input is wrong, so all scripts end with that status.

    This holds while they run, too.
    """

    status = 2


@dataclass
class Scan:
    videos: list  # of Video, sorted by path; in a cache: in the order of the original videos
    classes: list  # class names, sorted
    unreadable: list  # paths of the files that could not be opened
    # path -> file_stamp before the file was opened; videos only
    stamps: dict = field(default_factory=dict)
    is_saved: bool = True  # the index holds this scan, or there is nothing to save


def list_files(prefix, root):
    """Paths of the visible files in root, then in its folders, sorted, relative to root.

    Raises UserError.
    """

    def names(folder, folders):
        try:
            with os.scandir(folder) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if entry.is_dir() == folders and entry.name[0] != "."
                )
        except OSError as error:
            raise UserError(f"{prefix}: {folder} can't be read ({error.strerror})") from error

    folders = [name for name in names(root, folders=True) if name != UCF_LISTS]
    inside = [
        f"{folder}/{name}"
        for folder in folders
        for name in names(os.path.join(root, folder), folders=False)
    ]
    return names(root, folders=False) + inside


def find_files(root, images, report=False):
    """{path relative to root: class name} of every video or image, sorted. Opens no file.

    Skips folders of samples, and says so if `report` is true. Raises UserError.
    """
    prefix = f"--data-path {root}"
    kind = "image" if images else "video"
    if not os.path.isdir(root):
        problem = "a file" if os.path.exists(root) else "no such folder"
        raise UserError(f"{prefix}: {problem}; expected a folder with <class>/<{kind}>")
    paths = list_files(prefix, root)
    of_samples = folders_of_samples(paths)
    places = name_some([str(Path(root, folder)) for folder in of_samples])
    every = [path for path in paths if has_suffix(kind, path)]
    found = [path for path in every if os.path.dirname(path) not in of_samples]
    if every and not found:
        problem = f"holds only samples of sample_gd.py, in {places}"
        raise UserError(f"{prefix}: {problem}; name a folder of other {kind}s")
    if of_samples and report:
        skipped = f"{plural(len(of_samples), 'folder')} with samples of sample_gd.py: {places}"
        say(f"note: {prefix}: skipped {skipped}; move other {kind}s out of there to use them")
    if not found:
        raise UserError(f"{prefix}: {explain_missing(root, kind)}")
    if "/" in found[-1] and "/" not in found[0]:
        both = f"some {kind}s are in class folders ({found[-1]}), others are not ({found[0]})"
        raise UserError(f"{prefix}: {both}; move all of them into class folders")
    seen = {}
    for path in found:
        if (twin := seen.setdefault(os.path.splitext(path)[0], path)) != path:
            raise UserError(
                f"{prefix}: {twin} and {path} differ only in their suffix; rename or remove one"
            )
    classes = {path: os.path.dirname(path) or UNLABELLED for path in found}
    if "none" in classes.values():
        raise UserError(
            f"{prefix}: the class none; --classes none asks for samples without a class; rename "
            "the folder"
        )
    return classes


def explain_missing(root, kind):
    """Say where a folder has most of its files of a kind, if they are too deep in it, or which
    files it should have.
    """
    paths = (path for depth in (3, 4) for path in Path(root).glob("/".join(["[!.]*"] * depth)))
    counts = Counter(path.parents[1] for path in paths if has_suffix(kind, path)).most_common()
    for place, count in counts[:1]:
        merge = "".join(
            f"merge it with {other.name}/ in one folder, or " for other, _ in counts[1:2]
        )
        return (
            f"no {kind}s in {root}/<class>; {place}/<class> has {plural(count, kind)}; "
            f"{merge}pass {place} instead"
        )
    advice = "to train on videos, add --video" if kind == "image" else "images need no --video"
    return (
        f"no {kind}s found; expected <class>/<{kind}> with one of {' '.join(SUFFIXES[kind])}; "
        f"{advice}"
    )


def scan_videos(root, index_folder=None, images=False):
    """The Scan of a folder of videos or images.

    Opens every video that is not in the index, and no image.

    Only one rank should call this. Writes the index if its folder exists; else save_index will.
    Raises UserError.
    """
    found = find_files(root, images, report=True)
    classes = sorted(set(found.values()))
    if images:
        return Scan(
            [probe(root, class_name, path) for path, class_name in found.items()], classes, []
        )
    known = read_index(index_place(root, index_folder)) if index_folder else {}
    stamps = {path: file_stamp(root, path) for path in found}
    entries = {
        path: known[path] for path in found if path in known and known[path][0] == stamps[path]
    }
    errors = {}  # path -> why it can't be opened
    new = [path for path in found if path not in entries]
    for path in Bar(new, desc="opening videos", unit="video", disable=not new):
        try:
            entries[path] = stamps[path], probe(root, found[path], path)
        except UnreadableError as error:
            errors[path] = error
    if not entries:
        reason = (
            f"{plural(len(found), 'file')}), the first is {errors[new[0]]}; convert them: ffmpeg "
            "-i FILE FILE.mp4"
        )
        raise CorruptDataError(f"--data-path {root}: can't open any of its videos ({reason}")
    videos = [entries[path][1] for path in found if path in entries]
    scan = Scan(videos, classes, list(errors), stamps, is_saved=entries == known)
    if index_folder and os.path.isdir(index_folder):
        save_index(scan, root, index_folder)
    return scan


def file_stamp(root, path):
    """[size in bytes, modification time in ns] of a file; [0, 0] if it is gone."""
    with suppress(OSError):
        stat = os.stat(os.path.join(root, path))
        return [stat.st_size, stat.st_mtime_ns]
    return [0, 0]


def name_hash(name, size=6):
    """A hash of a name: `size` bytes as hexadecimal digits."""
    return hashlib.blake2b(os.fsencode(name), digest_size=size).hexdigest()


def index_place(root, folder):
    """The path of a data folder's index in the folder of the runs."""
    return Path(folder, INDEX_FILE.format(name_hash(os.path.realpath(root))))


def save_index(scan, root, folder):
    """Write a scan that is not saved yet to the index, all or nothing. The folder must exist."""
    if scan.is_saved:
        return
    scan.is_saved = True
    place = index_place(root, folder)
    rows = [(scan.stamps[video.path], asdict(video)) for video in scan.videos]
    # several runs may start at once
    temporary = place.with_name(f"{place.name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.write_text(json.dumps({"format": INDEX_FORMAT, "videos": rows}))
        os.replace(temporary, place)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        say(f"{place} could not be written ({error.strerror})")


def read_index(place):
    """{path: (stamp, Video)}; empty if there is no valid index."""
    try:
        index = read_json(place)
        if (got := index["format"]) != INDEX_FORMAT:
            raise ValueError(f"format {got}, expected {INDEX_FORMAT}")
        return {fields["path"]: (stamp, Video(**fields)) for stamp, fields in index["videos"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{place} is not a valid index ({error}): building it again")
        return {}


# The split into training and validation; videos that are too short or corrupt ---------------------


def split_videos(root, videos, val_fraction):
    """(training, validation) videos, at least one each.

    Raises UserError if there are fewer than two videos. UCF-101's first list makes the split if it
    is in or beside ROOT and names some but not all of these videos. Without it, a hash of
    Class/stem does: videos that are added, removed or converted do not move others to another part.
    """
    if len(videos) < 2:
        raise UserError(
            f"--data-path {root}: 1 usable file; expected at least 2, one to train and one to "
            "validate"
        )
    _, train_keys = find_ucf_lists(root, videos)
    if train_keys:
        val = {video for video in videos if video.key not in train_keys}
    else:
        num_val = sum(hash_fraction(video) < val_fraction for video in videos)
        val = set(sorted(videos, key=hash_fraction)[: min(max(num_val, 1), len(videos) - 1)])
    return [video for video in videos if video not in val], [
        video for video in videos if video in val
    ]


def hash_fraction(video):
    """A hash of the video's class and stem as a number in [0, 1)."""
    return int(name_hash(video.key), 16) / 2**48


def find_ucf_lists(root, videos):
    """(folder of UCF lists that split these videos, Class/stem of the first), or (None, set())."""
    for folder in (Path(root, UCF_LISTS), Path(os.path.abspath(root)).parent / UCF_LISTS):
        if (file := folder / "trainlist01.txt").is_file():
            # as Python decodes names
            lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            # "Archery/v_Archery_g08_c01.avi 3"
            names = (re.sub(r"\s+\d+$", "", line.strip()) for line in lines)
            train_keys = {os.path.splitext(name)[0] for name in names}
            if 0 < sum(video.key in train_keys for video in videos) < len(videos):
                return folder, train_keys
    return None, set()


def copy_ucf_lists(root, videos, folder):
    """Copy the UCF lists that split these videos, if any, to another data folder."""
    lists, _ = find_ucf_lists(root, videos)
    for file in lists.glob("*.txt") if lists else ():
        Path(folder, UCF_LISTS).mkdir(exist_ok=True)
        # not its mode: a later run must overwrite it
        shutil.copyfile(file, Path(folder, UCF_LISTS, file.name))


def fitting_interval(video, num_frames, interval):
    """The largest distance between the frames of a clip, up to `interval`, that fits a video."""
    return min(interval, (video.num_frames - 1) // (num_frames - 1)) if num_frames > 1 else interval


def long_enough(videos, num_frames, kind, flag):
    """The videos with at least num_frames frames. Raises UserError if there are none."""
    kept = [video for video in videos if video.num_frames >= num_frames]
    if not kept:
        longest = max(videos, key=lambda video: video.num_frames)
        advice = "use fewer, or add longer videos"
        if kind == "validation":  # another one may have trained in an earlier phase
            advice = "use fewer, replace it, or start over with a higher --val-fraction"
        frames = plural(longest.num_frames, "frame")
        found = f"the longest {kind} video has {frames}: {longest.path}"
        raise UserError(f"{flag} {num_frames}: {found}; {advice}")
    return kept


@dataclass(frozen=True)
class Data:
    """The videos to train and to validate on.

    train and val map num_frames to the videos with at least as many.
    """

    source: object  # see source.py
    train: dict
    val: dict
    num_too_short: int  # videos too short for the longest training clips
    val_too_short: dict  # num_frames -> the number of validation videos that are too short for it

    @property
    def scan(self):
        return self.source.scan

    def spare(self, num_frames):
        """The training videos that replace validation videos if none of those can be read."""
        return [video for video in self.train[min(self.train)] if video.num_frames >= num_frames][
            :SPARES
        ]


def find_data(source, val_fraction, lengths, val_lengths, flag):
    """The Data of a source for clips of `lengths` frames, which `flag` sets, and of `val_lengths`.

    Raises UserError.
    """
    train, val = split_videos(source.root, source.videos(), val_fraction)
    of_train = {n: long_enough(train, n, "training", flag) for n in lengths}
    val_flags = dict.fromkeys(val_lengths, "--val-frames") | dict.fromkeys(lengths, flag)
    of_val = {n: long_enough(val, n, "validation", val_flags[n]) for n in sorted(val_flags)}
    longest = max(lengths)
    num_too_short = len(train) + len(val) - len(of_train[longest]) - len(of_val[longest])
    val_too_short = {n: len(val) - len(kept) for n, kept in of_val.items()}
    return Data(source, of_train, of_val, num_too_short, val_too_short)


def name_some(names, most=3):
    """The first few of many names, such as "a, b, c and 5 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class CorruptVideos:
    """Counts corrupt videos, each once, and raises CorruptDataError when there are too many."""

    def __init__(self, scan, max_fraction, known=()):
        self.total = len(scan.videos) + len(scan.unreadable)
        self.max_fraction = max_fraction
        self.paths = dict.fromkeys(known)

    def __str__(self):
        return f"corrupt so far: {len(self.paths)} of {self.total}"

    def add(self, paths):
        """The paths that are new, each once.

        Raises CorruptDataError above max(1, max_fraction * total) videos.
        """
        new = [path for path in dict.fromkeys(paths) if path not in self.paths]
        self.paths.update(dict.fromkeys(new))
        allowed = max(1, int(self.max_fraction * self.total))
        if new and len(self.paths) > allowed:
            found = (
                f"{len(self.paths)} of {self.total} files are corrupt, expected at most {allowed}"
            )
            advice = "repair, move or delete them, or raise this limit"
            raise CorruptDataError(
                f"--max-bad-fraction {self.max_fraction}: {found}: {name_some(new)}; {advice}"
            )
        return new

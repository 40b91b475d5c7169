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

from runtime.atomic import write_file
from runtime.cli import Bar, UserError, plural, say
from runtime.untrusted import read_json
from video.files import SUFFIXES, UnreadableError, Video, has_suffix, probe
from video.samples import folders_of_samples

UNLABELLED = "all"  # the class of files directly in ROOT
UCF_LISTS = "ucfTrainTestlist"
TRAIN_LIST = "trainlist01.txt"
INDEX_FILE = ".video_index-{}.json"  # with a hash of the data's path; in the folder of the runs
INDEX_FORMAT = 4
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

    def list_names(folder, folders=False):
        try:
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if entry.name[0] != "."]
                return sorted(entry.name for entry in visible if entry.is_dir() == folders)
        except OSError as error:
            raise UserError(f"{prefix}: {folder} can't be read ({error.strerror})") from error

    paths = list_names(root)
    for folder in list_names(root, folders=True):
        if folder != UCF_LISTS:
            names = list_names(os.path.join(root, folder))
            paths += [f"{folder}/{name}" for name in names]
    return paths


def find_files(root, images, report=False):
    """{path relative to root: class name} of every video or image, sorted. Opens no file.

    Skips folders of samples, and says so if `report` is true. Raises UserError.
    """
    prefix = f"--data-path {root}"
    kind = "image" if images else "video"
    if not os.path.isdir(root):
        problem = "a file" if os.path.exists(root) else "no such folder"
        raise UserError(f"{prefix}: {problem}; expected a folder with <class>/<{kind}>")
    files = list_files(prefix, root)
    sample_folders = folders_of_samples(files)
    shown_folders = name_some([str(Path(root, folder)) for folder in sample_folders])
    files = [path for path in files if has_suffix(kind, path)]
    paths = [path for path in files if os.path.dirname(path) not in sample_folders]
    if files and not paths:
        raise UserError(
            f"{prefix}: holds only samples of sample_gd.py, in {shown_folders}; name a folder of "
            f"other {kind}s (train.py --pairs trains a student on samples)"
        )
    if sample_folders and report:
        say(
            f"note: {prefix}: skipped {plural(len(sample_folders), 'folder')} with samples of "
            f"sample_gd.py: {shown_folders}; move other {kind}s out of there to use them"
        )
    if not paths:
        raise UserError(f"{prefix}: {explain_missing(root, kind)}")
    if "/" in paths[-1] and "/" not in paths[0]:
        raise UserError(
            f"{prefix}: some {kind}s are in class folders ({paths[-1]}), others are not "
            f"({paths[0]}); move all of them into class folders"
        )
    by_stem = {}
    for path in paths:
        stem, _ = os.path.splitext(path)
        twin = by_stem.setdefault(stem, path)
        if twin != path:
            raise UserError(
                f"{prefix}: {twin} and {path} differ only in their suffix; rename or remove one"
            )
    classes = {path: os.path.dirname(path) or UNLABELLED for path in paths}
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
    deeper = [*Path(root).glob("[!.]*/[!.]*/[!.]*"), *Path(root).glob("[!.]*/[!.]*/[!.]*/[!.]*")]
    counts = Counter(path.parents[1] for path in deeper if has_suffix(kind, path))
    if counts:
        (folder, count), *others = counts.most_common(2)
        merge = f"merge it with {others[0][0].name}/ in one folder, or " if others else ""
        return (
            f"no {kind}s in {root}/<class>; {folder}/<class> has {plural(count, kind)}; "
            f"{merge}pass {folder} instead"
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
    class_names = find_files(root, images, report=True)
    classes = sorted(set(class_names.values()))
    if images:
        videos = [probe(root, class_name, path) for path, class_name in class_names.items()]
        return Scan(videos, classes, unreadable=[])
    indexed = read_index(index_path(root, index_folder)) if index_folder else {}
    stamps = {path: file_stamp(root, path) for path in class_names}
    # path -> (stamp, Video)
    entries = {path: entry for path, entry in indexed.items() if entry[0] == stamps.get(path)}
    new = [path for path in stamps if path not in entries]
    errors = {}  # path -> why it can't be opened
    for path in Bar(new, desc="opening videos", unit="video", disable=not new):
        try:
            entries[path] = stamps[path], probe(root, class_names[path], path)
        except UnreadableError as error:
            errors[path] = error
    if not entries:
        raise CorruptDataError(
            f"--data-path {root}: can't open any of its videos ({plural(len(new), 'file')}), the "
            f"first is {errors[new[0]]}; convert them: ffmpeg -i FILE FILE.mp4"
        )
    scan = Scan(
        videos=[entries[path][1] for path in class_names if path in entries],
        classes=classes,
        unreadable=list(errors),
        stamps=stamps,
        is_saved=entries == indexed,
    )
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


def index_path(root, folder):
    """The path of a data folder's index in the folder of the runs."""
    root_hash = name_hash(os.path.realpath(root))
    return Path(folder, INDEX_FILE.format(root_hash))


def save_index(scan, root, folder):
    """Write a scan that is not saved yet to the index, all or nothing. The folder must exist."""
    if scan.is_saved:
        return
    scan.is_saved = True
    path = index_path(root, folder)
    rows = [(scan.stamps[video.path], asdict(video)) for video in scan.videos]
    content = json.dumps({"format": INDEX_FORMAT, "videos": rows})
    try:
        write_file(path, content.encode(), shared=True)  # several runs may start at once
    except OSError as error:
        say(f"{path} could not be written ({error.strerror})")


def read_index(path):
    """{path of a video: (stamp, Video)}; empty if there is no valid index."""
    try:
        index = read_json(path)
        if index["format"] != INDEX_FORMAT:
            raise ValueError(f"format {index['format']}, expected {INDEX_FORMAT}")
        return {fields["path"]: (stamp, Video(**fields)) for stamp, fields in index["videos"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{path} is not a valid index ({error}): building it again")
        return {}


# The split into training and validation; videos that are too short or corrupt ---------------------


def split_videos(root, videos, val_fraction):
    """(training, validation) videos, at least one each.

    Raises UserError if there are fewer than two videos. UCF-101's first list makes the split if it
    is in or beside ROOT and names some but not all of these videos; a note says if one in ROOT does
    not. Without it, a hash of
    Class/stem does: videos that are added, removed or converted do not move others to another part,
    unless so few are there that only the one with the lowest hash validates.
    """
    if len(videos) < 2:
        raise UserError(
            f"--data-path {root}: 1 usable file; expected at least 2, one to train and one to "
            "validate"
        )
    _, train_keys = find_ucf_lists(root, videos)
    if not train_keys:
        note_unused_list(root, videos)
        num_val = sum(hash_fraction(video) < val_fraction for video in videos)
        num_val = min(max(num_val, 1), len(videos) - 1)
        train_keys = {video.key for video in sorted(videos, key=hash_fraction)[num_val:]}
    train = [video for video in videos if video.key in train_keys]
    val = [video for video in videos if video.key not in train_keys]
    return train, val


def note_unused_list(root, videos):
    """Say if ROOT has a list of its own, which names none or all of the videos."""
    path = Path(root, UCF_LISTS, TRAIN_LIST)
    if path.is_file():
        amount = "all" if videos[0].key in read_keys(path) else "none"
        say(
            f"note: {path}: names {amount} of the {plural(len(videos), 'usable file')}, so a hash "
            "of their names splits them; expected some, one Class/name.avi per line"
        )


def hash_fraction(video):
    """A hash of the video's class and stem as a number in [0, 1)."""
    return int(name_hash(video.key), 16) / 2**48


def find_ucf_lists(root, videos):
    """(folder of UCF lists that split these videos, Class/stem of the first), or (None, set())."""
    for folder in (Path(root, UCF_LISTS), Path(os.path.abspath(root)).parent / UCF_LISTS):
        train_list = folder / TRAIN_LIST
        if not train_list.is_file():
            continue
        train_keys = read_keys(train_list)
        num_train = sum(video.key in train_keys for video in videos)
        if 0 < num_train < len(videos):
            return folder, train_keys
    return None, set()


def read_keys(path):
    """The Class/stem of each line of a list such as "Archery/v_Archery_g08_c01.avi 3"."""
    # as Python decodes names; editors on Windows begin files with a mark of their encoding
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    names = [re.sub(r"\s+\d+$", "", line.strip()) for line in text.splitlines()]
    stems = [os.path.splitext(name)[0] for name in names]
    return {stem if "/" in stem else f"{UNLABELLED}/{stem}" for stem in stems}


def copy_ucf_lists(root, videos, folder):
    """Copy the UCF lists that split these videos, if any, to another data folder.

    Removes those of an earlier call.
    """
    lists, _ = find_ucf_lists(root, videos)
    copies = Path(folder, UCF_LISTS)
    for copy in copies.glob("*.txt"):
        copy.unlink()
    if lists is None:
        return
    copies.mkdir(exist_ok=True)
    for file in lists.glob("*.txt"):
        # not its mode: a later run must overwrite it
        shutil.copyfile(file, copies / file.name)


def fitting_interval(video, num_frames, interval):
    """The largest distance between the frames of a clip, up to `interval`, that fits a video."""
    if num_frames == 1:
        return interval
    largest = (video.num_frames - 1) // (num_frames - 1)
    return min(interval, largest)


def long_enough(videos, num_frames, kind, flag):
    """The videos with at least num_frames frames. Raises UserError if there are none."""
    kept = [video for video in videos if video.num_frames >= num_frames]
    if not kept:
        longest = max(videos, key=lambda video: video.num_frames)
        advice = "use fewer, or add longer videos"
        if kind == "validation":  # another one may have trained in an earlier phase
            advice = "use fewer, replace it, or start over with a higher --val-fraction"
        raise UserError(
            f"{flag} {num_frames}: the longest {kind} video has "
            f"{plural(longest.num_frames, 'frame')}: {longest.path}; {advice}"
        )
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
    real: object = None  # the Data of --real-data, which only trains, beside pairs

    @property
    def scan(self):
        return self.source.scan

    @property
    def files(self):
        """The Data of the video files: of --real-data if there is any, else this."""
        return self.real or self

    def spare(self, num_frames):
        """The training videos that replace validation videos if none of those can be read."""
        shortest = min(self.train)
        videos = [video for video in self.train[shortest] if video.num_frames >= num_frames]
        return videos[:SPARES]


def find_data(source, val_fraction, lengths, val_lengths, flag):
    """The Data of a source for clips of `lengths` frames, which `flag` sets, and of `val_lengths`.

    Raises UserError.
    """
    all_train, all_val = split_videos(source.root, source.videos(), val_fraction)
    train = {
        num_frames: long_enough(
            videos=all_train,
            num_frames=num_frames,
            kind="training",
            flag=flag,
        )
        for num_frames in lengths
    }
    val_flags = dict.fromkeys(val_lengths, "--val-frames") | dict.fromkeys(lengths, flag)
    val = {
        num_frames: long_enough(
            videos=all_val,
            num_frames=num_frames,
            kind="validation",
            flag=val_flags[num_frames],
        )
        for num_frames in sorted(val_flags)
    }
    longest = max(lengths)
    num_long_enough = len(train[longest]) + len(val[longest])
    return Data(
        source=source,
        train=train,
        val=val,
        num_too_short=len(source.videos()) - num_long_enough,
        val_too_short={n: len(all_val) - len(videos) for n, videos in val.items()},
    )


def name_some(names, most=3):
    """The first few of many names, such as "a, b, c and 5 more"."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


class CorruptVideos:
    """Counts corrupt videos, each once, and raises CorruptDataError when there are too many."""

    def __init__(self, scan, max_fraction, known=()):
        paths = {video.path for video in scan.videos} | {*scan.unreadable}
        self.total = len(paths)
        self.max_fraction = max_fraction
        # a user may have deleted others
        self.paths = dict.fromkeys(path for path in known if path in paths)

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
            raise CorruptDataError(
                f"--max-bad-fraction {self.max_fraction}: {len(self.paths)} of {self.total} files "
                f"are corrupt, expected at most {allowed}: {name_some(new)}; repair, move or "
                "delete them, or raise this limit"
            )
        return new


def log_skipped(log, data):
    """Log how many files are too short for the longest clips, or can't be opened."""
    longest = max(data.train)
    short = f"{plural(data.num_too_short, 'file')} with fewer than {plural(longest, 'frame')}"
    if data.val_too_short[longest]:
        short += f" ({data.val_too_short[longest]} for validation)"
    log(f"skipped: {short}, {plural(len(data.scan.unreadable), 'file')} that can't be opened")
    for num_frames, count in data.val_too_short.items():
        if num_frames > longest and count:
            log(
                f"skipped: {plural(count, 'validation file')} with fewer than the {num_frames} "
                "frames of --val-frames"
            )


def log_data(log, args, data):
    """Log the number of training files, the validation files, and notes.

    datasets/check.py prints the same.
    """
    most = max(data.train)
    interval = args.frame_interval[-1]
    kind = "video" if args.video else "image"
    val = [video.path for video in data.val[most]]
    log(
        f"training: {plural(len(data.train[most]), kind)} in "
        f"{plural(len(data.scan.classes), 'class')}; validation: {plural(len(val), kind)}, "
        f"{name_some(val, 6)}"
    )
    for num_frames, videos in data.train.items():
        clips = f"clips of {plural(num_frames, 'frame')}"
        missing = sorted({*data.scan.classes} - {video.class_name for video in videos})
        if missing:
            log(
                f"note: class {name_some(missing)}: no training {kind} for {clips}, so it can't "
                "be learned; add some"
            )
        fits = [fitting_interval(video, num_frames, interval) for video in videos]
        num_short = sum(fit < interval for fit in fits)
        if num_short and not data.source.has_samples:
            log(
                f"note: --frame-interval {interval}: {clips} don't fit into {num_short} of "
                f"{plural(len(videos), f'training {kind}')}; these use the largest interval that "
                f"fits, {min(fits)} or more"
            )

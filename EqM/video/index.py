"""What a data folder holds: `ROOT/<Class>/<video>.avi`, or images, which are clips of one frame. And its splits.

Files directly in ROOT are one class, "all". Where videos and images are treated alike, the code says video for both.
ROOT may also be a latent cache of cache_latents.py, which gives the same clips, as the VAE's posterior of their frames.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from runtime.cli import Bar, UserError, say
from runtime.untrusted import FPS, check_types, read_json
from video.files import (
    LATENTS_SUFFIX,
    SUFFIXES,
    UnreadableError,
    Video,
    has_suffix,
    media_kind,
    probe,
)
from video.frame_cache import FrameCache

UNLABELLED = "all"  # the class of files directly in ROOT
UCF_LISTS = "ucfTrainTestlist"
INDEX_FILE = ".video_index-{}.json"  # with a hash of the data's path; beside the runs
INDEX_FORMAT = 2
LATENTS_FILE, PARTIAL_FILE = "latents.json", "latents.partial.json"  # of a complete, of an unfinished latent cache
LATENTS_FORMAT = 1
SPARES = 100  # training videos that may stand in for validation videos, at most
LATENTS_TYPES = {  # of latents.json
    "vae": str, "vae_sha256": str | None, "image_size": int, "channels": int, "downsample": int, "scale": float,
    "shift": float, "flips": bool, "classes": list, "unreadable": list, "videos": list,
}  # fmt: skip


@dataclass(frozen=True)
class Scan:
    videos: list  # of Video, sorted by path; of a cache: in the order of the videos it was made from
    classes: list  # class names, sorted; a label is an index into it
    unreadable: list  # paths of the files that could not be opened
    entries: dict  # path -> (size and modification time of the file, Video): the content of the index
    is_saved: bool  # the index says the same, or there is none


# ----------------------------------------------------------------------------------------------------------------------
# Latent caches: what latents.json says


def latents_path(video):
    """The path of a video's latents in a cache, relative to the cache."""
    return str(PurePosixPath(video.path).with_suffix(LATENTS_SUFFIX))


def latents_settings(root, images=False):
    """The content of a cache's latents.json, None if root is not a cache. Raises UserError if it can't be used."""
    prefix, path = f"--data-path {root}", Path(root, LATENTS_FILE)
    if not os.path.exists(path):
        if os.path.exists(os.path.join(root, PARTIAL_FILE)):
            raise UserError(f"{prefix}: a latent cache that is not complete: run cache_latents.py again to continue")
        return None
    try:
        settings = read_json(path)
        found = settings["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{prefix}: its {LATENTS_FILE} is damaged ({error}): make the latent cache again") from error
    if found != LATENTS_FORMAT:
        raise UserError(
            f"{prefix}: a latent cache of format {str(found)[:20]}, this code reads {LATENTS_FORMAT}: make it again"
        )
    if images:
        raise UserError(f"{prefix}: latents of videos, wanted images: add --video to use them")
    try:
        check_types(settings, LATENTS_TYPES)
        if min(settings[name] for name in ("image_size", "channels", "downsample")) < 1:
            raise ValueError("a size below 1")
        classes = {_parse_video(fields).class_name for fields in settings["videos"]}
        if unknown := classes - set(settings["classes"]):
            raise ValueError(f"no class {min(unknown)}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{prefix}: its {LATENTS_FILE} is damaged ({error}): make the latent cache again") from error
    return settings


def _parse_video(fields):
    """The Video with these fields of a JSON file. Raises ValueError or TypeError."""
    check_types(fields, Video.__annotations__)
    if not 1 <= fields["num_frames"] < 2**31 or not FPS[0] <= fields["fps"] <= FPS[1]:
        raise ValueError(f"a video of {str(fields['num_frames'])[:50]} frames at {fields['fps']} per second")
    return Video(**fields)


def _scan_latents(root, settings):
    """The scan of a cache, from its latents.json. Raises UserError if a file is missing."""
    videos = [Video(**fields) for fields in settings["videos"]]
    for video in videos:
        if not os.path.isfile(os.path.join(root, video.path)):
            raise UserError(f"--data-path {root}: a latent cache without its {video.path}: run cache_latents.py again")
    return Scan(videos, settings["classes"], settings["unreadable"], entries={}, is_saved=True)


# ----------------------------------------------------------------------------------------------------------------------
# Folders of videos or images: each video is opened once, then its metadata is read from the index


def check_data_path(root, images=False):
    """The checks of scan_videos that open no video. Raises UserError."""
    if latents_settings(root, images) is None:
        _find_files(root, images)


def list_folder(prefix, folder, kind):
    """(names of subfolders, names of files of a kind) directly in `folder`, sorted, without hidden ones.

    Raises UserError, with a text that begins with `prefix`, if the folder can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            entries = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{prefix}: {folder} can't be read ({error.strerror})") from error
    folders = [name for name, is_dir in entries if is_dir and name != UCF_LISTS]
    return folders, [name for name, is_dir in entries if not is_dir and has_suffix(kind, name)]


def _list_classes(prefix, root, kind):
    """Two lists of (class name, path relative to root): the files of a kind in class folders, those beside them."""
    classes, unlabelled = list_folder(prefix, root, kind)
    labelled = [
        (name, f"{name}/{file}") for name in classes for file in list_folder(prefix, os.path.join(root, name), kind)[1]
    ]
    return labelled, [(UNLABELLED, file) for file in unlabelled]


def _find_files(root, images):
    """(class name, path relative to root) of every video or image, sorted. Opens no file. Raises UserError."""
    prefix, kind = f"--data-path {root}", media_kind(images)
    if not os.path.exists(root):
        raise UserError(f"{prefix}: no such folder")
    if not os.path.isdir(root):
        raise UserError(f"{prefix}: a file, wanted a folder of class folders with {kind}s")
    labelled, unlabelled = _list_classes(prefix, root, kind)
    if labelled and unlabelled:
        raise UserError(
            f"{prefix}: {kind}s in class folders ({labelled[0][1]}) and beside them ({unlabelled[0][1]}): "
            "move these into a class folder"
        )
    found = labelled or unlabelled
    if not found:
        other = media_kind(not images)
        if any(_list_classes(prefix, root, other)):
            advice = "add --video" if images else "leave out --video"
            raise UserError(f"{prefix}: no {kind} found, but {other}s: {advice} to use them")
        raise UserError(f"{prefix}: no {kind} found, wanted <class>/<{kind}> with one of {' '.join(SUFFIXES[kind])}")
    seen = {}
    for class_name, path in found:
        other = seen.setdefault((class_name, PurePosixPath(path).stem), path)
        if other != path:
            raise UserError(f"{prefix}: {other} and {path} differ only in their suffix: rename or remove one")
    return found


def scan_videos(root, index_folder=None, images=False):
    """The Scan of a data folder. Opens every video that the index does not know, and no images or latents.

    Only one rank should call this. The index lies in `index_folder`, beside the runs, None: nowhere; it is written here
    if that folder is there, else by `save_index`. An entry is valid as long as the file's size and modification time
    are the same. Raises UserError.
    """
    if (settings := latents_settings(root, images)) is not None:
        return _scan_latents(root, settings)
    found = _find_files(root, images)
    classes = sorted({class_name for class_name, _ in found})
    if images:
        return Scan([probe(root, class_name, path) for class_name, path in found], classes, [], {}, True)
    known = _read_index(index_place(root, index_folder)) if index_folder else {}
    stamps = {path: _file_stamp(root, path) for _, path in found}
    entries = {
        path: known[path] for class_name, path in found
        if path in known and (known[path][0], known[path][1].class_name) == (stamps[path], class_name)
    }  # fmt: skip
    new = [(class_name, path) for class_name, path in found if path not in entries]
    unreadable = []
    for class_name, path in Bar(new, desc="opening videos", unit="video", disable=not new):
        try:
            entries[path] = stamps[path], probe(root, class_name, path)
        except UnreadableError:
            unreadable.append(path)
    if not entries:
        raise UserError(f"--data-path {root}: none of its {len(found)} videos can be opened")
    videos = [entries[path][1] for _, path in found if path in entries]
    scan = Scan(videos, classes, unreadable, entries, is_saved=entries == known)
    if index_folder and os.path.isdir(index_folder):
        save_index(scan, root, index_folder)
        scan = replace(scan, is_saved=True)
    return scan


def index_place(root, folder):
    """The path of the index of a data folder in the folder of the runs."""
    key = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=6)
    return Path(folder, INDEX_FILE.format(key.hexdigest()))


def save_index(scan, root, folder):
    """Write the index of a data folder, whole or not at all, to a folder that is there, unless it is saved already."""
    if scan.is_saved:
        return
    place = index_place(root, folder)
    videos = [(stamp, asdict(video)) for _, (stamp, video) in sorted(scan.entries.items())]
    temporary = place.with_name(f"{place.name}.{os.urandom(4).hex()}")  # several runs may start at once
    try:
        temporary.write_text(json.dumps({"format": INDEX_FORMAT, "videos": videos}))
        os.replace(temporary, place)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        say(f"{place} could not be written ({error.strerror})")


def _file_stamp(root, path):
    """[size in bytes, modification time in ns] of a file, None if it is gone."""
    try:
        stat = os.stat(os.path.join(root, path))
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _read_index(place):
    """path -> (stamp, Video); empty if there is no valid index."""
    try:
        index = read_json(place)
        if index["format"] != INDEX_FORMAT:
            raise ValueError("another format")
        entries = [(stamp, _parse_video(fields)) for stamp, fields in index["videos"]]
        return {video.path: (stamp, video) for stamp, video in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{place} is not a valid index ({error}): building it again")
        return {}


# ----------------------------------------------------------------------------------------------------------------------
# The split into training and validation, and videos that are too short or bad


def split_videos(root, videos, val_fraction):
    """(training, validation) videos, at least one each. Raises UserError if there are fewer than two videos.

    UCF-101's first list decides if it is in or beside ROOT and names some but not all of these videos (those it does
    not name validate). Else a hash of Class/stem decides: adding, removing or converting a video moves no other.
    """
    if len(videos) < 2:
        raise UserError(f"--data-path {root}: {len(videos)} usable file, wanted at least 2: one trains, one validates")
    _, train_keys = _find_ucf_lists(root, videos)
    if train_keys:
        train = [video for video in videos if video.key in train_keys]
        return train, [video for video in videos if video.key not in train_keys]
    ranked = sorted(videos, key=hash_fraction)
    num_val = sum(hash_fraction(video) < val_fraction for video in videos)
    val = set(ranked[: min(max(num_val, 1), len(videos) - 1)])
    return [video for video in videos if video not in val], [video for video in videos if video in val]


def hash_fraction(video):
    """A hash of the video's class and stem as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(video.key), digest_size=6).digest(), "big") / 2**48


def _find_ucf_lists(root, videos):
    """(folder of the UCF lists that split these videos, keys of the training videos); (None, set()) if there are none.

    Lists that name none or all of the videos do not count.
    """
    for folder in (Path(root, UCF_LISTS), Path(os.path.abspath(root)).parent / UCF_LISTS):
        train_keys = _read_ucf_list(folder / "trainlist01.txt")
        if 0 < sum(video.key in train_keys for video in videos) < len(videos):
            return folder, train_keys
    return None, set()


def copy_ucf_lists(root, videos, folder):
    """Copy the UCF lists that split these videos, if any, to another data folder."""
    lists, _ = _find_ucf_lists(root, videos)
    for file in lists.glob("*.txt") if lists else ():
        Path(folder, UCF_LISTS).mkdir(exist_ok=True)
        shutil.copyfile(file, Path(folder, UCF_LISTS, file.name))


def _read_ucf_list(file):
    """The set of Class/stem that a list names; empty if there is no such file."""
    if not file.is_file():
        return set()
    text = file.read_text(encoding="utf-8", errors="surrogateescape")  # as Python decodes file names
    names = (re.sub(r"\s+\d+$", "", line.strip()) for line in text.splitlines())  # "Archery/v_Archery_g08_c01.avi 3"
    return {str(PurePosixPath(name).with_suffix("")) for name in names if PurePosixPath(name).name}


def fitting_interval(video, num_frames, interval):
    """The largest distance between the frames of a clip, up to `interval`, that fits a video."""
    return min(interval, (video.num_frames - 1) // (num_frames - 1)) if num_frames > 1 else interval


def long_enough(videos, num_frames, kind="", flag="--num-frames"):
    """(videos with at least num_frames frames, number of shorter ones). Raises UserError if all are shorter."""
    kept = [video for video in videos if video.num_frames >= num_frames]
    if not kept:
        longest = max((video.num_frames for video in videos), default=0)
        raise UserError(f"{flag} {num_frames}: the longest {kind}video of --data-path has {longest} frames")
    return kept, len(videos) - len(kept)


@dataclass(frozen=True)
class Data:
    """The result of the scan of --data-path for training, as sent to all ranks.

    train and val are dicts: num_frames -> list of Video that are long enough for clips of num_frames frames.
    """

    scan: Scan
    train: dict
    val: dict
    num_short: int  # videos too short for the longest training clips
    frames: FrameCache | None = None  # of all these videos, with --cache-frames

    def spare(self, num_frames):
        """Training videos that stand in for validation videos, should none of those be readable."""
        return [video for video in self.train[min(self.train)] if video.num_frames >= num_frames][:SPARES]

    @property
    def used(self):
        """The videos of all lists, each once."""
        lists = itertools.chain(self.train.values(), self.val.values())
        return list({video.path: video for video in itertools.chain(*lists)}.values())


def find_data(root, images, val_fraction, lengths, val_lengths, flag, index_folder):
    """The Data for training clips of `lengths` frames (set by `flag`) and validation clips of these and `val_lengths`.

    Opens videos as scan_videos does, so only one rank should call it. Raises UserError.
    """
    scan = scan_videos(root, index_folder, images=images)
    train, val = split_videos(root, scan.videos, val_fraction)
    of_train = {n: long_enough(train, n, "training ", flag) for n in set(lengths)}
    of_val = {n: long_enough(val, n, "validation ", flag) for n in set(lengths)}
    num_short = of_train[max(lengths)][1] + of_val[max(lengths)][1]
    of_val |= {n: long_enough(val, n, "validation ", "--val-frames") for n in val_lengths}
    return Data(
        scan,
        {n: videos for n, (videos, _) in of_train.items()},
        {n: videos for n, (videos, _) in sorted(of_val.items())},
        num_short,
    )


class BadVideos:
    """Counts bad videos, each once, and raises UserError when there are too many."""

    def __init__(self, total, max_fraction, known=()):
        self.total, self.max_fraction = total, max_fraction
        self.paths = dict.fromkeys(known)

    def __str__(self):
        return f"bad so far: {self.count} of {self.total}"

    @property
    def count(self):
        return len(self.paths)

    def add(self, paths):
        """The paths that are new, each once. Raises UserError above max(1, max_fraction * total) bad videos."""
        new = [path for path in dict.fromkeys(paths) if path not in self.paths]
        self.paths.update(dict.fromkeys(new))
        if new and self.count > max(1, self.max_fraction * self.total):
            raise UserError(
                f"{self.count} of {self.total} files are bad (newest: {', '.join(new[:3])}), more than "
                f"--max-bad-fraction {self.max_fraction} allows: repair or remove them, or raise it"
            )
        return new

"""Clips and labels from a folder of videos, `ROOT/<Class>/<video>.avi`, or of images, which are clips of one frame.

Files directly in ROOT are one class, "all". Where images take the same way as videos, the code says video for both.
ROOT may also be a latent cache of cache_latents.py: the same clips, as the VAE's posterior of their frames.
An item is a function of the data set's arguments and the number of the sample in the stream, so workers, ranks and
interruptions change nothing.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from runtime.cli import UserError, say
from runtime.untrusted import FPS, read_json
from video.files import (
    KINDS,
    MOST_PIXELS,
    SUFFIXES,
    UnreadableError,
    Video,
    is_a,
    is_cached,
    probe,
)

UNLABELLED = "all"  # the class of files that lie directly in ROOT
UCF_LISTS = "ucfTrainTestlist"
INDEX = "video_index.json"  # hidden in ROOT, in plain sight in a run folder
INDEX_FORMAT = 2
LATENTS, PARTIAL = "latents.json", "latents.partial.json"  # of a latent cache: complete, not yet
LATENTS_FORMAT = 1
MOST_FRAMES = 2**31  # of a video: two years


@dataclass(frozen=True)
class Scan:
    videos: list  # of Video, sorted by path; of a cache: in the order of the videos that it was made of
    classes: list  # their class names, sorted; a label is a position in it
    unreadable: list  # paths of the files that could not even be opened
    entries: dict  # path -> (size and time of change of the file, Video): the index
    is_saved: bool  # the index lies where the next scan will find it


# ----------------------------------------------------------------------------------------------------------------------
# What lies in ROOT: a latent cache, or files that are opened once and remembered


def check_data_path(root, images=False):
    """The part of the scan that opens no video; raises UserError."""
    if latents_settings(root, images) is None:
        _find(root, images)


def latents_settings(root, images=False):
    """What latents.json of a latent cache says, None if root is no cache; raises UserError if it can't be used."""
    here, place = f"--data-path {root}", Path(root, LATENTS)
    if not os.path.exists(place):
        if os.path.exists(os.path.join(root, PARTIAL)):
            raise UserError(f"{here}: a latent cache that is not complete: run cache_latents.py again, it will go on")
        return None
    try:
        about = read_json(place)
        found = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{here}: its {LATENTS} is damaged ({error}): make the latent cache anew") from error
    if found != LATENTS_FORMAT:
        raise UserError(
            f"{here}: a latent cache of format {str(found)[:20]}, this code reads {LATENTS_FORMAT}: make it anew"
        )
    if images:
        raise UserError(f"{here}: latents of videos, wanted images: add --video to use them")
    if odd := _odd_setting(about):
        raise UserError(f"{here}: its {LATENTS} is damaged ({odd}): make the latent cache anew")
    return about


def _odd_setting(about):
    """What is wrong in a latents.json, in a word or two; None if all is of the right kind and no path leaves ROOT."""
    counts = {"image_size": 2**16, "channels": 2**10, "downsample": 2**10}
    wrong = [name for name, most in counts.items() if not _is_number(about.get(name), int, 1, most)]
    wrong += [name for name in ("scale", "shift") if not _is_number(about.get(name), (int, float), -1e6, 1e6)]
    wrong += [name for name in ("classes", "unreadable") if not _is_names(about.get(name))]
    if not isinstance(about.get("flips"), bool):
        wrong.append("flips")
    if not isinstance(about.get("vae"), str):
        wrong.append("vae")
    if wrong:
        return wrong[0]
    videos = about.get("videos")
    if not isinstance(videos, list) or not videos:
        return "videos"
    classes = set(about["classes"])
    for fields in videos:
        video = _video_of(fields)
        if video is None or not is_cached(video):
            return f"the video {str(fields)[:100]}"
        if video.class_name not in classes:
            return f"the class of {video.path[:100]}"
    return None


def _video_of(fields):
    """The Video of a line of an index or a cache; None if it is not one, or its path leads out of ROOT."""
    if not isinstance(fields, dict) or fields.keys() != Video.__dataclass_fields__.keys():
        return None
    video = Video(**fields)
    sides = [side for side in (video.height, video.width) if side is not None]
    is_right = (
        _is_names([video.path, video.class_name])
        and not os.path.isabs(video.path) and ".." not in PurePosixPath(video.path).parts
        and _is_number(video.num_frames, int, 1, MOST_FRAMES)
        and _is_number(video.fps, (int, float), *FPS)
        and all(_is_number(side, int, 1, MOST_PIXELS) for side in sides)
    )  # fmt: skip
    return video if is_right else None


def _is_number(value, kind, least, most):
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def _is_names(value):
    """Whether value is a list of texts that may be names of files."""
    return isinstance(value, list) and all(isinstance(name, str) and "\0" not in name for name in value)


def _scan_latents(root, about):
    """The scan of a cache, going by its latents.json; raises UserError if a file is missing."""
    videos = [Video(**fields) for fields in about["videos"]]
    for video in videos:
        if not os.path.isfile(os.path.join(root, video.path)):
            raise UserError(f"--data-path {root}: a latent cache without its {video.path}: run cache_latents.py again")
    return Scan(videos, about["classes"], about["unreadable"], entries={}, is_saved=True)


def list_folder(here, folder, kind):
    """Folders and files of a kind right in `folder`, hidden ones left out, as two sorted lists of names.

    Raises UserError, which begins with `here`, if the folder can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            entries = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{here}: {folder} can't be read ({error.strerror})") from error
    folders = [name for name, is_dir in entries if is_dir and name != UCF_LISTS]
    return folders, [name for name, is_dir in entries if not is_dir and is_a(kind, name)]


def _list_classes(here, root, kind):
    """(class name, path below root) of the files of a kind: a list of those in class folders, one of those beside."""
    classes, unlabelled = list_folder(here, root, kind)
    labelled = [
        (name, f"{name}/{file}") for name in classes for file in list_folder(here, os.path.join(root, name), kind)[1]
    ]
    return labelled, [(UNLABELLED, file) for file in unlabelled]


def _find(root, images):
    """(class name, path below root) of every video or image, sorted, going by the names; raises UserError."""
    here, kind = f"--data-path {root}", KINDS[images]
    if not os.path.exists(root):
        raise UserError(f"{here}: no such folder")
    if not os.path.isdir(root):
        raise UserError(f"{here}: a file, wanted a folder of class folders with {kind}s")
    labelled, unlabelled = _list_classes(here, root, kind)
    if labelled and unlabelled:
        raise UserError(
            f"{here}: {kind}s in class folders ({labelled[0][1]}) and beside them ({unlabelled[0][1]}): "
            "move these into a class folder"
        )
    found = labelled or unlabelled
    if not found:
        other = KINDS[not images]
        if any(_list_classes(here, root, other)):
            advice = "add --video" if images else "leave out --video"
            raise UserError(f"{here}: no {kind} found, but {other}s: {advice} to use them")
        raise UserError(f"{here}: no {kind} found, wanted <class>/<{kind}> with one of {' '.join(SUFFIXES[kind])}")
    seen = {}
    for class_name, path in found:
        other = seen.setdefault((class_name, PurePosixPath(path).stem), path)
        if other != path:
            raise UserError(f"{here}: {other} and {path} differ only in their suffix: rename or remove one")
    return found


def scan_videos(root, index_folder=None, images=False):
    """Open every video once and remember what was found; only one rank should do this. Images and latents are not
    even opened.

    The index lies in ROOT (.video_index.json) or, where that can't be written, in `index_folder`. What it says of
    a file holds as long as the file's size and time of change do. Raises UserError.
    """
    if (about := latents_settings(root, images)) is not None:
        return _scan_latents(root, about)
    found = _find(root, images)
    classes = sorted({class_name for class_name, _ in found})
    if images:
        return Scan([probe(root, class_name, path) for class_name, path in found], classes, [], {}, True)
    places = [Path(root, "." + INDEX)] + ([Path(index_folder, INDEX)] if index_folder else [])
    indices = [_read_index(place) for place in places]
    known = {path: entry for index in indices for path, entry in index.items()}
    stamps = {path: _stamp(root, path) for _, path in found}
    entries = {
        path: known[path] for class_name, path in found
        if path in known and (known[path][0], known[path][1].class_name) == (stamps[path], class_name)
    }  # fmt: skip
    new = [(class_name, path) for class_name, path in found if path not in entries]
    unreadable = []
    for class_name, path in tqdm(new, desc="opening videos", unit="video", disable=not new):
        try:
            entries[path] = stamps[path], probe(root, class_name, path)
        except UnreadableError:
            unreadable.append(path)
    if not entries:
        raise UserError(f"--data-path {root}: none of its {len(found)} videos can be opened")
    is_saved = entries in indices or _write_index(places, entries)
    videos = [entries[path][1] for _, path in found if path in entries]
    return Scan(videos, classes, unreadable, entries, is_saved)


def save_index(scan, folder):
    """Keep the index in a run folder, if ROOT did not take it when the videos were scanned."""
    if not scan.is_saved:
        _write_index([Path(folder, INDEX)], scan.entries)


def _stamp(root, path):
    """Size and time of change of a file, None if it is gone."""
    try:
        stat = os.stat(os.path.join(root, path))
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _read_index(place):
    """path -> (stamp, Video); empty where no sound index is."""
    try:
        index = read_json(place)
        if index["format"] != INDEX_FORMAT:
            raise ValueError("another format")
        entries = [(stamp, _video_of(fields)) for stamp, fields in index["videos"]]
        if any(video is None for _, video in entries):
            raise ValueError("a line that is no video")
        return {video.path: (stamp, video) for stamp, video in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{place} is not a sound index ({error}): building it anew")
        return {}


def _write_index(places, entries):
    """Into the first place that takes it, all or nothing; returns whether one did."""
    videos = [(stamp, asdict(video)) for stamp, video in entries.values()]
    text = json.dumps({"format": INDEX_FORMAT, "videos": videos})
    for place in places:
        if not os.access(place.parent, os.W_OK):
            continue
        temporary = place.with_name(f"{place.name}.{os.urandom(4).hex()}")
        try:
            temporary.write_text(text)
            os.replace(temporary, place)
            return True
        except OSError as error:
            temporary.unlink(missing_ok=True)
            say(f"{place} could not be written ({error.strerror})")
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Which of the videos train, which validate, which can't be used


def split_videos(root, videos, val_fraction):
    """(training, validation) videos, at least one each; raises UserError if there are not two.

    UCF-101's first list decides where it lies in or beside ROOT and knows these videos (what it does not list
    validates), else a hash of Class/stem: adding, removing or converting videos moves no other one.
    """
    if len(videos) < 2:
        raise UserError(f"--data-path {root}: {len(videos)} usable file, wanted at least 2: one trains, one validates")
    _, listed = find_ucf_lists(root, videos)
    if listed:
        train = [video for video in videos if video.key in listed]
        return train, [video for video in videos if video.key not in listed]
    ranked = sorted(videos, key=hash_fraction)
    num_val = sum(hash_fraction(video) < val_fraction for video in videos)
    val = set(ranked[: min(max(num_val, 1), len(videos) - 1)])
    return [video for video in videos if video not in val], [video for video in videos if video in val]


def hash_fraction(video):
    """A number in [0, 1) that only the video's class and stem decide."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(video.key), digest_size=6).digest(), "big") / 2**48


def find_ucf_lists(root, videos):
    """(folder with the UCF lists that decide the split of these videos, the keys that train); (None, set()) if none."""
    for folder in (Path(root, UCF_LISTS), Path(os.path.abspath(root)).parent / UCF_LISTS):
        listed = _ucf_keys(folder / "trainlist01.txt")
        if 0 < sum(video.key in listed for video in videos) < len(videos):
            return folder, listed
    return None, set()


def _ucf_keys(file):
    """What a list names, as Class/stem; nothing if there is no such file."""
    if not file.is_file():
        return set()
    text = file.read_text(encoding="utf-8", errors="surrogateescape")  # as names of files come
    names = (re.sub(r"\s+\d+$", "", line.strip()) for line in text.splitlines())  # "Archery/v_Archery_g08_c01.avi 3"
    return {str(PurePosixPath(name).with_suffix("")) for name in names if PurePosixPath(name).name}


def long_enough(videos, num_frames, kind="", flag="--num-frames"):
    """(videos with at least num_frames frames, number of the others); raises UserError if none is left."""
    kept = [video for video in videos if video.num_frames >= num_frames]
    if not kept:
        longest = max((video.num_frames for video in videos), default=0)
        raise UserError(f"{flag} {num_frames}: the longest {kind}video of --data-path has {longest} frames")
    return kept, len(videos) - len(kept)


@dataclass(frozen=True)
class Data:
    """What the scan of --data-path found for training: all that the other ranks need to know of it.

    train and val hold lists of Video by num_frames: those long enough for a clip of that many frames.
    """

    scan: Scan
    train: dict
    val: dict
    num_short: int  # videos too short for the longest clips


def find_data(root, images, val_fraction, lengths, val_lengths, flag, index_folder):
    """The Data for training clips of `lengths` frames (given by the flag) and validating `val_lengths` as well.

    Opens every video once (or reads the index); for one rank only. Raises UserError.
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
    """The books on bad videos: who was named already, and when there are too many."""

    def __init__(self, total, max_fraction, known=()):
        self.total, self.max_fraction = total, max_fraction
        self.paths = dict.fromkeys(known)

    @property
    def count(self):
        return len(self.paths)

    def add(self, paths):
        """The paths that are new, each once; raises UserError beyond max(1, max_fraction * total) bad videos."""
        new = [path for path in dict.fromkeys(paths) if path not in self.paths]
        self.paths.update(dict.fromkeys(new))
        if new and self.count > max(1, self.max_fraction * self.total):
            raise UserError(
                f"{self.count} of {self.total} files are bad, {', '.join(new[:3])} the newest: more than "
                f"--max-bad-fraction {self.max_fraction} allows; repair or remove them, or raise it"
            )
        return new

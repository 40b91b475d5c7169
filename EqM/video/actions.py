"""Actions: what was done between the frames of a video.

    ROOT/actions.json    {"names": ["stay", "left", "right"], "mirror": {"left": "right", "right":
                         "left"}}; mirror only if clips may be flipped
    NAME.actions.npy     beside NAME.mp4: int64 (T,), where entry t is the number of the action
                         between frames t - 1 and t, or -1 if it is not known

An action that is not known is called "none".
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runtime.cli import UserError
from runtime.untrusted import check_regular, read_json
from video.files import UnreadableError

ACTIONS_FILE = "actions.json"
SUFFIX = ".actions.npy"
NO_ACTION = -1
NONE = "none"  # its name


@dataclass(frozen=True)
class Actions:
    """The actions of the videos in a data folder `root`."""

    root: str
    names: list
    mirrored: list | None  # the number of each action in a mirrored clip; None: never mirror clips

    def of_clip(self, video, frame_indices, flipped):
        """The actions of the frames of a clip, a list.

        The first leads from a frame that nobody sees, so it is NO_ACTION. Raises UnreadableError.
        """
        actions = self.of_video(video)
        (_, *others) = actions[list(frame_indices)].tolist()
        if flipped:
            others = [self.mirrored[action] if action >= 0 else action for action in others]
        return [NO_ACTION, *others]

    def of_video(self, video):
        """The actions of all frames of a Video, int64 (T,). Raises UnreadableError."""
        path = actions_path(self.root, video)
        try:
            return read_actions(path, video.num_frames, self.names)
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{path}: {error}") from error


def actions_path(root, video):
    """The file with the actions of a Video."""
    return Path(root, video.path).with_suffix(SUFFIX)


def read_actions(path, num_frames, names):
    """The actions of a video, int64 (num_frames,). Raises OSError or ValueError."""
    actions = read_numbers(path, names)
    if actions.shape != (num_frames,):
        raise ValueError(f"got int64 {list(actions.shape)}, expected [{num_frames}], one per frame")
    return actions


def read_numbers(path, names):
    """An array of actions from a .npy file, int64. Raises OSError or ValueError."""
    check_regular(path)
    # unlike np.load, it reads no other format and trusts no size
    actions = np.lib.format.open_memmap(path, mode="r")
    if actions.dtype != np.int64:
        raise ValueError(f"got {actions.dtype}, expected int64")
    check_numbers(actions, names)
    return actions


def check_numbers(actions, names):
    """Raise ValueError unless an array or tensor holds numbers of actions, or NO_ACTION."""
    unknown = actions[(actions < NO_ACTION) | (actions >= len(names))]
    if len(unknown):
        raise ValueError(
            f"unknown action {unknown[0]}, expected 0 to {len(names) - 1}, or -1 for none"
        )


def open_actions(root, videos):
    """The Actions of a data folder, after a check of all videos; None if they have no actions.

    Raises UserError.
    """
    prefix = f"--data-path {root}"
    path = Path(root, ACTIONS_FILE)
    if not path.exists():
        stray = actions_path(root, videos[0])
        if os.path.exists(stray):  # not if the name is too long for a file
            raise UserError(
                f"{prefix}: has {stray.relative_to(root)} but no {ACTIONS_FILE}, which names the "
                "actions; add it, or remove the actions of all videos"
            )
        return None
    try:
        names, mirrored = parse_names(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{prefix}: its {ACTIONS_FILE} is wrong: {error}; change it") from error
    for video in videos:
        if video.varies:
            raise UserError(
                f"{prefix}: {video.path} has a variable frame rate, so its frames have no "
                "actions of their own; convert it (ffmpeg -i FILE -fps_mode cfr FILE.mp4), with an "
                "action for each new frame"
            )
        path = actions_path(root, video)
        try:
            read_actions(path, video.num_frames, names)
        except FileNotFoundError as error:
            raise UserError(
                f"{prefix}: no {path}; expected actions beside each video, or for none "
                f"of them; add it, or remove {ACTIONS_FILE}"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"{prefix}: {path}: {error}; write it again") from error
    return Actions(str(root), names, mirrored)


def parse_names(content):
    """(names, mirrored), as in Actions, of the content of actions.json. Raises ValueError."""
    if not isinstance(content, dict) or not isinstance(content.get("names"), list):
        raise ValueError('expected {"names": [...]}')
    names = content["names"]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^\s,*][^,*]*", name) or name == NONE:
            raise ValueError(
                f"the name {name!r}; expected text without , and *, other than {NONE!r}"
            )
    if not names or len(set(names)) < len(names):
        raise ValueError("expected names that differ, at least one")
    mirror = content.get("mirror")
    if mirror is None:
        return names, None
    if not isinstance(mirror, dict):
        raise ValueError(f"mirror: got {mirror!r}; expected pairs of names")
    for name, other in mirror.items():
        if {name, other} - set(names) or mirror.get(other) != name:
            raise ValueError(
                f"mirror: {name!r} becomes {other!r}; expected two names, and the same backward"
            )
    return names, [names.index(mirror.get(name, name)) for name in names]


def copy_actions(root, copies, out):
    """Copy the actions of videos to another data folder; copies: {path in out: Video}.

    Removes those of an earlier call if the videos have none by now.
    """
    pairs = [(Path(root, ACTIONS_FILE), Path(out, ACTIONS_FILE))]
    for path, video in copies.items():
        pairs.append((actions_path(root, video), Path(out, path).with_suffix(SUFFIX)))
    for source, copy in pairs:
        if os.path.exists(source):
            shutil.copyfile(source, copy)  # not its mode: a later call must overwrite it
        else:
            copy.unlink(missing_ok=True)


def find_actions(path, num_frames, names):
    """The actions beside a single video, int64 (num_frames,), or None if it has none.

    Raises OSError, or ValueError if the folder of the video names others.
    """
    path = Path(os.path.abspath(path))
    file = path.with_suffix(SUFFIX)
    if not os.path.exists(file):
        return None
    for folder in (path.parent, path.parent.parent):
        if (folder / ACTIONS_FILE).exists():
            others, _ = parse_names(read_json(folder / ACTIONS_FILE))
            if others != names:
                raise ValueError(f"they are {', '.join(others)}, expected {', '.join(names)}")
            break
    return read_actions(file, num_frames, names)


# Actions that a user asks for ---------------------------------------------------------------------


def find_sequences(words, names):
    """The sequences of actions that --actions asks for, int64 (N, n).

    A word is a list of spans, such as "right*8,up*4", or a file: text with such a list in each
    line, or .npy with int64 (n,) or (N, n). Raises UserError.
    """
    rows = []
    for word in words:
        try:
            if os.path.isfile(word) or word.endswith((".npy", ".txt")):
                rows += read_sequences(word, names)
            else:
                rows.append(parse_spans(word, names))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--actions {word}: {reason}") from error
    lengths = sorted({len(row) for row in rows})
    if lengths in ([], [0]):
        raise UserError(f"--actions: has no actions; expected spans such as {names[0]}*8")
    if len(lengths) > 1:
        raise UserError(
            f"--actions: sequences of {' and '.join(map(str, lengths))} actions; expected the same "
            "number in each; change one"
        )
    return torch.tensor(rows)


def read_sequences(path, names):
    """The sequences in a file, a list of lists. Raises OSError or ValueError."""
    if path.endswith(".npy"):
        actions = read_numbers(path, names)
        if actions.ndim not in (1, 2):
            raise ValueError(f"got int64 {list(actions.shape)}, expected [n] or [N, n]")
        return np.atleast_2d(actions).tolist()
    check_regular(path)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [parse_spans(line, names) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"no actions; expected lines such as {names[0]}*4")
    return rows


def parse_spans(text, names):
    """The actions, a list of numbers, of spans such as "right*8,up*4". Raises ValueError."""
    actions = []
    for span in text.split(","):
        match = re.fullmatch(r"([^*]+?)(?:\*([0-9]{1,5}))?", span.strip())
        if not match:
            raise ValueError(f"got {span!r}; expected spans such as {names[0]}*8")
        actions += [number_of(match[1], names)] * int(match[2] or 1)
    if not actions:
        raise ValueError(f"no actions; expected spans such as {names[0]}*8")
    return actions


def number_of(name, names):
    """The number of an action by its name. Raises ValueError."""
    if name == NONE:
        return NO_ACTION
    if name not in names:
        raise ValueError(
            f"no action {name!r}; expected one of {', '.join(names)}, or {NONE} if it is not known"
        )
    return names.index(name)


def numbers_of(actions, names):
    """The numbers (n,) of actions: one or several, by name or by number. Raises ValueError."""
    if isinstance(actions, str):
        actions = [actions]
    if isinstance(actions, list):
        actions = [number_of(one, names) if isinstance(one, str) else one for one in actions]
    numbers = torch.as_tensor(actions).reshape(-1)
    check_numbers(numbers, names)
    return numbers


def names_of(actions, names):
    """The names of actions (..., T), nested lists."""
    table = [*names, NONE]  # NO_ACTION is the last
    return np.array(table, dtype=object)[np.asarray(actions)].tolist()

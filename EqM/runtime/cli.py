"""Flags, one-line messages and errors."""

import argparse
import difflib
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.atomic import FULL, why_unwritable
from runtime.distributed import local_rank, rank

LINE_SECONDS = 60  # between two lines of a Bar in a file
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left{postfix}"
UNTYPED = object()  # the value of a flag until it is parsed
# seconds that the other ranks give rank 0 to report an error that all ranks have
RANK_0_SPEAKS_FIRST = 10
LOST = {  # pattern of an error's text -> its meaning
    r"DataLoader worker \(pid": (
        "a loader process has ended, perhaps for lack of memory: lower --num-workers"
    ),
    r"can't allocate memory": "too little memory",  # not a torch.OutOfMemoryError, as on a GPU
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited": (
        "another rank has ended: see its error"
    ),
    r"Timed out waiting": "a rank waited too long for the others",
    r"^Dist\w*Error|gloo": (
        "the ranks can't reach each other: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    ),
}

_unlogged = []  # lines of warnings from before there was a log


class UserError(Exception):
    """An error that the user can fix.

    Its text is one line: what is wrong, what was expected, how to fix it.
    """


# Flags --------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to the help of a flag, unless it is None or False or the help mentions it."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Flags(argparse.Namespace):
    """The values of all flags, frozen. `typed` names the flags that the user gave."""

    __slots__ = ("typed",)

    def __init__(self, values, typed):
        vars(self).update(values)
        object.__setattr__(self, "typed", frozenset(typed))

    def __setattr__(self, name, value):
        raise AttributeError(f"{name}: flags are frozen; resolve returns a copy")

    def __reduce__(self):
        return Flags, (vars(self), self.typed)

    def resolve(self, **values):
        """A copy of the flags with some values filled in. Only preflight and hubconf call this."""
        return Flags(vars(self) | values, self.typed)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that returns Flags and reports errors in one line, and once under torchrun.

    With fromfile_prefix_chars="@", the word @FILE stands for the flags in a file, a recipe. The
    flags then have its text as `recipe`.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.recipe = []  # lines

    def convert_arg_line_to_args(self, line):
        """The words of a line of a recipe, without its comment."""
        self.recipe.append(line)
        return shlex.split(re.sub(r"(^|\s)#.*", "", line))

    def error(self, message):
        if message.startswith("[Errno"):
            message = f"@FILE: {message}; expected a recipe, such as @scripts/recipes/ours.txt"
        fail(message)

    def parse_args(self, args=None):
        names = [action.dest for action in self._actions if action.dest != "help"]
        untyped = argparse.Namespace(**dict.fromkeys(names, UNTYPED))
        try:
            namespace, rest = self.parse_known_args(args, untyped)
        except ValueError as error:
            self.error(f"a recipe is not a text of flags ({error}); expected scripts/recipes/*.txt")
        values = vars(namespace)
        if rest and values.get("skip_others") is not True:
            self.error(self.explain(rest[0].split("=")[0], values))
        typed = [name for name in names if values[name] is not UNTYPED]
        for name in names:
            if name not in typed:
                values[name] = self.get_default(name)
        if self.fromfile_prefix_chars:
            values["recipe"] = "\n".join(self.recipe) or None
        return Flags(values, typed)

    def explain(self, word, values):
        """Say why a word of the command line is wrong: a mistyped flag, an unexpected argument."""
        if not word.startswith("-"):
            positional = ""
            for action in self._get_positional_actions():
                positional += f", {action.metavar} is {values[action.dest]}"
            return (
                f"{word}: unexpected argument{positional}; if a pattern matches several files, "
                "name one of them"
            )
        close = difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.75)
        advice = f"did you mean {close[0]}?" if close else "see --help"
        return f"{word}: no such flag; {advice}"


def flag_text(args, name):
    """A flag with its value as a user types it, such as "--num-frames 4"."""
    value = getattr(args, name)
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"--{flag} {value}"


def number(kind, above=-math.inf, least=-math.inf, most=math.inf):
    """A `type=` for argparse: an int or a finite float within bounds. `above` is exclusive."""
    bounds = {"above": above, "at least": least, "at most": most}
    noun = "an integer" if kind is int else "a number"
    expected = " and ".join(
        f"{word} {bound}" for word, bound in bounds.items() if abs(bound) < math.inf
    )

    def parse(text):
        value = math.nan
        with suppress(ValueError):
            value = kind(text)
        if not (value > above and least <= value <= most and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"got {text}, expected {noun} {expected}")
        return value

    return parse


COUNT = number(int, least=1, most=2**31 - 1)
NATURAL = number(int, least=0, most=2**63 - 1)
POSITIVE = number(float, above=0)
NON_NEGATIVE = number(float, least=0)
SHARE = number(float, least=0, most=1)


def add_speed_flags(parser):
    """Add the speed flags of training and sampling. Returns the add_argument of their group."""
    add = parser.add_argument_group("speed").add_argument
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16", "fp16"],
        help=(
            "bf16 and fp16: mixed precision; tf32: matrix products are rounded; tf32 and fp16 "
            "need a GPU; default: bf16 on a GPU that has it, else fp32; fp32 with an energy; a "
            "resumed run keeps its own"
        ),
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the transformer blocks with torch.compile",
    )
    return add


def check_speed_flags(args):
    """Raise UserError if this machine does not support --precision or --compile."""
    check_precision(args.precision)
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UserError(
            "--compile: no C++ compiler found; expected g++ or clang++; install g++ or remove the "
            "flag"
        )


def precisions():
    """The values of --precision that this rank's device supports, the best one first."""
    if not torch.cuda.is_available():
        return ["fp32", "bf16"]
    with torch.cuda.device(local_rank()):  # or every rank would use memory of the first GPU
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    # the same GPUs have bf16 and tf32
    return ["bf16", "fp32", "tf32", "fp16"] if has_bf16 else ["fp32", "fp16"]


def check_precision(precision):
    """Raise UserError if this machine does not support that --precision; None is not checked."""
    if precision not in (None, *precisions()):
        device = "a machine without a GPU"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name(local_rank())
        raise UserError(
            f"--precision {precision}: does not work on {device}; use {' or '.join(precisions())}"
        )


def resolve_precision(precision, energy, kept=None):
    """The --precision of the flag, else of the resumed run (`kept`), else the best for this model.

    Raises UserError.
    """
    # the gradient of an energy is the field
    precision = precision or kept or ("fp32" if energy else None)
    if precision is None and "bf16" not in precisions():
        say(
            "note: this GPU has no bf16, so --precision is fp32: fp16 is faster and takes less "
            "memory"
        )
    check_precision(precision)
    return precision or precisions()[0]


def check_devices():
    """Raise UserError if torchrun started more processes than this machine has GPUs (if any)."""
    if torch.cuda.is_available() and local_rank() >= torch.cuda.device_count():
        count = os.environ.get("LOCAL_WORLD_SIZE", local_rank() + 1)
        raise UserError(
            f"--nproc_per_node={count}: GPUs on this machine: {torch.cuda.device_count()}; start "
            "as many"
        )


def check_writable(flag, folder):
    """Raise UserError unless `folder` is writable or can be made. Leaves nothing behind."""
    if not str(folder):
        raise UserError(f"{flag} '': an empty name; name a folder")
    parent = Path(folder).absolute()
    if any(len(os.fsencode(part)) > 255 for part in parent.parts):
        raise UserError(
            f"{flag} {str(folder)[:50]}...: a name of more than 255 bytes; use a shorter one"
        )
    if not os.path.exists(parent):
        # new/../file is `file` once the folder `new` is made
        parent = Path(os.path.normpath(parent))
    while not os.path.lexists(parent):  # a broken link blocks a folder, as a file does
        parent = parent.parent
    try:
        # os.access allows root to write to /proc. Hidden: another rank may list the folder
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=parent))
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: {parent} is not a writable folder; name another"
        ) from error


# Messages -----------------------------------------------------------------------------------------


def one_line(text, encoding="utf-8"):
    """Escape line breaks, escape sequences and what this encoding lacks.

    File names may contain all of them.
    """
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return line.encode(encoding, "backslashreplace").decode(encoding)


def plural(count, noun):
    """A count with its noun: "1 video", "2 videos", "3 classes"."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith(('s', 'ch')) else 's'}"


def say(message, log=None):
    """Print a line on rank 0 without breaking a progress bar, and add it to the file `log`.

    Raises UserError.
    """
    message = one_line(message)
    if rank() == 0:
        tqdm.write(one_line(message, sys.stdout.encoding or "utf-8"))
        if log is not None:
            append(log, [message + "\n"])


def append(path, lines):
    """Add lines to a text file. Raises UserError."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


@contextmanager
def writing(path, needed=None):
    """Turn the error of a write to `path` into a UserError that says what is wrong on its disk.

    needed: the size of the file in bytes, if it is known.
    """
    try:
        yield
    except Exception as error:
        # as torch reports a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # as safetensors reports one
            cause = OSError(int(number[1]), os.strerror(int(number[1])))
        if not isinstance(cause, OSError) or isinstance(error, UserError):
            raise
        raise UserError(why_unwritable(path, cause, needed)) from error


def warnings_as_lines(log=None):
    """Print warnings as lines. With a log, add them and the earlier warnings to it."""

    def show(message, *_, **__):
        say(f"note: {message}", log)
        if log is None:
            _unlogged.append(f"note: {one_line(str(message))}\n")

    warnings.showwarning = show
    if log is not None and rank() == 0:
        append(log, _unlogged)
    _unlogged.clear()


class Bar(tqdm):
    """A progress bar of rank 0 on a terminal.

    In a file or a pipe, one line per minute without escape codes.
    """

    def __init__(self, *args, **kwargs):
        self.is_shown = sys.stderr.isatty()
        self.said = time.monotonic()
        settings = {} if self.is_shown else {"file": io.StringIO(), "mininterval": 1}
        super().__init__(*args, **{"disable": rank() != 0} | settings | kwargs)

    def display(self, msg=None, pos=None):
        if self.is_shown:
            super().display(msg, pos)
        elif msg is None and time.monotonic() - self.said >= LINE_SECONDS:
            self.said = time.monotonic()
            values = self.format_dict | {"bar_format": LINE_FORMAT}
            print(one_line(self.format_meter(**values)), file=sys.stderr, flush=True)


def fail(message, status=2, wait=True):
    """End this process with one line on stderr.

    Status 2: wrong input; status 1: a failure while running. torchrun kills all ranks as soon as
    one exits. With `wait`, the others give rank 0 time to report, and report only if they still run
    then (an error on one machine). A script that starts torchrun names a file in EQM_ERROR_FILE and
    shows the line after torchrun's own report. EQM_TRACEBACK=1 adds the traceback.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun may end this rank before it reports
    # torch's handler would raise again when the next loader process ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if wait and rank() != 0:
        time.sleep(RANK_0_SPEAKS_FIRST)
    text = one_line(" ".join(str(message).split()), sys.stderr.encoding or "utf-8")
    line = f"{os.path.basename(sys.argv[0])}: error: {text}"
    if os.environ.get("EQM_TRACEBACK") == "1":
        sys.stderr.write(
            traceback.format_exc() if sys.exception() else "".join(traceback.format_stack())
        )
    try:
        append(os.environ["EQM_ERROR_FILE"], [line + "\n"])
    except (KeyError, UserError):  # the disk may be full
        tqdm.write(line, file=sys.stderr)  # not into a progress bar
    sys.exit(status)


@contextmanager
def wrong_input():
    """Report a UserError of the checks before any work in one line, with status 2."""
    try:
        yield
    except UserError as error:
        fail(error)


def thread_failed(details):
    """A threading.excepthook that leaves an OSError to the main thread.

    There, TensorBoard raises it again.
    """
    if not isinstance(details.exc_value, OSError):
        threading.__excepthook__(details)


@contextmanager
def one_line_errors(*others):
    """Report a UserError, `others`, or a lack of disk, memory or processes in a line, status 1."""
    threading.excepthook = thread_failed
    try:
        with warnings.catch_warnings():
            warnings_as_lines()
            yield
    except KeyboardInterrupt:  # training that has begun saves first
        if rank() != 0:
            sys.exit(130)  # rank 0 reports
        fail("stopped by SIGINT: run the same command again", status=130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError, *others) as error:
        status = getattr(error, "status", 1)  # a rank has its own
        wait = not isinstance(error, ConnectionError)
        is_full = getattr(error, "errno", None) in FULL and error.filename
        fail(why_unwritable(error.filename, error) if is_full else error, status, wait)
    except RuntimeError as error:
        # If another loader process ends now, torch's handler would raise again
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        text = f"{type(error).__name__} {error}"
        first, *_ = str(error).split("\n")
        meanings = [
            meaning for pattern, meaning in LOST.items() if re.search(pattern, text, re.IGNORECASE)
        ]
        if not meanings:
            raise
        fail(f"{meanings[0]} ({first}); all checkpoints are intact", status=1, wait=False)

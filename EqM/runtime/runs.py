"""The folders of runs, and where training starts: afresh, from a checkpoint, or where a run was interrupted."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint import SHAPE, load, shape_of
from checkpoint_parts import Progress
from runtime.distributed import UserError, rank, say
from runtime.signals import is_restarted, lock


def run_number(folder):
    """7 of .../007-EqM-S-4-f4-rope; -1 for what is no run folder."""
    number = folder.name.split("-")[0]
    return int(number) if number.isdecimal() else -1


def make_run_folder(results_dir, name):
    """A new run folder, results_dir/NNN-name, with its subfolders."""
    root = Path(results_dir)
    root.mkdir(parents=True, exist_ok=True)
    while True:
        folder = root / f"{max(map(run_number, root.iterdir()), default=-1) + 1:03d}-{name}"
        with suppress(FileExistsError):  # two runs that start at once
            folder.mkdir()
            break
    (folder / "checkpoints").mkdir()
    (folder / "samples").mkdir()
    return folder


def newest_run(results_dir, name):
    """The newest run folder of that name, or None if there is none."""
    return max(Path(results_dir).glob(f"[0-9]*-{name}"), key=run_number, default=None)


def newest_checkpoint(folder, **asked):
    """(path, dict as of `load`) of the newest checkpoint of a run that is whole; (None, None) without any.

    Those that are damaged are named. latest.pt is always the newest; only without it are the others looked through.
    """
    whole = {}
    latest = Path(folder, "checkpoints", "latest.pt")
    for path in sorted(latest.parent.glob("*.pt"), key=lambda path: (path != latest, path)):
        try:
            state = load(path, **asked)
        except UserError as error:
            say(f"note: {error}")
            continue
        if path == latest:
            return path, state
        whole[path] = state["step"]
    newest = max(whole, key=whole.get, default=None)
    return newest, newest and load(newest, **asked)


def clean(folder):
    """Remove what a process that was killed was writing. Only for who holds the lock of the folder."""
    for path in Path(folder).rglob("*.tmp"):
        if path.is_file():
            path.unlink()


def keep_last(folder, count, always=()):
    """Of a run's numbered checkpoints, remove all but the `count` last and those of the steps `always`."""
    numbered = [path for path in Path(folder, "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.stem))[:-count]:
        if int(path.stem) not in always:
            path.unlink()


@dataclass
class Start:
    """Where training starts: afresh, from --ckpt, or where a run was interrupted."""

    progress: Progress
    path: Path | None = None  # of the checkpoint
    state: dict | None = None  # and what it holds
    folder: Path | None = None  # of the run that goes on, also if it has no checkpoint yet

    @property
    def goes_on(self):
        """Whether the checkpoint is the run's own."""
        return self.folder is not None and self.path is not None and self.path.parent.parent == self.folder

    @property
    def window(self):
        """What the run had measured when it was stopped before it could log that; None in any other case."""
        return self.state["run"]["window"] if self.goes_on else None

    @property
    def bad_videos(self):
        return self.state["run"]["bad_videos"] if self.goes_on else []


def find_start(args, name):
    """The Start that the flags of train.py ask for.

    With --resume, or restarted by torchrun, the newest run of that name goes on, from its beginning if it has no whole
    checkpoint. Its folder is locked from here on. Raises UserError.
    """
    folder = newest_run(args.results_dir, name)
    if folder and not args.resume and not is_restarted(folder):
        folder = None
    given = {name: value for name in SHAPE if (value := getattr(args, name, None)) is not None}
    asked = shape_of(args.model) | given | {"ebm": args.ebm}
    start = Start(Progress(), folder=folder)
    if folder:
        if rank() == 0:
            lock(folder)
            clean(folder)
        start.path, start.state = newest_checkpoint(folder, **asked)
        if start.state:
            start.state["run"] = start.state.get("run") or {"window": None, "bad_videos": []}
    if start.path is None and args.ckpt:
        start.path, start.state = Path(args.ckpt), load(args.ckpt, **asked)
    if start.path is None:
        return start
    state, step = start.state, start.state["step"]
    kind = state["optimizer"]["kind"] if state["optimizer"] else args.optimizer
    if kind != args.optimizer:
        raise UserError(f"--ckpt {start.path}: trained with --optimizer {kind}, found {args.optimizer}: give the same")
    if start.goes_on:
        start.progress = Progress(step, best_loss=state["best_loss"], **state["phase"])
        args.ckpt = state["config"]["training"].get("ckpt")  # where the phase started, for the record
    elif args.max_steps and args.max_steps <= step:
        raise UserError(
            f"--max-steps {args.max_steps}: the checkpoint has {step} steps already, and steps are counted over all "
            "phases; give a larger number"
        )
    else:
        pretrained = state["phase"].get("pretrained", False)
        start.progress = Progress(step, first_step=step, pretrained=pretrained)
    return start

"""Checkpoints: written so that no crash damages one, read so that none can run code.

--ckpt names a file of train.py, a folder of scripts/export.py or a file of a published image model.
For all three, `load` returns this dict of tensors and plain Python values. Only files of train.py
have a "run":
    version    format of the file
    config     {"model": fields of EqMConfig, "data": vae, image_size, fps, ..., "training": all
               flags, "typed": the names of the flags that the user typed}
    model, ema flat state dicts
    optimizer  {"kind": "adamw" or "muon", "states": [state dicts], "scaler": state dict}; None in
               other files
    step       global step, over all phases
    phase      the other fields of Progress, of the phase and of the run
    best_loss  lowest validation loss of the phase
    run        {"window": averages of steps that are not logged yet, or None, "bad_videos": paths of
               corrupt videos}; `Run.save` adds it
"""

import hashlib
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map_with_path

from inflate import inflate
from models import SHAPE, EqM, EqMConfig, model_name, shapes_of
from published import load_published, published_parts, read_export
from runtime import distributed
from runtime.atomic import atomic_write, link
from runtime.cli import UserError, flag_text, say, writing
from runtime.memory import free_bytes, pinned_bytes
from runtime.metrics import read_metrics
from runtime.runs import is_restarted, lock, name_similar, newest_run, remove_temporary_files
from runtime.untrusted import read_torch
from schedule import current_phase, is_due
from sharding import full_tensor, is_sharded, shard_like

VERSION = 1
KEYS = {"version", "config", "model", "ema", "optimizer", "step", "phase", "best_loss"}
SAVED_STEP = "saved_step.txt"  # in a run folder: the step of its newest checkpoint
PARTS = ("model", "ema", "optimizer", "run")  # the parts that hold tensors
SETTINGS = {  # names that every config has; older files may lack those with a default
    "model": {field.name for field in fields(EqMConfig) if field.default is MISSING},
    "data": {"vae", "image_size", "time_scale", "longest_time_scale"},
    "training": {"model", "num_frames", "video"},
}


@dataclass
class Progress:
    """The progress of a run.

    Steps are global: a phase that starts from a checkpoint continues the count.
    """

    step: int = 0
    first_step: int = 0  # of the phase; it also names the phase's stream of samples
    position: int = 0  # number of samples used from that stream
    best_loss: float = math.inf  # lowest validation loss of the phase
    best_step: int = -1  # and its step
    seconds: float = 0.0  # of the run, without interruptions
    flops: float = 0.0  # of the run's training steps
    ema_start: int = 0  # the step at which the average of the weights began: see optim.ema_decay

    def count_step(self, batch_size, flops_per_clip):
        self.step += 1
        self.position += batch_size
        self.flops += batch_size * flops_per_clip

    def begin_phase(self):
        """Start another phase at this step, with its own stream and best loss."""
        self.first_step = self.step
        self.position = 0
        self.best_loss = math.inf
        self.best_step = -1


# Saving -------------------------------------------------------------------------------------------


def save(path, state):
    """Write a checkpoint to `path`, which has its old or its complete new content at any time.

    Raises UserError.
    """
    needed = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
    with writing(path, needed):
        Path(path).parent.mkdir(exist_ok=True)  # a user may have deleted it
        with atomic_write(path) as file:
            torch.save(state, file)


def run_state(config, model, ema, optimizers, scaler, progress):
    """The content of a run's checkpoint, except for its "run"."""
    phase = asdict(progress)
    return {
        "version": VERSION,
        "config": config,
        "model": dict(model.state_dict()),
        "ema": dict(ema.state_dict()),
        "optimizer": {
            "kind": config["training"]["optimizer"],
            "states": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
        },
        "step": phase.pop("step"),
        "best_loss": phase.pop("best_loss"),
        "phase": phase,
    }


class Writer:
    """Write the checkpoints of a run in a thread of rank 0.

    Training pauses only while the tensors are copied. The next call of a method raises the thread's
    error. All ranks gather the full tensors of a sharded state.
    """

    def __init__(self, folder):
        self.path = Path(folder, "checkpoints", "latest.pt")
        # {place in the state: tensor on the CPU}, memory that all checkpoints of the run reuse
        self.copies = {}
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending = None

    def write(self, state, names, before, after):
        """Save a state as latest.pt and under `names`. All ranks call this.

        before(): makes sure that the metrics are on the disk; after(): deletes old checkpoints.
        """
        self.wait()
        self.check_memory(state)
        state = tree_map_with_path(self.copy, state)
        copied = None
        if distributed.rank() != 0:
            return
        if torch.cuda.is_available():
            copied = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
            copied.record()  # the next step runs after the copies on the GPU, so it needs no wait

        def run():
            if copied is not None:
                copied.synchronize()
            before()
            save(self.path, state)
            with writing(self.path):
                for name in names:
                    link(self.path, name)
                self.path.parents[1].joinpath(SAVED_STEP).write_text(f"{state['step']}\n")
            after()

        self.pending = self.thread.submit(run)

    def copy(self, place, value):
        """A copy of a value on the CPU, in the memory of the previous copy if the shapes agree."""
        if not isinstance(value, torch.Tensor):
            return value
        value = full_tensor(value)
        if distributed.rank() != 0:
            return None
        if place not in self.copies or self.copies[place].shape != value.shape:
            self.copies[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.copies[place].copy_(value, non_blocking=True)

    def check_memory(self, state):
        """Raise UserError, on all ranks, if the copy of a sharded state exceeds rank 0's memory."""
        if not any(map(is_sharded, state["model"].values())):
            return
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        sizes = [pinned_bytes(leaf.nbytes) if leaf.is_cuda else leaf.nbytes for leaf in tensors]
        needed = 0 if self.copies else sum(sizes)
        needed, free = distributed.broadcast((needed, free_bytes()))
        if needed > free:
            raise UserError(
                f"--shard: a checkpoint takes {needed / 1e9:.3g} GB of memory on the machine of "
                f"rank 0, which has {free / 1e9:.3g} GB free: choose one with more; earlier "
                "checkpoints are intact"
            )

    def check(self):
        """Raise the error of the thread, if it has ended with one."""
        if self.pending is not None and self.pending.done():
            self.pending.result()

    def wait(self):
        """Wait until nothing is being written. Raises the error of the thread."""
        if self.pending is not None:
            self.pending.result()


def names_at(progress, last_step, every):
    """The names of this step's checkpoint besides latest.pt."""
    names = [f"{progress.step:07d}.pt"] if is_due(progress.step, last_step, every) else []
    return names + (["best.pt"] if progress.best_step == progress.step else [])


def complete_names(start, phases, every):
    """Link the resumed checkpoint to all its names: the run may have been killed before it did.

    If it had steps to log, the training loop does this after it has validated.
    """
    if distributed.rank() == 0 and start.resumes and not start.unlogged:
        last_step = current_phase(phases, start.progress.first_step).last_step
        for name in ["latest.pt", *names_at(start.progress, last_step, every)]:
            link(start.path, name)


# Loading ------------------------------------------------------------------------------------------


class DamagedError(UserError):
    """The content of a checkpoint is damaged, so that no code can read it."""


def load(path, parts=PARTS, model=None, ebm=None):
    """The dict of a checkpoint. model, ebm: --model and --ebm, for published files.

    Raises UserError. The tensors stay in the file, so no rank needs its own copy. Only those of
    `parts` are checked for damage.
    """
    if os.path.isdir(path):
        state = from_elsewhere(*read_export(path))
    else:
        state = read_file(path, parts)
        published = published_parts(state)
        if published:
            state = from_elsewhere(*load_published(path, *published, model, ebm))
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        expected = f"a dict with {', '.join(sorted(KEYS))}"
        raise UserError(f"--ckpt {path}: not a checkpoint of this project; expected {expected}")
    if state["version"] != VERSION:
        raise UserError(
            f"--ckpt {path}: has format version {state['version']}, this code reads version "
            f"{VERSION}"
        )
    config = state["config"]
    if "model" not in config:
        raise UserError(f"--ckpt {path}: holds a VAE; expected a model, of train.py")
    lacking = [part for part, names in SETTINGS.items() if not names <= config[part].keys()]
    if lacking or not isinstance(state["step"], int):
        # the last commit that reads them
        raise UserError(f"--ckpt {path}: lacks settings; commit f311e33 reads older files")
    return state


def load_inflated(args):
    """The dict of a checkpoint that --inflate makes of an image model's EMA weights.

    Raises UserError.
    """
    path = args.inflate
    flag = f"--inflate {args.inflate}"
    try:
        state = load(path, ["ema"], args.model, args.ebm)
    except UserError as error:
        raise UserError(f"{flag}: {str(error).removeprefix(f'--ckpt {path}: ')}") from error
    config = config_of(flag, state, args.model)
    data = state["config"]["data"]
    if (config.num_frames, config.temporal_patch_size) != (1, 1):
        raise UserError(
            f"{flag}: holds a video model, expected an image model (for a video model, use --ckpt)"
        )
    if config.ebm != "none":
        raise UserError(
            f"{flag}: trained with --ebm {config.ebm}; --inflate does not support gradients of "
            "energies"
        )
    try:
        weights, config = inflate(
            state["ema"],
            config,
            num_frames=args.num_frames,
            temporal_patch_size=args.temporal_patch_size,
            rope_theta=args.rope_theta,
            time_scale=data["time_scale"],
        )
    except ValueError as error:
        raise UserError(
            f"{flag}: {error}; change --temporal-patch-size, the clips' length or the model"
        ) from error
    # the flags of the image run give defaults; all that was trained is one frame
    training = state["config"]["training"] | {"num_frames": 1, "video": True}
    inflated = {"model": asdict(config), "data": data, "training": training}
    return from_elsewhere(inflated, model=weights, ema=weights, step=0)


def read_file(path, parts=None):
    """The content of a file of torch.save. parts: names, as in `read_torch`. Raises UserError."""
    try:
        return read_torch(path, parts)
    except FileNotFoundError:
        reason = "no such file; expected a checkpoint, for example RUN/checkpoints/best.pt"
    except pickle.UnpicklingError:
        reason = (
            "not a checkpoint, or one that holds code (only tensors and plain values are loaded)"
        )
        if Path(path).suffix == ".safetensors":
            reason = f"weights without their config; expected their folder, {Path(path).parent}"
    except OSError as error:
        reason = f"can't be read ({error.strerror or error}); expected a checkpoint file"
        raise UserError(f"--ckpt {path}: {reason}") from error
    except Exception as error:
        reason = (
            f"damaged or cut short ({type(error).__name__}); use another checkpoint, or copy it "
            "again"
        )
    raise DamagedError(f"--ckpt {path}: {reason}")


def from_elsewhere(config, model, ema, step, version=VERSION):
    """The dict of a checkpoint of another program than train.py: without optimizer and phase."""
    return {
        "version": version,
        "config": config,
        "model": model,
        "ema": ema,
        "optimizer": None,
        "step": step,
        "phase": {"first_step": step, "position": 0, "ema_start": step},
        "best_loss": math.inf,
    }


def load_model(path, use_ema=True, model=None, video=None, **checks):
    """(network in eval mode on the CPU, config of the file, step) of a checkpoint.

    Raises UserError. model, video, checks: see `config_of`.
    """
    part = "ema" if use_ema else "model"
    flag = f"--ckpt {path}"
    state = load(path, [part], model, checks.get("ebm"))
    config = config_of(flag, state, model, video, **checks)
    if not use_ema and state["model"] is state["ema"]:  # exported and published models
        raise UserError(f"--no-ema: {flag} holds EMA weights only; remove the flag")
    note_old_best(Path(path), state)
    network = EqM(config)
    network.load_state_dict(state[part])
    return network.eval(), state["config"], state["step"]


def note_old_best(path, state):
    """Say so if a best.pt is older than the run's newest checkpoint by more than a fifth of the
    steps of its phase.
    """
    if path.name != "best.pt":
        return
    with suppress(OSError, ValueError):  # a best.pt that is not in a run folder
        newest = int((path.parents[1] / SAVED_STEP).read_text())
        if newest - state["step"] > (newest - state["phase"]["first_step"]) / 5:
            say(
                f"note: best.pt has step {state['step']}, latest.pt has step {newest}: no later "
                "validation loss was lower; latest.pt has the newest weights"
            )


def weights_sha256(weights):
    """The SHA-256 of the names, shapes and float32 values of a flat state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.float().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_run(start, model, ema, optimizers, scaler):
    """Restore everything that is trained from the checkpoint of a Start."""
    state = start.state
    for network, weights in ((model, state["model"]), (ema, state["ema"])):  # sharded or not
        places = network.state_dict()
        network.load_state_dict(
            {name: shard_like(value, places[name]) for name, value in weights.items()}
        )
    if state["optimizer"]:  # exported and published models have none
        load_optimizers(optimizers, state["optimizer"]["states"])
        # the last phase may have been in bf16
        if scaler.is_enabled() and state["optimizer"]["scaler"]:
            scaler.load_state_dict(state["optimizer"]["scaler"])


def load_optimizers(optimizers, saved):
    """Restore the optimizers' state of each weight.

    Settings such as the learning rate come from the flags.
    """
    for optimizer, state in zip(optimizers, saved, strict=True):
        weights = optimizer.param_groups[0]["params"]
        moments = {}
        for index, values in state["state"].items():
            moments[index] = {
                name: shard_like(value, weights[index]) if value.dim() else value  # a step count
                for name, value in values.items()
            }
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        # On the CPU, tensors still map the file, which training must not change
        for values in optimizer.state.values():
            values |= {name: value.clone() for name, value in values.items()}


def config_of(flag, state, model=None, video=None, **asked):
    """The EqMConfig of a loaded checkpoint.

    Raises UserError if it is invalid or does not match the weights. model, video, asked: the
    --model, the --video and the fields that it must have; None is not checked.
    """
    training = state["config"]["training"]
    if model not in (None, training["model"]):
        raise UserError(f"--model {model}: {flag} has {training['model']}; remove the flag")
    if video not in (None, training["video"]):
        if video:
            raise UserError(
                f"{flag}: holds an image model, --video needs a video model: remove --video, or "
                "train from it with --inflate"
            )
        raise UserError(f"{flag}: holds a video model: add --video")
    try:
        config = EqMConfig(**state["config"]["model"])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{flag}: damaged: the settings of its model are invalid ({error})"
        ) from error
    expected = shapes_of(config)
    for part in ("model", "ema"):
        shapes = {name: tuple(value.shape) for name, value in state[part].items()}
        for name in expected | shapes:
            if shapes.get(name) != expected.get(name):
                raise UserError(
                    f"{flag}: its weights do not match its config: shapes of {name} are "
                    f"{shapes.get(name)} and {expected.get(name)}"
                )
    check(flag, config, **asked)
    return config


def check(flag, saved, **asked):
    """Raise UserError, beginning with `flag`, unless an EqMConfig has the values of `asked`.

    None is not checked.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    use_rope = asked.pop("use_rope", saved.use_rope)
    if saved.use_rope and not use_rope:
        raise UserError(f"{flag}: trained with --use-rope: add it")
    if use_rope and not saved.use_rope:
        raise UserError(
            f"{flag}: fixed positions cannot be converted: retrain with --use-rope, or remove it"
        )
    if saved.use_rope:
        asked.pop("num_frames", None)  # no weight depends on it
    expected = model_name(**asdict(saved) | asked)
    if saved.name != expected:
        raise UserError(
            f"{flag}: holds {saved.name}, --model is {expected}: remove --model, --depth, "
            "--hidden-size and --num-heads: the checkpoint has them"
        )
    for name in asked.keys() - set(SHAPE):  # the shape is in the name, which is compared above
        if getattr(saved, name) != asked[name]:
            asks = f"--{name.replace('_', '-')}"
            asks = {"input_size": "--image-size", "in_channels": "--vae"}.get(name, asks)
            tied = ""
            if name == "num_frames":
                tied = " (fixed positions are tied to it; --use-rope models are not)"
            raise UserError(
                f"{flag}: has {name.replace('_', ' ')} {getattr(saved, name)}, {asks} gives "
                f"{asked[name]}: they must agree{tied}; change or remove {asks}"
            )


# Where training starts ----------------------------------------------------------------------------


@dataclass
class Start:
    """Where training starts: from scratch, --ckpt or --inflate, or at a run's last checkpoint."""

    progress: Progress
    path: Path | None = None  # of the checkpoint
    state: dict | None = None  # and its content
    inflates: bool = False  # whether it is the image model of --inflate
    sha256: str | None = None  # of the weights that a new phase starts from, on rank 0
    folder: Path | None = None  # of the run to resume, even if it has no checkpoint yet
    restarts: bool = False  # whether torchrun restarted the job of that run
    resumes: bool = False  # whether the checkpoint belongs to that run; only then:
    unlogged: dict | None = None  # the StepStats.averaged of steps that the run had not logged
    bad_videos: list = ()  # paths of the corrupt videos that it knows

    @property
    def origin(self):
        """Where the run starts, in messages: a flag with its file."""
        if self.resumes:
            return f"--resume of {self.path}"
        return f"--inflate {self.path}" if self.inflates else f"--ckpt {self.path}"

    @property
    def config(self):
        """The config of the checkpoint; empty without one."""
        return self.state["config"] if self.state else {"model": {}, "data": {}, "training": {}}

    def resumed_flag(self, name):
        """The resumed run's value of a flag; None for a new run."""
        return self.config["training"].get(name) if self.resumes else None

    def read(self, args):
        """The content of the checkpoint for the flags of train.py. Raises UserError."""
        if self.inflates:
            return load_inflated(args)
        state = load(self.path, model=args.model, ebm=args.ebm)
        if args.pairs and not self.resumes:
            # a student starts from the averaged weights, which made the samples
            state = state | {"model": state["ema"], "optimizer": None}
        return state


def find_start(args, name):
    """The Start for the flags of train.py: a resumed run, else a new phase from --ckpt or
    --inflate, else scratch.

    A new phase takes model, EMA, optimizer and step from --ckpt, with --pairs the EMA weights and
    the step. From --inflate it takes the EMA weights, at step 0. Raises UserError.
    """
    ckpt = args.ckpt or args.inflate
    start = find_resumed(args, name, ckpt)
    if start.resumes:
        check_same_data(start, args)
    # a restart repeats a command that was checked
    if start.resumes and ckpt and not start.restarts and distributed.rank() == 0:
        check_began_from(start, args, Path(ckpt))
    if start.resumes or not ckpt:
        return start
    start.path = Path(ckpt)
    start.inflates = bool(args.inflate)
    start.state = start.read(args)
    if not args.new_classes:
        check_optimizer(start, args)
    if distributed.rank() == 0:  # of the file, as --inflate has changed the weights
        start.sha256 = start_weights(args, args.model)[0]
    step = start.state["step"]
    check_last_step(args, step, least=step + 1)
    begins_anew = args.new_classes or args.pairs
    ema_start = step if begins_anew else start.state["phase"]["ema_start"]
    start.progress = Progress(step, first_step=step, ema_start=ema_start)
    return start


def check_optimizer(start, args):
    """Raise UserError if the checkpoint of a Start holds the states of another --optimizer."""
    kind = start.state["optimizer"]["kind"] if start.state["optimizer"] else args.optimizer
    if kind != args.optimizer:
        raise UserError(
            f"{start.origin}: trained with --optimizer {kind}, got {args.optimizer}: give the same"
        )


def find_resumed(args, name, ckpt=None, read=load):
    """The Start at the newest run of that name, locked, if --resume or a restart asks for it.

    Else from scratch.
    """
    folder = newest_run(args.results_dir, name)
    start = Start(Progress())
    if folder is None and args.resume:
        similar = "" if ckpt else name_similar(args.results_dir, name)
        say(
            f"--resume: no run {name} in {args.results_dir}{similar}; starting from "
            f"{ckpt or 'the beginning'}"
        )
    start.restarts = folder is not None and is_restarted(folder)
    if folder is None or not (args.resume or start.restarts):
        return start
    if distributed.rank() == 0:
        lock(folder)
        remove_temporary_files(folder)
    check_not_deleted(folder)
    start.folder = folder
    start.path, start.state = newest_checkpoint(folder, read)
    if state := start.state:
        start.resumes = True
        start.bad_videos = state["run"]["bad_videos"]
        # or the file would stay open during the run
        start.unlogged = deepcopy(state["run"]["window"])
        check_optimizer(start, args)
        check_last_step(args, state["step"], least=state["step"])
        phase = dict(state["phase"])
        phase.pop("skipped", None)  # older files
        start.progress = Progress(state["step"], best_loss=state["best_loss"], **phase)
    return start


def check_last_step(args, step, least):
    """Raise UserError if the flags end the run before the step `least`. step: of the checkpoint."""
    if args.max_steps is None or args.max_steps >= least:
        return
    flag = "--frames-schedule to step" if getattr(args, "frames_schedule", None) else "--max-steps"
    raise UserError(
        f"{flag} {args.max_steps}: the checkpoint is at step {step} already; steps are counted "
        "over all phases; give a larger number"
    )


def check_same_data(start, args):
    """Raise UserError if a student would continue the run of its teacher, which has the same name,
    or the other way round.
    """
    trained = "pairs" if start.resumed_flag("pairs") else "videos"
    asked = "pairs" if args.pairs else "videos"
    if asked != trained:
        raise UserError(
            f"--resume: continues {start.folder}, which trains on {trained}, this command on "
            f"{asked}; name another --results-dir, or {'remove' if args.pairs else 'add'} --pairs"
        )


def check_began_from(start, args, path):
    """Raise UserError if a resumed run did not begin from `path`, of --ckpt or --inflate."""
    name = "inflate" if args.inflate else "ckpt"
    if path.resolve().is_relative_to(start.folder.resolve()):  # one of the files of this run
        check_newest(start, args, path, name)
        return
    began = f"{flag_text(args, name)}: --resume continues {start.folder}, which began"
    if not start.resumed_flag(name):
        raise UserError(f"{began} without it; remove one of the two")
    try:
        sha256, step = start_weights(args, args.model or start.resumed_flag("model"))
    except UserError as error:  # the files of earlier phases may be deleted
        reason = str(error).removeprefix(f"--ckpt {path}: ")
        say(
            f"note: {flag_text(args, name)}: {reason}; so it can't be compared with the start of "
            f"{start.folder}"
        )
        return
    if start.resumed_flag("start_sha256"):
        differs = sha256 != start.resumed_flag("start_sha256")
    # Older runs have no SHA-256: compare the step, if they say at which step they began
    elif args.inflate or start.resumed_flag("frames_schedule"):
        differs = False
    else:
        differs = step != start.progress.first_step
    if differs:
        raise UserError(
            f"{began} from other weights ({start.resumed_flag(name)}); remove one of the two"
        )


def check_newest(start, args, path, name):
    """Raise UserError if a resumed run would not continue from its own file `path`."""
    step = load(path, [])["step"]
    if step != start.progress.step:
        raise UserError(
            f"{flag_text(args, name)}: has step {step}, but --resume continues {start.folder} from "
            f"step {start.progress.step}; remove this flag, or remove --resume to start a phase"
        )


def start_weights(args, model):
    """(SHA-256 of the weights that --ckpt or --inflate gives a phase, step). Raises UserError."""
    part = "ema" if args.inflate or args.pairs else "model"
    state = load(args.ckpt or args.inflate, [part], model, args.ebm)
    return weights_sha256(state[part]), state["step"]


def check_not_deleted(folder):
    """Raise UserError if the run has saved checkpoints and all are gone.

    A run killed before it saved starts over.
    """
    checkpoints = Path(folder, "checkpoints")
    metrics = Path(folder, "metrics.jsonl")
    rows = read_metrics(metrics)[0] if metrics.exists() else []
    # A new run makes this folder before anything else, so without it, somebody has deleted it
    had_saved = Path(folder, SAVED_STEP).exists() or not checkpoints.exists()
    if rows and had_saved and not any(checkpoints.glob("*.pt")):
        raise UserError(
            f"--resume: the checkpoints of {folder} were deleted (its metrics reach step "
            f"{rows[-1]['step']}): restore one, or remove --resume to start a new run"
        )


def newest_checkpoint(folder, read=load):
    """(path, dict of `load`) of the newest intact checkpoint of a run; (None, None) without one.

    Names damaged ones. Raises UserError if none can be read, and one is not damaged, but of another
    version, for example: the run must not start over in its folder.
    """
    intact = []
    refusal = None
    latest = Path(folder, "checkpoints", "latest.pt")
    for path in sorted(latest.parent.glob("*.pt"), key=lambda path: (path != latest, path)):
        try:
            intact.append((path, read(path)))
        except UserError as error:
            say(f"note: {error}")
            if not isinstance(error, DamagedError):
                refusal = refusal or error
        if intact and path == latest:  # always the newest
            break
    if refusal and not intact:
        raise refusal
    return max(intact, key=lambda one: one[1]["step"], default=(None, None))


# Flags --------------------------------------------------------------------------------------------


def add_flags(add):
    """Add the flags that say where training starts, to the group "run" of train.py."""
    add(
        "--ckpt",
        metavar="FILE",
        help="start a new phase from this checkpoint, export or published image model",
    )
    add(
        "--inflate",
        metavar="FILE",
        help="start a video model from an image model: checkpoint, export or published",
    )
    add(
        "--new-classes",
        action="store_true",
        help="train on other classes than before; known names keep embeddings",
    )
    add(
        "--resume",
        action="store_true",
        help="continue the newest run of this model, frames and positions, if any",
    )


def check_flags(args):
    """Raise UserError for contradictions among --ckpt, --inflate and --new-classes."""
    for name in ("ckpt", "inflate"):
        if getattr(args, name) == "":
            raise UserError(
                f"{flag_text(args, name)}: an empty name; name a checkpoint, or remove it to "
                "start from scratch"
            )
    if args.new_classes and not (args.ckpt or args.inflate):
        raise UserError("--new-classes: needs a model of other classes; add --ckpt or --inflate")
    if args.inflate and args.ckpt:
        raise UserError(
            f"--inflate {args.inflate}: a run starts from one model; remove it, or remove --ckpt"
        )
    if args.inflate and not (args.video and args.use_rope):
        raise UserError(
            f"--inflate {args.inflate}: starts a video model with rotary positions; add --video "
            "and --use-rope"
        )

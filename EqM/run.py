"""The run folder of train.py and train_vae.py: what they write and how they end."""

import functools
import json
import os
import statistics
import time
from dataclasses import asdict

import torch

import checkpoint
import models
from runtime import distributed, runs
from runtime.atomic import write_file
from runtime.cli import (
    COUNT,
    NATURAL,
    NON_NEGATIVE,
    SHARE,
    UserError,
    check_writable,
    number,
    say,
    warnings_as_lines,
    writing,
)
from runtime.distributed import rank, world_size
from runtime.metrics import Metrics, StepStats, import_wandb
from runtime.signals import StopSignal
from runtime.untrusted import is_text
from schedule import clip_lengths
from video.index import CorruptVideos, fitting_interval, log_data, log_skipped, save_index
from video.loader import end_children

# flags that `note_changes` does not report: harmless, or checked against the checkpoint
UNREPORTED = {
    "resume",
    "ckpt",
    "inflate",
    "new_classes",
    "num_classes",
    "results_dir",
    "vae",
    "num_workers",
    "loader_timeout",
    "wandb",
    "save_minutes",
    "keep_last",
    "shard",
    "grad_checkpoint",
    "model",
    "guidance_chosen",
    *models.FLAGS,
}


class Run:
    """The folder of a run with its log, metrics and checkpoints.

    All ranks have one, and rank 0 writes.
    """

    def __init__(self, start, args, name, run_config, source, wandb=False, together=False):
        self.folder = start.folder
        if not self.folder and rank() == 0:
            self.folder = runs.make_run_folder(args.results_dir, name)
        self.folder = distributed.broadcast(self.folder)
        self.log = functools.partial(say, log=self.folder / "log.txt")
        warnings_as_lines(self.folder / "log.txt")
        if rank() == 0:
            save_index(source.scan, source.root, args.results_dir)
        logged_step = start.progress.step - 1 if start.unlogged else start.progress.step
        self.metrics = Metrics(
            folder=self.folder,
            resume_step=logged_step,
            wandb=wandb,
            config=run_config,
        )
        self.stats = StepStats(start.unlogged)
        self.bad_videos = CorruptVideos(source.scan, args.max_bad_fraction, start.bad_videos)
        self.stop = StopSignal(together)
        self.writer = checkpoint.Writer(self.folder)
        self.saved_at = time.monotonic()

    def write_config(self, run_config):
        if rank() == 0:
            path = self.folder / "config.json"
            with writing(path):
                write_file(path, json.dumps(run_config, indent=2).encode())

    def report_corrupt(self, paths, step):
        """Name each corrupt video that a rank has found once.

        Raises UserError, on all ranks, if there are too many.
        """
        for path in self.bad_videos.add(distributed.gather_items(paths)):
            self.log(
                f"step {step}: {path} can't be decoded; others take its place ({self.bad_videos})"
            )

    def wants_to_save(self, minutes):
        """Whether so many minutes have passed since the last checkpoint; 0 = never."""
        return 0 < 60 * minutes <= time.monotonic() - self.saved_at

    def save(self, state, names=(), after=lambda: None):
        """Save the state of `checkpoint.run_state` as in `Writer.write`. All ranks call this."""
        self.writer.wait()
        self.stop.barrier()  # the next step has a shorter timeout
        self.saved_at = time.monotonic()
        unlogged = self.stats.averaged(state["step"]) if len(self.stats) else None
        self.report_corrupt(self.stats.corrupt, state["step"])
        state = state | {"run": {"window": unlogged, "bad_videos": list(self.bad_videos.paths)}}
        self.writer.write(state, names, before=self.metrics.sync, after=after)

    def stop_early(self, step, save):
        """Save the steps that are not saved yet, and say how to continue."""
        if len(self.stats):
            save()
        self.writer.wait()
        where = f"and saved at step {step}" if step else "before the first step"
        # a shell script adds the flag
        advice = os.environ.get("EQM_ADVICE", "run the same command with --resume")
        self.log(
            f"stopped by {self.stop.name or 'a signal to another rank'} {where}: to continue, "
            f"{advice}"
        )

    def close(self):
        """Wait for the other ranks and end the loader processes."""
        self.stop.barrier()
        end_children()  # the end of a DataLoader would wait for processes that are still starting
        self.metrics.close()


# What a run records ------------------------------------------------------------------------------


def run_name(args):
    """EqM-S-4-f4-rope, or EqM-S-4-f4-8-16-rope with a schedule; -causal at the end for --causal.

    A glob pattern if the model is not known yet.
    """
    model = (args.model or "EqM-*").replace("/", "-")
    lengths = "-".join(map(str, clip_lengths(args)))
    positions = "-rope" if args.use_rope else ""
    causal = "-causal" if args.causal else ""
    return f"{model}-f{lengths}{positions}{causal}"


def make_run_config(args, config, phase, data, vae):
    """The `config` in the checkpoints of a phase: plain values that record how it was trained."""
    training = vars(args) | {"num_frames": phase.num_frames, "global_batch_size": phase.batch_size}
    if args.frames_schedule:
        training["frames_schedule"] = ",".join(map(str, args.frames_schedule))

    def time_scale(part, interval):  # median seconds between two frames of a clip
        return statistics.median_low(
            fitting_interval(video, phase.num_frames, interval) / video.fps
            for video in part.train[phase.num_frames]
        )

    # a student samples as its teacher did, but knows the longest time scale of its real clips
    longest = max(time_scale(part, args.frame_interval[-1]) for part in (data, data.files))

    return {
        "model": asdict(config) | {"num_frames": phase.num_frames},
        "data": {
            "vae": vae.name,
            "vae_sha256": vae.sha256,
            "image_size": args.image_size,
            "fps": statistics.median(video.fps for video in data.train[phase.num_frames]),
            "frame_interval": args.frame_interval,
            "time_scale": time_scale(data, args.frame_interval[0]),
            "longest_time_scale": longest,
            "classes": data.scan.classes,
        },
        "training": training,
        "typed": sorted(args.typed),
    }


def note_changes(start, run_config, run):
    """Log the typed flags that changed in a resumed run, and keep its previous config.

    The metrics get them, too.
    """
    before = start.config["training"]
    now = run_config["training"]
    typed = {*start.config.get("typed", before), *run_config["typed"]} & before.keys() - UNREPORTED
    changes = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in typed and before[name] != now[name]
    ]
    if start.resumes and changes and rank() == 0:
        text = f"resumed with other flags: {', '.join(changes)}"
        run.log(text)
        run.metrics.note(start.progress.step, text)
        (run.folder / f"config-until-{start.progress.step:07d}.json").write_text(
            json.dumps(start.config, indent=2)
        )


def log_run(run, args, config, model, data, first_step, last_step, device):
    """Log the model, the data and the machine."""
    size = sum(map(torch.numel, model.parameters())) / 1e6
    run.log(
        f"{run.folder}: {config.name}, {size:.1f} M parameters, "
        f"{config.positions}, objective {config.objective}; {world_size()} x {device.type}, "
        f"steps {first_step} to {last_step}"
    )
    for part in filter(None, (data, data.real)):
        log_data(run.log, args, part)
        log_skipped(run.log, part)


# Flags --------------------------------------------------------------------------------------------


def add_flags(parser):
    """Add the flags of the run folder and of what is written to it to the parser of train.py."""
    add = parser.add_argument_group("run").add_argument
    add("--results-dir", default="results", metavar="DIR", help="parent folder of the run folder")
    checkpoint.add_flags(add)
    add("--dry-run", action="store_true", help="check flags, data and checkpoint, then exit")
    add("--log-every", type=COUNT, default=100, help="steps between two lines of metrics")
    add(
        "--ckpt-every", type=COUNT, default=50_000, help="steps between checkpoints, and at the end"
    )
    add(
        "--save-minutes",
        type=NON_NEGATIVE,
        default=15.0,
        help="minutes between checkpoints; 0 = off",
    )
    add(
        "--keep-last",
        type=COUNT,
        help="numbered checkpoints to keep, besides the last of each phase; default: all",
    )
    add("--val-every", type=COUNT, default=2_500, help="steps between validations, and at the end")
    add(
        "--val-frames",
        type=COUNT,
        nargs="+",
        default=[],
        help="additional clip lengths to validate; default: none",
    )
    add("--val-clips", type=COUNT, default=256, help="validation clips, at most 4 per video")
    add("--sample-every", type=NATURAL, default=10_000, help="steps between samples; 0 = off")
    add("--num-samples", type=COUNT, default=8, help="clips sampled each time")
    add("--wandb", action="store_true", help="log to Weights & Biases as well")


def check_flags(args):
    """Raise UserError if the run can't write to its folder or to Weights & Biases."""
    check_writable("--results-dir", args.results_dir)
    if not is_text(args.results_dir):
        raise UserError(
            f"--results-dir {args.results_dir}: not UTF-8, which TensorBoard needs; name another"
        )
    if args.wandb:
        import_wandb()


def add_loading_flags(add, num_workers):
    """Add the flags that say which videos are read, and how."""
    add(
        "--val-fraction",
        type=number(float, above=0, most=1),
        default=0.05,
        help=(
            "fraction of the videos for validation, at least one video; split files in --data-path "
            "replace it"
        ),
    )
    add(
        "--max-bad-fraction",
        type=SHARE,
        default=0.1,
        help="fraction of the files that may be corrupt; one always may",
    )
    add(
        "--num-workers",
        type=number(int, least=0, most=1024),
        default=num_workers,
        help="loader processes per rank; 0 = in-process",
    )
    add(
        "--cache-frames",
        action="store_true",
        help=(
            "decode each video once, into a folder in --results-dir that later runs reuse; at most "
            "20 GB"
        ),
    )
    add(
        "--loader-timeout",
        type=NON_NEGATIVE,
        default=300.0,
        help=(
            "seconds for loader processes to start or load a batch; 0 = no limit, but ranks wait "
            "600 s at most"
        ),
    )

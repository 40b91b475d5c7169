"""The run folder of train.py and train_vae.py: what they write and how they end."""

import functools
import itertools
import json
import os
import time

import checkpoint
from runtime import distributed, runs
from runtime.cli import NON_NEGATIVE, SHARE, number, say, warnings_as_lines, writing
from runtime.metrics import Metrics, StepStats
from runtime.signals import StopSignal
from video.index import CorruptVideos, save_index
from video.loader import end_children


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
    workers = number(int, least=0, most=1024)
    add(
        "--num-workers",
        type=workers,
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


class Run:
    """The folder of a run with its log, metrics and checkpoints.

    All ranks have one, and rank 0 writes.
    """

    def __init__(self, start, args, name, run_config, scan, wandb=False, together=False):
        self.folder = start.folder
        if not self.folder:
            is_first = distributed.rank() == 0
            new_folder = runs.make_run_folder(args.results_dir, name) if is_first else None
            self.folder = distributed.broadcast(new_folder)
        self.log = functools.partial(say, log=self.folder / "log.txt")
        warnings_as_lines(self.folder / "log.txt")
        if distributed.rank() == 0:
            save_index(scan, args.data_path, args.results_dir)
        logged_step = start.progress.step - 1 if start.unlogged else start.progress.step
        self.metrics = Metrics(
            folder=self.folder,
            resume_step=logged_step,
            wandb=wandb,
            config=run_config,
        )
        self.stats = StepStats(start.unlogged)
        self.bad_videos = CorruptVideos(scan, args.max_bad_fraction, start.bad_videos)
        self.stop = StopSignal(together)
        self.writer = checkpoint.Writer(self.folder)
        self.saved_at = time.monotonic()

    def write_config(self, run_config):
        if distributed.rank() == 0:
            with writing(self.folder / "config.json"):
                (self.folder / "config.json").write_text(json.dumps(run_config, indent=2))

    def report_corrupt(self, paths, step):
        """Name each corrupt video that a rank has found once.

        Raises UserError, on all ranks, if there are too many.
        """
        paths_of_all = itertools.chain(*distributed.gather(paths))
        for path in self.bad_videos.add(paths_of_all):
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

"""Numbers of a run: metrics.jsonl for programs, TensorBoard and (when asked) wandb for people."""

import json
import math
import os
import time
import uuid
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.atomic import atomic_write
from runtime.cli import UserError


def read_metrics(path):
    """Read a metrics.jsonl.

    Returns:
        the rows, dicts with "step" and whatever was logged (None = was not finite), and the number of
        lines that were torn by a crash and left out.
    """
    rows, torn = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            else:
                torn += 1
    return rows, torn


def import_wandb():
    """The wandb package; raises UserError if it is missing, so that --wandb can be checked before a run starts."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(f"--wandb: {error}; run `pip install wandb`, or leave the flag out") from error
    return wandb


class Metrics:
    """Logs numbers on rank 0; on every other rank all methods do nothing.

    Args:
        folder: the run folder; metrics.jsonl and the TensorBoard events go there.
        resume_step: the step the run goes on from; what was logged after it is dropped, as it is going
            to be logged again. `torn` then counts the broken lines that were dropped as well.
        wandb: also send everything to wandb; raises UserError if that can't be.
        config: dict shown by wandb.
    """

    def __init__(self, folder, resume_step=None, wandb=False, config=None):
        self.torn = 0
        self.file = self.board = self.wandb = None
        if distributed.rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second of start-up, spent on one rank

        path = Path(folder) / "metrics.jsonl"
        if resume_step is not None and path.exists():
            self.torn = _drop_after(resume_step, path)
        self.wandb = _start_wandb(Path(folder), config) if wandb else None
        self.board = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def log(self, step, **scalars):
        """Append one line {"step": step, name: number, ...}; NaN and infinity, which JSON lacks, become null."""
        if self.file is None:
            return
        scalars = {name: value.item() if hasattr(value, "item") else value for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self.file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(scalars, step=step)

    def sync(self):
        """See to it that what was logged outlasts a power cut, as checkpoints do."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def video(self, step, name, clips, gif=None, mp4=None):
        """Show clips uint8 (N, T, H, W, 3) as one picture: a row per clip, a column per frame; images 8 in a row.

        gif (bytes) goes to TensorBoard, which plays it, and mp4 (a path) to wandb, as name_moving.
        """
        if self.file is None:
            return
        if clips.shape[1] == 1:  # a row of images is laid out as the frames of a clip are
            columns = min(len(clips), 8)
            blank = np.full_like(clips[:1], 255).repeat(-len(clips) % columns, axis=0)
            clips = np.concatenate([clips, blank]).reshape(-1, columns, *clips.shape[2:])
        N, T, H, W, _ = clips.shape
        sheet = clips.transpose(0, 2, 1, 3, 4).reshape(N * H, T * W, 3)
        self.board.add_image(name, sheet, step, dataformats="HWC")
        if gif is not None:  # add_video would want moviepy, to make such a GIF
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(encoded_image_string=gif)
            value = Summary.Value(tag=f"{name}_moving", image=image)
            self.board.file_writer.add_summary(Summary(value=[value]), step)
        if self.wandb:
            wandb = import_wandb()
            moving = {f"{name}_moving": wandb.Video(str(mp4), format="mp4")} if mp4 else {}
            self.wandb.log({name: wandb.Image(sheet)} | moving, step=step)

    def close(self):
        if self.file is not None:
            self.file.close()
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _drop_after(step, path):
    """Rewrite the file, all or nothing, without the rows after `step`; returns the number of torn lines."""
    rows, torn = read_metrics(path)
    with atomic_write(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows if row["step"] <= step)
    return torn


def _start_wandb(folder, config):
    """A wandb run that a resumed run continues: its id lies in the run folder."""
    wandb = import_wandb()
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    try:
        return wandb.init(
            project="EqM-Video", name=folder.name, dir=folder, config=config, id=id_file.read_text(), resume="allow"
        )
    except wandb.Error as error:  # no account on this machine, no network
        raise UserError(f"--wandb: {error}; run `wandb login`, or set WANDB_MODE=offline") from error


class StepStats:
    """What happened since the last line of metrics; it stays on the device until then, so no step waits for it.

    earlier is what `averaged` gave when the run was interrupted within the window, {"names": [...], "rows": (n, k)}.
    """

    def __init__(self, earlier=None):
        self.names = earlier["names"] if earlier else []
        self.earlier = earlier["rows"] if earlier else torch.empty(0, 0)
        self.rows, self.files, self.bad, self.waited, self.began = [], [], [], 0.0, time.monotonic()

    def __len__(self):
        return len(self.earlier) + len(self.rows)

    def add(self, files, **scalars):
        """What a step found, as scalars on the device: the same names at each step; the videos it was fed with.

        A step with "skipped" 1 changed no weights: it counts, but its other numbers do not, and may be anything.
        """
        self.rows.append(torch.stack(list(scalars.values())).float())
        self.files.append(files)
        self.names = list(scalars)

    def next_batch(self, batches):
        """The next batch of an iterator; counts the time spent waiting for it and its bad videos."""
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        self.bad += batch["bad"]
        return batch

    def averaged(self, step):
        """Means over all ranks for each step up to `step`: {"names": [...], "rows": float32 (n, k)}, on the CPU.

        Raises UserError, on all ranks, at the first number that is not finite.
        """
        if not self.rows:
            return {"names": self.names, "rows": self.earlier}
        own = torch.stack(self.rows)
        rows = distributed.average(own.clone()).cpu()
        wrong = ~rows.isfinite()
        if "skipped" in self.names:
            wrong &= rows[:, self.names.index("skipped"), None] == 0
        if wrong.any():
            self.raise_nonfinite(step, wrong.any(1).nonzero()[0].item())
        return {"names": self.names, "rows": torch.cat([self.earlier.reshape(-1, rows.shape[1]), rows])}

    def raise_nonfinite(self, step, index):
        """Raise UserError, on all ranks, that says all that is known of row `index`, which is not finite.

        `step` is that of the last row; the rows of before an interruption do not count.
        """
        own = torch.stack(self.rows)
        rows = distributed.average(own.clone()).cpu()
        index %= len(rows)
        name = self.names[(~rows[index].isfinite()).nonzero()[0].item()]
        norm = self.names.index("grad_norm")  # one over all ranks: says nothing of where it began
        is_finite = own[index].isfinite().cpu()
        is_finite[norm] = True
        parts = distributed.gather((is_finite.all().item(), self.files[index]))
        guilty = [rank for rank, (is_fine, _) in enumerate(parts) if not is_fine] or list(range(len(parts)))
        files = list(dict.fromkeys(file for rank in guilty for file in parts[rank][1]))
        norms = rows[: index + 1, norm].tolist()[-8:]
        raise UserError(
            f"the {name} of step {step - len(rows) + 1 + index} is not finite, on rank {', '.join(map(str, guilty))}, "
            f"of {', '.join(files)}; gradient norms up to it: {', '.join(f'{norm:.3g}' for norm in norms)}; the last "
            "checkpoint is intact: try a lower --lr or, if it is rare, --skip-nonfinite 3"
        )

    def summary(self, step, global_batch):
        """Means over the window and all ranks; raises UserError if one of the numbers was not finite."""
        columns = dict(zip(self.names, self.averaged(step)["rows"].double().unbind(1), strict=True))
        skipped = columns.pop("skipped", None)
        counted = slice(None) if skipped is None else skipped == 0
        means = {name: values[counted].mean().item() for name, values in columns.items()}
        if skipped is not None:
            means["skipped"] = int(skipped.sum())
        seconds = time.monotonic() - self.began
        return means | {
            "clips_per_s": len(self.rows) * global_batch / seconds,
            "wait_frac": self.waited / seconds,
        }

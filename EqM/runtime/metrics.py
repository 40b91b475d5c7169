"""Metrics of a run: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import itertools
import json
import math
import re
import time
import uuid
from pathlib import Path

import torch
from einops import rearrange

from runtime import distributed
from runtime.atomic import atomic_write, sync
from runtime.cli import UserError, append, writing

# dense rate of bf16 matrix products (V100, T4: fp16), from data sheets; the first match counts
PEAK_TFLOPS = {
    "B200": 2250,
    "GB200": 2500,
    "H100 PCIe": 756,
    "H800 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A10G": 70,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "V100": 125,
    "T4": 65,
    "MI250X": 191,
    "MI300X": 1307,
}


def peak_tflops(name, precision):
    """The peak rate of a GPU in TFLOP/s, by its name in torch.

    None if unknown, as in fp32, which uses other units.
    """
    if "Laptop" in name:  # laptop chips have the names of faster ones
        return None
    for model, rate in PEAK_TFLOPS.items():
        if re.search(rf"\b{model}\b", name):
            return {"bf16": rate, "fp16": rate, "tf32": rate / 2}.get(precision)
    return None


def device_stats(device, precision, tflops_per_s):
    """{name: value} of a GPU: mfu, the fraction of its peak rate (if that is known), and peak
    memory in GB.
    """
    if device.type != "cuda":
        return {}
    peak = peak_tflops(torch.cuda.get_device_name(device), precision)
    stats = {"mfu": tflops_per_s / peak} if peak else {}
    return stats | {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}


def bar_text(row):
    """The text of the progress bar for a row of metrics."""
    parts = {
        "train_loss": "loss {:.3f}",
        "clips_per_s": "{:.1f} clips/s",
        "tflops_per_s": "{:.3g} TFLOP/s",
        "mfu": "{:.0%} MFU",
        "gpu_memory_gb": "{:.1f} GB",
    }
    return ", ".join(text.format(row[name]) for name, text in parts.items() if name in row)


def read_metrics(path, notes=False):
    """(rows of a metrics.jsonl, with None for values that were not finite; number of lines that a
    crash cut short).
    """
    rows = []
    torn = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                if isinstance(row["step"], int) and (notes or "note" not in row):
                    rows.append(row)
            except (ValueError, LookupError, TypeError, RecursionError):
                torn += 1
    return rows, torn


def import_wandb():
    """Import wandb. Raises UserError if it is not installed."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(f"--wandb: {error}; run `pip install wandb`, or remove the flag") from error
    return wandb


class Metrics:
    """Log metrics in a run folder, on rank 0; on other ranks the methods do nothing.

    They raise UserError. resume_step: the step from which a run continues; it logs later steps
    again. wandb: log there, too, with `config`.
    """

    def __init__(self, folder, resume_step=0, wandb=False, config=None):
        self.board = None
        self.wandb = None
        if distributed.rank() != 0:
            return
        # takes a second to load; needed on rank 0 only
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder, "metrics.jsonl")
        if self.path.exists():
            rows, _ = read_metrics(self.path, notes=True)
            kept = [row for row in rows if row["step"] <= resume_step]
            with atomic_write(self.path) as file:
                file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
        self.wandb = _start_wandb(Path(folder), config) if wandb else None
        self.board = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self.path.touch()

    def log(self, step, **scalars):
        """Append one line {"step": step, name: value, ...}.

        NaN and infinity, which JSON lacks, become null.
        """
        if self.board is None:
            return
        row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        append(self.path, [json.dumps({"step": step} | row) + "\n"])
        with writing(self.path):
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(scalars, step=step)

    def note(self, step, text):
        """Append one line {"step": step, "note": text}; on rank 0."""
        append(self.path, [json.dumps({"step": step, "note": text}) + "\n"])
        self.board.add_text("note", text, step)

    def sync(self):
        """Write the metrics to the disk, so that they survive a power cut, as checkpoints do."""
        if self.board is not None:
            with writing(self.path):
                sync(self.path)

    def video(self, step, name, clips, gif=None, mp4=None):
        """Log clips uint8 (N, T, H, W, 3) as one image: a row per clip, a column per frame.

        Images (T = 1) in one row. gif (bytes) goes to TensorBoard, and mp4 (a path) to wandb, as
        name_moving.
        """
        if self.board is None:
            return
        rows = clips.swapaxes(0, 1) if clips.shape[1] == 1 else clips
        sheet = rearrange(rows, "n t h w c -> (n h) (t w) c")
        self.board.add_image(name, sheet, step, dataformats="HWC")
        if gif is not None:  # add_video would need moviepy to make the same GIF
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(encoded_image_string=gif)
            value = Summary.Value(tag=f"{name}_moving", image=image)
            self.board.file_writer.add_summary(Summary(value=[value]), step)
        if self.wandb:
            wandb = import_wandb()
            pictures = {name: wandb.Image(sheet)}
            if mp4:
                pictures[f"{name}_moving"] = wandb.Video(str(mp4), format="mp4")
            self.wandb.log(pictures, step=step)

    def close(self):
        if self.board is not None:
            with writing(self.path):
                self.board.close()
        if self.wandb:
            self.wandb.finish()


def _start_wandb(folder, config):
    """Start the wandb run, or continue it after a resume by the id in the run folder."""
    wandb = import_wandb()
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    try:
        return wandb.init(
            project="EqM-Video",
            name=folder.name,
            dir=folder,
            config=config,
            id=id_file.read_text(),
            resume="allow",
        )
    except wandb.Error as error:  # not logged in, no network
        raise UserError(
            f"--wandb: {error}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error


class StepStats:
    """Statistics of the training steps since the last line of metrics.

    They stay on the device until that line is due, so no step waits for the device. earlier: the
    result of `averaged` from before an interruption, for steps that were not logged. These don't
    count if later steps have values of other names, because the flags have changed.
    """

    def __init__(self, earlier=None):
        self.earlier = earlier or {"names": [], "rows": torch.empty(0, 0)}
        self.names = self.earlier["names"]
        # of each step: (k,) on the device; paths of its videos
        self.rows = []
        self.files = []
        self.corrupt = []  # paths of videos that could not be decoded
        self.flops = 0.0
        self.waited = 0.0
        self.began = time.monotonic()

    def __len__(self):
        """The number of steps."""
        return len(self.earlier["rows"]) + len(self.rows)

    def add(self, files, flops=0.0, **scalars):
        """Add a step: paths of its videos, FLOPs of all ranks, scalars (0-dimensional, the same
        names at each step).

        Other values of a step with "skipped" = 1, which changed no weights, are ignored and may be
        infinite or NaN.
        """
        self.flops += flops
        self.rows.append(torch.stack(list(scalars.values())).detach().float())
        self.files.append(files)
        self.names = list(scalars)

    def next_batch(self, batches):
        """The next batch of an iterator. Counts the waiting time and the corrupt videos."""
        began = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - began
        self.corrupt += batch["corrupt"]
        return batch

    def averaged(self, step):
        """The values of each step, averaged over all ranks: {"names": [...], "rows": (n, k) float32
        on the CPU}.

        step: of the last row. All ranks call this. Raises UserError if a value is not finite,
        except in skipped steps.
        """
        if not self.rows:
            return self.earlier
        rows = distributed.average(torch.stack(self.rows)).cpu()
        nonfinite = ~rows.isfinite()
        if "skipped" in self.names:
            # 1 only if no rank has a loss that is not finite
            nonfinite &= rows[:, self.names.index("skipped"), None] < 1
        if nonfinite.any():
            index = nonfinite.any(1).nonzero()[0].item()
            self.raise_nonfinite(step, rows, index)
        if self.earlier["names"] == self.names:
            rows = torch.cat([self.earlier["rows"], rows])
        return {"names": self.names, "rows": rows}

    def raise_nonfinite(self, step, rows, index):
        """Raise UserError, on all ranks, for a value of row `index` that is not finite.

        `step` is of the last row.
        """
        norm = self.names.index("grad_norm")
        name = self.names[(~rows[index].isfinite()).nonzero()[0].item()]
        values = self.rows[index].clone()
        values[norm] = 0  # it is the same on all ranks, so it does not show the cause
        parts = distributed.gather((values.isfinite().all().item(), self.files[index]))
        ranks = [rank for rank, (is_finite, _) in enumerate(parts) if not is_finite]
        ranks = ranks or range(len(parts))
        files = dict.fromkeys(itertools.chain(*(parts[rank][1] for rank in ranks)))
        norms = [f"{value:.3g}" for value in rows[: index + 1, norm].tolist()]
        raise UserError(
            f"the {name} of step {step - len(rows) + 1 + index} is not finite, on rank "
            f"{', '.join(map(str, ranks))}, of {', '.join(files)}; gradient norms up to it: "
            f"{', '.join(norms[-8:])}; the last checkpoint is intact: try a lower --lr"
        )

    def summary(self, step, global_batch):
        """{name: mean over the steps and all ranks}, with the number of skipped steps and speeds.

        The speeds are clips_per_s, tflops_per_s and wait_frac.
        """
        rows = self.averaged(step)["rows"].double()
        columns = dict(zip(self.names, rows.unbind(1), strict=True))
        skipped = columns.pop("skipped", None)
        counted = slice(None) if skipped is None else skipped == 0
        means = {name: values[counted].mean().item() for name, values in columns.items()}
        if skipped is not None:
            means["skipped"] = int(skipped.sum())
        seconds = time.monotonic() - self.began
        return means | {
            "clips_per_s": len(self.rows) * global_batch / seconds,
            "tflops_per_s": self.flops / seconds / distributed.world_size() / 1e12,  # per rank
            "wait_frac": self.waited / seconds,
        }

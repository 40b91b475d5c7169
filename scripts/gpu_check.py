"""Run tests/gpu_checks.py and time some models, for scripts/gpu_check.sh, into results/gpu.md."""

import json
import os
import subprocess
import sys
from engine import ROOT
from pathlib import Path

# Let waiting threads sleep instead of spin: on a busy machine, spinning makes a step many times
# slower. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from benchmark import made
from runtime.atomic import write_file
from runtime.cli import (
    COUNT,
    ArgumentParser,
    UserError,
    check_writable,
    fail,
    one_line_errors,
    precisions,
    wrong_input,
)

ON_GPU = torch.cuda.is_available()
SPEED = (
    "A training step on random latents of 32 x 32 x 4, without loading. MFU: FLOP/s / the GPU's "
    "peak FLOP/s."
)


def parse_args():
    parser = ArgumentParser(
        description="Check that a machine with GPUs trains correctly, and measure its speed."
    )
    parser.add_argument(
        "gpus",
        nargs="?",
        type=COUNT,
        metavar="GPUS",
        help="GPUs for the checks with several ranks; default: all, or 2 processes without a GPU",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file for the tables; default: results/gpu.md, or none without a GPU",
    )
    return parser.parse_args()


class Rows:
    """A pytest plugin that collects the rows of gpu_checks.py, grouped by a test's docstring."""

    def __init__(self):
        self.lines = []
        self.failed = []
        self.part = None

    def pytest_runtest_logreport(self, report):
        rows = report.user_properties if report.when == "call" else []
        for part, row in rows:
            if part != self.part:
                self.lines += [
                    "",
                    f"**{part}**",
                    "",
                    "| what | measured | at most | | |",
                    "|---|---|---|---|---|",
                ]
                self.part = part
            self.lines.append(row)
            print(f"\n{row}", end="", flush=True)
        if report.failed:
            self.failed.append(report.nodeid.partition("::")[2] or report.nodeid)


def measure_speed(rows):
    """Print the table of benchmark.py --only sizes line by line, and add it to the rows."""
    flags = ["--precision", "bf16" if "bf16" in precisions() else "fp16"]
    flags += ["--pairs", "10", "--compile"] if ON_GPU else ["--pairs", "3"]
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--only", "sizes", *flags]
    rows.lines += ["", f"**{SPEED}**", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("|"):
                rows.lines.append(line.rstrip())
    if process.returncode:
        rows.failed.append(f"speed (status {process.returncode})")


@one_line_errors()
def main():
    args = parse_args()
    num_gpus = torch.cuda.device_count()
    rows = Rows()
    ranks = args.gpus or num_gpus or 2
    out = args.out or (ROOT / "results/gpu.md" if ON_GPU else None)
    with wrong_input():
        if ON_GPU and ranks > num_gpus:
            raise UserError(
                f"GPUS {ranks}: this machine has {num_gpus}; expected at most {num_gpus}"
            )
        if out:
            check_writable("--out", out.parent)
            if out.is_dir():
                raise UserError(f"--out {out}: is a folder; name a file")
    title = "Check WITHOUT a GPU: tiny sizes"
    if ON_GPU:
        title = f"GPU check: {ranks} x {torch.cuda.get_device_name()}"
    print(title)
    os.environ["GPUS"] = str(ranks)
    checks = str(ROOT / "tests/gpu_checks.py")
    status = pytest.main([checks, "-vv", "-p", "no:cacheprovider"], plugins=[rows])
    if status and not rows.failed:
        rows.failed.append("pytest")
    measure_speed(rows)
    verdict = f"FAILED: {'; '.join(rows.failed)}" if rows.failed else "All checks are ok"
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"# {title}, torch {torch.__version__}", *rows.lines, "", f"{verdict}.", ""]
        write_file(out, "\n".join(lines).encode())
        write_file(out.with_suffix(".json"), json.dumps([made()], indent=1).encode() + b"\n")
    if rows.failed:
        fail(f"{verdict}; the reasons are above", status=1)
    print(f"{verdict}; see {out}" if out else verdict)


if __name__ == "__main__":
    main()

"""Runs of two ranks, in real processes, that are killed and stopped at random moments."""

import argparse
import json
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from shlex import split

import torch

from benchmark import made
from process import GONE_WITHIN, descendants, end, kill, kill_all, ranks, wait_gone
from training import TORCHRUN, Training, compare, make_data

EVERY = 10  # steps from one checkpoint of a storm to the next
STEPS_PER_HIT = 45  # of the run; raise it on a faster machine
FLAGS = split(f"""
    --log-every 1
    --val-every 50
    --sample-every 0
    --ckpt-every {EVERY}
    --keep-last 3
    --num-workers 1
""")


def storm(training, hits, seed=0, from_step=1.5):
    """Start the run again and again, hit it at random moments, then let it finish.

    hit(process, rng) does the damage and says what it was; half of the moments are anywhere within
    6 seconds of the start of the launcher, half within `from_step` seconds of the first new step.
    Returns what was seen, dicts of hit, gone_s (seconds until all processes were gone), lost (steps
    that were logged and have to be done again)."""
    rng = random.Random(seed)
    seen = []
    step = 0
    for hit in hits:
        first = 0
        seconds = 6
        if rng.random() >= 0.5:
            first = min(step + 1, training.steps)
            seconds = from_step
        process = training.start("--resume", until=first)
        time.sleep(rng.uniform(0, seconds))
        if process.poll() is not None:
            end(process)
            print(f"the run was finished after {len(seen)} of {len(hits)} hits")
            return seen
        pids = [process.pid, *descendants(process.pid)]
        name = hit(process, rng)
        began = time.monotonic()
        output, _ = process.communicate(timeout=GONE_WITHIN)
        assert 'train.py", line' not in output, output  # a traceback of ours
        wait_gone(pids)
        gone = time.monotonic() - began
        step = training.last_step()
        saved = [0]
        for path in training.results.glob("*/checkpoints/*.pt"):  # each of them must be intact
            saved.append(torch.load(path, weights_only=True)["step"])
        lost = max(0, step - max(saved))
        seen.append({"hit": name, "gone_s": gone, "lost": lost})
        print(f"{name} at step {step}, {lost} to do again, gone in {gone:.1f} s", flush=True)
    training.run("--resume", timeout=1800)
    return seen


def kill_something(process, rng):
    """SIGKILL for torchrun alone, for one rank, or for all at once."""
    what = rng.choice(["torchrun", "a rank", "all processes"])
    started = ranks(process)
    if what == "a rank" and started:
        kill(rng.choice(started))
    elif what == "all processes":
        kill_all(process)
    else:
        kill(process.pid)
    return f"SIGKILL of {what}"


def stop_launcher(process, rng):
    """SIGTERM for torchrun, as a cluster sends it."""
    kill(process.pid, signal.SIGTERM)
    return "SIGTERM of torchrun"


HEADER = (
    "| event | hits | differences at the end | steps repeated, at most "
    "| all processes gone after, at most |"
)


def rows_of(seen, differences):
    """A row of the table for each kind of hit."""
    for name in sorted({hit["hit"] for hit in seen}):
        hits = [hit for hit in seen if hit["hit"] == name]
        lost = max(hit["lost"] for hit in hits)
        gone = max(hit["gone_s"] for hit in hits)
        yield f"| {name} | {len(hits)} | {differences} | {lost} of {EVERY} | {gone:.1f} s |"


def main():
    parser = argparse.ArgumentParser(
        description="Hit a run of two ranks at random moments and see what is lost."
    )
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of torchrun, a rank or all")
    parser.add_argument("--stops", type=int, default=10, help="SIGTERMs of torchrun")
    parser.add_argument("--out", default="results/faults.md", help="where the table goes")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    flags = [*FLAGS, *args.flags]
    lines = [HEADER, "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        data = make_data(Path(root, "shapes"))
        for name, count, hit in (
            ("SIGKILL", args.kills, kill_something),
            ("SIGTERM", args.stops, stop_launcher),
        ):
            steps = max(100, STEPS_PER_HIT * count)
            whole = Training(data, Path(root, name, "whole"), steps, TORCHRUN, flags)
            whole.run(timeout=1800)
            stormy = replace(whole, results=Path(root, name, "stormy"))
            seen = storm(stormy, count * [hit])
            assert len(seen) == count, "the run ended too early: raise STEPS_PER_HIT"
            changes = compare(whole, stormy)
            print(*changes, sep="\n")
            lines += rows_of(seen, len(changes))
    table = "\n".join(lines)
    print(table)
    title = " ".join(["# Runs interrupted at random moments", *args.flags])
    out = Path(args.out)
    out.write_text(f"{title}\n\n{table}\n")
    out.with_suffix(".json").write_text(json.dumps([made()], indent=1) + "\n")


if __name__ == "__main__":
    main()

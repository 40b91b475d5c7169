"""Runs of two ranks, in real processes, that are killed and stopped at random moments."""

import argparse
import os
import random
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from training import TORCHRUN, Training, compare, make_data

EVERY = 10  # steps from one checkpoint of a storm to the next
GONE_WITHIN = 45  # seconds; torchrun gives ranks 30 s to end

# Processes ------------------------------------------------------------------------------------------------------------


def table():
    """{pid: parent's pid} of all processes that live (a zombie does not)."""
    parents = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                state, parent = (place / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except (OSError, IndexError):
                continue
            if state not in "ZX":
                parents[int(place.name)] = int(parent)
    return parents


def descendants(pid):
    """Children, their children and so on, in this order."""
    parents, found = table(), [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def ranks(launcher):
    """The processes that a torchrun has started, its ranks."""
    return [pid for pid, parent in table().items() if parent == launcher.pid]


def loaders(pid):
    """The loader processes among the descendants."""
    return [child for child in descendants(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_gone(pids, timeout=GONE_WITHIN):
    """Seconds until none of the processes lives; fails after the timeout."""
    began = time.monotonic()
    while alive := set(pids) & table().keys():
        assert time.monotonic() - began < timeout, f"{alive} still live after {timeout} s"
        time.sleep(0.05)
    return time.monotonic() - began


def kill(pid, number=signal.SIGKILL):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_all(process):
    """SIGKILL for a process that still runs, and for all that it has started."""
    for pid in [process.pid, *descendants(process.pid)] if process.poll() is None else ():
        kill(pid)


# Runs -----------------------------------------------------------------------------------------------------------------


def start(training, step, *flags):
    """The process of a run that has logged a step."""
    process = training.start(*flags)
    training.wait_for(step, process)
    return process


def end(process, status=0, timeout=GONE_WITHIN):
    """What a process that ends with this status has printed. None: any status but 0."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill_all(process)
    assert process.returncode == status if status is not None else process.returncode, output
    return output


def error_of(output):
    """The one line that says what went wrong."""
    (line,) = [line for line in output.splitlines() if "train.py: error:" in line]
    assert 'train.py", line' not in output, output  # a traceback, which may only be torchrun's own
    return line


def last_saved(training):
    return torch.load(training.folder / "checkpoints/latest.pt", weights_only=True)["step"]


def wait_until(condition, process, timeout=120):
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)


# Storms ---------------------------------------------------------------------------------------------------------------


def storm(training, count, hit, seed=0, report=print, from_start=6.0, from_step=1.5):
    """Start the run again and again, hit it `count` times at random moments, then let it finish.

    hit(process, rng) does the damage and says what it was; half of the moments are anywhere within `from_start` seconds
    of the start of the launcher, half within `from_step` seconds of the first new step. Returns what was seen, dicts of
    hit, gone_s (seconds until all processes were gone), lost (steps that were logged and have to be done again).
    """
    rng, seen, step = random.Random(seed), [], 0
    while len(seen) < count:
        process = training.start("--resume")
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, from_start))
        elif training.wait_for(step + 1, process):
            time.sleep(rng.uniform(0, from_step))
        if process.poll() is not None:
            output, _ = process.communicate()
            assert process.returncode == 0, output
            report(f"the run was finished after {len(seen)} of {count} hits")
            return seen
        pids = [process.pid, *descendants(process.pid)]
        name, began = hit(process, rng), time.monotonic()
        output, _ = process.communicate(timeout=GONE_WITHIN)
        assert 'train.py", line' not in output, output  # a traceback of ours
        wait_gone(pids)
        gone = time.monotonic() - began
        rows = training.rows(whole=False) if list(training.results.glob("*/metrics.jsonl")) else []
        step, saved = rows[-1]["step"] if rows else 0, newest_step(training)
        seen.append({"hit": name, "gone_s": gone, "lost": max(0, step - saved)})
        report(f"{len(seen)}/{count}: {name} at step {step}, {seen[-1]['lost']} to do again, gone in {gone:.1f} s")
    training.run("--resume", timeout=1800)
    return seen


def newest_step(training):
    """The step of the newest checkpoint, each of which must be intact; 0 without any."""
    steps = [0]
    for path in training.results.glob("*/checkpoints/*.pt"):
        steps.append(torch.load(path, weights_only=True)["step"])
    return max(steps)


def kill_something(process, rng):
    """SIGKILL for torchrun alone, for one rank, or for all at once."""
    what, started = rng.choice(["torchrun", "a rank", "all processes"]), ranks(process)
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


def main():
    parser = argparse.ArgumentParser(description="Hit a run of two ranks at random moments and see what is lost.")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of torchrun, a rank or all")
    parser.add_argument("--stops", type=int, default=10, help="SIGTERMs of torchrun")
    parser.add_argument("--steps-per-hit", type=int, default=45, help="length of the run; more on a faster machine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="results/faults.md", help="where the table goes")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    lines = ["| event | hits | differences at the end | steps repeated, at most | all processes gone after, at most |"]
    lines += ["|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        data = make_data(Path(root, "shapes"))
        flags = ["--log-every", 1, "--val-every", 50, "--sample-every", 0, "--ckpt-every", EVERY, "--keep-last", 3]
        flags += ["--num-workers", 1, *args.flags]
        for name, count, hit in (("SIGKILL", args.kills, kill_something), ("SIGTERM", args.stops, stop_launcher)):
            steps = max(100, args.steps_per_hit * count)
            whole = Training(data, Path(root, name, "whole"), steps, TORCHRUN, flags)
            whole.run(timeout=1800)
            stormy = replace(whole, results=Path(root, name, "stormy"))
            seen = storm(stormy, count, hit, args.seed, lambda line: print(line, flush=True))
            assert len(seen) == count, "the run ended too early: raise --steps-per-hit"
            found = compare(whole, stormy)
            print(*found, sep="\n")
            for what in sorted({one["hit"] for one in seen}):
                some = [one for one in seen if one["hit"] == what]
                lost, gone = (max(one[key] for one in some) for key in ("lost", "gone_s"))
                lines.append(f"| {what} | {len(some)} | {len(found)} | {lost} of {EVERY} | {gone:.1f} s |")
    table = "\n".join(lines)
    print(table)
    title = " ".join(["# Runs interrupted at random moments", *args.flags])
    Path(args.out).write_text(f"{title}\n\n{table}\n")


if __name__ == "__main__":
    main()

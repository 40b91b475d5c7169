"""Runs of two ranks, in real processes, that are killed and stopped at random moments."""

import argparse
import json
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmark import made
from process import GONE_WITHIN, descendants, end, kill, kill_all, ranks, wait_gone
from training import TORCHRUN, Training, compare, make_data

EVERY = 10  # steps from one checkpoint of a storm to the next


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
        first, seconds = (
            (0, 6) if rng.random() < 0.5 else (min(step + 1, training.steps), from_step)
        )
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
        files = training.results.glob("*/checkpoints/*.pt")
        step = training.last_step()
        saved = [
            torch.load(path, weights_only=True)["step"] for path in files
        ]  # each of them must be intact
        lost = max(0, step - max(saved, default=0))
        seen.append({"hit": name, "gone_s": gone, "lost": lost})
        print(
            f"{len(seen)}/{len(hits)}: {name} at step {step}, {lost} to do again, gone in "
            f"{gone:.1f} s",
            flush=True,
        )
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


def main():
    parser = argparse.ArgumentParser(
        description="Hit a run of two ranks at random moments and see what is lost."
    )
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of torchrun, a rank or all")
    parser.add_argument("--stops", type=int, default=10, help="SIGTERMs of torchrun")
    parser.add_argument(
        "--steps-per-hit", type=int, default=45, help="length of the run; more on a faster machine"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="results/faults.md", help="where the table goes")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    lines = [
        (
            "| event | hits | differences at the end | steps repeated, at most | all processes "
            "gone after, at most |"
        )
    ]
    lines += ["|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        data = make_data(Path(root, "shapes"))
        flags = [
            "--log-every",
            1,
            "--val-every",
            50,
            "--sample-every",
            0,
            "--ckpt-every",
            EVERY,
            "--keep-last",
            3,
        ]
        flags += ["--num-workers", 1, *args.flags]
        for name, count, hit in (
            ("SIGKILL", args.kills, kill_something),
            ("SIGTERM", args.stops, stop_launcher),
        ):
            steps = max(100, args.steps_per_hit * count)
            whole = Training(data, Path(root, name, "whole"), steps, TORCHRUN, flags)
            whole.run(timeout=1800)
            stormy = replace(whole, results=Path(root, name, "stormy"))
            seen = storm(stormy, count * [hit], args.seed)
            assert len(seen) == count, "the run ended too early: raise --steps-per-hit"
            found = compare(whole, stormy)
            print(*found, sep="\n")
            for what in sorted({one["hit"] for one in seen}):
                some = [one for one in seen if one["hit"] == what]
                lost, gone = (max(one[key] for one in some) for key in ("lost", "gone_s"))
                lines.append(
                    f"| {what} | {len(some)} | {len(found)} | {lost} of {EVERY} | {gone:.1f} s |"
                )
    table = "\n".join(lines)
    print(table)
    title = " ".join(["# Runs interrupted at random moments", *args.flags])
    out = Path(args.out)
    out.write_text(f"{title}\n\n{table}\n")
    out.with_suffix(".json").write_text(json.dumps([made()], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Starts loader processes again and again, each time right after a collective, beside gloo's threads and TensorBoard.

    torchrun --nproc_per_node=2 tests/faults/starts.py --data-path DIR --rounds 250     # 1,000 starts, half an hour

Prints how many were started; one that hangs ends the run with the error of --loader-timeout.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "EqM"))
from runtime import distributed
from runtime.metrics import Metrics
from video.clips import Clips
from video.index import scan_videos
from video.loader import batches_of, end_children, make_loader

WORKERS = 2


def main():
    parser = argparse.ArgumentParser(description="Start loader processes right after a collective, many times.")
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device, started = distributed.start(), 0
    scan = scan_videos(args.data_path)
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(folder)
        for step in range(1, args.rounds + 1):
            clips = {4: Clips(args.data_path, scan.videos, scan.classes, 4, 16)}
            batches = [[(4, index)] for index in range(WORKERS)]
            loader = make_loader(clips, batches, WORKERS, timeout=300, device=device)
            metrics.log(step, started=started)
            distributed.average(torch.ones(2**20))
            distributed.gather("a value")
            assert len(list(batches_of(loader))) == len(batches)
            started += WORKERS * distributed.world_size()
            end_children()
        metrics.close()
    if distributed.rank() == 0:
        print(f"{started} loader processes started, none hung")
    distributed.stop()


if __name__ == "__main__":
    main()

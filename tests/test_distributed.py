"""Ranks: which of them does what, and what they exchange."""

import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

from process import run_ranks
from runtime import distributed, signals
from runtime.distributed import own_indices, rank
from training import ROOT


@pytest.mark.parametrize(
    "maker, flags, is_fast",
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_python_and_the_shell_know_the_processors_with_fast_bf16(maker, flags, is_fast):
    about = f"vendor_id\t: {maker}\nmodel name\t: a processor\nflags\t\t: fpu {flags} sse\n"
    pattern = distributed.FAST_BF16.pattern
    assert bool(distributed.FAST_BF16.search(about)) == is_fast
    grep = f'grep -qszE "{pattern}" '
    assert f"{grep}/proc/cpuinfo" in (ROOT / "scripts/experiment.sh").read_text()
    assert (subprocess.run(["bash", "-c", grep], input=about, text=True).returncode == 0) == is_fast


def exchange():
    """What a rank gets from the others."""
    distributed.start()
    mine = own_indices(3)
    first = own_indices(1)
    found = {
        "broadcast": distributed.broadcast(["from", rank()]),
        "gather": distributed.gather(rank() * 10),
        "average": distributed.average(torch.tensor([1.0, 3.0]) * (1 + rank())),
        "collect": distributed.collect(mine, torch.tensor(mine) * 10),
        "collect from one": distributed.collect(
            first, torch.ones(1, 2) if first else torch.empty(0)
        ),
    }
    found |= vote()
    distributed.stop()
    return found


def vote():
    """The steps at which ranks vote, save and stop; rank 1 asks for both. The clocks differ."""
    stop_signal = signals.StopSignal()
    clock = [0.0]
    signals.time = SimpleNamespace(monotonic=lambda: clock[0])
    found = {"votes": [], "saves": [], "stopped": None}
    for step in range(40):
        if step == 30 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stop_signal.vote(save=rank() == 1 and step % 2 == 0)
        found["votes"] += [step] if stop_signal.flags is not None else []
        clock[0] += 10 * rank() + (0.3 if step < 20 else 0.11)
        try:
            found["saves"] += [step] if stop_signal.resolve() else []
            if step == 8:
                clock[0] += 100  # a validation, then a vote outside of steps
                stop_signal.resolve()
        except signals.Interrupted:
            found["stopped"] = step
            break
    return found


def test_ranks_exchange_values_and_vote_once_per_second():
    # by the clock of rank 0: 0.3 s a step, from step 20 on 0.11 s
    votes = [0, 1, 2, 5, 9, 10, 11, 14, 18, 22, 27, 37]
    on_all = {
        "broadcast": ["from", 0],
        "gather": [0, 10],
        "average": [1.5, 4.5],
        "votes": votes,
        "saves": [0, 2, 10, 14, 18, 22],
        "stopped": votes[-1],
    }
    on_first = {"collect": [0, 10, 20], "collect from one": [[1.0, 1.0]]}
    expected = [on_all | on_first, on_all | dict.fromkeys(on_first)]
    ranks, _ = run_ranks(exchange)
    assert tree_map(lambda value: getattr(value, "tolist", lambda: value)(), ranks) == expected

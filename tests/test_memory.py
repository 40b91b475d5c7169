"""Bytes and FLOPs of training steps: closed forms, torch's own hooks, the committed counts and
their tables.
"""

import math
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
import memory
import models
from models import EqM_models
from runtime.distributed import autocast
from runtime.memory import pinned_bytes
from training import ROOT, error_of

TOKENS, WIDTH, HEADS = 2048, 384, 6  # of 16 frames in EqM-S/2
ROWS = memory.read_rows()


@pytest.fixture(scope="module")
def counts():
    """{flag: (bytes kept, bytes at the peak)} of EqM-S/2 with one and with two blocks, for a
    clip.
    """
    return {
        flag: [memory.count_step("S/2", flag, 1, depth) for depth in (1, 2)]
        for flag in memory.FLAGS
    }


def per_block(steps, part):
    return steps[1][part] - steps[0][part]


def test_a_block_keeps_its_input_and_if_selective_attention_and_all_products_but_one(counts):
    in_float = 4 * TOKENS * WIDTH
    products = (
        2 * (3 + 1 + 1 + 1) * TOKENS * WIDTH
    )  # in bf16: queries, keys and values, attention, proj, fc2
    sums = 4 * TOKENS * HEADS  # of the weights of attention
    assert per_block(counts["full"], 0) == pytest.approx(in_float, rel=1e-3)
    assert per_block(counts["selective"], 0) == pytest.approx(in_float + products + sums, rel=1e-3)
    for flag in memory.GRAD_CHECKPOINTS:  # the peak is in one block, besides what the others keep
        assert per_block(counts[flag], 1) == pytest.approx(per_block(counts[flag], 0), rel=1e-3)


def test_the_bytes_are_those_that_saved_tensor_hooks_see(counts):
    saved = {}
    attend = torch.nn.functional.scaled_dot_product_attention

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        FakeTensorMode(),
        patch.object(models, "attend", attend),
        autocast(torch.device("cpu"), "bf16"),
    ):
        model = EqM_models["EqM-S/2"](depth=1, **memory.SETTINGS)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.empty(1, 4, 16, 32, 32), torch.zeros(1, dtype=torch.long))
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    seen = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    of_casts = 2 * 2 * TOKENS * WIDTH  # both branches are in float32 on a GPU, for addcmul
    assert counts[None][0][0] == pytest.approx(seen + of_casts, rel=0.02)


def test_selective_takes_xl_from_3_8_to_1_1_gb_a_clip_for_a_tenth_more_flops():
    off, selective, _ = (row for row in ROWS if row["model"] == "XL/2")
    assert off["kept_mb"] > 3500 and selective["kept_mb"] + selective["kept_once_mb"] < 1200
    assert selective["gflops"] < 1.1 * off["gflops"]


def test_the_committed_counts_are_those_of_the_code_and_the_tables_are_theirs():
    row = memory.measure("S/2", "selective")
    assert row == ROWS[4] | {
        name: pytest.approx(row[name], rel=1e-2) for name in row if name.endswith(("mb", "flops"))
    }
    assert (ROOT / "results/memory.md").read_text().splitlines()[2:] == memory.tables(ROWS)


def test_the_copy_of_a_checkpoint_counts_powers_of_two_as_torch_allocates_pinned_memory():
    sizes = [0, 1, 4, 5, 4096, 4097, 3 * 2**20]
    assert [pinned_bytes(size) for size in sizes] == [0, 1, 4, 8, 4096, 8192, 4 * 2**20]
    with torch.device("meta"):
        weights = [
            weight.nbytes for weight in EqM_models["EqM-XL/2"](**memory.SETTINGS).parameters()
        ]
    rounded = sum(2 ** math.ceil(math.log2(size)) for size in weights)
    (pinned,) = {row["pinned_mb"] for row in ROWS if row["model"] == "XL/2"}
    assert 1e6 * pinned == 4 * rounded > 1.3 * 4 * sum(weights)  # weight, EMA, two of AdamW


def test_a_sharded_run_needs_the_rounded_memory_for_its_copy_on_gpus(monkeypatch, tmp_path):
    sizes = [5000, 3000]  # which become 8192 and 4096
    monkeypatch.setattr(checkpoint, "is_sharded", lambda _: True)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda: 10_000)
    writer = checkpoint.Writer(tmp_path)
    writer.check_memory(
        {"model": {str(size): torch.empty(size, dtype=torch.int8) for size in sizes}}
    )
    with FakeTensorMode():
        on_gpu = {str(size): torch.empty(size, dtype=torch.int8, device="cuda:0") for size in sizes}
    assert "takes 1.23e-05 GB of memory" in error_of(writer.check_memory, {"model": on_gpu})


@pytest.mark.parametrize("flag", memory.FLAGS)
def test_the_peak_of_any_batch_is_known_from_two_batches(flag):
    few, many = (memory.count_step("S/4", flag, clips, 2)[1] for clips in memory.BATCHES)
    for clips, error in ((2, 0.05), (64, 0.01), (1024, 0.01)):
        line = few + (clips - 1) * (many - few) / (memory.BATCHES[1] - 1)
        peak = memory.count_step("S/4", flag, clips, 2)[1]
        assert line == pytest.approx(peak, rel=error) and (
            clips > memory.BATCHES[1] or line > 0.9999 * peak
        )


def test_clips_fit_in_proportion_to_their_frames_and_to_the_memory_that_is_free():
    def fits(frames, gb, ranks=1):
        return memory.fitting_clips(ROWS[-3], frames, gb, ranks)  # of XL/2, whose states take 13 GB

    assert fits(4, 80) - 2 * fits(8, 80) in (0, 1) and fits(8, 24) < fits(8, 80) * 24 / 80 < fits(
        8, 24, ranks=8
    )

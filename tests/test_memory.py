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
from training import error_of

TOKENS, WIDTH, HEADS = 2048, 384, 6  # of 16 frames in EqM-S/2
ROWS = memory.read_rows()


def count(flag, clips=1, depth=1, settings=memory.SETTINGS):
    """(bytes kept, bytes at the peak) of a step."""
    return memory.count_step(name="S/2", flag=flag, clips=clips, depth=depth, settings=settings)


def row_of(model):
    """Without --grad-checkpoint."""
    (row,) = [row for row in ROWS if (row["model"], row["flag"]) == (model, "off")]
    return row


def test_a_block_keeps_its_input_and_if_selective_attention_and_all_products_but_one():
    in_float = 4 * TOKENS * WIDTH
    # in bf16: queries, keys and values, attention, proj, fc2
    products = 2 * (3 + 1 + 1 + 1) * TOKENS * WIDTH
    sums = 4 * TOKENS * HEADS  # of the weights of attention
    expected = {"full": in_float, "selective": in_float + products + sums}
    for flag, size in expected.items():
        kept, peak = count(flag)
        kept_by_two, peak_of_two = count(flag, depth=2)
        assert kept_by_two - kept == pytest.approx(size, rel=1e-3)
        # the peak is in one block, besides what the others keep
        assert peak_of_two - peak == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("flag", [None, "selective", "full"])
def test_a_causal_block_keeps_clean_and_noisy_tokens_and_what_each_noisy_patch_sees(flag):
    blocks = []
    for settings in (memory.SETTINGS, memory.CAUSAL_SETTINGS):
        kept, _ = count(flag, settings=settings)
        kept_by_two, _ = count(flag, depth=2, settings=settings)
        blocks.append(kept_by_two - kept)
    usual, causal = blocks
    patches = 8
    tokens = 15 / 8  # 7 clean patches, 8 noisy ones
    expected = tokens * usual
    if flag is None:
        seen = sum(range(2, patches + 1)) * TOKENS // patches  # clean ones and itself
        expected += 2 * 2 * seen * WIDTH  # keys and values in bf16
        expected += 2 * tokens * TOKENS * WIDTH  # the outputs of the parts, joined
        expected -= (tokens - 1) * 2 * 18 * WIDTH**2  # weights in bf16, which serve both halves
    assert causal == pytest.approx(expected, rel=0.01 if flag is None else 0.02)


def test_the_bytes_are_those_that_saved_tensor_hooks_see():
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
    for weight in model.parameters():
        saved.pop(weight.untyped_storage()._cdata, None)
    seen = sum(storage.nbytes() for storage in saved.values())
    of_casts = 2 * 2 * TOKENS * WIDTH  # both branches are in float32 on a GPU, for addcmul
    kept, _ = count(None)
    assert kept == pytest.approx(seen + of_casts, rel=0.02)


def test_the_committed_counts_are_those_of_the_code_and_the_tables_are_theirs():
    row = memory.measure("S/2", "selective")
    for name, value in ROWS[4].items():
        if name.endswith(("mb", "flops")):
            value = pytest.approx(value, rel=1e-2)
        assert row[name] == value
    written = (memory.PLACE / "memory.md").read_text()
    assert written.splitlines()[2:] == memory.tables(ROWS)


def test_the_copy_of_a_checkpoint_counts_powers_of_two_as_torch_allocates_pinned_memory():
    sizes = [0, 1, 4, 5, 4096, 4097, 3 * 2**20]
    assert [pinned_bytes(size) for size in sizes] == [0, 1, 4, 8, 4096, 8192, 4 * 2**20]
    with torch.device("meta"):
        model = EqM_models["EqM-XL/2"](**memory.SETTINGS)
    weights = [weight.nbytes for weight in model.parameters()]
    rounded = sum(2 ** math.ceil(math.log2(size)) for size in weights)
    pinned = 1e6 * row_of("XL/2")["pinned_mb"]
    assert pinned == 4 * rounded > 1.3 * 4 * sum(weights)  # weight, EMA, two of AdamW


def test_a_sharded_run_needs_the_rounded_memory_for_its_copy_on_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "is_sharded", lambda _: True)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda: 10_000)
    writer = checkpoint.Writer(tmp_path)

    def weights(device):  # their sizes become 8192 and 4096
        return {size: torch.empty(size, dtype=torch.int8, device=device) for size in (5000, 3000)}

    writer.check_memory({"model": weights("cpu")})
    with FakeTensorMode():
        state = {"model": weights("cuda:0")}
    assert "takes 1.23e-05 GB of memory" in error_of(writer.check_memory, state)


def test_the_peak_of_any_batch_is_known_from_two_batches():
    few, many = memory.BATCHES
    _, first = count("selective", clips=few)
    _, last = count("selective", clips=many)
    for clips, error in ((2, 0.05), (1024, 0.01)):
        line = first + (clips - few) * (last - first) / (many - few)
        _, peak = count("selective", clips=clips)
        assert line == pytest.approx(peak, rel=error)
        assert clips > many or line > 0.9999 * peak  # rather too much


def test_clips_fit_in_proportion_to_their_frames_and_to_the_memory_that_is_free():
    def fits(frames, gb, ranks=1):  # of XL/2, whose states take 13 GB
        return memory.fitting_clips(row=row_of("XL/2"), frames=frames, gb=gb, ranks=ranks)

    assert fits(4, 80) - 2 * fits(8, 80) in (0, 1)
    assert fits(8, 24) < fits(8, 80) * 24 / 80 < fits(8, 24, ranks=8)

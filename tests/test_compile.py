"""torch.compile changes no result. In one file, as the start of its compiler takes longest: a
process pays it once.
"""

import copy
import shutil
from dataclasses import replace
from shlex import split

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.utils.checkpoint import CheckpointPolicy

import models
from runtime import distributed
from test_causal import stream_of
from test_models import clip, distance, labels, loss_and_gradients, tiny
from training import Training, run_here

config.compile_threads = 1  # no pool of processes, whose start takes longer than what they compile
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def no_code():
    """Run the graphs that torch.compile finds as they are: the run below makes C++ code of two."""
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        yield


def compare(model, compiled, *inputs):
    """Check that a compiled model has the loss and the gradients of an eager one."""
    loss, gradients = loss_and_gradients(model, *inputs)
    again, same = loss_and_gradients(compiled, *inputs)
    assert again == pytest.approx(loss, rel=1e-5)
    assert all(distance(a, b) < 1e-4 for a, b in zip(same, gradients, strict=True))


def compare_with_eager(grad_checkpoint=None, **positions):
    """A compiled model and its EMA, after a check that they have the outputs, loss and gradients of
    an eager one.
    """
    model, compiled = (tiny(**positions) for _ in range(2))
    compiled.grad_checkpoint = grad_checkpoint
    ema = copy.deepcopy(compiled).requires_grad_(False)
    for network in (compiled, ema):
        network.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    x = clip(8, batch=3)
    y = labels(3)
    compare(model, compiled, x, y)
    with torch.no_grad():
        assert distance(ema(x, y), model(x, y)) < 1e-5
    return compiled, ema


def saved_bytes(model):
    """What a model keeps for its backward pass, besides weights."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = (
            tensor  # keeps it, so that no other gets its place
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(clip(8, batch=3), labels(3))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(part.untyped_storage().nbytes() for key, part in saved.items() if key not in own)


def test_a_compiled_fixed_model_gives_the_same_loss_and_gradients_and_keeps_less_if_selective(
    no_code,
):
    compiled, _ = compare_with_eager("selective", use_rope=False)
    assert counters["stats"]["unique_graphs"] == 2
    assert saved_bytes(compiled) < 0.5 * saved_bytes(tiny(use_rope=False))


def test_two_graphs_serve_all_blocks_frame_counts_and_batches(no_code):
    model, ema = compare_with_eager(position_table="space", rope_speed=0.5)
    for num_frames, batch in (
        (16, 5),
        (4, 5),
        (9, 5),
        (64, 5),
        (16, 3),
    ):  # 64 frames have as many tokens as D
        loss_and_gradients(model, clip(num_frames, batch=batch), labels(batch))
        with torch.no_grad():
            ema(clip(num_frames, batch=batch - 1), labels(batch - 1))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_flow_model_takes_one_level_per_clip_or_per_temporal_patch(no_code):
    model, compiled = (tiny(objective="flow") for _ in range(2))
    compiled.compile_blocks()
    for gamma in (torch.rand(3), torch.rand(3, 2).repeat_interleave(4, dim=1)):
        compare(model, compiled, clip(8, batch=3), labels(3), gamma)
    for num_frames in (12, 16, 64):
        compiled(clip(num_frames, batch=2), labels(2), gamma=torch.zeros(2, num_frames))
    assert counters["stats"]["unique_graphs"] == 2  # one for a level, one for several


def test_compiled_causal_models_can_use_flex_attention(no_code, monkeypatch):
    """On a GPU they do. On a CPU it has no backward pass, so this compares outputs."""
    monkeypatch.setattr(models, "FLEX_DEVICES", ["cpu"])
    model, compiled = (tiny(causal=True, context=8, depth=1) for _ in range(2))
    compiled.compile_blocks()
    x = clip(12, batch=2)
    with torch.no_grad():
        f = model(x, labels(2), clean=x.flip(2))
        same = compiled(x, labels(2), clean=x.flip(2))
        (masks,) = compiled.masks.values()
        assert masks.blocks is not None and counters["stats"]["unique_graphs"] == 1
        assert distance(same, f) < 1e-5
        with torch.compiler.set_stance("force_eager"):  # as in validation
            assert torch.equal(compiled(x, labels(2), clean=x.flip(2)), f)
    flex = torch.ops.higher_order.flex_attention
    assert models.keep_expensive(None, flex) == CheckpointPolicy.MUST_SAVE


def test_a_compiled_causal_model_streams_the_same_videos(no_code):
    model, compiled = (tiny(causal=True, context=8, depth=1) for _ in range(2))
    compiled.compile_blocks()
    streams = [
        stream_of(network, [0, 1], guidance=2.0, num_steps=3) for network in (model, compiled)
    ]
    for _ in range(4):
        latents, same = (stream.step(None) for stream in streams)
        assert distance(same, latents) < 1e-5
    # no cache, one patch, more patches, and the most, which a full cache keeps in a slice
    assert counters["stats"]["unique_graphs"] <= 4


def test_the_compiler_can_ask_whether_tf32_is_allowed():
    # Where torch's newer setting, fp32_precision, allowed it, the question raises, and nothing
    # compiles
    for precision in ("tf32", "fp32"):
        distributed.set_precision(precision)
        assert (
            torch.backends.cuda.matmul.allow_tf32
            == torch.backends.cudnn.allow_tf32
            == (precision == "tf32")
        )


def test_a_compiled_run_learns_what_the_plain_run_learns(shapes, tmp_path):
    flags = split("--hidden-size 64 --num-heads 2 --lr 3e-3 --global-batch-size 8 --log-every 1")
    plain = Training(shapes, tmp_path / "plain", 12, flags=flags)
    compiled = replace(plain, results=tmp_path / "compiled")
    for run, more in ((plain, []), (compiled, ["--compile"])):
        run_here(run, "--val-every", 4, "--sample-every", 0, *more)
    for row, same in zip(plain.rows(), compiled.rows(), strict=True):
        for name in {"train_loss", "grad_norm", "val_loss"} & row.keys():
            assert same[name] == pytest.approx(row[name], rel=1e-4)
    assert plain.saved()["model"].keys() == compiled.saved()["model"].keys()
    assert counters["stats"]["unique_graphs"] == 2  # one to train, one for the EMA

"""Causal models: what a patch sees, the cache, streams, and the flags that don't fit."""

import gc
import itertools
import math
from dataclasses import replace
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import causal
import sample_gd
import train
from causal import Cache, attention_masks, count_pairs, mask_function
from generation import Stream
from models import EqM, EqMConfig
from plans import Plan
from runtime.rng import normal
from test_models import clip, counted_flops, distance, randomized
from tiny_data import random_checkpoint
from training import ANY_LENGTH, TINY, Training, refused, run_main, sample_here
from video.files import probe
from video.writers import write_mp4

CONFIG = EqMConfig(
    input_size=4,
    patch_size=2,
    temporal_patch_size=2,
    in_channels=2,
    hidden_size=48,
    depth=3,
    num_heads=2,
    num_classes=3,
    use_rope=True,
    rope_speed=0.5,
    position_table="space",
    causal=True,
    context=4,
)
FLOW = {"objective": "flow"}
both_objectives = pytest.mark.parametrize("changes", [{}, FLOW], ids=["eqm", "flow"])


def network(**changes):
    return randomized(EqM(replace(CONFIG, **changes)))


def cache_of(config):
    tokens = math.prod(config.grid(config.temporal_patch_size))
    return Cache(config.depth, config.context_patches, tokens)


# What a patch sees --------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 2, 9])
@pytest.mark.parametrize("together", [1, 4, 9])
def test_a_patch_sees_the_clean_patches_before_it_and_itself(context, together, monkeypatch):
    """Whether it attends by FlexAttention, or in parts of some patches."""
    token = torch.arange(27)
    of_flex = mask_function(5, 3, context)(0, 0, token[:, None], token)
    patch = torch.arange(5)
    patches_back = patch[:, None] - patch
    is_near = patches_back <= context
    # of 4 clean patches, as nothing sees the last one clean, and 5 noisy patches
    sees = torch.zeros(9, 9, dtype=torch.bool)
    sees[:4, :4] = ((patches_back >= 0) & is_near)[:4, :4]
    sees[4:, :4] = ((patches_back > 0) & is_near)[:, :4]
    sees[4:, 4:] = patches_back == 0
    assert torch.equal(of_flex, sees.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1))
    assert of_flex.sum() == count_pairs(5, context) * 3**2
    monkeypatch.setattr(causal, "LEAST_TOKENS", 3 * together)
    parts, _ = attention_masks(5, 3, context)
    assert len(parts) == math.ceil(4 / together) + math.ceil(5 / together)
    in_parts = torch.zeros(27, 27, dtype=torch.bool)
    for part in parts:
        columns = torch.cat([token[seen] for seen in part.seen])
        mask = torch.ones(1, 1) if part.mask is None else part.mask
        in_parts[token[part.tokens, None], columns] = mask.bool()
    assert torch.equal(in_parts, of_flex)
    if together == 1:
        assert all(part.mask is None for part in parts)


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_patches", "changes"),
    [
        (6, {}),
        (6, FLOW),
        (6, FLOW | {"temporal_patch_size": 1, "actions": "a,b"}),
        (1, FLOW),
        (500, {"input_size": 2, "depth": 2, "context": 6}),
    ],
    ids=["eqm", "flow", "actions", "one patch", "1,000 frames"],
)
def test_a_patch_with_a_cache_equals_a_pass_over_all_frames(num_patches, changes):
    """So a patch sees no later frame, nor the noise of another patch."""
    model = network(**changes)
    config = model.config
    size = config.temporal_patch_size
    x = clip(size * num_patches, config)
    clean = clip(size * num_patches, config, seed=2)
    y = torch.tensor([[1, 2, 0, 1, 1, 0, 2]]) if config.actions else torch.tensor([1])
    seconds = torch.tensor([0.08])
    gamma = torch.rand(1, num_patches).repeat_interleave(size, dim=1)
    cache = cache_of(config)
    worst = 0.0

    def field(x, y, gamma, **seen):
        told = {"gamma": gamma} if config.learns.is_told else {}
        return model(x, y, seconds, **seen, **told)

    with torch.no_grad():
        full = field(x, y, gamma, clean=clean)
        for t in range(num_patches):
            frames = slice(size * t, size * t + size)
            condition = y[:, [0, 1 + t]] if config.actions else y
            if t < 6 or t >= num_patches - 6:
                f = field(x[:, :, frames], condition, gamma[:, frames], cache=cache)
                worst = max(worst, (f - full[:, :, frames]).abs().max().item())
            cache.fills = True
            field(clean[:, :, frames], condition, torch.ones(1), cache=cache)
            cache.fills = False
            assert cache.num_patches == min(t + 1, config.context_patches)
    assert worst < 5e-5 * full.abs().max()  # float32


# FLOPs --------------------------------------------------------------------------------------------


@both_objectives
def test_flops_equal_the_count_of_torch(changes, monkeypatch):
    monkeypatch.setattr(causal, "LEAST_TOKENS", 1)  # no Part has pairs that the mask hides
    model = network(**changes)
    config = model.config
    x = clip(9, config, batch=2)
    y = torch.tensor([0, 3])
    told = {"gamma": torch.rand(2, 10)[:, :9]} if changes else {}
    for kind, error in ((None, 0.02), ("selective", 0.02), ("full", 0.1)):
        model.grad_checkpoint = kind
        counted = counted_flops(lambda: model(x, y, clean=x, **told))
        assert counted == 2 * config.flops(9)
        trained = counted_flops(lambda: model(x, y, clean=x, **told).square().mean().backward())
        assert trained == pytest.approx(2 * config.training_flops(9, kind), rel=error)


@both_objectives
def test_the_flops_of_a_stream_count_the_pass_that_fills_the_cache(changes):
    model = network(**changes)
    stream = stream_of(model, [0, 1], num_steps=4, method="euler")

    def film():
        for _ in range(5):
            stream.step(None)

    assert counted_flops(film) == 2 * model.config.stream_flops(9, evaluations=3)


# Streams ------------------------------------------------------------------------------------------


def stream_of(model, indices, seed=0, **changes):
    """A Stream of samples of one class, whose latents are their pixels."""
    plan = Plan(
        model,
        SimpleNamespace(decode=lambda latents: latents, downsample=1),
        classes=["a"],
        conditions=torch.zeros(4, dtype=torch.int64),
        num_frames=8,
        time_scale=0.04,
    )
    settings = {
        "method": "gd",
        "num_steps": 2,
        "step_size": 0.1,
        "momentum": None,
        "stop_below": None,
        "shift": 1.0,
        "guidance": 1.0,
        "precision": "fp32",
    }
    return Stream(plan, indices, settings | changes, seed)


@both_objectives
def test_a_stream_follows_the_guided_field_of_a_pass_over_all_frames(changes):
    model = network(**changes)
    stream = stream_of(model, [0], seed=5, method="euler", guidance=3.0)
    told = {"gamma": torch.zeros(1)} if changes else {}
    step = 1 if changes else 1 / 4  # c(0) = 4
    clean = torch.zeros(1, 2, 8, 4, 4)
    for t in range(4):
        frames = slice(2 * t, 2 * t + 2)
        noise = normal(5, "sample", t, [0], (2, 2, 4, 4))
        x = clean.clone()
        x[:, :, frames] = noise
        with torch.no_grad():
            f, f_null = (
                model(x, torch.tensor([y]), clean=clean, **told)[:, :, frames] for y in (0, 3)
            )
        latents = stream.step(None)
        assert distance(latents, noise + step * (f_null + 3 * (f - f_null))) < 1e-5
        assert stream.evaluations == 1
        clean[:, :, frames] = latents


def test_a_step_of_a_stream_that_was_interrupted_can_be_repeated(monkeypatch):
    model = network()
    stream, other = (stream_of(model, [0]) for _ in range(2))
    assert stream.step(None).equal(other.step(None))
    last = model.blocks[-1]
    forward = last.forward

    def interrupt(*args, **kwargs):
        if stream.cache.fills:  # the other blocks have kept the patch
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.step(None)
    for _ in range(2):
        assert stream.step(None).equal(other.step(None))


def test_samples_of_a_stream_stop_without_a_change_to_the_others():
    model = network()
    x = normal(0, "sample", 0, range(4), (2, 2, 4, 4))
    with torch.no_grad():
        f, f_null = (model(x, torch.full((4,), y), clean=x) for y in (0, 3))
    for guidance in (1.0, 2.0):
        sizes = (f_null + guidance * (f - f_null)).square().flatten(1).mean(dim=1).sqrt()
        # some of the samples stop at once
        few = {"num_steps": 4, "stop_below": sizes.mean().item(), "guidance": guidance}
        streams = [stream_of(model, [index], **few) for index in range(4)]
        together = stream_of(model, [0, 1, 2, 3], **few)
        evaluations = []
        for _ in range(3):
            latents = together.step(None)
            evaluations += together.evaluations.tolist()
            for index, stream in enumerate(streams):
                alone = stream.step(None)
                assert distance(latents[index], alone[0]) < 1e-5
                assert stream.evaluations == together.evaluations[index]
        assert len(set(evaluations)) > 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A causal model with random weights, whose patches have 4 frames."""
    path = tmp_path_factory.mktemp("causal") / "causal.pt"
    return random_checkpoint(path, use_rope=True, num_frames=8, causal=True, context=8)


def test_a_video_begins_with_the_shorter_one_and_continues_given_frames(
    checkpoint, tmp_path, capsys
):
    flags = split("--num-samples 3 --seed 4")
    long, about = sample_here(checkpoint, tmp_path / "long", *flags, "--num-frames", 18)
    short, _ = sample_here(checkpoint, tmp_path / "short", *flags, "--num-frames", 8)
    assert (long.shape[1], about["source"]["window"]) == (18, 4)
    assert (long[:, :8] == short).all() and (long[:, 8:12] != long[:, 4:8]).any()
    given = ["--given", tmp_path / "long", "--given-frames", "0-3", "--no-keep-background"]
    continued, _ = sample_here(
        checkpoint, tmp_path / "continued", *flags, "--num-frames", 18, *given
    )
    assert (continued[:, :4] == long[:, :4]).all()
    assert (continued[:, 4:] != long[:, 4:]).any()
    last = ["--ckpt", checkpoint, "--video", "--given", tmp_path / "long", "--given-frames", "4-7"]
    message = "--given-frames 4-7: a causal model continues the first frames"
    assert message in refused(capsys, sample_gd, *last, "--folder", tmp_path / "s", late=True)


def test_memory_does_not_grow_with_the_film(checkpoint, tmp_path, monkeypatch):
    """Nothing but the files holds more than one patch, the context and the given frames."""
    sizes = []

    def write(folder, parts, *args, **settings):
        for number, (_, _, frames) in enumerate(parts):
            if number not in (5, 24):
                continue
            tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
            of_films = [value for value in tensors if value.dim() == 5 and value.shape[0] == 2]
            sizes.append(max(value.numel() for value in of_films) / frames.size)

    monkeypatch.setattr(sample_gd, "write_samples", write)
    given = tmp_path / "given.mp4"
    write_mp4(given, np.zeros((8, 16, 16, 3), np.uint8), 25)
    flags = split("--video --num-frames 100 --num-samples 2 --num-sampling-steps 2")
    flags += ["--given", given, "--given-frames", "0-7"]
    run_main(sample_gd, *flags, "--ckpt", checkpoint, "--folder", tmp_path / "s")
    assert sizes == [2, 2]  # two given patches


def test_given_patches_take_no_evaluations(checkpoint, tmp_path, capsys):
    flags = split("--num-samples 2 --num-frames 12 --stop-below 1e-9 --num-sampling-steps 4")
    sample_here(checkpoint, tmp_path / "s", *flags)
    assert "mean 9.0 of 9" in capsys.readouterr().out
    given = ["--given", tmp_path / "s", "--given-frames", "0-7"]
    sample_here(checkpoint, tmp_path / "given", *flags, *given)
    assert "mean 3.0 of 3" in capsys.readouterr().out


def test_a_class_may_change_with_the_patches(checkpoint, tmp_path):
    flags = split("--num-samples 2 --cfg-scale 2")
    both, about = sample_here(checkpoint, tmp_path / "both", *flags, "--classes", "0*8,1*4", "0*12")
    same, _ = sample_here(checkpoint, tmp_path / "same", *flags, "--classes", "0*12")
    assert both.shape[1] == 12
    assert (both[0, :8] == same[0, :8]).all() and (both[0, 8:] != same[0, 8:]).any()
    assert (both[1] == same[1]).all()
    assert about["spans"][0] == [0, 0, 1]
    given = ["--classes", "1*12", "--given", tmp_path / "same"]
    _, about = sample_here(checkpoint, tmp_path / "given", *flags, *given)
    assert [entry["class"] for entry in about["given"]] == ["B", "B"]  # not those of the clips


# Training -----------------------------------------------------------------------------------------


def test_training_continues_in_causal_phases_and_never_back(shapes, tmp_path, capsys):
    def phase(name, *flags):
        folder = ["--data-path", shapes, "--results-dir", tmp_path / name]
        run_main(train, *TINY, *folder, "--sample-every", 0, *flags)

    phase("both", "--max-steps", 1)
    ckpt = tmp_path / "both/000-EqM-Ti-4-f4-rope/checkpoints/0000001.pt"
    more = split("--num-frames 8 --context-noise 0.2")
    previews = split("--sample-every 2 --num-samples 2 --num-sampling-steps 2")
    phase("causal", "--max-steps", 2, "--ckpt", ckpt, "--causal", *more, *previews)
    (folder,) = (tmp_path / "causal").glob("000-*")
    assert probe(folder / "samples", "", "0000002.mp4").num_frames == 8  # all patches
    assert folder.name == "000-EqM-Ti-4-f8-rope-causal"
    start = folder / "checkpoints/0000002.pt"
    phase("causal", "--max-steps", 3, "--ckpt", start, *more)
    start.unlink()
    phase("causal", "--max-steps", 4, "--ckpt", start, "--resume", *more)
    phase("causal", "--max-steps", 5, "--resume", *more)
    second = folder.with_name(folder.name.replace("000", "001"))
    assert {*(tmp_path / "causal").glob("0*")} == {folder, second}
    assert (second / "checkpoints/0000005.pt").exists()


def test_lengths_may_grow_and_mix_from_an_image_model(shapes, tmp_path):
    image = random_checkpoint(tmp_path / "image.pt", hidden_size=96, num_classes=12)
    run = Training(shapes, tmp_path, None, base=ANY_LENGTH)
    schedule = "--frames-schedule 2:2:4,6:6:4 --mix 0.5 --temporal-patch-size 2 --causal"
    more = "--new-classes --log-every 1 --context-noise 0.2 --sample-every 0"
    run_main(train, *run.command_flags(*split(f"{schedule} {more}"), "--inflate", image))
    assert run.folder.name == "000-EqM-Ti-4-f2-6-rope-causal"
    config = EqMConfig(**run.saved()["config"]["model"])
    assert (config.causal, config.context) == (True, 4)  # the last patch sees two others
    flops = {config.training_flops(frames) * 4 for frames in (2, 6)}
    totals = [row["flops"] for row in run.rows() if "flops" in row]
    assert {b - a for a, b in itertools.pairwise(totals[2:])} <= flops

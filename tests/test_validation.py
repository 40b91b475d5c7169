"""Validation: the same losses each time, on any number of ranks."""

import functools
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

import validation
from models import Block, EqM, model_config
from runtime import distributed
from runtime.rng import generator
from runtime.signals import StopSignal
from test_optim import SMALL
from tiny_videos import write_video
from vae import VAE
from validation import summarize, validate, validation_chunks
from video.clips import Clips, ClipsByFrames, collate
from video.index import scan_videos

CHUNKS = [[(4, 0), (4, 1), (4, 2)], [(4, 3), (4, 4), (4, 5)], [(4, 6), (4, 7)], [(8, 0), (8, 1)], [(8, 2)]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name in ("A/a", "A/b", "B/c", "B/d"):
        write_video(root / f"{name}.avi", num_frames=10)
    return root


@pytest.fixture
def models():
    """EMA and raw weights, which differ."""
    torch.manual_seed(0)
    models = [EqM(model_config("EqM-Ti/4", **SMALL, num_frames=4, use_rope=True)) for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1)
    return models


@pytest.fixture
def loaders(videos):
    """Makes the loaders of that many ranks, which share the chunks."""
    scan = scan_videos(videos)
    clips = {n: Clips(videos, scan.videos, scan.classes, n, 16, flip=False, stream="validation") for n in (4, 8)}
    dataset = ClipsByFrames(clips)

    def make(world_size, chunks=CHUNKS):
        parts = [chunks[rank::world_size] for rank in range(world_size)]
        return [DataLoader(dataset, batch_sampler=part, collate_fn=collate) for part in parts]

    return make


def run(models, loader, num_frames=4, given=False):
    return validate(*models, VAE("none"), loader, num_frames, "fp32", torch.device("cpu"), StopSignal(), given)[0]


def test_validation_gives_the_same_losses_bit_for_bit_on_any_number_of_ranks(models, loaders, monkeypatch):
    (alone,) = loaders(1)
    expected = run(models, alone)
    assert run(models, alone) == expected  # and every time
    both, rows = loaders(2), []
    monkeypatch.setattr(distributed, "gather", lambda mine: rows.append(mine) or [mine])
    for loader in both:
        run(models, loader)
    monkeypatch.setattr(distributed, "gather", lambda mine: rows)
    assert run(models, both[1]) == expected


def test_validation_sees_the_ema_the_raw_weights_and_every_number_of_frames(models, loaders):
    (loader,) = loaders(1)
    both = run(models, loader)
    own = {name for name in both if name in ("val_loss", "val_loss_rel", "val_loss_raw") or "gamma" in name}
    assert both.keys() - own == {"val_loss_f4", "val_loss_rel_f4", "val_loss_f8", "val_loss_rel_f8"}
    assert both["val_loss"] == both["val_loss_f4"] != both["val_loss_f8"]
    swapped = models[::-1]
    assert run(swapped, loader)["val_loss"] == both["val_loss_raw"]
    assert run(swapped, loader, num_frames=8)["val_loss_raw"] == both["val_loss_f8"]


def test_validation_of_compiled_models_adds_one_graph_to_that_of_training(models, loaders, monkeypatch):
    compile_eagerly = functools.partialmethod(nn.Module.compile, backend="eager")  # for machines without a compiler
    monkeypatch.setattr(Block, "compile", compile_eagerly)
    torch._dynamo.reset()
    counters.clear()
    (loader,), (ema, model) = loaders(1, CHUNKS[:-1]), models  # a batch of one clip would take a graph of its own
    ema.eval().requires_grad_(False)
    expected = run(models, loader, given=True)
    for network in models:
        network.compile_blocks()
    for _ in range(2):
        model(torch.randn(2, 3, 4, 16, 16), torch.zeros(2, dtype=torch.int64)).sum().backward()
        assert run(models, loader, given=True) == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


def test_with_given_frames_the_loss_is_that_of_the_others_beside_a_clean_first_half(models, loaders, num_frames=8):
    (loader,) = loaders(1)
    plain = run(models, loader, num_frames)
    both = run(models, loader, num_frames, given=True)
    found = both.pop("val_loss_given")
    assert both == plain and "val_loss_given" not in plain

    losses, names = [], ("clips", "labels", "time_scales", "indices")
    for batch in [batch for batch in loader if batch["clips"].shape[2] == num_frames]:
        for clip, label, scale, index in zip(*(batch[name] for name in names), strict=True):
            x = (clip.float() / 127.5 - 1)[None]
            noise = torch.empty(1, *x.shape[1:]).normal_(generator=generator(0, "noise", "validation", index.item()))
            gamma, half = index.item() * validation.GOLDEN_RATIO % 1, num_frames // 2
            x_gamma = torch.cat([x[:, :, :half], gamma * x[:, :, half:] + (1 - gamma) * noise[:, :, half:]], dim=2)
            with torch.no_grad():
                f = models[0](x_gamma, label[None], scale[None])[:, :, half:]
            target = (x - noise)[:, :, half:] * min(4, 20 * (1 - gamma))
            losses.append((f - target).square().mean().item())
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_clips_of_one_temporal_patch_have_no_loss_with_given_frames(models, loaders):
    (loader,) = loaders(1)
    assert run(models, loader, given=True) == run(models, loader)


def test_validation_tells_the_gammas_apart():
    rows = torch.zeros(10, 6, dtype=torch.float64)  # frames, index, gamma, EMA, raw, E[x^2]
    rows[:, 0], rows[:, 1], rows[:, 2] = 4, torch.arange(10), torch.arange(10) / 10
    rows[:, 3], rows[:, 4], rows[:, 5] = torch.arange(10), 7, 0.5
    metrics = summarize(rows, 4)
    assert metrics["val_loss"] == 4.5 and metrics["val_loss_raw"] == 7
    assert metrics["val_loss_rel"] == pytest.approx(4.5 / (13.867 * 1.5), rel=1e-3)
    fifths = {name: value for name, value in metrics.items() if "gamma" in name}
    assert fifths == {f"val_loss_gamma_{n / 5}": 2 * n + 0.5 for n in range(5)}
    assert not any("_f4" in name for name in metrics)  # the only number of frames has no name of its own


def test_chunks_hold_clips_of_one_length_and_at_most_four_of_each_video():
    chunks = validation_chunks({4: ["a", "b", "c", "d", "e"], 8: ["a"]}, [4, 8], num_clips=18)
    assert [len(chunk) for chunk in chunks] == [validation.CHUNK, validation.CHUNK, 2, 4]
    assert [key for chunk in chunks for key in chunk] == [(4, n) for n in range(18)] + [(8, n) for n in range(4)]


def test_validation_covers_the_classes_also_when_there_are_more_videos_than_it_takes(videos, tmp_path):
    root = tmp_path / "data"
    for number in range(84):
        (root / "AB"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / "A/a.avi", root / "AB"[number % 2] / f"{number:02d}.avi")
    scan = scan_videos(root)
    clips = Clips(root, scan.videos, scan.classes, 4, 16, flip=False, stream="validation")
    labels = [clips[index]["label"] for index in range(32)]
    assert 8 < sum(labels) < 24

"""Validation: the same losses each time, on any number of ranks."""

import pytest
import torch
from torch.utils.data import DataLoader

import validation
from runtime import distributed
from runtime.rng import generator
from runtime.signals import StopSignal
from test_models import tiny
from tiny_videos import clips_of, make_video, write_equal_videos
from transport import OBJECTIVES
from vae import VAE
from validation import summarize, validate, validation_chunks
from video.clips import Clips, collate
from video.index import Scan
from video.loader import ClipsByFrames
from video.source import Files, open_source

CHUNKS = [[(4, 0), (4, 1)], [(4, 2), (4, 3)], [(4, 4)], [(8, 0), (8, 1)], [(8, 2)]]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Clips of 4 and of 8 frames of four videos."""
    source = open_source(write_equal_videos(tmp_path_factory.mktemp("videos"), 10), 16)
    return ClipsByFrames({n: clips_of(source, n, flip=False, stream="validation") for n in (4, 8)})


@pytest.fixture
def models():
    """EMA and raw weights, which differ."""
    ema, raw = (tiny(input_size=16, num_classes=2) for _ in range(2))
    raw.load_state_dict({name: 0.9 * value for name, value in raw.state_dict().items()})
    return ema, raw


def batches(data_set, chunks=CHUNKS):
    return DataLoader(data_set, batch_sampler=chunks, collate_fn=collate)


def run(models, loader, num_frames=4, given=False, together=False):
    metrics, _ = validate(
        *models,
        VAE("none"),
        loader=loader,
        num_frames=num_frames,
        precision="fp32",
        device=torch.device("cpu"),
        stop=StopSignal(together=together),
        given=given,
    )
    return metrics


@pytest.mark.parametrize("together", [False, True])
def test_the_losses_are_the_same_on_any_number_of_ranks(models, data_set, monkeypatch, together):
    expected = run(models, batches(data_set))
    parts = []

    def keep_part(part):
        parts.append(part)
        return [part]

    monkeypatch.setattr(distributed, "gather", keep_part)
    if together:  # each rank has all chunks, and those of rank 0 count
        run(models, batches(data_set), together=True)
        run(models[::-1], batches(data_set), together=True)
    else:
        run(models, batches(data_set, CHUNKS[0::2]))
        run(models, batches(data_set, CHUNKS[1::2]))
    monkeypatch.setattr(distributed, "gather", lambda part: parts)
    assert run(models, batches(data_set), together=together) == expected


def test_it_sees_the_ema_the_raw_weights_and_every_number_of_frames(models, data_set):
    loader = batches(data_set)
    both = run(models, loader)
    names = {name for name in both if name.endswith(("_f4", "_f8"))}
    assert names == {"val_loss_f4", "val_loss_rel_f4", "val_loss_f8", "val_loss_rel_f8"}
    assert both["val_loss"] == both["val_loss_f4"] != both["val_loss_f8"]
    swapped = run(models[::-1], loader, num_frames=8, given=True)
    assert swapped["val_loss_raw"] == both["val_loss_f8"]
    assert swapped["val_loss_f4"] == both["val_loss_raw"]
    assert run(models, loader, given=True) == both  # clips of one temporal patch are not forced


def naive_loss_of_second_half(model, batch, row):
    """The loss of a clip of 8 frames, given its first four."""
    only = slice(row, row + 1)
    x = batch["clips"][only].float() / 127.5 - 1
    index = batch["indices"][row].item()
    noise = torch.empty_like(x).normal_(generator=generator(0, "noise", "validation", index))
    gamma = index * validation.GOLDEN_RATIO % 1
    x_gamma = gamma * x + (1 - gamma) * noise
    x_gamma[:, :, :4] = x[:, :, :4]
    with torch.no_grad():
        f = model(x_gamma, batch["y"][only], batch["time_scales"][only])
    target = (x - noise) * min(4, 20 * (1 - gamma))
    return (f - target)[:, :, 4:].square().mean().item()


def test_the_loss_with_given_frames_is_of_those_after_a_clean_first_half(models, data_set):
    loader = batches(data_set, CHUNKS[3:])
    plain = run(models, loader, 8)
    both = run(models, loader, 8, given=True)
    loss = both.pop("val_loss_given")
    assert both == plain
    losses = []
    for batch in loader:
        for row in range(len(batch["clips"])):
            losses.append(naive_loss_of_second_half(models[0], batch, row))
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_validation_tells_the_gammas_apart():
    rows = []
    for index in range(10):
        # frames, index, gamma, EMA, raw, E[x^2]; with given frames, with actions: none
        rows.append([4, index, index / 10, index, 7, 0.5, -1, -1, -1])
    metrics = summarize(torch.tensor(rows, dtype=torch.float64), 4, OBJECTIVES["eqm"])
    assert metrics.pop("val_loss") == 4.5
    assert metrics.pop("val_loss_raw") == 7
    assert metrics.pop("val_loss_rel") == pytest.approx(4.5 / (13.867 * 1.5), rel=1e-3)
    # The only number of frames has no name of its own
    assert metrics == {f"val_loss_gamma_{fifth / 5}": 2 * fifth + 0.5 for fifth in range(5)}


def test_chunks_hold_clips_of_one_length_and_at_most_four_of_each_video():
    chunks = validation_chunks({4: ["a", "b", "c", "d", "e"], 8: ["a"]}, [4, 8], num_clips=18)
    assert [len(chunk) for chunk in chunks] == [validation.CHUNK, validation.CHUNK, 2, 4]
    assert [key for chunk in chunks for key in chunk] == [(4, n) for n in range(18)] + [
        (8, n) for n in range(4)
    ]


def test_a_few_clips_of_many_videos_cover_the_classes(tmp_path):
    videos = [make_video(f"{'AB'[number % 2]}/{number:02d}") for number in range(84)]
    source = Files(tmp_path, Scan(videos, ["A", "B"], []), 16)
    clips = Clips(source, videos, 4, flip=False, stream="validation")
    classes = [clips.draw(index)[0].class_name for index in range(32)]
    assert 8 < classes.count("B") < 24

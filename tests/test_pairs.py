"""Pairs of noise and sample: what sample_gd.py keeps, and students that train on it."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from functools import partial
from shlex import split

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import checkpoint
import export
import sample_gd
import train
import transport
from models import EqMConfig, model_config
from runtime.rng import normal, uniform
from runtime.untrusted import read_json
from tiny_data import make_vae, random_checkpoint
from tiny_videos import write_equal_videos
from training import (
    TINY,
    Training,
    compare,
    content,
    counted_steps,
    losses_of,
    mistakes,
    on_two_ranks,
    refused,
    run_here,
    run_main,
    sample_here,
)
from vae import VAE, load_vae
from video.clips import Clips, Mix, collate
from video.pairs import Pairs

FRAMES = 4
SEED = 3  # of the samples
STEPS = 6
STUDENT = split("""
    --video
    --use-rope
    --pairs
    --global-batch-size 4
    --num-workers 0
    --lr 1e-3
    --max-steps 16
    --val-fraction 0.3
    --gamma-shift 3
    --pure-noise 0.25
""")
# a step of almost no size: the samples are their noise
NO_STEP = split("--num-sampling-steps 2 --stepsize 1e-12")
MIXED = split("--forcing 0.5 --forcing-regions 0.5 --pairs-share 0.5 --frame-interval 1 2")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with random networks, pixels.pt and latents.pt with its VAE, samples of each, and
    real videos of their classes.
    """
    folder = tmp_path_factory.mktemp("places")
    vae = make_vae(folder / "vae")
    settings = {"num_frames": FRAMES, "use_rope": True}
    random_checkpoint(folder / "pixels.pt", **settings)
    random_checkpoint(folder / "latents.pt", vae=vae, **settings)
    flags = split("--num-samples 10 --seed 3 --batch-size 4")
    sample_here(folder / "pixels.pt", folder / "pixels", *flags, "--fps", 12.5)
    sample_here(folder / "latents.pt", folder / "latents", *flags, *NO_STEP, "--save-latents")
    write_equal_videos(folder / "real", 10, size=(16, 16))
    return folder


def student(places, *flags, teacher="pixels"):
    """Flags of train.py."""
    data = ["--data-path", places / teacher]
    start = ["--ckpt", places / f"{teacher}.pt"]
    return [*STUDENT, *data, *start, *flags]


def read_batch(source, indices):
    """The batch of these samples of the stream of a source."""
    clips = Clips(source, source.videos(), FRAMES, flip=False)
    clips = pickle.loads(pickle.dumps(clips))  # as a loader process gets them
    return collate([clips[index] for index in indices])


def noise_of(batch, shape):
    """The noise of its clips, which do not need their indices."""
    pairs = batch["pairs"]
    return transport.draw_noise(0, 0, range(len(pairs)), shape, torch.device("cpu"), pairs)


def altered(places, folder, kind="pixels", source=(), **about):
    """A copy of a sample folder whose samples.json says something else."""
    shutil.copytree(places / kind, folder)
    path = folder / "samples.json"
    content = read_json(path)
    content["source"] |= source
    content["flags"] |= about.pop("flags", {})
    path.write_text(json.dumps(content | about))
    return folder


# What sample_gd.py keeps --------------------------------------------------------------------------


def test_kept_latents_are_what_the_vae_decodes(places, tmp_path):
    vae = load_vae(str(places / "vae"))
    flags = split("--num-samples 5 --batch-size 2 --save-latents")
    clips, _ = sample_here(places / "latents.pt", tmp_path / "s", *flags)
    latents = np.load(tmp_path / "s/latents.npy")
    assert latents.shape == (5, vae.channels, FRAMES, 8, 8)
    scaled = (torch.from_numpy(latents) - vae.shift) * vae.scale
    difference = vae.decode(scaled).int() - torch.from_numpy(clips)
    assert difference.abs().max() <= 1  # scaled and unscaled again
    sample_here(places / "latents.pt", tmp_path / "s")
    assert not (tmp_path / "s/latents.npy").exists()


def test_latents_are_kept_of_one_window_and_of_a_vae(places, tmp_path, capsys):
    folder = tmp_path / "s"
    sample_here(places / "pixels.pt", folder, "--save-latents")
    assert "works on pixels, which samples.npz has" in capsys.readouterr().out
    assert not (folder / "latents.npy").exists()
    flags = split("--video --save-latents --num-frames 12 --window 8")
    flags += ["--folder", folder, "--ckpt", places / "latents.pt"]
    line = refused(capsys, sample_gd, *flags)
    assert "--save-latents: the 12 frames are made in windows of 8" in line


def test_samples_json_tells_the_noise_that_sampling_began_with(places):
    batch = read_batch(Pairs(places / "latents"), range(10))
    x = load_vae(str(places / "vae")).latents_of(batch["clips"], 0, 0, range(10))
    assert_close(noise_of(batch, x.shape[1:]), x, atol=1e-5, rtol=1e-5)
    assert sorted(batch["pairs"]) == [(SEED, number, FRAMES) for number in range(10)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a causal teacher that takes actions, teacher.pt, and its samples, which are
    their noise.
    """
    folder = tmp_path_factory.mktemp("world")
    causal = {"causal": True, "context": 2, "temporal_patch_size": 1, "actions": "stay,left"}
    random_checkpoint(folder / "teacher.pt", num_frames=FRAMES, use_rope=True, **causal)
    flags = split("--num-samples 10 --seed 3 --num-frames 4 --actions left*3 stay,left*2")
    sample_here(folder / "teacher.pt", folder / "samples", *flags, *NO_STEP)
    return folder


def test_samples_of_a_causal_model_have_noise_of_each_patch_and_their_actions(world):
    source = Pairs(world / "samples")
    source.actions = source.open_actions(["stay", "left"])
    batch = read_batch(source, range(10))
    pixels = batch["clips"] / 127.5 - 1
    noise = noise_of(batch, pixels.shape[1:])
    assert_close(noise.clamp(-1, 1), pixels, atol=1 / 127, rtol=0)
    actions = {tuple(y) for y in batch["y"][:, 1:].tolist()}
    assert actions == {(-1, 1, 1, 1), (-1, 0, 1, 1)}
    source.actions_made = [["none"] * FRAMES] * 10
    assert source.open_actions([]) is None  # a student from scratch has no actions


def test_a_causal_student_trains_on_the_samples_of_a_causal_teacher(world, tmp_path):
    flags = ["--data-path", world / "samples", "--ckpt", world / "teacher.pt"]
    flags += ["--results-dir", tmp_path, "--sample-every", 0]
    run_main(train, *STUDENT, *flags)
    (run,) = tmp_path.glob("000-*-causal")
    state = checkpoint.load(run / "checkpoints/best.pt")
    assert state["config"]["model"]["actions"] == "stay,left"
    assert state["config"]["training"]["teacher"]["num_steps"] == 2


def test_all_patches_of_a_sample_may_be_pure_noise():
    is_sample = torch.arange(40) < 20
    levels = transport.draw_gammas(
        0, 0, range(40), num_frames=4, patch=1, causal=True, is_sample=is_sample, pure_noise=0.5
    )
    is_pure = (levels == 0).all(dim=1)
    assert 4 < is_pure[:20].sum() < 16
    assert (levels[~is_pure] > 0).all() and not is_pure[20:].any()


# The loss of a pair -------------------------------------------------------------------------------


CONFIG = model_config("EqM-Ti/4", input_size=16, in_channels=3, num_classes=2, num_frames=FRAMES)


def test_a_pair_is_interpolated_with_its_own_noise_and_keeps_its_label(places):
    indices = range(4, 20)  # of two epochs
    batch = read_batch(Pairs(places / "pixels"), indices)
    seen = []

    def network(x_gamma, y, *_, **__):
        seen.append((x_gamma, y))
        return torch.zeros_like(x_gamma)

    config = replace(CONFIG, class_dropout_prob=0.9)
    losses, _ = losses_of(network, batch, config, pure_noise=0.25)
    ((x_gamma, y),) = seen
    samples = np.load(places / "pixels/samples.npz")
    gamma = transport.shift_gamma(uniform(5, "gamma", 7, indices), 3.0)
    is_pure = uniform(5, "pure noise", 7, indices) < 0.25
    assert 0 < is_pure.sum() < len(indices)
    seeds, numbers, _ = zip(*batch["pairs"], strict=True)
    assert {*seeds} == {SEED}
    numbers = list(numbers)
    x = torch.from_numpy(samples["arr_0"][numbers]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    eps = normal(SEED, "sample", 0, numbers, x.shape[1:])
    level = gamma.masked_fill(is_pure, 0.0)
    assert torch.equal(x_gamma, transport.interpolate(x, eps, level))
    assert y.tolist() == samples["labels"][numbers].tolist()
    target = transport.OBJECTIVES["eqm"].target(x, eps, level)
    assert losses["train_loss"].item() == pytest.approx(target.square().mean().item(), rel=1e-5)
    independent = Pairs(places / "pixels", "independent")
    assert independent.pairs == {} and independent.has_samples


def test_samples_are_not_forced_among_real_clips():
    is_sample = torch.arange(40) % 2 == 0
    draw = partial(transport.draw_gammas, 0, 0, range(40), num_frames=8, patch=4, size=6)
    forced = draw(share=1.0, region_share=0.5)
    mixed = draw(share=1.0, region_share=0.5, is_sample=is_sample, pure_noise=0.5)
    whole = draw()
    assert torch.equal(mixed[~is_sample], forced[~is_sample])  # as without samples
    of_samples = mixed[is_sample].flatten(1)
    assert (of_samples == of_samples[:, :1]).all()
    is_pure = uniform(0, "pure noise", 0, range(40)) < 0.5
    expected = whole.masked_fill(is_pure, 0.0)[is_sample]
    assert torch.equal(of_samples[:, 0], expected)


@pytest.mark.parametrize("share", [0.7, 0.5, 1.0, 0.01])
def test_a_mix_interleaves_two_streams_and_skips_no_sample_of_either(share):
    first = [{"of": "first", "at": index} for index in range(300)]
    second = [{"of": "second", "at": index} for index in range(300)]
    mix = Mix(first, second, share)
    count = {"first": 0, "second": 0}
    for index in range(200):
        sample = mix[index]
        assert sample["index"] == index
        assert sample["at"] == count[sample["of"]]
        count[sample["of"]] += 1
        assert abs(count["first"] - share * (index + 1)) < 1


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """A student of pairs and real clips that nothing has disturbed."""
    base = student(places, *MIXED, "--real-data", places / "real")
    training = Training(places / "pixels", tmp_path_factory.mktemp("whole"), 16, base=base)
    assert run_here(training) == STEPS
    return training


def test_a_student_begins_with_averaged_weights_and_records_its_teacher(places, whole):
    state = whole.saved()
    recorded = state["config"]["training"]
    about = read_json(places / "pixels/samples.json")["source"]
    teacher = checkpoint.load(places / "pixels.pt")
    assert recorded["teacher"]["weights_sha256"] == about["weights_sha256"]
    assert recorded["teacher"]["weights_sha256"] == checkpoint.weights_sha256(teacher["ema"])
    assert recorded["start_sha256"] == about["weights_sha256"]  # not of the raw weights
    assert recorded["teacher"]["guidance"] == about["guidance"]
    assert recorded["pairs"] == "own"
    config = EqMConfig(**state["config"]["model"])
    card = dict(export.facts(state, config, "fp32", None))
    assert card["student of"] == "pixels.pt, guidance 4"
    assert state["phase"]["ema_start"] == teacher["step"] == 10
    # the time scale of the pairs, and that of the real clips with --frame-interval 1 2
    data = state["config"]["data"]
    assert data["time_scale"] == data["longest_time_scale"] == pytest.approx(2 / 25)


def test_a_stopped_student_resumes_and_ends_the_same(whole, tmp_path):
    parts = replace(whole, results=tmp_path)
    assert run_here(parts, "--resume", stop_after=2) == 2
    assert run_here(parts, "--resume", stop_after=1) == 1
    assert run_here(parts, "--resume") == STEPS - 3
    assert compare(whole, parts) == []


def test_a_student_does_not_continue_the_run_of_its_teacher(places, whole, capsys):
    videos = ["--data-path", places / "real", "--results-dir", whole.results, "--resume"]
    before = content(whole.folder / "checkpoints")
    line = refused(capsys, train, *TINY, *videos)
    assert f"--resume: continues {whole.folder}, which trains on pairs, this" in line
    assert "add --pairs" in line
    assert content(whole.folder / "checkpoints") == before


def test_two_ranks_train_the_same_student(places, tmp_path):
    flags = [*student(places, "--pairs-share", 0.7), "--real-data", places / "real"]
    flags += split("--sample-every 16 --num-samples 1 --num-sampling-steps 2")
    run_main(train, *flags, "--results-dir", tmp_path / "1")
    on_two_ranks(train, *flags, "--results-dir", tmp_path / "2")
    paths = sorted(tmp_path.glob("*/*/checkpoints/latest.pt"))
    one, two = (checkpoint.load(path)["model"] for path in paths)
    for name, value in one.items():
        assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_a_student_of_latents_encodes_nothing_and_samples_in_four_steps_without_guidance(
    places, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(VAE, "posterior", lambda *_: pytest.fail("it encodes"))
    results = tmp_path / "r"
    flags = student(places, "--results-dir", results, "--sample-every", 0, teacher="latents")
    with counted_steps(train) as steps:
        run_main(train, *flags)
    assert len(steps) == STEPS
    (ckpt,) = results.glob("*/checkpoints/latest.pt")
    folder = tmp_path / "s"
    run_main(sample_gd, "--video", "--ckpt", ckpt, "--folder", folder, "--num-samples", 1)
    line = "student of a teacher with guidance 4; samples of 4 by euler, 4 evaluations, "
    assert line + "guidance 1" in capsys.readouterr().out
    source = read_json(folder / "samples.json")["source"]
    assert source["guidance_chosen"]


# Bad input ----------------------------------------------------------------------------------------


def refused_samples(places, folder, capsys, **changes):
    """The error about altered samples."""
    altered(places, folder, **changes)
    return refused(capsys, train, *student(places, "--data-path", folder))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"source": {"window": 2}}, r"samples of 4 frames in windows of 2; expected one window"),
        ({"flags": {"given": "clip.mp4"}}, r"samples with --given; expected samples"),
        ({"flags": {"init": "clip.mp4"}}, r"samples with --init; expected samples"),
        ({"source": {"image_size": 32}}, r"has frames of 32 px, --ckpt .* has 16 px"),
        ({"source": {"vae": "ema"}}, r"made with the VAE ema, --ckpt .* with none"),
        ({"indices": [0, 1]}, r"its samples.json has 2 indices for 10 samples"),
    ],
)
def test_samples_whose_noise_does_not_fit_are_refused(places, tmp_path, capsys, changes, expected):
    line = refused_samples(places, tmp_path / "s", capsys, **changes)
    assert re.search(f"--data-path .*: {expected}", line), line


def test_samples_of_a_causal_teacher_need_its_actions_and_one_class(
    world, places, tmp_path, capsys
):
    flags = ["--data-path", world / "samples", "--temporal-patch-size", 1, "--model", "EqM-Ti/4"]
    line = refused(capsys, train, *STUDENT, "--vae", "none", *flags)
    assert "no action 'left'; expected one of " in line
    assert "pass the model that made the samples as --ckpt" in line
    line = refused_samples(places, tmp_path / "s", capsys, spans=[[0, 1]])
    assert "samples whose class changes" in line


def test_samples_without_seed_or_class_are_refused(places, tmp_path, capsys):
    folder = altered(places, tmp_path / "s")
    about = folder / "samples.json"
    about.write_text(about.read_text().replace('"seed"', '"seeds"'))
    line = refused(capsys, train, *student(places, "--data-path", folder))
    assert "its samples.json has no seed" in line
    few = split("--num-samples 2 --classes none")
    sample_here(places / "pixels.pt", tmp_path / "none", *few)
    line = refused(capsys, train, *student(places, "--data-path", tmp_path / "none"))
    assert "samples without a class" in line


MISTAKES = """
--num-frames 8 => --num-frames 8: the samples in --data-path .* have 4 frames
--val-frames 8 => --val-frames 8: the samples in --data-path .* have 4 frames
--image-size 32 => --image-size 32: --data-path .* has 16; remove
--forcing 0.5 => --forcing 0.5: does not apply to --pairs
--forcing-regions 0.5 => --forcing-regions 0.5: does not apply to --pairs
--causal => --causal: the samples in --data-path .* were made at once
--pairs-share 0.5 => --pairs-share 0.5: .*; add --real-data DIR
--cache-frames => --cache-frames: --pairs reads samples
--data-path real => --data-path real: no samples.json in it
--real-data latents => --real-data latents: holds only samples
--real-data nowhere => --real-data nowhere: no such folder
--real-data real --data-path latents --ckpt latents.pt => both or none; name a latent cache
"""


def test_latents_that_are_not_those_of_the_samples_are_refused(places, tmp_path, capsys):
    latents = np.load(places / "latents/latents.npy")
    wrong = {
        "few": (latents[1:], "9, .* not the latents of 10 samples of 4 frames; sample again"),
        "short": (latents[:, :, 1:], "not the latents of 10 samples of 4 frames; sample again"),
        "precise": (latents.astype(np.float64), "latents.npy holds float64"),
    }
    for name, (changed, expected) in wrong.items():
        folder = altered(places, tmp_path / name, kind="latents")
        np.save(folder / "latents.npy", changed)
        flags = student(places, "--data-path", folder, teacher="latents")
        assert re.search(expected, refused(capsys, train, *flags))
    os.truncate(folder / "latents.npy", 200)
    assert "latents.npy is damaged" in refused(capsys, train, *flags)


@pytest.mark.parametrize("flags, expected", mistakes(MISTAKES))
def test_flags_that_pairs_do_not_have_are_refused(places, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(places)
    line = refused(capsys, train, *student(places, *split(flags)))
    assert re.search(expected, line), line


def test_real_clips_have_the_classes_of_the_pairs(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without results, where the index of the clips would be
    shutil.copytree(places / "real", tmp_path / "other")
    (tmp_path / "other/B").rename(tmp_path / "other/C")
    line = refused(capsys, train, *student(places, "--real-data", tmp_path / "other"))
    assert re.search("--real-data .*other: has the classes A, C, --data-path .* A, B", line)

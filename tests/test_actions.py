"""Actions of frames: files, clips, models, training, sampling."""

import json
import math
import os
from dataclasses import replace
from shlex import split

import numpy as np
import pytest
import torch

import cache_latents
import check
import checkpoint
import export
import sample_gd
import train
import validation
from models import Condition, EqM
from runtime.rng import generator
from test_generation import make_plan
from test_models import TINY, clip, distance, randomized
from tiny_data import random_checkpoint
from tiny_videos import clips_of, frame_indices_of
from training import ROOT, error_of, record_calls, refused, run_main, sample_here
from vae import VAE
from validation import GOLDEN_RATIO
from video.actions import NO_ACTION, find_sequences, open_actions, parse_spans
from video.clips import collate
from video.drawing import FONT_SIZE
from video.files import UnreadableError
from video.source import open_source
from video.writers import write_lossless

NAMES = ["stay", "left", "right"]
MIRROR = {"left": "right", "right": "left"}
T = 6  # frames of a video
CAUSAL = {"use_rope": True, "causal": True, "context": 3}
TRAIN = split("""
    --video
    --use-rope
    --causal
    --temporal-patch-size 1
    --vae none
    --image-size 8
    --model EqM-Ti/4
    --depth 1
    --hidden-size 48
    --num-heads 2
    --global-batch-size 2
    --num-workers 0
    --val-clips 2
    --sampler euler
    --num-sampling-steps 3
    --num-samples 2
    --sample-every 2
""")


def config(**changes):
    settings = {"temporal_patch_size": 1, "num_classes": 3, "actions": ",".join(NAMES)}
    return replace(TINY, **settings | changes)


def write_world(root, count=4, mirror=MIRROR, fps=25):
    """Videos whose frame k is gray 4 k, with random actions. Returns root."""
    root.mkdir()
    (root / "actions.json").write_text(json.dumps({"names": NAMES, "mirror": mirror}))
    for index in range(count):
        frames = np.repeat(np.arange(T, dtype=np.uint8) * 4, 8 * 8 * 3).reshape(T, 8, 8, 3)
        write_lossless(root / f"{index}.mkv", frames, fps)
        actions = np.random.default_rng(index).integers(len(NAMES), size=T)
        np.save(root / f"{index}.actions.npy", actions)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of videos with actions; tests only read it."""
    return write_world(tmp_path_factory.mktemp("actions") / "world")


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The results folder of a causal training run with actions, in two phases."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--frames-schedule", "2:2,4:3", "--data-path", world]
    run_main(train, *TRAIN, *flags, "--results-dir", folder)
    return folder


def checkpoint_of(run):
    (path,) = run.glob("*/checkpoints/latest.pt")
    return path


def recorded(world, video):
    return np.load(world / video.path.replace(".mkv", ".actions.npy"))


# Files and clips ----------------------------------------------------------------------------------


def with_actions(root):
    source = open_source(root, 8)
    source.actions = open_actions(root, source.videos())
    return source


def test_clips_carry_the_actions_between_their_frames_mirrored_with_them(world):
    clips = clips_of(with_actions(world), 3, seed=5)
    flips = 0
    for index in range(24):
        sample = clips[index]
        video, frames, _ = clips.draw(index)
        assert frame_indices_of(sample["clip"]) == frames
        label, first, *others = sample["y"]
        assert label == 0
        assert first == NO_ACTION
        expected = recorded(world, video)[frames[1:]].tolist()
        flipped = clips._random_int("flip", 2, index) == 1
        flips += flipped
        assert others == [[0, 2, 1][action] if flipped else action for action in expected]
    assert 0 < flips < 24


def test_a_cache_carries_the_actions_and_drops_them_when_they_are_gone(world, tmp_path):
    root = write_world(tmp_path / "world")
    cache = tmp_path / "cache"
    flags = ["--data-path", root, "--out", cache, "--vae", "none", "--image-size", 8]
    run_main(cache_latents, *flags)
    videos = clips_of(with_actions(root), 3)
    cached = clips_of(with_actions(cache), 3)
    for index in range(8):
        assert videos[index]["y"] == cached[index]["y"]
    for path in root.glob("*actions*"):
        path.unlink()
    run_main(cache_latents, *flags)
    assert with_actions(cache).actions is None and not [*cache.rglob("*actions*")]


def test_actions_that_are_gone_while_training_make_a_corrupt_video(tmp_path):
    source = with_actions(write_world(tmp_path / "world"))
    (tmp_path / "world/1.actions.npy").unlink()
    (video,) = [video for video in source.videos() if video.path == "1.mkv"]
    with pytest.raises(UnreadableError, match="1.actions.npy"):
        source.actions.of_clip(video, [0, 1], flipped=False)


# Models -------------------------------------------------------------------------------------------


def test_a_condition_drops_class_and_actions_together_to_rows_of_their_own():
    y = torch.tensor([[1, -1, 2], [0, 1, 0], [-1, -1, -1]])
    condition = Condition.of(y, config())
    assert condition.y.tolist() == [[1, 3, 2], [0, 1, 0], [3, 3, 3]]
    assert condition.null(torch.tensor([False, True, False])).y.tolist() == [
        [1, 3, 2],
        [3, 3, 3],
        [3, 3, 3],
    ]
    assert condition.null().is_null() and not condition.is_null()


def test_a_model_with_equal_actions_is_the_model_of_their_sum_with_the_class():
    model = randomized(EqM(config()))
    usual = EqM(config(actions="")).eval()
    state = model.state_dict()
    table = state.pop("y_embedder.action_table.weight")
    x = clip(5, model.config, batch=2)
    with torch.no_grad():
        for action in range(4):
            weights = dict(state)
            weights["y_embedder.embedding_table.weight"] = (
                state["y_embedder.embedding_table.weight"] + table[action]
            )
            usual.load_state_dict(weights)
            y = torch.tensor([[2, *[action] * 5], [3, *[action] * 5]])
            assert distance(model(x, y), usual(x, y[:, 0])) < 1e-6


# Training -----------------------------------------------------------------------------------------


def test_a_run_learns_the_actions_and_its_checkpoint_names_them(run):
    state = checkpoint.load(checkpoint_of(run))
    assert state["config"]["model"]["actions"] == "stay,left,right"
    table = "y_embedder.action_table.weight"
    assert state["model"][table].shape == (4, 48)
    moments = [values["exp_avg"] for values in state["optimizer"]["states"][0]["state"].values()]
    (moment,) = [value for value in moments if value.shape == (4, 48)]
    assert (moment[3] != 0).any()  # "none" is learned
    (metrics,) = run.glob("*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["val_x_error"] > 0 and "val_action_psnr" in last


def test_a_checkpoint_continues_with_the_same_actions_only(run, tmp_path, capsys):
    places = ["--ckpt", checkpoint_of(run), "--results-dir", tmp_path / "runs", "--dry-run"]
    flags = [*TRAIN, "--num-frames", 4, "--max-steps", 9, "--data-path"]
    other = write_world(tmp_path / "other", mirror=None)
    run_main(train, *flags, other, *places, "--no-flip")
    for path in other.glob("*actions*"):
        path.unlink()
    line = refused(capsys, train, *flags, other, *places)
    assert "has no actions, --ckpt" in line and "has the actions stay, left, right" in line


def validated(model, batch):
    """What validation measures of a model on one batch."""
    with torch.no_grad():
        columns = validation.measure(
            model,
            model,
            VAE("none"),
            batch,
            precision="fp32",
            device=torch.device("cpu"),
            given=False,
        )
    rows = torch.stack([column.double() for column in columns], dim=1)
    return validation.summarize(rows, 4, model.config.learns)


@pytest.mark.parametrize("flags", [CAUSAL, {}], ids=["causal", "bidirectional"])
def test_validation_tells_what_a_model_predicts_from_noise_and_actions(flags, world, monkeypatch):
    model = randomized(EqM(config(input_size=8, num_classes=1, **flags)))
    clips = clips_of(with_actions(world), 4, flip=False, stream="validation")
    batch = collate([clips[index] for index in range(5)])
    stay = torch.zeros(5, 3, dtype=torch.int64)
    actions_of = iter(stay)  # in place of random ones
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(actions_of))
    metrics = validated(model, batch)

    x = batch["clips"].float() / 127.5 - 1
    errors = []
    for actions in (batch["y"][:, 2:], stay):
        for index, gamma in enumerate(0.15 * (torch.arange(5) * GOLDEN_RATIO % 1).float()):
            clip = x[index : index + 1]
            noise = torch.empty_like(clip)
            noise.normal_(generator=generator(0, "noise", "validation", index))
            x_gamma = gamma * clip + (1 - gamma) * noise
            y = torch.tensor([[0, len(NAMES), *actions[index]]])
            clean = {"clean": clip} if model.config.causal else {}
            with torch.no_grad():
                f = model(x_gamma, y, batch["time_scales"][:1], **clean)
            predicted = x_gamma + (1 - gamma) * f / 4
            errors.append((predicted - clip)[:, :, 1:].square().mean().item())
    of_true = sum(errors[:5]) / 5
    of_stay = sum(errors[5:]) / 5
    assert metrics["val_x_error"] == pytest.approx(of_true, rel=1e-4)
    expected = 10 * math.log10(of_stay / of_true)
    assert metrics["val_action_psnr"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_random_condition_has_any_actions_but_none_and_keeps_the_first_and_the_class():
    condition = Condition.of(torch.full((40, 7), -1), config())
    y = condition.randomized(config(), [generator(0, "test", row) for row in range(40)]).y
    assert y[:, :2].equal(condition.y[:, :2])
    assert y[:, 2:].unique().tolist() == [0, 1, 2]
    last = Condition.of(torch.full((1, 7), -1), config())
    assert last.randomized(config(), [generator(0, "test", 39)]).y.equal(y[39:])
    assert last.randomized(config(actions=""), []) is None


# Sampling -----------------------------------------------------------------------------------------


def test_spans_and_files_give_sequences(tmp_path):
    assert parse_spans("right*2, up , none*3", ["up", "right"]) == [1, 1, 0, -1, -1, -1]
    (tmp_path / "lines.txt").write_text("left*2\n\nstay,right\n")
    np.save(tmp_path / "rows.npy", np.array([[0, -1], [1, 2]]))
    words = [str(tmp_path / "lines.txt"), "right*2", str(tmp_path / "rows.npy")]
    assert find_sequences(words, NAMES).tolist() == [[1, 1], [0, 2], [2, 2], [0, -1], [1, 2]]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_a_file_without_actions_is_refused(tmp_path, shape):
    np.save(tmp_path / "rows.npy", np.zeros(shape, np.int64))
    error = error_of(find_sequences, [str(tmp_path / "rows.npy")], NAMES)
    assert "--actions: has no actions" in error


def test_actions_of_videos_with_a_variable_frame_rate_are_refused(tmp_path):
    root = write_world(tmp_path / "world")
    videos = [replace(video, varies=True) for video in with_actions(root).videos()]
    assert "1.mkv has a variable frame rate" in error_of(open_actions, root, videos[1:])


def test_actions_start_after_the_given_frames_and_set_the_length(run, world, tmp_path):
    given = ["--given", world / "1.mkv", "--given-frames", "0-2", "--no-keep-background"]
    actions = ["--actions", "right*2,left", "none,stay*2"]
    clips, about = sample_here(checkpoint_of(run), tmp_path / "samples", *given, *actions)
    before = [NAMES[action] for action in np.load(world / "1.actions.npy")[1:3]]
    assert clips.shape == (2, 6, 8, 8, 3)
    assert about["given"][0]["class"] == "all"  # the only class, whatever the folder's name
    assert about["actions"] == [
        ["none", *before, "right", "right", "left"],
        ["none", *before, "none", "stay", "stay"],
    ]


def test_given_frames_have_no_actions_without_a_file_and_never_those_of_another_world(
    run, tmp_path, capsys
):
    root = write_world(tmp_path / "world")
    flags = ["--given", root / "1.mkv", "--given-frames", "0-2", "--actions", "left"]
    (root / "actions.json").write_text('{"names": ["up", "down", "stay"]}')
    places = ["--video", "--ckpt", checkpoint_of(run), "--folder", tmp_path / "samples"]
    line = refused(capsys, sample_gd, *places, *flags, late=True)
    assert "they are up, down, stay, expected stay, left, right" in line
    os.remove(root / "1.actions.npy")
    _, about = sample_here(checkpoint_of(run), tmp_path / "samples", *flags)
    assert about["actions"][0] == ["none", "none", "none", "left"]


def test_given_frames_of_another_rate_have_no_actions(run, tmp_path, capsys):
    """At 20 frames per second, frames 0 and 1 of the model are closest to frames 0 and 1."""
    root = write_world(tmp_path / "world", fps=20)
    flags = ["--given", root / "1.mkv", "--given-frames", "0-1", "--actions", "left"]
    _, about = sample_here(checkpoint_of(run), tmp_path / "samples", *flags)
    assert about["actions"][0] == ["none", "none", "left"]
    assert "has another frame rate than the model, so no actions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """The checkpoint of a causal model with random weights."""
    path = tmp_path_factory.mktemp("random") / "random.pt"
    settings = CAUSAL | {"temporal_patch_size": 1, "num_frames": 4, "actions": ",".join(NAMES)}
    return random_checkpoint(path, **settings)


def test_actions_change_the_frames_that_they_lead_to_and_none_before(random_model, tmp_path):
    first, _ = sample_here(random_model, tmp_path / "a", "--actions", "left*4")
    more = split("--actions left*2,right*9 --num-frames 5")
    other, about = sample_here(random_model, tmp_path / "b", *more)
    assert about["actions"][0] == ["none", "left", "left", "right", "right"]
    assert (first[:, :3] == other[:, :3]).all() and (first[:, 3:] != other[:, 3:]).any()


def test_a_program_plays_by_actions_what_sample_gd_makes(random_model, tmp_path):
    sampler = torch.hub.load(str(ROOT), "model", source="local", ckpt=random_model)
    few = {"num_sampling_steps": 4, "stepsize": 0.05}
    stream = sampler.stream(num_samples=2, **few)
    whole = sampler(num_samples=2, actions=["left,right", "stay*2"], **few)
    flags = split("--actions left,right stay*2")
    clips, _ = sample_here(random_model, tmp_path / "samples", *flags)
    assert torch.equal(whole, torch.from_numpy(clips))
    steps = [
        stream.step(),
        stream.step(actions=["left", 0]),
        stream.step(actions=["right", "stay"]),
    ]
    assert torch.equal(torch.cat(steps, dim=1), whole)
    stream.reset()
    for t, actions in enumerate([["right"], [1, 0], [2, 0]]):
        assert torch.equal(stream.step(actions=actions), whole[:, t : t + 1])  # no first action
    with pytest.raises(ValueError, match="no action 'up'"):
        stream.step(actions=["up"])
    shown = whole[:, :2]
    after = []
    for action in ("left", "right"):
        stream.reset(shown, actions=[None, [action, "stay"]])
        after.append(stream.step(actions=["stay"]))
    assert torch.equal(after[0][1], after[1][1]) and not torch.equal(after[0][0], after[1][0])


def test_each_window_begins_without_an_action():
    actions = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    for settings, none in [({}, 3), (CAUSAL, 1)]:
        plan = make_plan(
            EqM(config(**settings)),
            count=1,
            conditions=torch.tensor([2]),
            num_frames=7,
            window=4,
            actions=actions,
        )
        assert plan.condition_at([0], frame=0).y.tolist() == [[2, 3, 1, 2, 0]]
        assert plan.condition_at([0], frame=4).y.tolist() == [[2, none, 2, 0, 3]]


def test_a_model_with_actions_is_sampled_without_and_says_so(run, tmp_path, capsys):
    _, about = sample_here(checkpoint_of(run), tmp_path / "samples")
    assert about["actions"] == [["none"] * 4] * 2
    assert (
        "has actions (stay, left, right); without --actions all are none" in capsys.readouterr().out
    )


# Scripts ------------------------------------------------------------------------------------------


def test_the_card_of_an_export_names_the_actions(random_model, tmp_path):
    run_main(export, random_model, tmp_path / "shared")
    card = (tmp_path / "shared/README.md").read_text()
    assert "| actions | 3, one per frame: stay, left, right |" in card
    _, about = sample_here(tmp_path / "shared", tmp_path / "samples", "--actions", "left*2")
    assert about["actions"][0] == ["none", "left", "left"]


def test_check_shows_the_actions_below_the_frames(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sheets = record_calls(monkeypatch, check, "write_sheet", lambda out, videos, names: videos)
    texts = record_calls(monkeypatch, check, "add_actions", lambda videos, actions: actions)
    flags = "--num-frames 4 --image-size 8 --vae none --model EqM-Ti/4 --global-batch-size 2"
    run_main(check, world, *split(flags), "--max-steps", 10)
    text = capsys.readouterr().out
    assert "actions: stay, left, right" in text and "--temporal-patch-size 1" in text
    possible = []
    for index in range(4):
        names = [NAMES[action] for action in np.load(world / f"{index}.actions.npy")]
        possible += [["none", *names[start : start + 3]] for start in (1, 2, 3)]
    assert len(texts[0]) == 3 and all(row in possible for row in texts[0])
    (frames,) = {
        (videos.shape[2], videos[:, :, 128:].min(), *videos[0, 0, 129, 0]) for videos in sheets
    }
    assert frames == (128 + 2 * FONT_SIZE, 0, 255, 255, 255)  # black text on white below a frame

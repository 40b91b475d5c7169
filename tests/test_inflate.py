"""Models of clips that start from image models: their field on equal frames, and runs of train.py
--inflate.
"""

import shutil
from dataclasses import replace
from shlex import split

import pytest
import torch

import checkpoint
import export
import train
from inflate import inflate
from models import EqM
from test_models import clip, distance, labels, tiny
from tiny_data import make_images
from tiny_videos import write_equal_videos
from training import IMAGES, refused, run_main

RATES = 12, 25, 50  # frames per second
IMAGE = {"temporal_patch_size": 1, "num_frames": 1}
KINDS = {  # of image models; head_dim is 32
    "fixed": {"use_rope": False},
    "rotary": {"rope_theta": 100.0},
    "rotary and table, moving": {
        "position_table": "space",
        "rope_speed": 0.5,
        "rope_split": "8,12,12",
    },
    "normalized, told the noise level": {"use_rope": False, "qk_norm": True, "objective": "flow"},
}


@torch.no_grad()
def largest_error(image, video, y=0, seconds=1 / 25):
    """The largest distance of the fields of equal frames from the image's field, over all RATES."""
    x = clip(1, image.config)
    gamma = torch.tensor([0.3]) if image.config.objective == "flow" else None

    def field(model, x, seconds):
        return model(x, torch.tensor([y]), torch.tensor([seconds]), gamma=gamma)

    equal = x.expand(-1, -1, video.config.temporal_patch_size, -1, -1)
    expected = field(image, x, seconds).expand_as(equal)
    return max(distance(field(video, equal, 1 / fps), expected) for fps in RATES)


def inflated(image, **settings):
    weights, config = inflate(image.state_dict(), image.config, num_frames=8, **settings)
    video = EqM(config).eval()
    video.load_state_dict(weights)
    return video


@pytest.mark.parametrize("kind", KINDS)
def test_equal_frames_get_the_field_of_the_image_at_any_frame_rate(kind):
    image = tiny(**IMAGE | KINDS[kind])
    video = inflated(image)
    positions = {"use_rope": True, "rope_split": "10,0,0", "position_table": "space"}
    if image.config.use_rope:
        positions = {}
    assert video.config == replace(image.config, num_frames=8, temporal_patch_size=2, **positions)
    assert largest_error(image, video) < 1e-5
    video = inflated(image, temporal_patch_size=4, rope_theta=100.0)
    assert largest_error(image, video) < 1e-5
    video = inflated(image, time_scale=1 / 8)  # frames of 8 fps
    assert largest_error(image, video, seconds=1 / 8) < 1e-5
    assert largest_error(image, video) > 0.01


@torch.no_grad()
def test_frame_rates_and_times_can_be_learned():
    image = tiny(**IMAGE | KINDS["fixed"])
    video = inflated(image)
    with torch.enable_grad():
        video(clip(8), labels(), torch.tensor([1 / 12])).square().sum().backward()
    assert (video.t_embedder.mlp[0].weight.grad != 0).any()
    # its temporal patches, one later
    later = clip(8).unflatten(2, (-1, 2)).roll(1, dims=2).flatten(2, 3)
    assert distance(video(later, labels()), video(clip(8), labels())) > 0.05


# Runs ---------------------------------------------------------------------------------------------

STEPS = split("--log-every 1 --sample-every 0 --val-clips 2")
CLIPS = split("--video --use-rope --temporal-patch-size 2 --num-frames 4 --lr 1e-9")
VIDEOS = [*IMAGES, *STEPS, *CLIPS]


def newest(results):
    return max(results.glob("*/checkpoints/latest.pt"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the checkpoint of a small image run, videos of the same classes)."""
    root = tmp_path_factory.mktemp("runs")
    paths = ["--data-path", make_images(root / "images", 6), "--results-dir", root / "image"]
    flags = split("--max-steps 3 --lr 0.1 --ema-decay 0.5 --sampler ngd")
    run_main(train, *IMAGES, *STEPS, *paths, *flags)
    return newest(root / "image"), write_equal_videos(root / "videos", 10, size=(16, 16))


def test_an_image_run_starts_a_run_of_clips_that_later_phases_continue(runs, tmp_path, capsys):
    path, videos = runs
    image, _, step = checkpoint.load_model(path)
    flags = [*VIDEOS, "--data-path", videos, "--results-dir", tmp_path]
    run_main(train, *flags, "--inflate", path, "--max-steps", 1)
    video, config, first_step = checkpoint.load_model(newest(tmp_path), video=True)
    assert largest_error(image, video, y=1) < 1e-5
    assert step == 3
    assert first_step == 1
    assert config["training"]["inflate"] == str(path)
    assert config["training"]["sampler"] == "ngd"
    state = checkpoint.load(newest(tmp_path))
    assert state["phase"]["ema_start"] == 0
    assert state["optimizer"]["states"][0]["state"][0]["step"] == 1

    capsys.readouterr()
    run_main(train, *flags, "--inflate", path, "--max-steps", 1, "--resume")
    assert "is finished at step 1" in capsys.readouterr().out
    other = checkpoint.load(path)
    other["ema"] = other["model"]  # --inflate takes the EMA weights
    checkpoint.save(tmp_path / "other.pt", other)
    flags_of_other = ["--inflate", tmp_path / "other.pt", "--max-steps", 2, "--resume"]
    line = refused(capsys, train, *flags, *flags_of_other)
    assert f"which began from other weights ({path}); remove one of the two" in line
    run_main(train, *flags, "--ckpt", newest(tmp_path), "--num-frames", 6, "--max-steps", 2)
    later, config, _ = checkpoint.load_model(newest(tmp_path))
    assert later.config == replace(video.config, num_frames=6)
    assert config["training"]["inflate"] is None


def test_an_exported_image_model_starts_clips_of_other_classes_at_the_rate_of_its_images(
    runs, tmp_path
):
    path, videos = runs
    state = checkpoint.load(path)
    state["config"]["data"]["time_scale"] = 1 / 8
    checkpoint.save(tmp_path / "image.pt", state)
    run_main(export, tmp_path / "image.pt", tmp_path / "shared")
    videos = shutil.copytree(videos, tmp_path / "videos")
    (videos / "A").rename(videos / "C")
    flags = [*VIDEOS, "--data-path", videos, "--results-dir", tmp_path, "--max-steps", 1]
    run_main(train, *flags, "--inflate", tmp_path / "shared", "--new-classes")
    (image, _, _), (video, config, _) = map(checkpoint.load_model, (path, newest(tmp_path)))
    assert config["data"]["classes"] == ["B", "C"]
    rows = image.y_embedder.embedding_table.weight[[1, 2, 2]]  # C is new: no class
    torch.testing.assert_close(video.y_embedder.embedding_table.weight, rows)
    no_class = image.config.num_classes
    assert largest_error(image, video, y=no_class, seconds=1 / 8) < 1e-5
    assert largest_error(image, video, y=no_class) > 0.001

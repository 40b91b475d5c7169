"""The pieces of train.py, and short runs of it (in this process, for speed)."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cache_latents
import checkpoint
import preflight
import sample_gd
import train
import transport
from checkpoint import Progress
from forcing import draw_gammas
from runtime import cli, distributed, metrics
from runtime.rng import normal, uniform
from test_vae import add_to_weights
from tiny_data import make_images, make_vae, save_checkpoint
from tiny_videos import scribble, write_video
from training import run_main
from vae import VAE, load_vae
from video.clips import Clips, collate
from video.index import latents_settings, scan_videos, split_videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos") / "data"
    for name in ("A/a.avi", "A/b.avi", "B/c.avi", "B/d.avi"):
        write_video(root / name, 10, size=(16, 16))
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "data", 8)


def refuse(monkeypatch, capsys, *flags):
    """The one line that train.py says before it ends with status 2."""
    monkeypatch.setattr(distributed, "start", lambda: pytest.fail("a device was touched"))
    run_main(train, *flags, status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "opening videos" not in line]
    assert "error: " in line
    return line


TRAIN = ["--video", "--model", "EqM-Ti/4", "--vae", "none", "--image-size", 16, "--num-frames", 8, "--use-rope"]
IMAGES = ["--model", "EqM-Ti/4", "--vae", "none", "--image-size", 16]


def test_a_disk_that_fills_while_samples_are_written_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_gd, "write_samples", full)
    ckpt = save_checkpoint(tmp_path / "rope.pt", use_rope=True, num_frames=4)
    flags = ["--video", "--ckpt", ckpt, "--folder", tmp_path, "--num-samples", 1, "--num-sampling-steps", 2]
    run_main(sample_gd, *flags, status=1)
    assert "sample_gd.py: error: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"), [(70, None, 70), (None, 3, 50 + 8), (55, 3, 55), (None, None, 50 + 3500)]
)
def test_a_run_ends_by_global_steps_or_by_its_own_epochs(max_steps, epochs, expected):
    progress = Progress(step=50, first_step=50)
    assert progress.last_step(max_steps, epochs, num_videos=10, batch_size=4) == expected


def test_more_processes_than_gpus_is_one_line(videos, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    line = refuse(monkeypatch, capsys, *TRAIN, "--data-path", videos)
    assert "--nproc_per_node=8" in line
    assert "2 GPUs" in line


# A step of every kind -----------------------------------------------------------------------------------------------


def run_training(results, *flags, status=0):
    """The metrics rows and the last checkpoint of a short run in this process, if it ends well."""
    flags = [*flags, "--results-dir", results, "--num-workers", 0, "--log-every", 1, "--sample-every", 0, "--depth", 1]
    run_main(train, *flags, status=status)
    if status:
        return None
    (folder,) = results.glob("[0-9]*")
    rows, torn = metrics.read_metrics(folder / "metrics.jsonl")
    assert torn == 0
    return rows, checkpoint.load(folder / "checkpoints/latest.pt")


KINDS = {
    "images": [],
    "images with an energy": ["--ebm", "l2", "--precision", "bf16"],
    "images with rotary positions that are dispersed": ["--use-rope", "--disp", "--grad-accum", 2],
    "images with a position table": ["--use-rope", "--position-table", "space"],
    "videos with all of it": [
        *("--video", "--num-frames", 6, "--use-rope", "--position-table", "space", "--rope-speed", 0.5),
        *("--ebm", "dot", "--disp", "--qk-norm"),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_learns(kind, images, videos, tmp_path):
    flags = KINDS[kind]
    data = videos if "--video" in flags else images
    shared = [*IMAGES, "--data-path", data, "--global-batch-size", 8, "--lr", 3e-3, *flags]
    rows, state = run_training(tmp_path / "r", *shared, "--max-steps", 20, "--val-every", 2)
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    first, last = sum(losses[:3]), sum(losses[-3:])
    assert last < 0.97 * first
    assert all("disp_loss" in row for row in rows) == ("--disp" in flags)
    assert state["config"]["model"]["ebm"] == (flags[flags.index("--ebm") + 1] if "--ebm" in flags else "none")
    assert state["config"]["model"]["temporal_patch_size"] == (4 if "--video" in flags else 1)
    assert state["config"]["model"]["position_table"] == ("space" if "--position-table" in flags else "none")
    assert state["config"]["training"]["video"] == ("--video" in flags)


@pytest.mark.parametrize(("tolerated", "ends"), [(0, True), (1, True), (2, False)])
def test_steps_whose_gradient_is_not_finite_are_left_out_as_long_as_they_are_tolerated(
    tolerated, ends, videos, tmp_path, monkeypatch, capsys
):
    """Steps 3 and 4 give NaN."""
    loss, calls = transport.loss, itertools.count(1)
    monkeypatch.setattr(transport, "loss", lambda *args: loss(*args) * (torch.nan if next(calls) in (3, 4) else 1))
    monkeypatch.setattr(train, "validate", lambda *_: ({"val_loss": 1.0}, []))
    flags = [*TRAIN, "--data-path", videos, "--global-batch-size", 4, "--max-steps", 6, "--skip-nonfinite", tolerated]
    if ends:
        run_training(tmp_path / "r", *flags, status=1)
        assert f"of step {3 + tolerated} is not finite" in capsys.readouterr().err
        return
    rows, state = run_training(tmp_path / "r", *flags)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0]
    assert [row["train_loss"] is None for row in rows] == [False, False, True, True, False, False]
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["phase"]["skipped"] == 0


SHORT = [*TRAIN, "--global-batch-size", 8, "--lr", 1e-3, "--max-steps", 12, "--val-every", 4]


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory):
    return run_training(tmp_path_factory.mktemp("plain") / "r", *SHORT, "--data-path", videos)


VARIANTS = {  # --compile: test_compile.py
    "grad checkpointing": (["--grad-checkpoint"], 1e-6),
    "in parts": (["--grad-accum", 4], 1e-4),
    "in bf16": (["--precision", "bf16"], 3e-2),
}


@pytest.mark.parametrize("way", VARIANTS)
def test_a_variant_learns_what_the_plain_run_learns(way, plain, videos, tmp_path):
    (plain_rows, state), (flags, tolerance) = plain, VARIANTS[way]
    rows, same = run_training(tmp_path / "r", *SHORT, "--data-path", videos, *flags)
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain_rows], rel=tolerance)
    assert rows[-1]["val_loss"] == pytest.approx(plain_rows[-1]["val_loss"], rel=tolerance)
    assert same["model"].keys() == state["model"].keys()


def test_fp16_scales_its_loss_skips_what_overflows_and_keeps_its_scale(videos, tmp_path, monkeypatch):
    for module in (cli, preflight):
        monkeypatch.setattr(module, "check_precision", lambda precision: None)  # the CPU can do it, slowly
    shared = [*TRAIN, "--data-path", videos, "--global-batch-size", 4, "--precision", "fp16"]
    rows, state = run_training(tmp_path / "r", *shared, "--max-steps", 12)
    assert all(np.isfinite([row["train_loss"], row["grad_norm"]]).all() for row in rows)
    scale = state["optimizer"]["scaler"]["scale"]
    assert scale == 65536 * 0.5 ** sum(row["skipped"] for row in rows)
    best = tmp_path / "r/000-EqM-Ti-4-f8-rope/checkpoints/latest.pt"
    more, state = run_training(tmp_path / "s", *shared, "--max-steps", 13, "--ckpt", best)
    assert state["optimizer"]["scaler"]["scale"] == scale * 0.5 ** more[0]["skipped"]


def test_a_run_keeps_its_precision_when_it_is_resumed_without_the_flag(videos, tmp_path):
    shared = [*TRAIN, "--data-path", videos, "--global-batch-size", 4]
    _, state = run_training(tmp_path / "r", *shared, "--max-steps", 2, "--precision", "bf16")
    for flags, precision in (([], "bf16"), (["--precision", "fp32"], "fp32"), ([], "fp32")):
        steps = state["step"] + 1
        _, state = run_training(tmp_path / "r", *shared, "--max-steps", steps, "--resume", *flags)
        assert (state["step"], state["config"]["training"]["precision"]) == (steps, precision)


@pytest.mark.parametrize(
    ("flags", "decay"), [([], 0.0), (["--optimizer", "muon"], 0.1), (["--optimizer", "muon", "--weight-decay", 0], 0.0)]
)
def test_muon_decays_its_weights_unless_told_otherwise(flags, decay, videos, tmp_path):
    shared = [*TRAIN, "--data-path", videos, "--global-batch-size", 4, "--max-steps", 1]
    _, state = run_training(tmp_path / "r", *shared, *flags)
    assert weight_decays(state) == {decay}
    shared[-1] = 2
    _, state = run_training(tmp_path / "r", *shared, *flags[:2], "--resume")  # a run keeps its own
    assert weight_decays(state) == {decay}


def weight_decays(state):
    return {saved["param_groups"][0]["weight_decay"] for saved in state["optimizer"]["states"]}


def test_positions_are_kept_by_later_phases_and_other_ones_are_refused(videos, tmp_path, capsys):
    flags = [*TRAIN, "--data-path", videos, "--global-batch-size", 4, "--position-table", "space", "--rope-speed", 0.5]
    flags += ["--forcing", 0.5]
    run_training(tmp_path, *flags, "--max-steps", 1)
    plain = [*TRAIN, "--data-path", videos, "--global-batch-size", 4, "--depth", 1, "--num-workers", 0]
    (ckpt,) = tmp_path.glob("000*/checkpoints/0000001.pt")
    shared = [*plain, "--results-dir", tmp_path, "--max-steps", 2]
    capsys.readouterr()
    for start in (["--resume"], ["--ckpt", ckpt]):
        for other in (["--position-table", "none"], ["--rope-speed", 0.25]):
            run_main(train, *shared, *start, *other, status=2)
            lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            assert len(lines) == 1 and other[0] in lines[0]
    run_main(train, *shared, "--num-frames", 9, "--ckpt", ckpt)
    state = checkpoint.load(next(tmp_path.glob("001*/checkpoints/latest.pt")))
    assert (state["config"]["model"]["position_table"], state["config"]["model"]["rope_speed"]) == ("space", 0.5)
    printed = capsys.readouterr().out
    assert "rotary positions of speed 0.5 and a table of space" in printed
    assert "note: --ckpt was trained with --forcing 0.5, this phase is without" in printed


def test_the_first_rank_of_a_machine_checks_for_all_of_them(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert preflight.check_run(SimpleNamespace()) is None  # without a look at a flag, file or folder


def test_the_dispersive_loss_is_logged_apart_and_drives_the_activations_apart(images, tmp_path):
    shared = [*IMAGES, "--data-path", images, "--global-batch-size", 8, "--lr", 1e-3]
    rows, _ = run_training(tmp_path / "with", *shared, "--disp", "--max-steps", 15)
    plain, _ = run_training(tmp_path / "without", *shared, "--max-steps", 1)
    assert rows[0]["train_loss"] == plain[0]["train_loss"]  # of the field alone
    dispersions = [row["disp_loss"] for row in rows]
    assert dispersions[-1] < dispersions[0] <= 0


def test_the_network_is_told_the_point_on_the_path_the_label_and_the_frame_rate_and_nothing_else(videos):
    seen = []

    def network(*args, **flags):
        seen.append((args, flags))
        return torch.zeros_like(args[0]), None

    scan = scan_videos(videos)
    clips = Clips(videos, scan.videos, scan.classes, 4, 16, frame_interval=(2, 2))
    batch, device = collate([clips[index] for index in range(3)]), torch.device("cpu")
    args = SimpleNamespace(global_seed=3, gamma_shift=2.0, precision="fp32", disp=False, forcing=0)
    config = SimpleNamespace(class_dropout_prob=0.5, num_classes=2, temporal_patch_size=4)
    losses, target_square = train.training_losses(network, VAE("none"), batch, config, args, stream=5, device=device)

    x, noise = batch["clips"].float() / 127.5 - 1, normal(3, "noise", 5, [0, 1, 2], (3, 4, 16, 16))
    gamma = transport.shift_gamma(uniform(3, "gamma", 5, [0, 1, 2]), 2.0)
    is_dropped = uniform(3, "label drop", 5, [0, 1, 2]) < 0.5
    ((inputs, flags),) = seen
    assert torch.equal(inputs[0], transport.interpolate(x, noise, gamma))
    assert torch.equal(inputs[1], torch.where(is_dropped, 2, batch["labels"]))
    assert inputs[2].tolist() == pytest.approx([0.08] * 3)
    assert len(inputs) == 3
    assert flags == {"return_features": True}
    assert losses.keys() == {"train_loss"}
    torch.testing.assert_close(losses["train_loss"], transport.target(x, noise, gamma).square().mean())
    torch.testing.assert_close(target_square, losses["train_loss"])  # as the network predicts zero


def test_forced_clips_have_a_level_per_frame_and_clean_frames_add_nothing_to_the_target(videos):
    scan = scan_videos(videos)
    clips = Clips(videos, scan.videos, scan.classes, 6, 16)
    batch, seen = collate([clips[index] for index in range(4)]), []
    network = lambda x, *rest, **flags: (seen.append(x) or torch.zeros_like(x), None)  # noqa: E731
    args = SimpleNamespace(global_seed=3, gamma_shift=2.0, precision="fp32", disp=False, forcing=1.0)
    config = SimpleNamespace(class_dropout_prob=0.1, num_classes=2, temporal_patch_size=4)
    device = torch.device("cpu")
    losses, target_square = train.training_losses(network, VAE("none"), batch, config, args, stream=5, device=device)
    gamma = draw_gammas(3, 5, range(4), 6, 4, 2.0, 1.0)
    x, noise = batch["clips"].float() / 127.5 - 1, normal(3, "noise", 5, range(4), (3, 6, 16, 16))
    assert gamma.shape == (4, 6) and (gamma == 1).any() and (gamma < 1).any()
    for clip, frame in itertools.product(range(4), range(6)):
        level = gamma[clip, frame]
        expected = level * x[clip, :, frame] + (1 - level) * noise[clip, :, frame]
        assert torch.equal(seen[0][clip, :, frame], expected)
    torch.testing.assert_close(target_square, losses["train_loss"])
    assert target_square < transport.zero_loss(x.square().mean())


# From a latent cache ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def cache(videos, tiny_vae, tmp_path_factory):
    """The latents of `videos`, mirrored ones included."""
    out = tmp_path_factory.mktemp("cache") / "latents"
    flags = ["--data-path", videos, "--vae", tiny_vae, "--image-size", 16, "--out", out, "--with-flips"]
    run_main(cache_latents, *flags)
    return out


FROM_LATENTS = ["--video", "--model", "EqM-Ti/4", "--num-frames", 8, "--use-rope", "--frame-interval", 1, 2]


def test_a_cache_trains_as_encoding_on_the_fly_does(videos, cache, tiny_vae, tmp_path):
    shared = [*FROM_LATENTS, "--global-batch-size", 4, "--lr", 1e-3, "--max-steps", 6, "--val-every", 1]
    slow, _ = run_training(tmp_path / "slow", *shared, "--data-path", videos, "--vae", tiny_vae, "--image-size", 16)
    fast, state = run_training(tmp_path / "fast", *shared, "--data-path", cache)
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert [row[key] for row in fast] == pytest.approx([row[key] for row in slow], rel=1e-3)
    data = state["config"]["data"]
    assert (data["vae"], data["image_size"], data["classes"]) == (str(tiny_vae), 16, ["A", "B"])
    assert data["vae_sha256"] == load_vae(str(tiny_vae)).sha256


def test_the_posterior_is_drawn_anew_for_each_sample_of_a_clip(cache):
    scan = scan_videos(cache)
    clips = Clips(cache, scan.videos[:1], scan.classes, 10, 16, flip=False)  # one video, all of its frames
    batch = collate([clips[0], clips[1]])
    assert torch.equal(batch["clips"][0], batch["clips"][1])
    vae = load_vae(latents_settings(cache)["vae"])
    x = vae.latents_of(batch["clips"], 0, 0, batch["indices"].tolist())
    mean, std = batch["clips"][0].float()
    drawn = (x / vae.scale - mean) / std
    assert not torch.allclose(drawn[0], drawn[1])
    assert drawn.std().item() == pytest.approx(1, abs=0.05)


def test_train_refuses_another_vae_than_that_of_its_cache(cache, tiny_vae, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(tiny_vae, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"scaling_factor": 0.18215', '"scaling_factor": 0.5'))
    flags = [*FROM_LATENTS, "--data-path", cache, "--results-dir", tmp_path / "results", "--vae", other]
    assert "has scale 0.5" in refuse(monkeypatch, capsys, *flags)
    (other / "config.json").write_text(config)
    add_to_weights(other, 0.1)
    assert "another VAE: its weights have SHA-256" in refuse(monkeypatch, capsys, *flags)


def test_without_mirrored_latents_no_clip_is_mirrored_and_a_note_says_so(cache, tmp_path, capsys):
    plain = shutil.copytree(cache, tmp_path / "plain")
    about = (plain / "latents.json").read_text()
    (plain / "latents.json").write_text(about.replace('"flips": true', '"flips": false'))
    shared = [*FROM_LATENTS, "--data-path", plain, "--global-batch-size", 4, "--max-steps", 1]
    _, state = run_training(tmp_path / "r", *shared)
    assert state["config"]["training"]["no_flip"] is True
    assert "no clip is mirrored" in capsys.readouterr().out


# Messages, several to a run -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default:a token holds")
def test_a_first_run_and_its_resume_say_all_that_is_not_as_asked(tmp_path, capsys):
    data, results, vae = tmp_path / "data", tmp_path / "results", make_vae(tmp_path / "vae")
    for name in ("A/a", "A/b", "B/c", "B/d", "B/e", "B/f"):
        write_video(data / f"{name}.avi", 20, size=(16, 16))
    flags = ["--video", "--model", "EqM-Ti/2", "--temporal-patch-size", 4, "--use-rope", "--num-frames", 8]
    flags += ["--hidden-size", 48, "--num-heads", 2]
    shared = ["--data-path", data, "--global-batch-size", 2, "--resume", "--val-clips", 2]
    shared += ["--frame-interval", 4, "--optimizer", "muon"]
    shared += ["--position-table", "space"]
    rows, state = run_training(results, *flags, *shared, "--vae", vae, "--image-size", 8, "--max-steps", 1)
    log = next(results.glob("*/log.txt")).read_text()
    printed = capsys.readouterr().out
    assert f"--resume: nothing to resume in {results}/[0-9]*-EqM-Ti-2-f8-rope: starting from the beginning" in printed
    (short,) = [line for line in log.splitlines() if "too short for 8 frames that are 4 apart" in line]
    assert short.startswith("note: 5 of 5 training videos") and short.endswith("from 2 on")
    assert log.count("note: a token holds 64 values") == 1  # a warning, as a line
    assert checkpoint.trained_time_scale(state["config"]["data"]) == pytest.approx(2 / 25)  # as the clips were seen
    assert (rows[-1]["lr"], rows[-1]["muon_lr"]) == (1e-4, 0.01)

    more = ["--lr", 1e-3, "--num-workers", 0, "--max-steps", 2]
    shared = shared[:-2]
    run_training(results, *flags, *shared, *more)  # neither --vae nor --image-size again
    (run,) = results.glob("[0-9]*")
    changed = "resumed with other flags: max_steps 1 -> 2, lr 0.0001 -> 0.001"
    assert (run / "log.txt").read_text().count(changed) == 1
    rows, _ = metrics.read_metrics(run / "metrics.jsonl", notes=True)
    assert [row["note"] for row in rows if "note" in row] == [changed]
    assert "note" not in str(metrics.read_metrics(run / "metrics.jsonl"))
    old, new = ((run / name).read_text() for name in ("config-until-0000001.json", "config.json"))
    assert '"lr": 0.0001' in old and '"lr": 0.001' in new

    (data / "B").rename(data / "C")
    capsys.readouterr()
    run_main(train, *flags, *shared, *more[:-1], 3, "--depth", 1, "--results-dir", results, status=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"has the classes A, C (2), --resume, {run}/checkpoints/latest.pt has A, B (2): a run keeps" in line
    (data / "C").rename(data / "B")
    shutil.move(tmp_path / "vae", tmp_path / "moved")
    ckpt = run / "checkpoints/latest.pt"
    new = [*flags, *shared, "--max-steps", 3, "--ckpt", ckpt, "--results-dir", tmp_path / "new"]
    for script, own in ((train, new), (sample_gd, ["--video", "--ckpt", ckpt])):
        run_main(script, *own, status=2)
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"the checkpoint's VAE {tmp_path / 'vae'} is not there: name its new place with --vae" in line


def test_one_unreadable_validation_video_does_not_stop_a_run_that_has_others(tmp_path, capsys):
    data = tmp_path / "data"
    for index in range(10):
        write_video(data / "A" / f"{index}.mov", 20, codec="libx264", size=(16, 16))
    _, (victim,) = split_videos(data, scan_videos(data).videos, 0.05)
    scribble(data / victim.path)
    assert scan_videos(data).unreadable == []  # it opens
    flags = [*TRAIN, "--num-frames", 12, "--data-path", data, "--global-batch-size", 2, "--max-steps", 1]
    rows, _ = run_training(tmp_path / "r", *flags)
    assert rows[-1]["val_loss"] > 0 and rows[-1]["bad_videos"] == 1
    line = f"{victim.path} can't be decoded; other clips take its place (bad so far: 1 of 10)"
    assert line in capsys.readouterr().out

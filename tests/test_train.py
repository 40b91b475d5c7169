"""The pieces of train.py, and short runs of it (in this process, for speed)."""

import shutil
from dataclasses import replace
from shlex import split
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import checkpoint
import preflight
import sample_gd
import train
import transport
from make_moving_shapes import CLASSES
from models import model_config
from runtime import cli, metrics
from runtime.rng import normal, uniform
from runtime.untrusted import read_json
from tiny_data import make_images, make_vae
from tiny_videos import scribble, write_equal_videos, write_video
from training import IMAGES, batch_of, counted_steps, losses_of, refused, run_main
from transport import OBJECTIVES
from vae import load_vae
from video.index import scan_videos, split_videos

VIDEOS = split("""
    --video
    --model EqM-Ti/4
    --depth 1
    --num-frames 8
    --use-rope
""")
TRAIN = [*VIDEOS, *split("--vae none --image-size 16 --global-batch-size 4")]
CONFIG = model_config("EqM-Ti/4", input_size=16, in_channels=3, num_classes=2, num_frames=8)
LOGGED = split("--num-workers 0 --log-every 1 --sample-every 0")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_equal_videos(tmp_path_factory.mktemp("videos") / "data", 10, size=(16, 16))


@pytest.fixture(scope="module")
def training(videos):
    """Flags of a run on these videos."""
    return [*TRAIN, "--data-path", videos]


def run_training(results, *flags):
    """The metrics rows and the last checkpoint of a short run in this process."""
    run_main(train, *flags, "--results-dir", results, *LOGGED)
    (folder,) = results.glob("[0-9]*")
    rows, _ = metrics.read_metrics(folder / "metrics.jsonl")
    return rows, checkpoint.load(folder / "checkpoints/latest.pt")


def column(rows, name):
    """The values of a metric in the rows that have it."""
    return [row[name] for row in rows if name in row]


def test_too_many_processes_are_one_line_from_the_first_rank(training, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    preflight.check_run(SimpleNamespace())  # without a look at a flag, file or folder
    monkeypatch.setenv("LOCAL_RANK", "2")
    line = refused(capsys, train, *training)
    assert "--nproc_per_node=8" in line
    assert "GPUs on this machine: 2" in line


@pytest.mark.parametrize(
    "max_steps, epochs, position, pairs_share, expected",
    [
        (70, None, 0, None, 70),
        (None, 3, 0, None, 50 + 8),
        (55, 3, 0, None, 55),
        (None, None, 0, None, 50 + 3500),
        (None, 3, 18, None, 50 + 3),  # a resumed run whose batches were larger before
        (None, 3, 32, None, 50),
        (None, 3, 0, 0.5, 50 + 15),  # real clips take half of each batch
    ],
)
def test_a_run_ends_at_its_global_step_or_after_its_epochs(
    max_steps, epochs, position, pairs_share, expected
):
    args = SimpleNamespace(
        max_steps=max_steps,
        epochs=epochs,
        num_frames=8,
        global_batch_size=4,
        pairs_share=pairs_share,
        real_data="videos" if pairs_share else None,
    )
    data = SimpleNamespace(train={8: range(10)})
    progress = checkpoint.Progress(step=50, first_step=50, position=position)
    assert preflight.only_phase(args, checkpoint.Start(progress), data).last_step == expected


def test_defaults_of_train_py_for_the_published_recipe_equal_the_paper(monkeypatch):
    """AdamW at 1e-4 without weight decay, uniform gamma, no forcing, label dropout 0.1."""
    monkeypatch.setattr("sys.argv", ["train.py", "--data-path", "x"])
    published = {"optimizer": "adamw", "lr": 1e-4, "gamma_shift": 1, "forcing": 0, "lr_decay": 0}
    published |= {"weight_decay": None}  # only --optimizer muon sets it above 0
    assert vars(train.parse_args()).items() >= published.items()
    assert CONFIG.class_dropout_prob == 0.1


# A step of every kind -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, expected",
    [  # narrow, as two backward passes take long, above all in bf16
        ("--ebm l2 --precision bf16 --hidden-size 96 --num-heads 2", ("l2", 1, "none")),
        ("--use-rope --disp --grad-accum 2", ("none", 1, "none")),
        (
            "--video --num-frames 6 --use-rope --position-table space --rope-speed 0.5 "
            "--ebm dot --disp --qk-norm --hidden-size 96 --num-heads 2",
            ("dot", 4, "space"),
        ),
    ],
)
def test_every_kind_of_training_learns(flags, expected, videos, tmp_path):
    is_video = "--video" in flags
    data = videos if is_video else make_images(tmp_path / "data", 8)
    steps = split("""
        --global-batch-size 8
        --lr 3e-3
        --max-steps 20
        --val-every 2
    """)
    rows, state = run_training(tmp_path / "r", *IMAGES, "--data-path", data, *steps, *split(flags))
    losses = column(rows, "val_loss")
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    dispersions = column(rows, "disp_loss")
    assert len(dispersions) == (20 if "--disp" in flags else 0)
    if dispersions:
        assert dispersions[-1] < dispersions[0] <= 0
    model = state["config"]["model"]
    assert (model["ebm"], model["temporal_patch_size"], model["position_table"]) == expected
    assert state["config"]["training"]["video"] == is_video


def test_a_validation_loss_that_is_not_finite_is_no_best(training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", lambda *_, **__: ({"val_loss": torch.nan}, []))
    run_training(tmp_path / "r", *training, "--max-steps", 2)
    assert (
        "step 2: validation loss nan; not finite: best.pt stays as it is" in capsys.readouterr().out
    )


SHORT = split("""
    --global-batch-size 8
    --lr 1e-3
    --max-steps 6
    --val-every 3
""")


@pytest.fixture(scope="module")
def plain(training, tmp_path_factory):
    return run_training(tmp_path_factory.mktemp("plain") / "r", *training, *SHORT)


# --grad-accum: test_end_to_end.py; --compile: test_compile.py; --grad-checkpoint: test_models.py
def test_bf16_learns_the_same_as_the_plain_run(plain, training, tmp_path):
    plain_rows, _ = plain
    rows, _ = run_training(tmp_path / "r", *training, *SHORT, "--precision", "bf16")
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(rows, name) == pytest.approx(column(plain_rows, name), rel=3e-2)


def test_fp16_scales_its_loss_skips_what_overflows_and_keeps_its_scale(
    training, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "check_precision", lambda precision: None)  # the CPU can do it, slowly
    fp16 = [*training, "--precision", "fp16"]
    rows, state = run_training(tmp_path / "r", *fp16, "--max-steps", 6)
    for name in ("train_loss", "grad_norm"):
        assert np.isfinite(column(rows, name)).all()
    scale = state["optimizer"]["scaler"]["scale"]
    assert scale == 65536 * 0.5 ** sum(column(rows, "skipped"))
    ckpt = tmp_path / "r/000-EqM-Ti-4-f8-rope/checkpoints/latest.pt"
    (row,), state = run_training(tmp_path / "s", *fp16, "--max-steps", 7, "--ckpt", ckpt)
    assert state["optimizer"]["scaler"]["scale"] == scale * 0.5 ** row["skipped"]


def test_muon_decays_its_weights_by_default_and_a_run_keeps_its_decay(plain, training, tmp_path):
    def weight_decays(state):
        return {saved["param_groups"][0]["weight_decay"] for saved in state["optimizer"]["states"]}

    _, adamw = plain
    assert weight_decays(adamw) == {0.0}
    muon = [*training, "--optimizer", "muon"]
    for flags, decay in (([], 0.1), (["--weight-decay", 0], 0.0)):
        results = tmp_path / str(decay)
        _, state = run_training(results, *muon, *flags, "--max-steps", 1)
        assert weight_decays(state) == {decay}
        _, state = run_training(results, *muon, "--resume", "--max-steps", 2)
        assert weight_decays(state) == {decay}


@pytest.mark.parametrize(
    "forcing, regions, disp", [(0.0, 0.0, True), (1.0, 0.0, False), (0.5, 0.5, False)]
)
def test_the_network_sees_only_noisy_clip_condition_and_frame_rate(forcing, regions, disp):
    clips = torch.randint(256, (8, 3, 6, 16, 16)).byte()
    f = torch.zeros(clips.shape)
    network = Mock(return_value=(f, torch.arange(4.0).unsqueeze(1)) if disp else f)
    batch = batch_of(clips)
    config = replace(CONFIG, class_dropout_prob=0.5)
    flags = {"disp": disp, "forcing": forcing, "forcing_regions": regions}
    losses, target_square = losses_of(network, batch, config, **flags)

    x = clips.float() / 127.5 - 1
    indices = range(8)
    noise = normal(5, "noise", 7, indices, (3, 6, 16, 16))
    gamma = transport.draw_gammas(
        5,
        7,
        indices,
        num_frames=6,
        patch=4,
        shift=3.0,
        share=forcing,
        region_share=regions,
        size=16,
    )
    is_dropped = uniform(5, "label drop", 7, indices) < transport.condition_dropout(gamma, 0.5)
    assert is_dropped.any() and not is_dropped.all()
    ((x_gamma, y, time_scales), others) = network.call_args
    assert others == {"return_features": disp}
    level = gamma.reshape(8, 1, -1, *gamma.shape[2:] or (1, 1))
    assert torch.equal(x_gamma, level * x + (1 - level) * noise)
    assert torch.equal(y, torch.where(is_dropped, 2, batch["y"]))
    assert torch.equal(time_scales, batch["time_scales"])
    assert ("disp_loss" in losses) == disp
    # as the network predicts zero
    expected = OBJECTIVES["eqm"].target(x, noise, gamma).square().mean()
    torch.testing.assert_close(losses["train_loss"], expected)
    torch.testing.assert_close(target_square, expected)


# From a latent cache ------------------------------------------------------------------------------


def test_training_from_a_cache_equals_encoding_on_the_fly(shapes, latents, tiny_vae, tmp_path):
    settings = """
        --frame-interval 1 2
        --global-batch-size 4
        --lr 1e-3
        --max-steps 4
        --val-every 2
    """
    shared = [*VIDEOS, *split(settings)]
    encoding = ["--data-path", shapes, "--vae", tiny_vae, "--image-size", 16]
    slow, _ = run_training(tmp_path / "slow", *shared, *encoding)
    fast, state = run_training(tmp_path / "fast", *shared, "--data-path", latents)
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(fast, name) == pytest.approx(column(slow, name), rel=1e-3)
    expected = {"vae": str(tiny_vae), "image_size": 16, "classes": sorted(CLASSES)}
    expected["vae_sha256"] = load_vae(str(tiny_vae)).sha256
    assert state["config"]["data"].items() >= expected.items()


def test_without_mirrored_latents_no_clip_is_mirrored_and_a_note_says_so(latents, tmp_path, capsys):
    plain = shutil.copytree(latents, tmp_path / "plain")
    settings = plain / "latents.json"
    settings.write_text(settings.read_text().replace('"flips": true', '"flips": false'))
    flags = ["--data-path", plain, "--global-batch-size", 4, "--max-steps", 1]
    _, state = run_training(tmp_path / "r", *VIDEOS, *flags)
    assert state["config"]["training"]["no_flip"]
    assert "no clip is mirrored" in capsys.readouterr().out


# What a run says of itself ------------------------------------------------------------------------


def test_a_resume_elsewhere_reports_changes_of_typed_flags_only(training, tmp_path, monkeypatch):
    def use_machine(precisions, cores):
        monkeypatch.setattr(cli, "precisions", lambda: precisions)
        monkeypatch.setattr(train.os, "cpu_count", lambda: cores)

    def make_loader_here(clips, batches, num_workers, **settings):
        workers.append(num_workers)
        return make_loader(clips, batches, num_workers=0, **settings)

    def config_of(name="config.json"):
        return read_json(run / name)

    make_loader = train.make_loader
    workers = []
    monkeypatch.setattr(train, "make_loader", make_loader_here)
    flags = [*training, "--results-dir", tmp_path, "--max-steps", 3, "--sample-every", 0]
    use_machine(["bf16", "fp32"], cores=2)
    with counted_steps(train, stop_after=1):
        run_main(train, *flags)
    (run,) = tmp_path.glob("[0-9]*")
    assert workers == [2, 1]  # one loader process is enough for validation
    use_machine(["fp32", "bf16"], cores=1)
    with counted_steps(train, stop_after=1):
        run_main(train, *flags, "--resume")
    log = run / "log.txt"
    assert "other flags" not in log.read_text()
    typed = set(config_of()["typed"])
    assert typed > {"model", "max_steps", "resume"}
    assert not typed & {"precision", "num_workers", "lr"}
    assert config_of()["training"]["precision"] == "bf16"
    assert config_of()["training"]["num_workers"] == 1

    recipe = tmp_path / "my.txt"
    recipe.write_text("--lr 1e-3  # faster\n--precision fp32")
    run_main(train, *flags, "--resume", f"@{recipe}")
    rows, _ = metrics.read_metrics(run / "metrics.jsonl", notes=True)
    (note,) = column(rows, "note")
    assert note == "resumed with other flags: lr 0.0001 -> 0.001, precision bf16 -> fp32"
    assert log.read_text().count(note) == 1
    assert config_of("config-until-0000002.json")["training"]["lr"] == 1e-4
    assert config_of()["training"]["lr"] == 1e-3
    assert config_of()["training"]["recipe"] == recipe.read_text()
    run_main(train, *flags, "--max-steps", 4, "--resume")  # without these flags
    assert "max_steps 3 -> 4, lr 0.001 -> 0.0001" in log.read_text()
    assert config_of()["training"]["precision"] == "fp32"  # a run keeps its own


@pytest.mark.filterwarnings("default:a token holds")
def test_a_run_its_resume_and_a_later_phase_report_all_deviations(tmp_path, capsys):
    data = tmp_path / "data"
    results = tmp_path / "results"
    vae = make_vae(tmp_path / "vae")
    for name in ("A/a", "A/b", "B/c", "B/d", "B/e", "B/f"):
        write_video(data / f"{name}.avi", 20, size=(16, 16))
    flags = split(f"""
        --data-path {data}
        --results-dir {results}
        --video
        --use-rope
        --model EqM-Ti/2
        --depth 1
        --temporal-patch-size 4
        --hidden-size 48
        --num-heads 2
        --num-frames 8
        --frame-interval 4
        --optimizer muon
        --global-batch-size 2
        --val-clips 2
        --num-workers 0
    """)
    first = split(f"""
        --position-table space
        --rope-speed 0.5
        --forcing 0.5
        --vae {vae}
        --image-size 8
        --num-classes 5
        --max-steps 1
        --resume
    """)
    rows, state = run_training(results, *flags, *first)
    (run,) = results.glob("[0-9]*")
    log = (run / "log.txt").read_text()
    printed = capsys.readouterr().out
    ckpt = run / "checkpoints/latest.pt"
    assert f"--resume: no run EqM-Ti-2-f8-rope in {results}; starting from the beginning" in printed
    assert "training: 5 videos in 2 classes; validation: 1 video, " in log
    assert "skipped: 0 files with fewer than 8 frames, 0 files that can't be opened" in log
    short = "note: --frame-interval 4: clips of 8 frames don't fit into 5 of 5 training videos"
    assert f"{short}; these use the largest interval that fits, 2 or more" in log
    assert log.count("note: a token holds 64 values") == 1  # a warning, as a line
    assert "rotary positions of speed 0.5 and a table of space" in log
    assert state["config"]["data"]["time_scale"] == pytest.approx(2 / 25)  # as the clips were seen
    assert rows[-1]["lr"] == 1e-4
    assert rows[-1]["muon_lr"] == 0.01

    flags += ["--max-steps", 2]
    line = refused(capsys, train, *flags, "--resume", "--rope-speed", 0.25)
    assert f"--resume of {ckpt}" in line
    assert "--rope-speed" in line
    (data / "B").rename(data / "C")
    classes = f"has the classes A, C, --resume of {ckpt} has A, B; pass its data"
    assert classes in refused(capsys, train, *flags, "--resume")
    (data / "C").rename(data / "B")
    capsys.readouterr()
    run_main(train, *flags, "--resume", "--dry-run")
    assert "note: a token holds 64 values" in capsys.readouterr().out
    run_main(train, *flags, "--resume")
    run_main(train, *flags, "--num-frames", 9, "--ckpt", ckpt.with_name("0000001.pt"))
    printed = capsys.readouterr().out
    assert "note: --ckpt was trained with --forcing 0.5, this phase is not, so it may" in printed
    (ckpt_of_phase,) = results.glob("001*/checkpoints/latest.pt")
    model = checkpoint.load(ckpt_of_phase)["config"]["model"]
    expected = {"position_table": "space", "rope_speed": 0.5, "num_classes": 5}
    assert model.items() >= expected.items()
    shutil.move(vae, tmp_path / "moved")
    line = f"VAE {vae}: not found; pass its new path with --vae"
    assert line in refused(capsys, train, *flags, "--max-steps", 3, "--ckpt", ckpt)
    assert line in refused(capsys, sample_gd, "--video", "--ckpt", ckpt, "--folder", tmp_path / "s")


@pytest.mark.parametrize("part", ["training", "validation", "neither: it can't be opened"])
def test_one_unreadable_video_is_named_once_and_counted_and_does_not_stop_a_run(
    part, tmp_path, capsys
):
    data = tmp_path / "data"
    for index in range(10):
        write_video(data / "A" / f"{index}.mov", 20, codec="libx264", size=(16, 16))
    victim, *_ = split_videos(data, scan_videos(data).videos, 0.05)[part == "validation"]
    if "opened" in part:
        (data / victim.path).write_bytes(b"no video at all")
    else:
        scribble(data / victim.path)
        assert scan_videos(data).unreadable == []  # it opens
    flags = split("--num-frames 12 --global-batch-size 9 --max-steps 1")
    rows, _ = run_training(tmp_path / "r", *TRAIN, *flags, "--data-path", data)
    assert rows[-1]["val_loss"] > 0
    assert rows[-1]["bad_videos"] == 1
    line = f"{victim.path} can't be decoded; others take its place (corrupt so far: 1 of 10)"
    log = next(tmp_path.glob("r/*/log.txt")).read_text()
    assert log.count(line) == capsys.readouterr().out.count(line) == 1

"""The pieces of train.py, and short runs of it (in this process, for speed)."""

import itertools
import json
import shutil
from types import SimpleNamespace

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
from tiny_data import make_images, make_vae
from tiny_videos import scribble, write_equal_videos, write_video
from training import IMAGES, counted_steps, refused, run_main
from transport import OBJECTIVES
from vae import VAE, load_vae
from video.index import scan_videos, split_videos

VIDEOS = ["--video", "--model", "EqM-Ti/4", "--depth", 1, "--num-frames", 8, "--use-rope"]
TRAIN = [*VIDEOS, "--vae", "none", "--image-size", 16, "--global-batch-size", 4]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_equal_videos(tmp_path_factory.mktemp("videos") / "data", 10, size=(16, 16))


def run_training(results, *flags):
    """The metrics rows and the last checkpoint of a short run in this process."""
    flags = [
        *flags,
        "--results-dir",
        results,
        "--num-workers",
        0,
        "--log-every",
        1,
        "--sample-every",
        0,
    ]
    run_main(train, *flags)
    (folder,) = results.glob("[0-9]*")
    return metrics.read_metrics(folder / "metrics.jsonl")[0], checkpoint.load(
        folder / "checkpoints/latest.pt"
    )


def test_too_many_processes_are_one_line_from_the_first_rank(videos, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (
        preflight.check_run(SimpleNamespace()) is None
    )  # without a look at a flag, file or folder
    monkeypatch.setenv("LOCAL_RANK", "2")
    line = refused(capsys, train, *TRAIN, "--data-path", videos)
    assert "--nproc_per_node=8" in line and "GPUs on this machine: 2" in line


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"),
    [(70, None, 70), (None, 3, 50 + 8), (55, 3, 55), (None, None, 50 + 3500)],
)
def test_a_run_ends_at_its_global_step_or_after_its_epochs(max_steps, epochs, expected):
    args = SimpleNamespace(max_steps=max_steps, epochs=epochs, num_frames=8, global_batch_size=4)
    data = SimpleNamespace(train={8: range(10)})
    progress = checkpoint.Progress(step=50, first_step=50)
    assert preflight.only_phase(args, progress, data).last_step == expected


def test_defaults_of_train_py_for_the_published_recipe_equal_the_paper(monkeypatch):
    """AdamW at 1e-4 without weight decay, uniform gamma, no forcing, label dropout 0.1."""
    monkeypatch.setattr("sys.argv", ["train.py", "--data-path", "x"])
    args = train.parse_args()
    assert (args.optimizer, args.lr, args.gamma_shift, args.forcing, args.lr_decay) == (
        "adamw",
        1e-4,
        1.0,
        0.0,
        0.0,
    )
    assert args.weight_decay is None  # only --optimizer muon sets it above 0
    assert (
        model_config("EqM-S/4", input_size=16, in_channels=3, num_classes=2).class_dropout_prob
        == 0.1
    )


# A step of every kind -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--ebm l2 --precision bf16", ("l2", 1, "none")),
        ("--use-rope --disp --grad-accum 2", ("none", 1, "none")),
        (
            (
                "--video --num-frames 6 --use-rope --position-table space --rope-speed 0.5 --ebm "
                "dot --disp --qk-norm"
            ),
            ("dot", 4, "space"),
        ),
    ],
)
def test_every_kind_of_training_learns(flags, expected, videos, tmp_path):
    data = videos if "--video" in flags else make_images(tmp_path / "data", 8)
    shared = [*IMAGES, "--data-path", data, "--global-batch-size", 8, "--lr", 3e-3, *flags.split()]
    rows, state = run_training(tmp_path / "r", *shared, "--max-steps", 20, "--val-every", 2)
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    dispersions = [row["disp_loss"] for row in rows if "disp_loss" in row]
    assert (len(dispersions) == 20 and dispersions[-1] < dispersions[0] <= 0) == ("--disp" in flags)
    assert (
        tuple(state["config"]["model"][n] for n in ("ebm", "temporal_patch_size", "position_table"))
        == expected
    )
    assert state["config"]["training"]["video"] == ("--video" in flags)


def test_a_loss_that_is_not_finite_ends_the_run(videos, tmp_path, monkeypatch, capsys):
    losses = transport.Objective.losses
    calls = itertools.count(1)

    def broken(*args, **flags):
        each, *rest = losses(*args, **flags)
        return each * (torch.nan if next(calls) == 3 else 1), *rest

    monkeypatch.setattr(transport.Objective, "losses", broken)
    flags = [*TRAIN, "--data-path", videos, "--max-steps", 6, "--num-workers", 0]
    run_main(train, *flags, "--results-dir", tmp_path, "--sample-every", 0, status=1)
    assert "of step 3 is not finite" in capsys.readouterr().err


def test_a_validation_loss_that_is_not_finite_is_no_best(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", lambda *_: ({"val_loss": torch.nan}, []))
    run_training(tmp_path / "r", *TRAIN, "--data-path", videos, "--max-steps", 2)
    assert (
        "step 2: validation loss nan; not finite: best.pt stays as it is" in capsys.readouterr().out
    )


SHORT = [*TRAIN, "--global-batch-size", 8, "--lr", 1e-3, "--max-steps", 6, "--val-every", 3]


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory):
    return run_training(tmp_path_factory.mktemp("plain") / "r", *SHORT, "--data-path", videos)


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [  # --compile: test_compile.py
        (["--grad-checkpoint", "selective"], 1e-6),
        (["--grad-accum", 4], 1e-4),
        (["--precision", "bf16"], 3e-2),
    ],
)
def test_a_variant_learns_the_same_as_the_plain_run(flags, tolerance, plain, videos, tmp_path):
    plain_rows, state = plain
    rows, same = run_training(tmp_path / "r", *SHORT, "--data-path", videos, *flags)
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx(
            [row[key] for row in plain_rows], rel=tolerance
        )
    assert rows[-1]["val_loss"] == pytest.approx(plain_rows[-1]["val_loss"], rel=tolerance)
    assert same["model"].keys() == state["model"].keys()


def test_fp16_scales_its_loss_skips_what_overflows_and_keeps_its_scale(
    videos, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "check_precision", lambda precision: None)  # the CPU can do it, slowly
    shared = [*TRAIN, "--data-path", videos, "--precision", "fp16"]
    rows, state = run_training(tmp_path / "r", *shared, "--max-steps", 6)
    assert all(np.isfinite([row["train_loss"], row["grad_norm"]]).all() for row in rows)
    scale = state["optimizer"]["scaler"]["scale"]
    assert scale == 65536 * 0.5 ** sum(row["skipped"] for row in rows)
    best = tmp_path / "r/000-EqM-Ti-4-f8-rope/checkpoints/latest.pt"
    more, state = run_training(tmp_path / "s", *shared, "--max-steps", 7, "--ckpt", best)
    assert state["optimizer"]["scaler"]["scale"] == scale * 0.5 ** more[0]["skipped"]


@pytest.mark.parametrize(("flags", "decay"), [([], 0.1), (["--weight-decay", 0], 0.0)])
def test_muon_decays_its_weights_by_default_and_a_run_keeps_its_decay(
    flags, decay, plain, videos, tmp_path
):
    def weight_decays(state):
        return {saved["param_groups"][0]["weight_decay"] for saved in state["optimizer"]["states"]}

    assert weight_decays(plain[1]) == {0.0}
    muon = [*TRAIN, "--data-path", videos, "--optimizer", "muon"]
    for steps, own in ((1, flags), (2, ["--resume"])):
        _, state = run_training(tmp_path / "r", *muon, *own, "--max-steps", steps)
        assert weight_decays(state) == {decay}


@pytest.mark.parametrize(
    ("forcing", "regions", "disp"), [(0.0, 0.0, True), (1.0, 0.0, False), (0.5, 0.5, False)]
)
def test_the_network_sees_only_noisy_clip_condition_and_frame_rate(forcing, regions, disp):
    seen = []
    (B, T) = (4, 6)

    def network(*inputs, **flags):
        seen.append((inputs, flags))
        f = torch.zeros_like(inputs[0])
        features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        return (f, features) if disp else f

    clips = torch.randint(256, (B, 3, T, 16, 16)).byte()
    y = torch.tensor([0, 1, 1, 0])
    indices = [0, 1, 2, 3]
    batch = {
        "clips": clips,
        "y": y,
        "time_scales": torch.full((B,), 0.08),
        "indices": torch.tensor(indices),
    }
    args = SimpleNamespace(
        global_seed=3, gamma_shift=2.0, precision="fp32", disp=disp, forcing=forcing
    )
    args.forcing_regions = regions
    config = model_config(
        "EqM-S/4", class_dropout_prob=0.5, num_classes=2, use_rope=True, input_size=16
    )
    losses, target_square = train.training_losses(
        network, VAE("none"), batch, config, args, 5, torch.device("cpu")
    )

    x = clips.float() / 127.5 - 1
    noise = normal(3, "noise", 5, indices, (3, T, 16, 16))
    gamma = transport.draw_gammas(3, 5, indices, T, 4, 2.0, forcing, 1, regions, 16)
    dropped = uniform(3, "label drop", 5, indices) < transport.condition_dropout(gamma, 0.5)
    ((inputs, flags),) = seen
    level = gamma.reshape(B, 1, -1, *((16, 16) if regions else (1, 1)))
    assert torch.equal(inputs[0], level * x + (1 - level) * noise)
    assert (
        torch.equal(inputs[1], torch.where(dropped, 2, y)) and dropped.any() and not dropped.all()
    )
    assert (
        inputs[2].tolist() == pytest.approx([0.08] * B)
        and len(inputs) == 3
        and flags == {"return_features": disp}
    )
    assert losses.keys() == {"train_loss"} | (
        {"disp_loss"} if disp else set()
    )  # apart from that of the field
    torch.testing.assert_close(
        losses["train_loss"], OBJECTIVES["eqm"].target(x, noise, gamma).square().mean()
    )
    torch.testing.assert_close(target_square, losses["train_loss"])  # as the network predicts zero


# From a latent cache ------------------------------------------------------------------------------


def test_training_from_a_cache_equals_encoding_on_the_fly(shapes, latents, tiny_vae, tmp_path):
    shared = [
        *VIDEOS,
        "--frame-interval",
        1,
        2,
        "--global-batch-size",
        4,
        "--lr",
        1e-3,
        "--max-steps",
        4,
    ]
    shared += ["--val-every", 2]
    slow, _ = run_training(
        tmp_path / "slow", *shared, "--data-path", shapes, "--vae", tiny_vae, "--image-size", 16
    )
    fast, state = run_training(tmp_path / "fast", *shared, "--data-path", latents)
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert [row.get(key, 0) for row in fast] == pytest.approx(
            [row.get(key, 0) for row in slow], rel=1e-3
        )
    data = state["config"]["data"]
    assert (data["vae"], data["image_size"], data["classes"]) == (
        str(tiny_vae),
        16,
        sorted(CLASSES),
    )
    assert data["vae_sha256"] == load_vae(str(tiny_vae)).sha256


def test_without_mirrored_latents_no_clip_is_mirrored_and_a_note_says_so(latents, tmp_path, capsys):
    plain = shutil.copytree(latents, tmp_path / "plain")
    (plain / "latents.json").write_text(
        (plain / "latents.json").read_text().replace('"flips": true', '"flips": false')
    )
    _, state = run_training(
        tmp_path / "r", *VIDEOS, "--data-path", plain, "--global-batch-size", 4, "--max-steps", 1
    )
    assert (
        state["config"]["training"]["no_flip"] and "no clip is mirrored" in capsys.readouterr().out
    )


# What a run says of itself ------------------------------------------------------------------------


def test_a_resume_elsewhere_reports_changes_of_typed_flags_only(videos, tmp_path, monkeypatch):
    def on_machine(bf16, cores):
        monkeypatch.setattr(
            cli, "precisions", lambda: ["bf16", "fp32"] if bf16 else ["fp32", "bf16"]
        )
        monkeypatch.setattr(train.os, "cpu_count", lambda: cores)

    def in_this_process(clips, batches, num_workers, *rest):
        workers.append(num_workers)
        return make_loader(clips, batches, 0, *rest)

    make_loader = train.make_loader
    workers = []
    monkeypatch.setattr(train, "make_loader", in_this_process)
    shared = [
        *TRAIN,
        "--data-path",
        videos,
        "--results-dir",
        tmp_path,
        "--max-steps",
        3,
        "--sample-every",
        0,
    ]
    on_machine(bf16=True, cores=2)
    with counted_steps(train, stop_after=1):
        run_main(train, *shared)
    (run,) = tmp_path.glob("[0-9]*")
    assert workers == [2, 1]  # one loader process is enough for validation
    on_machine(bf16=False, cores=1)
    with counted_steps(train, stop_after=1):
        run_main(train, *shared, "--resume")
    assert "other flags" not in (run / "log.txt").read_text()
    config = json.loads((run / "config.json").read_text())
    typed = set(config["typed"])
    assert {"model", "max_steps", "resume"} < typed and not {
        "precision",
        "num_workers",
        "lr",
    } & typed
    assert (config["training"]["precision"], config["training"]["num_workers"]) == ("bf16", 1)

    run_main(train, *shared, "--resume", "--lr", 1e-3, "--precision", "fp32")
    (note,) = [
        row["note"]
        for row in metrics.read_metrics(run / "metrics.jsonl", notes=True)[0]
        if "note" in row
    ]
    assert note == "resumed with other flags: lr 0.0001 -> 0.001, precision bf16 -> fp32"
    assert (run / "log.txt").read_text().count(note) == 1
    old, new = (
        json.loads((run / name).read_text())
        for name in ("config-until-0000002.json", "config.json")
    )
    assert (old["training"]["lr"], new["training"]["lr"]) == (1e-4, 1e-3)
    run_main(train, *shared, "--max-steps", 4, "--resume")  # without these flags
    assert "max_steps 3 -> 4, lr 0.001 -> 0.0001" in (run / "log.txt").read_text()
    assert (
        json.loads((run / "config.json").read_text())["training"]["precision"] == "fp32"
    )  # a run keeps its own


@pytest.mark.filterwarnings("default:a token holds")
def test_a_run_its_resume_and_a_later_phase_report_all_deviations(tmp_path, capsys):
    data = tmp_path / "data"
    results = tmp_path / "results"
    vae = make_vae(tmp_path / "vae")
    for name in ("A/a", "A/b", "B/c", "B/d", "B/e", "B/f"):
        write_video(data / f"{name}.avi", 20, size=(16, 16))
    flags = [
        *VIDEOS,
        "--model",
        "EqM-Ti/2",
        "--temporal-patch-size",
        4,
        "--hidden-size",
        48,
        "--num-heads",
        2,
    ]
    flags += [
        "--frame-interval",
        4,
        "--optimizer",
        "muon",
        "--data-path",
        data,
        "--global-batch-size",
        2,
    ]
    own = [
        "--position-table",
        "space",
        "--rope-speed",
        0.5,
        "--forcing",
        0.5,
        "--vae",
        vae,
        "--image-size",
        8,
    ]
    rows, state = run_training(
        results, *flags, *own, "--val-clips", 2, "--resume", "--max-steps", 1
    )
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
    assert (rows[-1]["lr"], rows[-1]["muon_lr"]) == (1e-4, 0.01)

    again = [
        *flags,
        "--val-clips",
        2,
        "--results-dir",
        results,
        "--num-workers",
        0,
        "--max-steps",
        2,
    ]
    for start, named in (
        (["--resume"], f"--resume of {ckpt}"),
        (["--ckpt", ckpt], f"--ckpt {ckpt}"),
    ):
        for other in (["--position-table", "none"], ["--rope-speed", 0.25]):
            line = refused(capsys, train, *again, *start, *other)
            assert named in line and other[0] in line
    (data / "B").rename(data / "C")
    classes = f"has the classes A, C (2), --resume of {ckpt} has A, B (2); pass its data"
    assert classes in refused(capsys, train, *again, "--resume")
    (data / "C").rename(data / "B")
    capsys.readouterr()
    run_main(train, *again, "--resume", "--dry-run")
    assert "note: a token holds 64 values" in capsys.readouterr().out
    run_main(train, *again, "--resume")
    run_main(train, *again, "--num-frames", 9, "--ckpt", ckpt.with_name("0000001.pt"))
    assert (
        "note: --ckpt was trained with --forcing 0.5, this phase is not, so it may"
        in capsys.readouterr().out
    )
    model = checkpoint.load(next(results.glob("001*/checkpoints/latest.pt")))["config"]["model"]
    assert (model["position_table"], model["rope_speed"]) == ("space", 0.5)
    shutil.move(vae, tmp_path / "moved")
    for script, new in (
        (train, [*again, "--max-steps", 3, "--ckpt", ckpt]),
        (sample_gd, ["--video", "--ckpt", ckpt]),
    ):
        assert f"VAE {vae}: not found; pass its new path with --vae" in refused(
            capsys, script, *new
        )


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
    flags = [
        *TRAIN,
        "--num-frames",
        12,
        "--data-path",
        data,
        "--global-batch-size",
        9,
        "--max-steps",
        1,
    ]
    rows, _ = run_training(tmp_path / "r", *flags)
    assert rows[-1]["val_loss"] > 0 and rows[-1]["bad_videos"] == 1
    line = f"{victim.path} can't be decoded; others take its place (corrupt so far: 1 of 10)"
    log = next(tmp_path.glob("r/*/log.txt")).read_text()
    assert log.count(line) == capsys.readouterr().out.count(line) == 1

"""sample_gd.py: a folder of samples that no crash leaves half, settings of the sampler, windows."""

import json
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoint
import gallery
import sample_gd
import train
from generation import SAMPLER, generate
from process import end, spawn, wait_until
from published import write_export
from scoring import manifest
from test_generation import TUNED
from tiny_data import random_checkpoint
from tiny_videos import write_equal_videos
from training import (
    FEW_STEPS,
    PYTHON,
    ROOT,
    Training,
    content,
    error_of,
    on_two_ranks,
    refused,
    run_main,
    sample_here,
)
from video.index import scan_videos
from video.samples import read_samples


def images(places, folder, count, *flags, **expected):
    return sample_here(
        places / "image.pt", folder, "--num-samples", count, "--batch-size", 2, *flags, **expected
    )


def names_of(count):
    return {f"{index:06d}.png" for index in range(count)} | {
        "samples.npz",
        "samples.json",
        "grid.png",
    }


def test_samples_that_were_cut_short_are_removed_by_the_next_call(places, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    fail_at = 0

    def full(*args, **kwargs):
        for number, batch in enumerate(generate(*args, **kwargs)):
            if number == fail_at:
                raise OSError(28, "No space left on device")
            yield batch

    assert images(places, folder, 5)[1]["mean_evaluations"] == 3
    before = content(folder)
    assert before.keys() == names_of(5)
    with monkeypatch.context() as patch:
        patch.setattr(sample_gd, "generate", full)
        images(places, folder, 101, status=1)
        assert content(folder) == before  # not even begun
        fail_at = 50
        images(places, folder, 101, status=1)
    left = {f"{index:06d}.png" for index in range(100)} | {"samples.unfinished"}
    assert content(folder).keys() == left  # each batch was written before the next was made
    assert "not finished" in error_of(read_samples, "--samples s", folder)
    images(places, folder, 3)
    assert (with_previews := content(folder)).keys() == names_of(3)
    with monkeypatch.context() as patch:
        patch.setattr(sample_gd, "write_reports", lambda *_: pytest.fail("here"))
        with pytest.raises(pytest.fail.Exception, match="here"):
            images(places, folder, 3, "--stop-below", 0.1)
    assert "samples.npz" in content(folder) and "samples.json" not in content(
        folder
    )  # which comes last
    images(places, folder, 3, "--no-previews")
    assert content(folder).keys() == with_previews.keys() - {"grid.png"}
    assert all(
        data == with_previews[name]
        for name, data in content(folder).items()
        if name != "samples.json"
    )


def test_samples_of_another_run_are_replaced_only_with_overwrite(
    places, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "s"
    other = shutil.copytree(places, tmp_path / "other")
    images(places, folder, 2)
    found = {"format": manifest.FORMAT}
    manifest.write_manifest(folder / "motion.json", found | {"generated": {"samples": str(folder)}})
    manifest.write_manifest(
        folder / "fvd.json", found | {"generated": {"weights_sha256": "of another model"}}
    )
    reports = ("energy.csv", "energy.png", "evaluations.csv", "evaluations.png")  # of another call
    for name in (*reports, "motion.png", "mine.json", "mine.png"):
        (folder / name).write_text("{}")
    before = content(folder)
    images(other, folder, 2, "--no-overwrite", status=2)
    assert f"--folder {folder}: has samples of {places / 'image.pt'}" in capsys.readouterr().err
    assert content(folder) == before
    images(places, folder, 3, "--no-overwrite")  # of the same run
    assert content(folder).keys() == names_of(3) | {"mine.json", "mine.png", "fvd.json"}
    assert "note" not in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, about = images(other, folder, 2, "--no-overwrite", "--overwrite")
    assert about["flags"]["ckpt"] == str(other / "image.pt")
    assert "note: 3 of 4 ranks are idle" in capsys.readouterr().out


def test_samples_never_become_training_videos(places, tmp_path, capsys):
    root = tmp_path / "videos"
    pixels = places / "pixels.pt"
    write_equal_videos(root)
    before = content(tmp_path)
    lengths = ["--num-frames", 8, 16]
    (root / "Made-f16").mkdir()
    shutil.copyfile(root / "A/one.avi", root / "Made-f16/one.avi")
    taken = {root / "A": "one.avi", root: "A/one.avi", root / "Made-f16": "one.avi"}
    for folder, file in taken.items():
        sample_here(pixels, folder, "--overwrite", status=2)
        line = f"--folder {folder}: {file} was not made by sample_gd.py; name a new folder"
        assert line in capsys.readouterr().err
    sample_here(pixels, root / "Made", *lengths, status=2)  # the second name of the list
    assert f"--folder {root}/Made-f16: one.avi was not made" in capsys.readouterr().err
    (root / "Made-f16/one.avi").unlink()
    assert content(tmp_path) == before
    (root / "Made-f16/.nfs01").write_text("")  # of the file system
    sampling = ["--ckpt", pixels, "--video", *FEW_STEPS, "--folder", root / "Made", *lengths]
    run_main(sample_gd, *sampling)
    flags = ["--video", "--data-path", root, "--vae", "none", "--image-size", 16, "--num-frames", 4]
    flags += ["--results-dir", tmp_path / "runs", "--use-rope"]
    capsys.readouterr()
    run_main(train, *flags, "--model", "EqM-Ti/4", "--dry-run")
    text = capsys.readouterr().out
    places_of_samples = f"{root / 'Made-f16'}, {root / 'Made-f8'}"
    assert text.count(f"skipped 2 folders with samples of sample_gd.py: {places_of_samples};") == 1
    assert scan_videos(root).classes == ["A", "B"] and len(scan_videos(root).videos) == 4


def test_a_kill_leaves_no_half_file_and_the_next_call_cleans_up(places, tmp_path):
    flags = [
        "--ckpt",
        places / "pixels.pt",
        "--video",
        *FEW_STEPS,
        "--folder",
        tmp_path / "s",
        "--num-frames",
        4000,
    ]
    process = spawn(*PYTHON, ROOT / "EqM/sample_gd.py", *flags)  # endless
    wait_until((tmp_path / "s/samples.unfinished").exists, process)
    process.kill()
    end(process, -signal.SIGKILL)
    left = content(tmp_path / "s").keys()
    assert "samples.unfinished" in left and not [
        n for n in left if n.endswith((".mp4", ".gif", ".npz", ".json"))
    ]
    assert sample_here(places / "pixels.pt", tmp_path / "s")[0].shape[:2] == (2, 8)
    assert not [name for name in content(tmp_path / "s") if name.endswith((".tmp", ".unfinished"))]


@pytest.mark.parametrize(
    ("model", "window"), [("pixels", 8), ("latents", 8), ("fixed", 8), ("plain", 20)]
)
def test_more_frames_than_in_training_are_sampled_window_by_window(
    places, tmp_path, capsys, model, window
):
    folder = tmp_path / "s"
    ckpt = places / f"{model}.pt"
    clips, about = sample_here(ckpt, folder, "--num-frames", 20)
    assert (
        clips.shape[:2] == (2, 20)
        and about["source"]["window"] == window
        and "note" not in capsys.readouterr().out
    )
    files = {"000000.mp4", "000001.mp4", "000000.gif", "000001.gif", "grid.gif", "sheet.png"}
    assert content(folder).keys() == files | {"samples.npz", "samples.json"}
    short, _ = sample_here(ckpt, folder, "--num-frames", 8, "--no-previews")
    assert np.array_equal(short, clips[:, :8]) == (
        model != "plain"
    )  # which has other noise, in one window
    if model == "pixels":
        run_main(gallery, folder)
        run_main(gallery, folder, "--png", tmp_path / "picture.png")
        assert (folder / "gallery.html").exists() and (tmp_path / "picture.png").exists()
    sample_here(ckpt, folder, "--num-frames", 12, "--window", 8, "--no-previews")
    assert ("trained without --forcing, or on clips of one" in capsys.readouterr().out) == (
        model == "plain"
    )


def test_sampling_uses_the_settings_of_training_unless_a_flag_replaces_them(tmp_path, capsys):
    ckpt = tmp_path / "a.pt"
    chosen = {"guidance_chosen": True}
    random_checkpoint(ckpt, training=TUNED | chosen, num_frames=4)
    write_export(tmp_path / "exported", checkpoint.load(ckpt), "fp32", "a card")
    for place, flags, changed, said in (
        (ckpt, [], {}, "ngd, 2 evaluations of step size 0.05, guidance 1.5"),
        (tmp_path / "exported", [], {}, "ngd, 2 evaluations of step size 0.05, guidance 1.5"),
        (
            ckpt,
            ["--cfg-scale", 2, "--stop-below"],
            {"cfg_scale": 2.0, "stop_below": 1.0},
            "guidance 2",
        ),
        (
            ckpt,
            ["--sampler", "heun"],
            {"sampler": "heun", "stop_below": None},
            "heun, 3 evaluations, guidance 1.5",
        ),
    ):
        run_main(
            sample_gd,
            "--video",
            "--ckpt",
            place,
            "--folder",
            tmp_path / "s",
            "--num-samples",
            1,
            *flags,
        )
        flags = json.loads((tmp_path / "s/samples.json").read_text())["flags"]
        assert (
            flags.items() >= (TUNED | chosen | changed).items() and said in capsys.readouterr().out
        )


def test_a_weaker_model_guides_instead_of_the_class(places, tmp_path, capsys):
    strong = places / "pixels.pt"
    weak = tmp_path / "weak.pt"

    def made(*flags):
        return sample_here(strong, tmp_path / "s", "--no-previews", *flags)

    plain, about = made("--cfg-scale", 1)
    same, _ = made("--cfg-scale", 5, "--weak-ckpt", strong)
    assert (
        np.array_equal(plain, same) and about["source"]["weak_sha256"] is None
    )  # f + 5 (f - f) is f
    state = checkpoint.load(strong)
    state["ema"] = {name: weight / 2 for name, weight in state["ema"].items()}
    checkpoint.save(weak, state)
    guided, about = made("--cfg-scale", 2, "--weak-ckpt", weak, "--classes", "none")
    assert not np.array_equal(
        made("--classes", "none")[0], guided
    )  # samples without a class are guided, too
    assert about["source"]["weak_sha256"] == checkpoint.weights_sha256(state["ema"])
    assert f"guidance 2 by {weak}" in capsys.readouterr().out
    refused(
        capsys,
        sample_gd,
        "--video",
        "--ckpt",
        strong,
        "--weak-ckpt",
        places / "latents.pt",
        "--folder",
        "new",
    )


def test_training_keeps_the_settings_over_a_resume_and_in_the_next_phase(shapes, tmp_path):
    def train_on(run, *flags):
        run_main(train, *run.command_flags("--num-frames", 8, "--sample-every", 9, *flags))
        training = json.loads((run.folder / "config.json").read_text())["training"]
        return {name: training[name] for name in SAMPLER}

    first = Training(shapes, tmp_path / "first", 2, flags=["--frame-interval", 1, 4])
    assert (
        train_on(
            first, *[w for name in TUNED for w in (f"--{name.replace('_', '-')}", TUNED[name])]
        )
        == TUNED
    )
    assert train_on(replace(first, steps=3), "--resume") == TUNED
    second = Training(
        shapes, tmp_path / "second", 4, flags=["--ckpt", first.folder / "checkpoints/0000003.pt"]
    )
    assert train_on(second, "--cfg-scale", 3) == TUNED | {"cfg_scale": 3.0}
    data = json.loads((first.folder / "config.json").read_text())[
        "data"
    ]  # of 25 frames 8 are at most 3 apart, not 4
    assert (data["time_scale"], data["longest_time_scale"]) == pytest.approx((0.04, 0.12))


def test_rank_0_alone_opens_a_split_with_the_index_beside_the_runs(
    places, shapes, tmp_path, monkeypatch
):
    folder = tmp_path / "runs/000-a/checkpoints"
    folder.mkdir(parents=True)
    ckpt = shutil.copy(places / "pixels.pt", folder)
    split = ["--given", shapes, "--given-split", "val", "--num-samples", 3, "--batch-size", 1]

    sampling = ["sample_gd.py", "--video", "--ckpt", ckpt, *FEW_STEPS, *split, "--folder"]
    on_two_ranks(*sampling, tmp_path / "two")
    assert len([*(tmp_path / "runs").glob(".video_index-*.json")]) == 1
    clips, about = sample_here(places / "pixels.pt", tmp_path / "one", *split)
    two, other = read_samples("two", tmp_path / "two")[1::-1]
    assert np.array_equal(clips, two) and about["real"] == other["real"]
    stderr = on_two_ranks(
        *sampling, tmp_path / "x", "--num-frames", 28, status=1
    )  # torchrun's own status
    (line,) = [line for line in stderr.splitlines() if "error: " in line]
    assert (
        "the longest video of --given-split val has 25 frames" in line
        and not (tmp_path / "x").exists()
    )
    monkeypatch.setenv("RANK", "1")
    assert sample_gd.open_split(SimpleNamespace(given_split="val"), None) is None

"""sample_gd.py: a folder of samples that no crash leaves half, settings of the sampler, windows."""

import shutil
from dataclasses import replace
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoint
import sample_gd
import train
from generation import generate
from plans import SAMPLER
from published import write_export
from runtime.untrusted import read_json
from scoring import manifest
from test_generation import TUNED
from tiny_data import random_checkpoint
from tiny_videos import write_equal_videos
from training import (
    FEW_STEPS,
    TINY,
    Training,
    content,
    error_of,
    on_two_ranks,
    run_main,
    sample_here,
)
from video.index import scan_videos
from video.samples import read_samples


def images(places, folder, count, *flags, **expected):
    few = ["--num-samples", count, "--batch-size", 2]
    return sample_here(places / "image.pt", folder, *few, *flags, **expected)


def names_of(count, *others):
    return {f"{index:06d}.png" for index in range(count)} | set(others)


COMPLETE = "samples.npz", "samples.json", "grid.png"


def test_samples_that_were_cut_short_are_removed_by_the_next_call(places, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    fail_at = 0

    def full(*args, **kwargs):
        for number, batch in enumerate(generate(*args, **kwargs)):
            if number == fail_at:
                raise OSError(28, "No space left on device")
            yield batch

    _, about = images(places, folder, 5)
    assert about["mean_evaluations"] == 3
    before = content(folder)
    assert before.keys() == names_of(5, *COMPLETE)
    with monkeypatch.context() as patch:
        patch.setattr(sample_gd, "generate", full)
        images(places, folder, 101, status=1)
        assert content(folder) == before  # not even begun
        fail_at = 50
        images(places, folder, 101, status=1)
    # Each batch was written before the next was made
    assert content(folder).keys() == names_of(100, "samples.unfinished")
    assert "not finished" in error_of(read_samples, "--samples s", folder)
    images(places, folder, 3)
    with_previews = content(folder)
    assert with_previews.keys() == names_of(3, *COMPLETE)
    with monkeypatch.context() as patch:
        patch.setattr(sample_gd, "write_reports", lambda *_: pytest.fail("here"))
        with pytest.raises(pytest.fail.Exception, match="here"):
            images(places, folder, 3, "--stop-below", 0.1)
    assert "samples.npz" in content(folder)
    assert "samples.json" not in content(folder)  # which comes last
    images(places, folder, 3, "--no-previews")
    without = content(folder)
    assert without.keys() == with_previews.keys() - {"grid.png"}
    del without["samples.json"]
    assert without.items() <= with_previews.items()


def test_samples_of_another_run_are_replaced_only_with_overwrite(
    places, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "s"
    other = shutil.copytree(places, tmp_path / "other")
    images(places, folder, 2)
    for name, generated in (
        ("motion.json", {"samples": str(folder)}),
        ("fvd.json", {"weights_sha256": "of another model"}),
    ):
        scores = {"format": manifest.FORMAT, "generated": generated}
        manifest.write_manifest(folder / name, scores)
    reports = ("energy.csv", "energy.png", "evaluations.csv", "evaluations.png")  # of another call
    for name in (*reports, "motion.png", "mine.json", "mine.png"):
        (folder / name).write_text("{}")
    before = content(folder)
    images(other, folder, 2, "--no-overwrite", status=2)
    assert f"--folder {folder}: has samples of {places / 'image.pt'}" in capsys.readouterr().err
    assert content(folder) == before
    images(places, folder, 3, "--no-overwrite")  # of the same run
    assert content(folder).keys() == names_of(3, *COMPLETE, "mine.json", "mine.png", "fvd.json")
    assert "note" not in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, about = images(other, folder, 2, "--no-overwrite", "--overwrite")
    assert about["flags"]["ckpt"] == str(other / "image.pt")
    assert "note: 3 of 4 ranks are idle" in capsys.readouterr().out


def test_samples_never_become_training_videos(places, tmp_path, capsys):
    root = tmp_path / "videos"
    made = root / "Made-f16"
    pixels = places / "pixels.pt"
    write_equal_videos(root)
    before = content(tmp_path)
    made.mkdir()
    shutil.copyfile(root / "A/one.avi", made / "one.avi")
    sampling = ["--video", "--ckpt", pixels, "--folder", root / "Made", *FEW_STEPS]
    sampling += ["--num-frames", 8, 16]
    run_main(sample_gd, *sampling, "--overwrite", status=2)
    error = capsys.readouterr().err
    assert f"--folder {made}: one.avi was not made by sample_gd.py; name a new folder" in error
    (made / "one.avi").unlink()
    assert content(tmp_path) == before
    (made / ".nfs01").write_text("")  # of the file system
    run_main(sample_gd, *sampling)
    capsys.readouterr()
    training = ["--data-path", root, "--results-dir", tmp_path / "runs", "--dry-run"]
    run_main(train, *training, *TINY, "--val-clips", 1)
    skipped = "skipped 2 folders with samples of sample_gd.py: "
    assert capsys.readouterr().out.count(f"{skipped}{made}, {root / 'Made-f8'};") == 1
    scan = scan_videos(root)
    assert scan.classes == ["A", "B"]
    assert len(scan.videos) == 4


@pytest.mark.parametrize(("model", "window"), [("pixels", 8), ("plain", 20)])
def test_more_frames_than_in_training_are_sampled_window_by_window(
    places, tmp_path, capsys, model, window
):
    folder = tmp_path / "s"
    ckpt = places / f"{model}.pt"
    clips, about = sample_here(ckpt, folder, "--num-frames", 20)
    assert clips.shape[:2] == (2, 20)
    assert about["source"]["window"] == window
    assert "note" not in capsys.readouterr().out
    short, _ = sample_here(ckpt, folder, "--num-frames", 8, "--no-previews")
    is_forced = model != "plain"  # without forcing, all frames are one window, with other noise
    assert np.array_equal(short, clips[:, :8]) == is_forced
    sample_here(ckpt, folder, "--num-frames", 12, "--window", 8, "--no-previews")
    note = "trained without --forcing, or on clips of one"
    assert (note in capsys.readouterr().out) == (not is_forced)


def test_sampling_uses_the_settings_of_training_unless_a_flag_replaces_them(tmp_path, capsys):
    ckpt = tmp_path / "a.pt"
    exported = tmp_path / "exported"
    settings = TUNED | {"guidance_chosen": True}
    random_checkpoint(ckpt, training=settings, num_frames=4)
    write_export(exported, checkpoint.load(ckpt), "fp32", "a card")
    kept = "ngd, 2 evaluations of step size 0.05, guidance 1.5"
    for path, flags, changes, words in (
        (ckpt, "", {}, kept),
        (exported, "", {}, kept),
        (ckpt, "--cfg-scale 2 --stop-below", {"cfg_scale": 2, "stop_below": 1}, "guidance 2"),
        (
            ckpt,
            "--sampler heun",
            {"sampler": "heun", "stop_below": None},
            "heun, 3 evaluations, guidance 1.5",
        ),
    ):
        folder = ["--folder", tmp_path / "s", "--num-samples", 1]
        run_main(sample_gd, "--video", "--ckpt", path, *folder, *split(flags))
        about = read_json(tmp_path / "s/samples.json")
        assert about["flags"].items() >= (settings | changes).items()
        assert words in capsys.readouterr().out


def test_a_weaker_model_guides_instead_of_the_class(places, tmp_path, capsys):
    strong = places / "pixels.pt"
    weak = tmp_path / "weak.pt"

    def sample(*flags):
        return sample_here(strong, tmp_path / "s", "--no-previews", *flags)

    state = checkpoint.load(strong)
    state["ema"] = {name: weight / 2 for name, weight in state["ema"].items()}
    checkpoint.save(weak, state)
    unguided, _ = sample("--classes", "none")
    guided, about = sample("--cfg-scale", 2, "--weak-ckpt", weak, "--classes", "none")
    assert not np.array_equal(unguided, guided)  # samples without a class are guided, too
    assert about["source"]["weak_sha256"] == checkpoint.weights_sha256(state["ema"])
    assert f"guidance 2 by {weak}" in capsys.readouterr().out


def test_training_keeps_the_settings_over_a_resume_and_in_the_next_phase(shapes, tmp_path):
    def train_on(run, *flags):
        run_main(train, *run.command_flags("--num-frames", 8, "--sample-every", 9, *flags))
        training = read_json(run.folder / "config.json")["training"]
        return {name: training[name] for name in SAMPLER}

    first = Training(shapes, tmp_path / "first", 2, flags=["--frame-interval", 1, 4])
    tuned = [f"--{name.replace('_', '-')}={value}" for name, value in TUNED.items() if value]
    assert train_on(first, *tuned) == TUNED
    assert train_on(replace(first, steps=3), "--resume") == TUNED
    ckpt = ["--ckpt", first.folder / "checkpoints/0000003.pt"]
    second = Training(shapes, tmp_path / "second", 4, flags=ckpt)
    assert train_on(second, "--cfg-scale", 3) == TUNED | {"cfg_scale": 3.0}
    data = first.saved()["config"]["data"]
    # Of 25 frames 8 are at most 3 apart, not 4
    assert (data["time_scale"], data["longest_time_scale"]) == pytest.approx((0.04, 0.12))


def test_rank_0_alone_opens_a_split_with_the_index_beside_the_runs(
    places, shapes, tmp_path, monkeypatch
):
    folder = tmp_path / "runs/000-a/checkpoints"
    folder.mkdir(parents=True)
    ckpt = shutil.copy(places / "pixels.pt", folder)
    given = ["--given", shapes, *split("--given-split val --num-samples 3 --batch-size 1")]
    sampling = ["--video", "--ckpt", ckpt, *FEW_STEPS, *given, "--folder"]
    on_two_ranks(sample_gd, *sampling, tmp_path / "two")
    assert len([*(tmp_path / "runs").glob(".video_index-*.json")]) == 1
    clips, about = sample_here(places / "pixels.pt", tmp_path / "one", *given)
    about_two, clips_of_two, _ = read_samples("two", tmp_path / "two")
    assert np.array_equal(clips, clips_of_two)
    assert about["real"] == about_two["real"]
    output = on_two_ranks(sample_gd, *sampling, tmp_path / "x", "--num-frames", 28, status=2)
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "the longest video of --given-split val has 25 frames" in line
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("RANK", "1")
    assert sample_gd.open_split(SimpleNamespace(given_split="val"), None) is None

"""evaluate.py end to end: against naive versions, repeated from its manifests, on one rank and on two."""

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import checkpoint
import evaluate
import sample_gd
from runtime.untrusted import file_sha256
from scoring import frechet, manifest, sources
from tiny_data import make_images, make_latents, make_state, write_npz
from training import ROOT, TORCHRUN, run_main
from video.clips import Clips
from video.index import scan_videos, split_videos

SIZE, FRAMES = 16, 8


class Detector(torch.nn.Module):
    """Called as the I3D and the Inception of the field are: 6 features, of clips or of images."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        x = x.flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(Detector()).save(path)
    return path


def read_clips(root, split, count, frames=FRAMES, stream="real"):
    """(clips uint8 (N, T, H, W, 3), labels, classes) of a data set, read without sources.py."""
    scan = scan_videos(root)
    videos = split_videos(root, scan.videos, 0.05)[split == "val"]
    clips = Clips(root, videos, scan.classes, frames, SIZE, flip=False, stream=stream)
    items = [clips[index] for index in range(count)]
    pixels = torch.stack([item["clip"].permute(1, 2, 3, 0) for item in items]).numpy()
    return pixels, [item["label"] for item in items], scan.classes


def write_samples(folder, clips, labels, classes, **about):
    folder.mkdir()
    write_npz(folder / "samples.npz", clips, labels)
    (folder / "samples.json").write_text(json.dumps({"classes": classes, "time_scale": 1 / 25} | about))
    return folder


@pytest.fixture(scope="module")
def samples(shapes, tmp_path_factory):
    """A sample folder that holds real clips."""
    about = {"source": {"temporal_patch_size": 4}, "flags": {"cfg_scale": 1.0}}
    return write_samples(tmp_path_factory.mktemp("samples") / "s", *read_clips(shapes, "val", 12, stream="a"), **about)


def make_checkpoint(path, classes, video=True):
    """Write a checkpoint as train.py does, with random weights."""
    shape = {"temporal_patch_size": 4, "num_frames": 4} if video else {"temporal_patch_size": 1, "num_frames": 1}
    state = make_state(70, input_size=SIZE, num_classes=len(classes), depth=1, use_rope=True, **shape)
    torch.manual_seed(0)
    state["ema"] = {name: torch.randn_like(value) / 5 for name, value in state["ema"].items()}
    state["config"]["data"]["classes"] = classes
    checkpoint.save(path, state)
    return path


@pytest.fixture(scope="module")
def ckpt(shapes, tmp_path_factory):
    classes = scan_videos(shapes).classes
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "best.pt", classes)


FEW = ["--num-workers", 0, "--resamples", 4]
SHORT = ["--num-sampling-steps", 4, "--stepsize", 0.05, "--cfg-scale", 1.5]


def run(*flags, status=0):
    """The manifest that evaluate.py writes for these flags, which begin with --out."""
    run_main(evaluate, *flags, status=status)
    path = Path(flags[1])
    return json.loads(path.read_text()) if path.is_file() else None


def by_scipy(a, b):
    """The Fréchet distance of features (N, D), computed with SciPy as in the papers."""
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)


def naive_features(clips):
    """The features of Detector of whole clips (N, T, H, W, 3), in NumPy."""
    pixels = clips.astype(float).transpose(0, 4, 1, 2, 3).reshape(len(clips), 3, -1)
    return np.concatenate([pixels.mean(2), pixels.std(2, ddof=1)], axis=1)


@pytest.mark.parametrize("metric", ["fvd", "fid"])
def test_the_distance_is_that_of_all_features_at_once(metric, shapes, samples, detector, tmp_path, monkeypatch):
    generated, real = np.load(samples / "samples.npz")["arr_0"], read_clips(shapes, "train", 20)[0]
    if metric == "fid":  # of frames
        generated, real = generated.reshape(-1, 1, SIZE, SIZE, 3), real.reshape(-1, 1, SIZE, SIZE, 3)
    flags = ["--metric", metric, "--samples", samples, "--data-path", shapes, "--detector", detector]
    batches, extract = [], frechet.extract

    def record_batch(detector, clips, *rest, **others):
        batches.append(len(clips))
        return extract(detector, clips, *rest, **others)

    monkeypatch.setattr(frechet, "extract", record_batch)
    found = run("--out", tmp_path / "a" / "b.json", *flags, "--num-real", 20, "--batch-size", 5, *FEW)
    assert found["values"][metric] == pytest.approx(by_scipy(naive_features(generated), naive_features(real)), rel=1e-4)
    low, high = found["result"]["interval95"]
    assert low < found["values"][metric] < high
    assert found["protocol"] == f"{metric}12_real20_8f_cfg1"
    assert max(batches) == 5  # no more clips are held at once
    assert found["real"]["split"] == "train" and found["real"]["num_videos"] == len(list(shapes.glob("*/*g02*")))
    assert found["detector"]["sha256"] == file_sha256(detector)


@pytest.mark.parametrize(
    ("trained", "flags", "name"),
    [
        ({"cfg_scale": 4.0, "guidance_chosen": False}, [], None),
        ({"cfg_scale": 4.0}, [], None),  # an older checkpoint, which does not say whether the default was chosen
        ({}, [], None),
        ({"cfg_scale": 4.0, "guidance_chosen": True}, [], "cfg4"),
        ({"cfg_scale": 1.5}, [], "cfg1.5"),
        ({"cfg_scale": 4.0, "guidance_chosen": False}, ["--cfg-scale", 1], "cfg1"),
        ({"cfg_scale": 4.0, "guidance_chosen": False}, ["--classes", "none"], "cfg1"),
    ],
)
def test_a_frechet_distance_needs_a_guidance_that_somebody_chose_and_names_it(
    trained, flags, name, shapes, ckpt, detector, tmp_path, capsys
):
    state = checkpoint.load(ckpt)
    state["config"]["training"] |= trained
    checkpoint.save(tmp_path / "a.pt", state)
    steps = ["--num-sampling-steps", 3, "--num-samples", 2]
    run_main(sample_gd, "--video", "--ckpt", tmp_path / "a.pt", "--folder", tmp_path / "s", *steps, *flags)
    places = ["--ckpt", tmp_path / "a.pt", *steps, *flags], ["--samples", tmp_path / "s"]
    for place, advice in zip(places, ("add it here (1", "sample again with it (1"), strict=True):
        flags = ["--metric", "fvd", "--data-path", shapes, "--detector", detector, "--num-real", 2, *place, *FEW]
        found = run("--out", tmp_path / "a.json", *flags, status=0 if name else 2)
        if name:
            assert found["protocol"] == f"fvd2_4f_{name}" and "guidance_chosen" in str(found["generated"])
        else:
            assert advice in capsys.readouterr().err


def test_several_sample_folders_have_a_manifest_each_as_if_scored_alone(shapes, samples, tmp_path, capsys):
    shutil.copytree(samples, tmp_path / "a")
    write_samples(tmp_path / "b", *read_clips(shapes, "val", 5, stream="b"), source={"temporal_patch_size": 4})
    flags = ["--metric", "consistency", "--data-path", shapes, "--num-real", 6, *FEW]
    both = ["--samples", tmp_path / "a", tmp_path / "b"]
    run("--out", "scores.json", *both, *flags)
    for name in "ab":
        alone = run("--out", tmp_path / "alone.json", "--samples", tmp_path / name, *flags)
        assert json.loads((tmp_path / name / "scores.json").read_text())["values"] == alone["values"]
    run("--out", tmp_path / "x.json", *both, *flags, status=2)
    assert "x.json: with several --samples the name of a new file in each" in capsys.readouterr().err


def test_an_older_manifest_of_a_forced_model_is_repeated_without_windows_and_without_its_threshold(shapes, tmp_path):
    path = make_checkpoint(tmp_path / "a.pt", scan_videos(shapes).classes)
    state = checkpoint.load(path)
    state["config"]["training"] |= {"forcing": 0.5, "stop_below": 1e9, "num_frames": 5}
    checkpoint.save(path, state)
    flags = ["--metric", "consistency", "--ckpt", path, "--data-path", shapes, "--num-real", 4, "--num-frames", 8]
    by_default = run("--out", tmp_path / "w.json", *flags, *FEW, *SHORT)
    assert by_default["generated"]["window"] == 5 and by_default["generated"]["stop_below"] == 1e9
    old = run("--out", tmp_path / "m.json", *flags, "--window", 8, "--stop-below", 0, *FEW, *SHORT)
    old["flags"] |= {"window": None}
    del old["generated"]["window"], old["generated"]["overlap"]  # as code wrote it that had no windows
    (tmp_path / "m.json").write_text(json.dumps(old))
    again = run("--out", tmp_path / "n.json", "--manifest", tmp_path / "m.json")
    assert again["repeats"]["bit_equal"] and again["generated"]["window"] == 8


def test_real_features_are_cached_and_computed_again_if_the_cache_is_damaged_or_the_data_changed(
    shapes, samples, detector, tmp_path, monkeypatch, capsys
):
    data = shutil.copytree(shapes, tmp_path / "data")
    flags = ["--metric", "fvd", "--samples", samples, "--data-path", data, "--detector", detector, "--num-real", 8]
    reads, real_stream = [], sources.real_stream
    monkeypatch.setattr(sources, "real_stream", lambda *args: (reads.append(1) or part for part in real_stream(*args)))

    def again():
        reads.clear()
        return run("--out", tmp_path / "a.json", *flags, *FEW)["values"], len(reads) > 0

    first, has_read = again()
    assert has_read
    assert again() == (first, False)
    (cached,) = (tmp_path / "evaluate-cache").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[:100])
    assert again() == (first, True)
    assert "is damaged" in capsys.readouterr().out
    assert cached.read_bytes() == whole
    for video in data.glob("*/*g02*"):
        os.utime(video, (1, 1))  # as if they had changed
    assert again() == (first, True)
    flags += ["--cache", tmp_path / "cache"]
    assert again() == (first, True)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_manifest_repeats_bit_for_bit_and_says_so_when_it_does_not(
    shapes, ckpt, detector, tmp_path, capsys
):
    flags = ["--metric", "fvd", "--ckpt", ckpt, "--data-path", shapes, "--detector", detector, "--num-real", 8]
    old = run("--out", tmp_path / "a.json", *flags, "--num-frames", 5, "--seed", 3, *FEW, *SHORT)
    assert old["generated"]["num_clips"] == 8 and old["protocol"] == "fvd8_5f_cfg1.5"
    assert (old["generated"]["seed"], old["generated"]["num_steps"], old["generated"]["step"]) == (3, 4, 70)
    repeat = ["--out", tmp_path / "b.json", "--manifest", tmp_path / "a.json"]
    new = run(*repeat)
    assert new["repeats"]["bit_equal"] and new["repeats"]["agrees"]
    assert new["values"] == old["values"] and new["result"]["interval95"] == old["result"]["interval95"]
    assert "bit for bit" in capsys.readouterr().out

    moved = [shutil.copytree(shapes, tmp_path / "moved"), shutil.copy(ckpt, tmp_path), shutil.copy(detector, tmp_path)]
    places = ["--data-path", moved[0], "--ckpt", moved[1], "--detector", moved[2]]
    assert run(*repeat, *places)["repeats"]["bit_equal"]
    assert run("--out", tmp_path / "c.json", "--manifest", tmp_path / "b.json")["repeats"]["bit_equal"]

    old["values"]["fvd"] += 0.01
    (tmp_path / "a.json").write_text(json.dumps(old))
    new = run(*repeat, "--tolerance", 1e-9, status=1)
    assert "do not agree" in capsys.readouterr().err
    assert not new["repeats"]["agrees"] and new["repeats"]["differences"]["fvd"] == pytest.approx(-0.01)
    assert run(*repeat, "--tolerance", 0.02)["repeats"]["agrees"]
    assert "agree with" in capsys.readouterr().out

    weights = torch.load(moved[1], weights_only=True)
    weights |= {"step": 71, "best_loss": 0.5, "optimizer": None}
    torch.save(weights, moved[1])
    assert run(*repeat, "--ckpt", moved[1], "--tolerance", 0.02)["repeats"]["agrees"]  # the weights are the same
    weights["ema"]["final_layer.linear.bias"] += 1
    torch.save(weights, moved[1])
    run(*repeat, "--ckpt", moved[1], status=2)
    assert "--ckpt: sha256" in capsys.readouterr().err
    next(moved[0].glob("*/*g02*")).rename(next(moved[0].glob("*/*g02*")).with_name("another.avi"))
    run(*repeat, "--data-path", moved[0], status=2)
    assert "--data-path" in capsys.readouterr().err


def test_motion_of_real_clips_is_right_and_its_confusion_is_a_diagonal(shapes, samples, tmp_path, capsys):
    flags = ["--samples", samples, "--data-path", shapes, "--num-real", 12]
    found = run("--out", tmp_path / "m.json", *flags, *FEW)
    assert found["metric"] == "motion" and found["protocol"] == "motion12_8f"
    assert found["values"]["direction_accuracy"] == found["values"]["shape_accuracy"] == 1
    for kind in ("generated", "real"):
        for rows in (found["result"][kind]["confusion"][what] for what in ("direction", "shape")):
            assert all(count == 0 for asked, row in rows.items() for name, count in row.items() if name != asked)
            assert sum(row[asked] for asked, row in rows.items()) == 12
    assert "asked, found:" in capsys.readouterr().out
    assert found["generated"]["samples_sha256"] == file_sha256(samples / "samples.npz")


def test_consistency_finds_the_seams_that_a_sample_folder_has(shapes, tmp_path):
    clips, labels, classes = read_clips(shapes, "val", 12, frames=12)
    clips = clips.copy()
    for first in range(4, 12, 4):  # each temporal patch is a few px further along than it should be
        clips[:, first : first + 4] = np.roll(clips[:, first : first + 4], first, axis=(2, 3))
    folder = write_samples(tmp_path / "s", clips, labels, classes)
    flags = ["--metric", "consistency", "--samples", folder, "--data-path", shapes, "--num-real", 12, *FEW]
    found = run("--out", tmp_path / "c.json", *flags, "--temporal-patch-size", 4)
    assert found["values"]["seam_score"] > 1.5
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    assert len(found["result"]["by_position"]["generated"]["change"]["mean"]) == 11
    off = run("--out", tmp_path / "d.json", *flags, "--temporal-patch-size", 5)
    assert off["values"]["seam_score"] < 1  # the seams are not at the borders of this patch size
    run("--out", tmp_path / "e.json", *flags, status=2)


def test_images_have_a_fid_from_a_checkpoint_and_from_its_samples(detector, tmp_path, monkeypatch):
    data = make_images(tmp_path / "images", 40)
    path = make_checkpoint(tmp_path / "best.pt", ["A", "B"], video=False)
    shared = ["--metric", "fid", "--data-path", data, "--detector", detector, "--num-real", 10, *FEW]
    found = run("--out", tmp_path / "a.json", *shared, "--ckpt", path, *SHORT)
    assert found["protocol"] == "fid10_1f_cfg1.5" and found["values"]["fid"] > 0
    run_main(sample_gd, "--ckpt", path, "--folder", tmp_path / "s", "--num-samples", 10, *SHORT)
    again = run("--out", tmp_path / "b.json", *shared, "--samples", tmp_path / "s")
    assert again["values"]["fid"] == pytest.approx(found["values"]["fid"], rel=1e-6)
    assert again["generated"]["source"]["weights_sha256"] == found["generated"]["weights_sha256"]


def test_two_ranks_that_sample_find_what_one_finds(shapes, ckpt, detector, tmp_path):
    flags = ["--metric", "fvd", "--ckpt", ckpt, "--data-path", shapes, "--detector", detector, "--num-real", 9]
    flags += ["--num-samples", 5, "--batch-size", 2, *FEW, *SHORT]
    alone = run("--out", tmp_path / "1.json", *flags)
    command = [*TORCHRUN, ROOT / "EqM/evaluate.py", "--out", tmp_path / "2.json", "--cache", tmp_path / "cache", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    shared = json.loads((tmp_path / "2.json").read_text())
    assert shared["machine"]["ranks"] == 2 and not shared["result"]["real_from_cache"]
    assert shared["values"]["fvd"] == pytest.approx(alone["values"]["fvd"], rel=1e-3)  # a grey level may round off
    assert shared["result"]["interval95"] == pytest.approx(alone["result"]["interval95"], rel=1e-2)


def damaged_copy(kind, tmp_path, samples):
    """A copy of a sample folder with this kind of damage."""
    folder = shutil.copytree(samples, tmp_path / "bad")
    clips = np.load(samples / "samples.npz")["arr_0"]
    if kind == "no json":
        (folder / "samples.json").unlink()
    elif kind == "mixed sizes":
        mixed = np.empty(2, dtype=object)
        mixed[:] = [clips[0], clips[1][:, :8]]
        np.savez(folder / "samples.npz", arr_0=mixed, labels=np.zeros(2, int))
    elif kind == "cut short":
        whole = (folder / "samples.npz").read_bytes()
        (folder / "samples.npz").write_bytes(whole[: len(whole) // 2])
    elif kind == "one clip":
        write_npz(folder / "samples.npz", clips[:1], [0])
    elif kind == "images":
        write_npz(folder / "samples.npz", clips[:, :1], [0] * len(clips))
    elif kind == "floats":
        write_npz(folder / "samples.npz", clips / 255, [0] * len(clips))
    elif kind == "unknown class":
        write_npz(folder / "samples.npz", clips, [99] * len(clips))
    return folder


BAD_SAMPLES = {
    "no json": "no samples.json in it; wanted a folder that", "mixed sizes": "of one size", "cut short": "zip",
    "one clip": "has 1 clips", "images": "holds images", "floats": "wanted uint8", "unknown class": "label 99",
}  # fmt: skip


def test_motion_without_the_truth_of_moving_shapes_names_other_metrics(shapes, samples, tmp_path, capsys):
    data = shutil.copytree(shapes, tmp_path / "data", ignore=shutil.ignore_patterns("shapes.json"))
    run("--metric", "motion", "--samples", samples, "--data-path", data, "--out", tmp_path / "a.json", status=2)
    assert "--metric motion is for Moving Shapes" in capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_damaged_or_unfit_sample_folder_is_refused(kind, shapes, samples, detector, tmp_path, capsys):
    flags = ["--metric", "fvd", "--samples", damaged_copy(kind, tmp_path, samples), "--data-path", shapes]
    run("--out", tmp_path / "out" / "a.json", *flags, "--detector", detector, status=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--samples" in lines[0] and BAD_SAMPLES[kind] in lines[0], lines
    assert not (tmp_path / "out").exists()


BAD_FLAGS = {  # changes to --metric fvd --samples S --data-path D --detector F; None removes a flag
    "no source": ({"--samples": None}, ["--ckpt and --samples"]),
    "two sources": ({"--ckpt": "x.pt"}, ["--ckpt and --samples"]),
    "no data": ({"--data-path": None}, ["--data-path", "not given"]),
    "data that are not there": ({"--data-path": "no/such"}, ["--data-path no/such"]),
    "no detector": ({"--detector": None}, ["--detector", "--metric fvd"]),
    "a detector that is not used": ({"--metric": "motion"}, ["--detector", "not used for --metric motion"]),
    "a detector that is not there": ({"--detector": "no/such.pt"}, ["--detector no/such.pt", "no such file"]),
    "one real clip": ({"--num-real": 1}, ["--num-real 1", "at least 2"]),
    "one generated clip": ({"--num-samples": 1}, ["--num-samples 1", "at least 2"]),
    "more clips than there are": ({"--num-samples": 13}, ["--num-samples 13", "has 12"]),
    "sampling flags": ({"--cfg-scale": 4}, ["--cfg-scale", "already sampled"]),
    "out in a file": ({"--out": "/dev/null/a.json"}, ["--out /dev/null"]),
    "out is a folder": ({"--out": "/"}, ["--out /", "a folder"]),
    "a cache in a file": ({"--cache": "/dev/null/a"}, ["--cache /dev/null/a"]),
    "one resample": ({"--resamples": 1}, ["--resamples 1", "at least 2"]),
    "a folder without videos": ({"--data-path": ROOT / "scripts"}, ["--data-path", "no video found"]),
    "no split": ({"--split": "test"}, ["--split"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_one_line_and_nothing_is_written(case, shapes, samples, detector, tmp_path, capsys):
    changes, words = BAD_FLAGS[case]
    flags = {"--out": tmp_path / "out" / "a.json", "--metric": "fvd", "--samples": samples, "--data-path": shapes}
    flags = flags | {"--detector": detector} | changes
    run(*(part for pair in flags.items() if pair[1] is not None for part in pair), status=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "out").exists()


def test_a_latent_cache_and_videos_that_are_too_short_are_refused(
    shapes, samples, detector, ckpt, tmp_path, capsys
):
    make_latents(tmp_path / "latents")
    shared = ["--out", tmp_path / "a.json", "--metric", "fvd", "--detector", detector]
    run(*shared, "--samples", samples, "--data-path", tmp_path / "latents", status=2)
    assert "a latent cache; wanted the folder of its videos" in capsys.readouterr().err
    shared += ["--cfg-scale", 1]
    run(*shared, "--ckpt", ckpt, "--data-path", shapes, "--num-frames", 40, status=2)
    assert "the longest video of --split train has 25 frames" in capsys.readouterr().err
    run(*shared, "--ckpt", ckpt, "--data-path", shapes, "--fps", 2, status=2)  # every twelfth frame
    assert "take 37" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1, "met', "damaged or not JSON"),
        ("[1, 2]", "not a manifest"),
        ('{"format": 2}', "has format 2, this code reads 1"),
        ('{"format": 1}', "damaged: has no code"),
        (None, "can't be read"),
    ],
)
def test_a_file_that_is_not_a_manifest_or_of_another_version_is_refused(text, words, tmp_path, capsys):
    if text is not None:
        (tmp_path / "m.json").write_text(text)
    run("--out", tmp_path / "a.json", "--manifest", tmp_path / "m.json", status=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--manifest" in lines[0] and words in lines[0], lines


def test_flags_that_change_the_values_are_refused_beside_a_manifest(shapes, samples, tmp_path, capsys):
    run("--out", tmp_path / "a.json", "--samples", samples, "--data-path", shapes, "--num-real", 2, *FEW)
    repeat = ["--out", tmp_path / "b.json", "--manifest", tmp_path / "a.json"]
    for flags, words in (
        (["--num-real", 96], "--num-real: --manifest"),
        (["--ckpt", "x.pt"], "--ckpt: --manifest"),
        (["--seed", 0], "--seed: --manifest"),  # even where it is the default
    ):
        run(*repeat, *flags, status=2)
        assert words in capsys.readouterr().err
    assert run(*repeat)["repeats"]["bit_equal"]


def test_the_commit_of_the_code_is_that_of_its_repository_with_a_plus_if_files_differ(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    home = tmp_path / "repository" / "EqM"
    home.mkdir(parents=True)
    (home / "manifest.py").write_text("pass\n")
    monkeypatch.setattr(manifest, "__file__", str(home / "manifest.py"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*words):
        return subprocess.run(["git", *identity, *words], cwd=home, capture_output=True, text=True, check=True).stdout

    git("init")
    assert manifest.code_commit() is None  # in a repository, but not tracked
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert manifest.code_commit() == commit
    (home / "manifest.py").write_text("changed\n")
    assert manifest.code_commit() == commit + "+"

"""evaluate.py end to end: naive versions, repeats, one and two ranks, bad input."""

import os
import shutil
import subprocess
import tempfile
import warnings
from shlex import split

import numpy as np
import pytest
import scipy.linalg
import torch

import evaluate
from process import PATH, end, spawn
from runtime import distributed
from runtime.untrusted import file_sha256, read_json
from sample_folders import FEW, FRAMES, SIZE, SOURCE, read_clips, refused, run, write_samples
from scoring import frechet, manifest, sources
from tiny_data import make_images, random_checkpoint
from training import ROOT, on_two_ranks, record_calls, sample_here
from video.files import UnreadableError
from video.source import Files


class Detector(torch.nn.Module):
    """A detector with the interface of the usual I3D and Inception models. It returns 6 features of
    clips or images.
    """

    def forward(
        self, x, rescale: bool = False, resize: bool = False, return_features: bool = False
    ):
        x = x.flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(Detector()).save(path)
    return path


@pytest.fixture(scope="module")
def samples(shapes, tmp_path_factory):
    """A sample folder that holds real clips."""
    return write_samples(
        tmp_path_factory.mktemp("samples") / "s", *read_clips(shapes, "val", 12, stream="a")
    )


@pytest.fixture
def fvd(shapes, samples, detector):
    flags = ["--metric", "fvd", "--samples", samples, "--data-path", shapes]
    return [*flags, "--detector", detector, "--num-real", 8]


def by_scipy(a, b):
    """The Fréchet distance of features (N, D), computed with SciPy."""
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        np.cov(a.T) + np.cov(b.T) - 2 * root.real
    )


def naive_features(clips):
    """The features of Detector of whole clips (N, T, H, W, 3), in NumPy."""
    pixels = clips.astype(float).transpose(0, 4, 1, 2, 3).reshape(len(clips), 3, -1)
    return np.concatenate([pixels.mean(2), pixels.std(2, ddof=1)], axis=1)


@pytest.mark.parametrize("metric", ["fvd", "fid"])
def test_fvd_and_fid_equal_a_naive_version(metric, shapes, samples, fvd, tmp_path, monkeypatch):
    generated = np.load(samples / "samples.npz")["arr_0"]
    real = read_clips(shapes, "train", 20)[0]
    if metric == "fid":  # of frames
        generated = generated.reshape(-1, 1, SIZE, SIZE, 3)
        real = real.reshape(-1, 1, SIZE, SIZE, 3)

    def size(detector, clips, args):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        return len(clips)

    batches = record_calls(monkeypatch, frechet, "extract", size)
    monkeypatch.setattr(frechet, "check_detector", lambda args, *_: {"sha256": "a"})
    distributed.set_precision("tf32")
    fvd[1] = metric
    fvd[-1] = 20
    found = run(tmp_path / "a" / "b.json", *fvd, "--batch-size", 5)
    naive = by_scipy(naive_features(generated), naive_features(real))
    assert found["values"][metric] == pytest.approx(naive, rel=1e-4)
    low, high = found["result"]["interval95"]
    assert low < found["values"][metric] < high
    assert found["protocol"] == f"{metric}12_real20_8f_cfg1"
    assert max(batches) == 5  # no more clips are held at once
    assert found["generated"]["source"] == SOURCE
    assert found["generated"]["samples_sha256"] == file_sha256(samples / "samples.npz")
    assert found["real"]["split"] == "train"
    assert found["real"]["num_videos"] == len([*shapes.glob("*/*g02*")])


@pytest.mark.parametrize(
    ("source", "label", "name", "about"),
    [
        ({"guidance": 4.0, "guidance_chosen": False}, None, None, {}),
        ({"guidance": 1.5, "guidance_chosen": True}, None, "cfg1.5", {}),
        # without classes there is no guidance
        ({"guidance": 4.0, "guidance_chosen": False}, -1, "cfg1", {}),
        ({"guidance": 4.0, "guidance_chosen": False}, -1, "cfg1", {"actions": [["none"] * 8] * 2}),
        # except by actions, the class of a later patch or a weaker model
        ({"guidance": 1.5, "guidance_chosen": True}, -1, "cfg1.5", {"actions": [["up"] * 8] * 2}),
        ({"guidance": 4.0, "guidance_chosen": False}, -1, None, {"spans": [[-1, 0]] * 2}),
        ({"guidance": 2.0, "guidance_chosen": True, "weak_sha256": "b"}, -1, "auto2", {}),
    ],
)
def test_frechet_protocols_name_the_guidance_that_the_user_chose(
    source, label, name, about, shapes, fvd, tmp_path, capsys
):
    clips, labels, classes = read_clips(shapes, "val", 2)
    labels = [label] * 2 if label else labels
    fvd[3] = write_samples(tmp_path / "s", clips, labels, classes, source=source, **about)
    if name is None:
        words = ["sample again with --cfg-scale (1 turns it off)"]
        refused(capsys, tmp_path / "a.json", *fvd, words=words)
        return
    assert run(tmp_path / "a.json", *fvd)["protocol"] == f"fvd2_real8_8f_{name}"
    said = capsys.readouterr().out
    assert "warning: 2 generated members for 6 features" in said and "8 real members" not in said


def test_each_of_several_sample_folders_gets_a_manifest(
    shapes, samples, tmp_path, monkeypatch, capsys
):
    folders = [shutil.copytree(samples, tmp_path / name) for name in "ab"]
    content = np.load(samples / "samples.npz")
    np.savez(folders[1] / "samples.npz", **{name: x[:5] for name, x in content.items()})
    flags = ["--metric", "consistency", "--data-path", shapes, "--num-real", 6, "--samples"]
    run("scores.json", *flags, *folders)
    alone = run(tmp_path / "alone.json", *flags, folders[1])
    first, second = (read_json(folder / "scores.json") for folder in folders)
    assert second["values"] == alone["values"] and first["protocol"] == "consistency12_real6_8f"
    words = ["expected the name of a new file in each of --samples"]
    for out in (tmp_path / "x.json", "samples.json", "sheet.json"):
        refused(capsys, out, *flags, *folders, words=words)
    refused(capsys, folders[0] / "sheet.json", *flags, folders[0], words=words)

    def deny(dir, **_):
        if dir == folders[1]:
            raise PermissionError

    record_calls(monkeypatch, tempfile, "mkdtemp", deny)  # the check of a folder
    words = [f"--out {folders[1]}: ", "is not a writable folder"]
    refused(capsys, "more.json", *flags, *folders, words=words)


def test_scores_repeat_and_real_features_are_cached_until_the_file_or_the_data_change(
    shapes, fvd, tmp_path, monkeypatch, capsys
):
    fvd[5] = shutil.copytree(shapes, tmp_path / "data")

    def read(files, video, *_):
        if "Square" in video.path:
            raise UnreadableError(video.path)
        return video

    reads = record_calls(monkeypatch, Files, "read", read)

    def again():
        reads.clear()
        made = run(tmp_path / "a.json", *fvd)
        found = made["values"], made["result"]["interval95"], made["real"]["bad_videos"]
        return found, len(reads) > 0

    first, has_read = again()
    assert first[-1]  # the corrupt videos, also if the cache replaces all
    assert has_read and again() == (first, False)
    (cached,) = (tmp_path / "evaluate-cache").iterdir()
    content = cached.read_bytes()
    cached.write_bytes(content[:100])
    assert again() == (first, True)
    assert "is damaged" in capsys.readouterr().out
    assert cached.read_bytes() == content
    for video in fvd[5].glob("*/*g02*"):
        os.utime(video, (1, 1))  # as if they had changed
    assert again() == (first, True)
    fvd += ["--cache", tmp_path / "cache"]
    assert again() == (first, True)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_consistency_finds_the_seams_of_samples(shapes, tmp_path, monkeypatch):
    clips, labels, classes = read_clips(shapes, "val", 12, frames=12)
    clips = clips.copy()
    for first in range(4, 12, 4):  # each temporal patch is a few px further along than it should be
        clips[:, first : first + 4] = np.roll(clips[:, first : first + 4], first, axis=(2, 3))
    flags = ["--metric", "consistency", "--data-path", shapes, "--num-real", 12, "--samples"]
    scores = {}
    for patch in (4, 5):
        source = {"temporal_patch_size": patch, "context": 8, "window": patch, "overlap": 0}
        folder = write_samples(tmp_path / f"{patch}", clips, labels, classes, source=source)
        values = run(tmp_path / f"{patch}.json", *flags, folder)["values"]
        scores[patch] = values["seam_score"]
        assert "window_seam_score" not in values  # a causal model has no windows
    assert scores[4] > 1.5 and scores[5] < 1  # the seams are not at the borders of patches of 5
    monkeypatch.chdir(folder)
    assert sources.Samples(".").provenance()["samples"] == str(folder)


def test_images_of_sample_gd_get_a_fid(detector, tmp_path):
    data = make_images(tmp_path / "images", 40)
    sample = split("--num-samples 10 --cfg-scale 1.5 --no-previews")
    ckpt = random_checkpoint(tmp_path / "image.pt", input_size=8)
    sample_here(ckpt, tmp_path / "s", *sample)
    flags = ["--metric", "fid", "--data-path", data, "--detector", detector, "--num-real", 10]
    found = run(tmp_path / "a.json", *flags, "--samples", tmp_path / "s")
    assert found["protocol"] == "fid10_1f_cfg1.5" and found["values"]["fid"] > 0
    assert found["generated"]["source"]["seed"] == 0 and found["generated"]["mean_evaluations"] == 3


def test_two_ranks_find_the_values_of_one(fvd, tmp_path):
    flags = [*fvd[:-1], 9, "--batch-size", 2, *FEW]
    alone = run(tmp_path / "1.json", *flags)
    on_two_ranks(evaluate, "--out", tmp_path / "2.json", "--cache", tmp_path / "cache", *flags)
    shared = read_json(tmp_path / "2.json")
    assert shared["machine"]["ranks"] == 2 and not shared["result"]["real_from_cache"]
    assert shared["values"]["fvd"] == pytest.approx(alone["values"]["fvd"], rel=1e-6)
    assert shared["result"]["interval95"] == pytest.approx(alone["result"]["interval95"], rel=1e-6)


def test_score_sh_samples_a_model_and_scores_the_samples(shapes, tmp_path):
    ckpt = random_checkpoint(tmp_path / "a.pt", num_frames=4, use_rope=True)
    environment = {
        "PATH": PATH,
        "CKPT": str(ckpt),
        "DATA": str(shapes),
        "METRIC": "consistency nearest",
        "FRAMES": str(FRAMES),
        "SAMPLES": "3",
        "REAL": "4",
        "OUT": str(tmp_path / "s"),
    }
    flags = ["--num-sampling-steps", 4, "--no-previews"]
    process = spawn("bash", ROOT / "scripts/score.sh", *flags, environment=environment)
    end(process, timeout=240)
    for metric in ("consistency", "nearest"):
        made = read_json(tmp_path / f"s/{metric}.json")
        assert made["protocol"] == f"{metric}3_real4_8f"
        assert made["generated"]["flags"]["num_sampling_steps"] == 4


def test_the_commit_in_a_manifest_has_a_plus_if_files_have_changed(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    file = tmp_path / "manifest.py"
    file.write_text("pass\n")
    monkeypatch.setattr(manifest, "__file__", str(file))

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    assert manifest.code_commit() is None  # in a repository, but not tracked
    git("add", ".")
    git("commit", "-m", "first")
    assert manifest.code_commit() == (commit := git("rev-parse", "HEAD"))
    file.write_text("changed\n")
    assert manifest.code_commit() == commit + "+"
    git("checkout", ".")
    (tmp_path / "EqM").mkdir()
    (tmp_path / "EqM/models.py").write_text("new\n")  # of the same code, in another folder
    assert manifest.code_commit() == commit + "+"

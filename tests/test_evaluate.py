"""evaluate.py end to end: naive versions, repeats of manifests, one and two ranks, bad input."""

import json
import os
import shutil
import subprocess
import tempfile
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

import evaluate
import sample_gd
from process import PATH, end, spawn
from runtime import distributed
from runtime.untrusted import file_sha256
from sample_folders import FEW, FRAMES, SIZE, SOURCE, read_clips, refused, run, write_samples
from scoring import frechet, manifest, sources
from tiny_data import make_images, random_checkpoint, write_npz
from training import ROOT, error_of, on_two_ranks, record_calls, run_main, sample_here


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
    return [
        "--metric",
        "fvd",
        "--samples",
        samples,
        "--data-path",
        shapes,
        "--detector",
        detector,
        "--num-real",
        8,
    ]


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
def test_fvd_and_fid_equal_a_naive_version(
    metric, shapes, samples, detector, tmp_path, monkeypatch
):
    generated = np.load(samples / "samples.npz")["arr_0"]
    real = read_clips(shapes, "train", 20)[0]
    if metric == "fid":  # of frames
        generated = generated.reshape(-1, 1, SIZE, SIZE, 3)
        real = real.reshape(-1, 1, SIZE, SIZE, 3)

    def size(detector, clips, *rest, **others):
        assert (
            not torch.backends.cudnn.allow_tf32
            and torch.get_float32_matmul_precision() == "highest"
        )
        return len(clips)

    batches = record_calls(monkeypatch, frechet, "extract", size)
    monkeypatch.setattr(frechet, "check_detector", lambda path, *_: {"sha256": file_sha256(path)})
    distributed.set_precision("tf32")
    flags = [
        "--metric",
        metric,
        "--samples",
        samples,
        "--data-path",
        shapes,
        "--detector",
        detector,
        "--num-real",
        20,
    ]
    found = run(tmp_path / "a" / "b.json", *flags, "--batch-size", 5)
    assert found["values"][metric] == pytest.approx(
        by_scipy(naive_features(generated), naive_features(real)), rel=1e-4
    )
    low, high = found["result"]["interval95"]
    assert low < found["values"][metric] < high
    assert found["protocol"] == f"{metric}12_real20_8f_cfg1"
    assert max(batches) == 5  # no more clips are held at once
    assert found["real"]["split"] == "train" and found["real"]["num_videos"] == len(
        list(shapes.glob("*/*g02*"))
    )


@pytest.mark.parametrize(
    ("source", "label", "name"),
    [
        ({"guidance": 4.0, "guidance_chosen": False}, None, None),
        ({"guidance": 4.0}, None, None),
        ({"guidance": 1.5, "guidance_chosen": True}, None, "cfg1.5"),
        (
            {"guidance": 4.0, "guidance_chosen": False},
            -1,
            "cfg1",
        ),  # without classes there is no guidance
        (
            {"guidance": 2.0, "guidance_chosen": True, "weak_sha256": "b"},
            -1,
            "auto2",
        ),  # except by a weaker model
    ],
)
def test_frechet_protocols_name_the_guidance_that_the_user_chose(
    source, label, name, shapes, fvd, tmp_path, capsys
):
    clips, own, classes = read_clips(shapes, "val", 2)
    fvd[3] = write_samples(
        tmp_path / "s", clips, [label] * 2 if label else own, classes, source=source
    )
    if name:
        assert run(tmp_path / "a.json", *fvd)["protocol"] == f"fvd2_real8_8f_{name}"
        said = capsys.readouterr().out
        assert (
            "warning: 2 generated members for 6 features" in said and "8 real members" not in said
        )
    else:
        refused(
            capsys,
            tmp_path / "a.json",
            *fvd,
            words=["sample again with --cfg-scale (1 turns it off)"],
        )


def test_each_of_several_sample_folders_gets_a_manifest(
    shapes, samples, tmp_path, monkeypatch, capsys
):
    folders = [shutil.copytree(samples, tmp_path / name) for name in "ab"]
    np.savez(
        folders[1] / "samples.npz",
        **{name: x[:5] for name, x in np.load(samples / "samples.npz").items()},
    )
    flags = ["--metric", "consistency", "--data-path", shapes, "--num-real", 6, "--samples"]
    run("scores.json", *flags, *folders)
    alone = run(tmp_path / "alone.json", *flags, folders[1])
    found = [json.loads((folder / "scores.json").read_text()) for folder in folders]
    assert (
        found[1]["values"] == alone["values"] and found[0]["protocol"] == "consistency12_real6_8f"
    )
    for out in (tmp_path / "x.json", "samples.json", "sheet.json", "grid.json"):
        refused(
            capsys,
            out,
            *flags,
            *folders,
            words=[f"{out}: expected the name of a new file in each of --samples"],
        )
    refused(
        capsys,
        folders[0] / "sheet.json",
        *flags,
        folders[0],
        words=["expected the name of a new file"],
    )
    made = tempfile.mkdtemp  # the check of a folder
    monkeypatch.setattr(
        tempfile, "mkdtemp", lambda dir: os.open("", 0) if dir == folders[1] else made(dir=dir)
    )
    refused(
        capsys,
        "more.json",
        *flags,
        *folders,
        words=[f"--out {folders[1]}: ", "is not a writable folder"],
    )


def test_real_features_are_cached_until_the_file_or_the_data_change(
    shapes, fvd, tmp_path, monkeypatch, capsys
):
    fvd[5] = shutil.copytree(shapes, tmp_path / "data")
    reads = []
    real_stream = sources.real_stream
    monkeypatch.setattr(
        sources,
        "real_stream",
        lambda *args: (reads.append(1) or part for part in real_stream(*args)),
    )

    def again():
        reads.clear()
        return run(tmp_path / "a.json", *fvd)["values"], len(reads) > 0

    first, has_read = again()
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


def test_a_manifest_repeats_bit_for_bit_or_reports_the_differences(shapes, fvd, tmp_path, capsys):
    old = run(tmp_path / "a.json", *fvd, "--seed", 3)
    assert old["generated"]["num_clips"] == 12 and old["generated"]["source"] == SOURCE
    assert old["generated"]["samples_sha256"] == file_sha256(fvd[3] / "samples.npz")
    repeat = [tmp_path / "b.json", "--manifest", tmp_path / "a.json"]
    new = run(*repeat)
    assert new["repeats"]["bit_equal"] and new["repeats"]["agrees"]
    assert (
        new["values"] == old["values"]
        and new["result"]["interval95"] == old["result"]["interval95"]
    )
    assert "bit for bit" in capsys.readouterr().out

    moved = [
        shutil.copytree(path, tmp_path / name) for path, name in ((fvd[5], "data"), (fvd[3], "s"))
    ]
    moved.append(shutil.copy(fvd[7], tmp_path))
    places = ["--data-path", moved[0], "--samples", moved[1], "--detector", moved[2]]
    assert run(*repeat, *places)["repeats"]["bit_equal"]
    assert run(tmp_path / "c.json", "--manifest", tmp_path / "b.json")["repeats"]["bit_equal"]

    old["values"]["fvd"] += 0.01
    (tmp_path / "a.json").write_text(json.dumps(old))
    refused(capsys, *repeat, "--tolerance", 1e-9, words=["do not agree"], status=1)
    found = json.loads((tmp_path / "b.json").read_text())["repeats"]
    assert not found["agrees"] and found["differences"]["fvd"] == pytest.approx(-0.01)
    assert run(*repeat, "--tolerance", 0.02)["repeats"]["agrees"]

    clips = np.load(moved[1] / "samples.npz")
    write_npz(
        moved[1] / "samples.npz", clips["arr_0"] ^ 1, clips["labels"]
    )  # sampled again, with different rounding
    assert run(*repeat, *places, "--tolerance", 1)["repeats"]["agrees"]
    assert "agree with" in (said := capsys.readouterr().out) and "samples" in said
    about = json.loads((moved[1] / "samples.json").read_text())
    about["source"]["weights_sha256"] = "b"
    (moved[1] / "samples.json").write_text(json.dumps(about))
    refused(
        capsys,
        *repeat,
        *places,
        words=["--samples: weights_sha256 is b, expected a as in --manifest"],
    )
    next(moved[0].glob("*/*g02*")).rename(next(moved[0].glob("*/*g02*")).with_name("another.avi"))
    refused(capsys, *repeat, *places[:2], words=["--data-path: videos_sha256"])


@pytest.mark.parametrize(
    ("old", "new", "agrees"),
    [
        ({"a": 1.0}, {"a": 1.0005}, True),
        ({"a": 1.0}, {"a": 1.002}, False),
        ({"a": 1000.0}, {"a": 1000.9}, True),  # relative to large values
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {"a": 1.0}, False),
        ({"a": 1.0}, {"a": None}, False),
        ({"a": 1.0}, {}, False),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, True),  # a new value
    ],
)
def test_values_agree_within_the_tolerance_and_missing_ones_do_not(old, new, agrees):
    shared = {"code": "x", "packages": {}, "machine": {}, "generated": {"samples_sha256": "a"}}
    found, line = manifest.compare(
        "m.json", shared | {"values": old}, shared | {"values": new, "code": "y"}, 1e-3
    )
    assert found["agrees"] == agrees and line.endswith("changed since: code")
    assert found["bit_equal"] == (
        old == {name: value for name, value in new.items() if name in old}
    )


def test_consistency_finds_the_seams_of_samples(shapes, tmp_path):
    clips, labels, classes = read_clips(shapes, "val", 12, frames=12)
    clips = clips.copy()
    for first in range(4, 12, 4):  # each temporal patch is a few px further along than it should be
        clips[:, first : first + 4] = np.roll(clips[:, first : first + 4], first, axis=(2, 3))
    flags = ["--metric", "consistency", "--data-path", shapes, "--num-real", 12, "--samples"]
    scores = {}
    for patch in (4, 5):
        folder = write_samples(
            tmp_path / f"{patch}", clips, labels, classes, source={"temporal_patch_size": patch}
        )
        found = run(tmp_path / f"{patch}.json", *flags, folder)
        scores[patch] = found["values"]["seam_score"]
    assert scores[4] > 1.5 and scores[5] < 1  # the seams are not at the borders of patches of 5


def test_images_of_sample_gd_get_a_fid(detector, places, tmp_path):
    data = make_images(tmp_path / "images", 40)
    sample_here(
        places / "image.pt",
        tmp_path / "s",
        "--num-samples",
        10,
        "--cfg-scale",
        1.5,
        "--no-previews",
    )
    flags = ["--metric", "fid", "--data-path", data, "--detector", detector, "--num-real", 10]
    found = run(tmp_path / "a.json", *flags, "--samples", tmp_path / "s")
    assert found["protocol"] == "fid10_1f_cfg1.5" and found["values"]["fid"] > 0
    assert found["generated"]["source"]["seed"] == 0 and found["generated"]["mean_evaluations"] == 3


def test_two_ranks_find_the_values_of_one(fvd, tmp_path):
    flags = [*fvd[:-1], 9, "--batch-size", 2, *FEW]
    alone = run(tmp_path / "1.json", *flags)
    on_two_ranks("evaluate.py", "--out", tmp_path / "2.json", "--cache", tmp_path / "cache", *flags)
    shared = json.loads((tmp_path / "2.json").read_text())
    assert shared["machine"]["ranks"] == 2 and not shared["result"]["real_from_cache"]
    assert shared["values"]["fvd"] == pytest.approx(alone["values"]["fvd"], rel=1e-6)
    assert shared["result"]["interval95"] == pytest.approx(alone["result"]["interval95"], rel=1e-6)


def test_score_sh_repeats_the_samples_and_scores_of_a_manifest(shapes, tmp_path):
    ckpt = random_checkpoint(
        tmp_path / "a.pt", training={"stop_below": 1e9}, num_frames=4, use_rope=True
    )
    flags = [
        "--num-samples",
        3,
        "--num-frames",
        FRAMES,
        "--num-sampling-steps",
        4,
        "--stop-below",
        0,
        "--seed",
        2,
    ]
    run_main(
        sample_gd, "--video", "--ckpt", ckpt, "--folder", tmp_path / "s", *flags, "--classes", 1, 0
    )
    flags = [
        "--metric",
        "consistency",
        "--samples",
        tmp_path / "s",
        "--data-path",
        shapes,
        "--num-real",
        4,
    ]
    old = run(tmp_path / "m.json", *flags)
    environment = {
        "PATH": PATH,
        "MANIFEST": str(tmp_path / "m.json"),
        "OUT": str(tmp_path / "again"),
    }
    assert "bit for bit" in end(
        spawn("bash", ROOT / "scripts/score.sh", environment=environment), timeout=240
    )
    new = json.loads((tmp_path / "again/again.json").read_text())
    assert new["generated"]["samples_sha256"] == old["generated"]["samples_sha256"]


def test_manifest_flags_may_have_values_that_begin_with_a_dash():
    flags = {
        "data_path": "-d",
        "metric": "motion",
        "out": "x",
        "samples": ["s", "t"],
        "keep_background": True,
    }
    words = manifest.as_words(flags | {"split": None})
    assert words == [
        "--data-path=-d",
        "--metric=motion",
        "--out=x",
        "--samples",
        "s",
        "t",
        "--keep-background",
    ]
    assert vars(evaluate.parse_args(words)).items() >= flags.items()


def test_an_older_manifest_is_repeated_or_refused(tmp_path):
    path = tmp_path / "m.json"
    about = {"format": manifest.FORMAT, "generated": {"flags": {"num_samples": 3}}}
    path.write_text(json.dumps(about))
    assert manifest.sampling_words(path) == ["--num-samples=3", "--stop-below=0"]
    path.write_text(json.dumps(about | {"generated": {}}))
    assert "m.json: lacks the flags of its samples" in error_of(manifest.sampling_words, path)


def test_the_commit_in_a_manifest_has_a_plus_if_files_have_changed(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    file = tmp_path / "manifest.py"
    file.write_text("pass\n")
    monkeypatch.setattr(manifest, "__file__", str(file))

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

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

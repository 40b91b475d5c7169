"""Names with spaces, quotes, line breaks and shell code work everywhere. No shell runs them; they forge no log line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cache_latents
import checkpoint
import export
import sample_gd
import train
from models import model_config
from runtime import metrics
from runtime.cli import one_line
from tiny_data import make_vae
from tiny_videos import write_video
from training import run_main
from video.files import UnreadableError

ROOT = Path(train.__file__).resolve().parents[1]
FORGED = "\nstep 9: validation loss 0.0000\n"
ODD = "-o  'd\"d`touch hacked`$(touch hacked);[x]* %s {0} ü😀\x1b[31m" + FORGED
CLASSES = ["-A" + ODD, "B '" + FORGED + "x" * 150]


def unreadable(*_):
    raise UnreadableError


def test_all_scripts_work_with_odd_names_and_no_log_line_is_forged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("data", "results", "cache", "exported", "samples", "ckpt", "vae")
    data, results, cache, exported, samples, ckpt, vae = (tmp_path / f"{name}{ODD}" for name in names)
    for name in (f"{class_name}/--{index}{ODD}" for class_name in CLASSES for index in range(2)):
        write_video(data / f"{name}.avi", 10, size=(16, 16))
    ckpt = ckpt.with_name(f"{ckpt.name}.pt")
    (data / CLASSES[0] / f"broken{ODD}.avi").write_bytes(b"RIFF and no more")
    (data / CLASSES[0] / f"bad{ODD}.avi").write_bytes((data / CLASSES[0] / f"--0{ODD}.avi").read_bytes()[:3000])
    run_main(cache_latents, f"--data-path={data}", f"--out={cache}", f"--vae={make_vae(vae)}", "--image-size=16",
             "--max-bad-fraction=1")  # fmt: skip
    shared = ["--video", "--model=EqM-Ti/4", "--num-frames=4", "--use-rope", "--depth=1", "--global-batch-size=4",
              "--num-workers=0", "--log-every=1", "--max-bad-fraction=1", f"--results-dir={results}",
              "--sample-every=1", "--num-samples=2", "--num-sampling-steps=2"]  # fmt: skip
    pixels = [*shared, f"--data-path={data}", "--vae=none", "--image-size=16"]
    run_main(train, *pixels, "--max-steps=1")
    monkeypatch.setattr("video.index.probe", unreadable)  # the index has all other videos
    run_main(train, *pixels, "--max-steps=2", "--resume", "--cache-frames")
    run_main(train, *shared, f"--data-path={cache}", "--max-steps=1")
    shutil.copy(min(results.glob("[0-9]*")) / "checkpoints/latest.pt", ckpt)
    run_main(train, *pixels, "--max-steps=3", f"--ckpt={ckpt}")
    run_main(export, "--", ckpt, exported)
    for path in (ckpt, exported):
        run_main(sample_gd, "--video", f"--ckpt={path}", f"--folder={samples}", "--num-samples=2",
                 "--num-sampling-steps=2", f"--classes={CLASSES[1]}")  # fmt: skip
        assert np.load(samples / "samples.npz")["labels"].tolist() == [1, 1]

    logs = [path.read_text(encoding="utf-8") for path in results.rglob("log.txt")]
    assert len(logs) == 3 and any("broken-o" in log for log in logs)
    for text in (capsys.readouterr().out, *logs):
        assert not any(line.startswith("step 9:") for line in text.splitlines())
        assert "\x1b" not in text
    for folder in results.glob("[0-9]*"):
        rows, torn = metrics.read_metrics(folder / "metrics.jsonl")
        assert rows and torn == 0
    jsons = [json.loads(path.read_text()) for path in (cache / "latents.json", samples / "samples.json")]
    jsons += [json.loads((folder / "config.json").read_text())["data"] for folder in results.glob("[0-9]*")]
    assert all(about["classes"] == sorted(CLASSES) for about in [*jsons, checkpoint.load(ckpt)["config"]["data"]])
    assert not list(tmp_path.rglob("hacked"))
    assert all("data" in path.name or ODD[:5] in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode 😀", "plain, ünïcode 😀"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x1b[2J\x00\x7f", r"\x1b[2J\x00\x7f"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),  # str.splitlines splits here
        ("no text \udcff", r"no text \udcff"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # written from right to left
    ],
)
def test_messages_escape_characters_that_are_not_printable(text, shown):
    assert one_line(text) == shown
    assert one_line(text, "ascii").isascii()


# Shell scripts, with a fake torchrun and python that only record their arguments.


@pytest.fixture
def run_copy(tmp_path):
    """A function that runs a script in a copy of scripts/ and returns (the process, the arguments of each call)."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py"))
    (tmp_path / "bin").mkdir()
    for name in ("torchrun", "python"):
        command = tmp_path / "bin" / name
        command.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >>"$RECORD"; printf "\\1\\0" >>"$RECORD"\n')
        command.chmod(0o755)

    def run(script, *arguments, **environment):
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RECORD": str(record)}
        command = ["bash", str(tmp_path / "scripts" / script), *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True)
        calls = os.fsdecode(record.read_bytes()).removesuffix("\1\0").split("\1\0") if record.exists() else []
        assert not list(tmp_path.rglob("hacked"))
        return done, [call.removesuffix("\0").split("\0") for call in calls]

    return run


PHASES = {"EXP": ODD, "CACHE": "0", "STEPS_1": "050", "STEPS_2": "90", "STEPS_3": "91"}


def run_folder(frames):
    return f"results/{ODD}/{frames:03d}-EqM-S-4-f{frames}-rope"


def make_run(root, frames, *names):
    """A run of one phase with these checkpoints; returns its folder."""
    folder = root / run_folder(frames)
    (folder / "checkpoints").mkdir(parents=True)
    for name in names:
        (folder / f"checkpoints/{name}.pt").touch()
    return folder


@pytest.mark.parametrize(
    ("runs", "calls"),  # {frames: checkpoints}; frames, --resume and --ckpt of each phase that the script starts
    [
        ({}, [(4, False)]),
        ({4: []}, [(4, True)]),
        ({4: ["0000050"]}, [(4, True), (8, False, 4, "0000050")]),
        ({4: ["0000050"], 8: []}, [(4, True), (8, True, 4, "0000050")]),
        ({4: ["0000050"], 8: ["latest"]}, [(8, True, 4, "0000050")]),
        ({4: [], 8: ["0000090"]}, [(8, True, 8, "0000090"), (16, False, 8, "0000090")]),
        ({8: ["best"]}, [(8, True, 8, "best")]),
        ({4: ["0000050"], 16: ["best", "latest"]}, [(16, True, 16, "latest")]),
    ],
)
def test_train_progressive_repeats_no_phase_before_one_with_checkpoints(runs, calls, run_copy, tmp_path):
    for frames, names in runs.items():
        make_run(tmp_path, frames, *names)
    done, found = run_copy("train_progressive.sh", **PHASES)
    assert ("--dry-run" in found[0]) == (not any(runs.values()))
    found = [call for call in found if "--dry-run" not in call]
    for call, (frames, resumes, *ckpt) in zip(found, calls, strict=True):
        path = [f"--ckpt={run_folder(ckpt[0])}/checkpoints/{ckpt[1]}.pt"] if ckpt else []
        assert [word for word in call if word.startswith("--ckpt")] == path
        assert f"--num-frames={frames}" in call and ("--resume" in call) == resumes
    assert done.returncode == (0 if calls[-1][0] == 16 else 2)  # 2: a phase has saved nothing, as python is a stand-in


def test_train_progressive_passes_odd_names_unchanged(run_copy, tmp_path):
    make_run(tmp_path, 4, "0000050"), make_run(tmp_path, 8, "0000090")
    names = PHASES | {"DATA": f"{ODD}data", "LATENTS": f"{ODD}latents", "VAE": f"{ODD}vae", "CACHE": "1"}
    done, calls = run_copy("train_progressive.sh", f"--rest={ODD}", "--max-bad-fraction", "0.5", **names)
    assert done.returncode == 0, done.stderr
    assert [call[2] for call in calls] == ["EqM/cache_latents.py"] + 2 * ["EqM/train.py"]
    assert {f"--data-path={ODD}data", f"--out={ODD}latents", f"--vae={ODD}vae"} <= set(calls[0])
    assert "--max-bad-fraction=0.5" in calls[0]
    for call in calls[1:]:
        assert {f"--data-path={ODD}latents", f"--results-dir=results/{ODD}", f"--rest={ODD}"} <= set(call)
    *_, next_command = os.fsdecode(done.stdout).splitlines()
    command = next_command.partition("with: ")[2].replace("bash", "printenv EXP #")
    assert subprocess.run(["bash", "-c", command], capture_output=True).stdout == os.fsencode(f"{ODD}\n")


def test_train_progressive_can_train_all_phases_in_one_run(run_copy):
    settings = {f"{name}_{phase}": str(10 * phase) for name in ("STEPS", "BATCH") for phase in (1, 2, 3)}
    settings |= {"CACHE": "0", "ONE_RUN": "1", "LR_DECAY": "0.4", "GPUS": "2"}
    _, (call,) = run_copy("train_progressive.sh", "--more", **settings)
    assert call[-4:-1] == ["--val-every=1", "--sample-every=1", "--frames-schedule=4:10:10,8:20:20,16:30:30"]
    assert call[call.index("--lr-decay") + 1] == "0.4"
    assert not any(flag.startswith(("--num-frames", "--ckpt", "--lr-decay-", "--resume")) for flag in call)


POSITIONS = ["--position-table", "space", "--rope-speed", "0.5"]
INTERVALS = ["--frame-interval", "1", "2"]
SMALL = ["--optimizer", "muon", "--gamma-shift", "3"]
SMALL += ["--sampler", "ngd", "--num-sampling-steps", "24", "--stepsize", "0.0217", "--cfg-scale", "1.5"]


@pytest.mark.parametrize(
    ("settings", "on_gpu", "flags", "share", "compiled"),
    [
        ({}, False, INTERVALS, "0.75", []),
        ({"RECIPE": "ours"}, True, INTERVALS, "0.75", ["--compile"]),
        ({"COMPILE": "0"}, True, INTERVALS, "0.75", []),
        ({"RECIPE": "small"}, False, [*INTERVALS, *SMALL], "0.75", []),
        ({"RECIPE": "published"}, False, ["--cfg-scale", "4"], "0", []),  # the rest are the defaults of train.py
        ({"RECIPE": "published", "FORCING": "0.5"}, False, ["--cfg-scale", "4"], "0.5", []),
    ],
)
def test_each_recipe_passes_its_flags_and_our_positions(settings, on_gpu, flags, share, compiled, run_copy, tmp_path):
    if on_gpu:
        (tmp_path / "bin/nvidia-smi").touch(0o755)
    _, (check, call) = run_copy("train_progressive.sh", CACHE="0", **settings)  # phase 1 saves nothing: the script ends
    _, (_, energy) = run_copy("train_progressive.sh", "--ebm", "dot", CACHE="0", **settings)
    assert "--compile" not in energy and energy[-2:] == ["--ebm", "dot"]
    expected = [*flags, *POSITIONS, "--forcing", share, "--lr-decay", "0", *compiled]
    for words in (check, call):
        place = words.index("--results-dir=results/progressive_rope_training") + 1
        assert words[place : words.index("--data-path=datasets/ucf-101")] == expected
    assert {"--num-frames=4", "--val-every=2500", "--sample-every=2500"} <= set(call)


def test_defaults_of_train_py_for_the_published_recipe_equal_the_paper(monkeypatch):
    """AdamW at 1e-4 without weight decay, uniform gamma, no forcing, label dropout 0.1."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-path", "x"])
    args = train.parse_args()
    assert (args.optimizer, args.lr, args.gamma_shift, args.forcing, args.lr_decay) == ("adamw", 1e-4, 1.0, 0.0, 0.0)
    assert args.weight_decay is None  # only --optimizer muon sets it above 0
    assert model_config("EqM-S/4", input_size=16, in_channels=3, num_classes=2).class_dropout_prob == 0.1


def test_train_progressive_leaves_positions_and_forcing_to_a_checkpoint(run_copy, tmp_path):
    def choices(**environment):
        """(its flags of positions, the value of --forcing) of each call."""
        for call in run_copy("train_progressive.sh", **PHASES | environment)[1]:
            place = call.index("--forcing") + 1
            share = call.pop(place)
            yield [flag for flag in call if flag in POSITIONS], share

    assert list(choices()) == 2 * [(POSITIONS, "0.75")]  # the dry run and phase 1, which saves nothing
    assert list(choices(FORCING="0.2")) == 2 * [(POSITIONS, "0.2")]
    config = make_run(tmp_path, 8, "0000090") / "config.json"
    for training, share in (({"lr": 1}, "0"), ({"forcing": 0.5}, "0.5")):  # the first is older than --forcing
        config.write_text(json.dumps({"training": training}))
        assert list(choices()) == 2 * [([], share)]
    assert list(choices(ONE_RUN="1")) == [(POSITIONS, "0.75")]  # which does not continue that run


def test_sample_passes_odd_names_unchanged_and_uses_the_newest_model(run_copy, tmp_path):
    for time, run in ((1, "a"), (3, "b"), (2, "c")):
        path = tmp_path / f"results/{ODD}/{run}\nx/checkpoints/best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    done, (call,) = run_copy("sample.sh", f"--rest={ODD}", EXP=ODD)
    assert done.returncode == 0, done.stderr
    expected = {f"--ckpt=results/{ODD}/b\nx/checkpoints/best.pt", f"--folder=samples/{ODD}-f16", f"--rest={ODD}"}
    assert expected <= set(call)
    _, (call,) = run_copy("sample.sh", EXP="x", CKPT=f"-{ODD}", OUT=f"-{ODD}")
    assert {f"--ckpt=-{ODD}", f"--folder=-{ODD}-f16"} <= set(call)
    _, (call,) = run_copy("sample.sh", EXP="x", CKPT="y", FRAMES="16 7", GPUS="2")
    assert call[call.index("--num-frames") :][:3] == ["--num-frames", "16", "7"] and "--folder=samples/x" in call


@pytest.mark.parametrize("step", ["\n", "x", "1 2", "a[$(touch hacked)]"])
@pytest.mark.parametrize("name", ["STEPS_1", "BATCH_3", "GPUS"])
def test_a_variable_that_is_not_a_number_is_named(run_copy, name, step):
    done, calls = run_copy("train_progressive.sh", CACHE="0", **{name: step})
    assert (done.returncode, calls) == (2, []) and f"{name}=".encode() in done.stderr

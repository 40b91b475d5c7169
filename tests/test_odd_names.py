"""Names with spaces, quotes, line breaks and shell code work everywhere. No shell runs them; they
forge no log line.
"""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest

import cache_latents
import checkpoint
import export
import sample_gd
import train
from runtime import metrics
from runtime.cli import one_line
from tiny_data import make_vae
from tiny_videos import write_video
from training import run_main
from video.files import UnreadableError

FORGED = "\nstep 9: validation loss 0.0000\n"
ODD = "-o  'd\"d`touch hacked`$(touch hacked);[x]* %s {0} ü😀跳\x1b[31m" + FORGED
CLASSES = ["-A" + ODD, "B '" + FORGED + "x" * 150]


def test_all_scripts_work_with_odd_names_and_no_log_line_is_forged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("data", "results", "cache", "exported", "samples", "ckpt", "vae")
    data, results, cache, exported, samples, ckpt, vae = (
        tmp_path / f"{name}{ODD}" for name in names
    )
    for name in (f"{class_name}/--{index}{ODD}" for class_name in CLASSES for index in range(2)):
        write_video(data / f"{name}.avi", 10, size=(16, 16))
    ckpt = ckpt.with_name(f"{ckpt.name}.pt")
    (data / CLASSES[0] / f"broken{ODD}.avi").write_bytes(b"RIFF and no more")
    (data / CLASSES[0] / f"bad{ODD}.avi").write_bytes(
        (data / CLASSES[0] / f"--0{ODD}.avi").read_bytes()[:3000]
    )
    run_main(
        cache_latents,
        f"--data-path={data}",
        f"--out={cache}",
        f"--vae={make_vae(vae)}",
        "--image-size=16",
        "--max-bad-fraction=1",
    )
    shared = [
        "--video",
        "--model=EqM-Ti/4",
        "--num-frames=4",
        "--use-rope",
        "--depth=1",
        "--global-batch-size=4",
        "--num-workers=0",
        "--log-every=1",
        "--max-bad-fraction=1",
        f"--results-dir={results}",
        "--sample-every=1",
        "--num-samples=2",
        "--num-sampling-steps=2",
    ]
    pixels = [*shared, f"--data-path={data}", "--vae=none", "--image-size=16"]
    run_main(train, *pixels, "--max-steps=1")
    monkeypatch.setattr(
        "video.index.probe", Mock(side_effect=UnreadableError)
    )  # the index has all other videos
    run_main(train, *pixels, "--max-steps=2", "--resume", "--cache-frames")
    run_main(train, *shared, f"--data-path={cache}", "--max-steps=1")
    shutil.copy(min(results.glob("[0-9]*")) / "checkpoints/latest.pt", ckpt)
    run_main(train, *pixels, "--max-steps=3", f"--ckpt={ckpt}")
    run_main(export, "--", ckpt, exported)
    for path in (ckpt, exported):
        run_main(
            sample_gd,
            "--video",
            f"--ckpt={path}",
            f"--folder={samples}",
            "--num-samples=2",
            "--num-sampling-steps=2",
            f"--classes={CLASSES[1]}",
        )
        assert np.load(samples / "samples.npz")["labels"].tolist() == [1, 1]

    logs = [path.read_text(encoding="utf-8") for path in results.rglob("log.txt")]
    assert len(logs) == 3 and any("broken-o" in log for log in logs)
    printed = capsys.readouterr().out
    assert "pictures say 'class 0' instead" in printed and "pictures say 'row" not in printed
    for text in (printed, *logs):
        assert not any(line.startswith("step 9:") for line in text.splitlines())
        assert "\x1b" not in text
    for folder in results.glob("[0-9]*"):
        rows, torn = metrics.read_metrics(folder / "metrics.jsonl")
        assert rows and torn == 0
    jsons = [
        json.loads(path.read_text()) for path in (cache / "latents.json", samples / "samples.json")
    ]
    jsons += [
        json.loads((folder / "config.json").read_text())["data"]
        for folder in results.glob("[0-9]*")
    ]
    assert all(
        about["classes"] == sorted(CLASSES)
        for about in [*jsons, checkpoint.load(ckpt)["config"]["data"]]
    )
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

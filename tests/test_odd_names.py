"""Names with spaces, quotes, line breaks and shell code work everywhere, and forge no log line."""

from shlex import split

import numpy as np
import pytest

import cache_latents
import export
import sample_gd
import train
from runtime.cli import one_line
from runtime.untrusted import read_json
from tiny_data import make_vae
from tiny_videos import write_video
from training import run_main

FORGED = "\nstep 9: validation loss 0.0000\n"
ODD = "-o  'd\"d`touch hacked`$(touch hacked);[x]* %s {0} ü😀跳\x1b[31m" + FORGED
TRAINING = split("""
    --model EqM-Ti/4
    --depth 1
    --num-frames 4
    --use-rope
    --global-batch-size 4
    --num-workers 0
    --log-every 1
    --sample-every 1
""")
SAMPLING = split("--video --num-samples 2 --num-sampling-steps 2")
CLASSES = ["-A" + ODD, "B '" + FORGED + "x" * 150]


def test_all_scripts_work_with_odd_names_and_no_log_line_is_forged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / f"data{ODD}"
    results = tmp_path / f"results{ODD}"
    cache = tmp_path / f"cache{ODD}"
    exported = tmp_path / f"exported{ODD}"
    samples = tmp_path / f"samples{ODD}"
    vae = make_vae(tmp_path / f"vae{ODD}")
    for class_name in CLASSES:
        for index in range(2):
            write_video(data / class_name / f"--{index}{ODD}.avi", 10, size=(16, 16))
    (data / CLASSES[0] / f"broken{ODD}.avi").write_bytes(b"RIFF and no more")
    encoding = [f"--data-path={data}", f"--vae={vae}", "--image-size=16", f"--out={cache}"]
    run_main(cache_latents, *encoding)
    shared = [*TRAINING, *SAMPLING, f"--results-dir={results}"]
    pixels = [*shared, f"--data-path={data}", *split("--vae none --image-size 16 --cache-frames")]
    run_main(train, *shared, f"--data-path={cache}", "--max-steps=1")
    run_main(train, *pixels, "--max-steps=1")
    ckpt = max(results.glob("[0-9]*")) / "checkpoints/latest.pt"
    run_main(train, *pixels, "--max-steps=2", f"--ckpt={ckpt}")
    run_main(export, "--", ckpt, exported)
    places = [f"--ckpt={exported}", f"--folder={samples}"]
    run_main(sample_gd, *SAMPLING, *places, f"--classes={CLASSES[1]}")
    assert np.load(samples / "samples.npz")["labels"].tolist() == [1, 1]

    logs = [path.read_text(encoding="utf-8") for path in results.rglob("log.txt")]
    assert len(logs) == 3
    assert any("broken-o" in log for log in logs)
    printed = capsys.readouterr().out
    assert "pictures say 'class 0' instead" in printed
    for text in (printed, *logs):
        assert "\nstep 9:" not in text
        assert "\x1b" not in text
    for path in (cache / "latents.json", samples / "samples.json"):
        assert read_json(path)["classes"] == sorted(CLASSES)
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize(
    "text, shown",
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

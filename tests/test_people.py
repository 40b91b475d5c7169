"""The table of runs of scripts/weizmann.sh: each number is that of the files it comes from."""

import json
import sys
from pathlib import Path

import pytest

from training import ROOT, run_main

sys.path.insert(0, str(ROOT / "scripts"))
import people


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def predictions(samples_per_clip, gain, kinds):
    """A result of --metric prediction: each kind's PSNR lies `gain` above 20 dB, that of moving pixels 1 dB higher."""
    found = {"clips": 64, "samples_per_clip": samples_per_clip}
    for value, more in (("psnr", 0), ("ssim", 0), ("psnr_moving", 1)):
        scores = {kind: 20 + gain + more for kind in kinds} | {"_repeated": 20.0}
        scores |= {f"{kind}_gain": gain + more for kind in kinds if kind != "_best"}
        for kind, score in scores.items():
            found |= {value + kind: score, f"{value}{kind}_interval95": [score - 0.5, score + 0.25]}
            found[f"{value}{kind}_by_frame"] = {"mean": [score], "half95": [0.5]}
    return found


def write_run(name, hours, gain, kinds=("", "_best", "_average")):
    rows = (1, 5.0, 8), (2, 5.25, 16), (3, None, 16), (4, 6.0, 16)  # the loss of fewer frames is another
    model = [
        {"step": step, "num_frames": frames, "seconds": 60 * step} | ({"val_loss": loss} if loss else {})
        for step, loss, frames in rows
    ]
    write_lines(Path("results", name, "000-VAE-64px-f4/metrics.jsonl"), [{"step": 3, "val_psnr": 31.414}])
    write_lines(Path("results", name, "001-EqM-S-2-f4-rope/metrics.jsonl"), model)
    Path("results", name, "settings").write_text(f"HOURS={hours} DATA=datasets/weizmann HOLD_OUT=7 8\n")
    judged = {"clips": 32, "right": 31, "share": 31 / 32, "interval95": [0.843, 0.994]}
    asked = {"clips": 96, "right": 90, "share": 90 / 96, "interval95": [0.87, 0.97], "still": [3, 40]}
    files = {
        "8of16-decoded": {"result": predictions(8, gain, kinds)},
        "4of16-decoded": {"result": predictions(10, gain, kinds)},
        "8of16-background": {"result": predictions(8, gain + 2, kinds)},
        "4of16-background": {"result": predictions(10, gain + 2, kinds)},
        "judge": {"result": {"real": judged, "samples": {f"samples/{name}-f16": asked}}},
        "nearest": {
            "values": {"rmse_ratio": 1.024, "nearer_than_95_percent": 0.052},
            "result": {"rmse_ratio_interval95": [0.981, 1.066]},
        },
    }
    for task, content in files.items():
        write_lines(Path("samples", f"{name}-{task}.json"), [content])


def table_of(path):
    rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_run_is_a_column_of_its_own_scores_in_the_order_of_the_hours(capsys):
    write_run("long", 3, 1.5)
    write_run("short", 0.5, -0.75)
    run_main(people, "long", "short", "--out", "out")
    table = table_of(Path("out/people.md"))
    assert table[""] == ["HOURS=0.5", "HOURS=3"]
    assert table["VAE, PSNR of held-out people (dB)"] == ["31.41"] * 2
    assert table["step of the checkpoint that is scored, best.pt"] == ["2"] * 2
    whole, moving = (f"8 of 16 given, {words} above repeating (dB)" for words in ("PSNR", "moving pixels"))
    for kind in ("a sample", "the average of 8"):
        assert table[f"{whole}: {kind}"] == ["-0.75 (-1.25 to -0.50)", "1.50 (1.00 to 1.75)"]
        assert table[f"{moving}: {kind}"] == ["0.25 (-0.25 to 0.50)", "2.50 (2.00 to 2.75)"]
        assert table[f"{moving}, background kept: {kind}"] == ["2.25 (1.75 to 2.50)", "4.50 (4.00 to 4.75)"]
    for kind in ("mean", "best", "average"):
        assert table[f"4 of 16 given, moving pixels (dB): {kind} of 10"] == ["20.25", "22.50"]
        assert table[f"4 of 16 given, moving pixels (dB), background kept: {kind} of 10"] == ["22.25", "24.50"]
    assert table["4 of 16 given, moving pixels of repeating (dB)"] == ["20.00"] * 2
    assert table["judge: samples that show what was asked for"] == ["90 of 96, 93.8% (87.0 - 97.0)"] * 2
    assert table["samples that move less than any real clip"] == ["2 of 96"] * 2
    assert table["nearest training clip, RMSE: samples / held-out"] == ["1.02 (0.98 to 1.07)"] * 2
    assert [run["hours"] for run in json.loads(Path("out/people.json").read_text())] == [0.5, 3]
    assert "| judge: real clips, one person left out | 31 of 32, 96.9% (84.3 - 99.4) |" in capsys.readouterr().out


def test_scores_of_earlier_versions_leave_cells_empty():
    write_run("old", 1, 0.5, kinds=("", "_best"))
    write_run("new", 2, 0.5)
    judged = Path("samples/old-judge.json")
    judged.write_text(judged.read_text().replace(', "still": [3, 40]', ""))
    run_main(people, "old", "new", "--out", "out")
    above = "8 of 16 given, PSNR above repeating (dB)"
    table = table_of(Path("out/people.md"))
    assert table[f"{above}: the average of 8"] == ["-", "0.50 (0.00 to 0.75)"]
    assert table[f"{above}: a sample"] == ["0.50 (0.00 to 0.75)"] * 2
    assert table["samples that move less than any real clip"] == ["-", "2 of 96"]


METRICS = "results/one/000-VAE-64px-f4/metrics.jsonl"


@pytest.mark.parametrize("missing", ["results/one/settings", METRICS, "samples/one-judge.json"])
def test_a_run_that_is_not_finished_is_one_line(missing, capsys):
    write_run("one", 1, 0.5)
    Path(missing).unlink()
    run_main(people, "one", "--out", "out", status=2)
    error = capsys.readouterr().err
    assert f"one: not a finished run of scripts/weizmann.sh: {missing} is missing; run it again with EXP=one" in error
    assert error.count("\n") == 1 and not Path("out").exists()

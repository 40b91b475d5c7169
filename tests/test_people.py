"""The table of runs of scripts/weizmann.sh: each number is that of the files it comes from."""

import json
from pathlib import Path

import pytest

import people
from training import refused, run_main


def write_lines(path, *rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n")


def predictions(samples_per_clip, gain):
    """A result of --metric prediction: each kind's PSNR is `gain` above 20 dB, that of moving pixels 1 dB higher."""
    found = {"clips": 64, "samples_per_clip": samples_per_clip}
    for value, more in (("psnr", 0), ("ssim", 0), ("psnr_moving", 1)):
        kinds = ("", "_best", "_average")
        scores = {kind: 20 + gain + more for kind in kinds} | {"_repeated": 20.0}
        scores |= {f"{kind}_gain": gain + more for kind in kinds if kind != "_best"}
        for kind, score in scores.items():
            found |= {value + kind: score, f"{value}{kind}_interval95": [score - 0.5, score + 0.25]}
            found[f"{value}{kind}_by_frame"] = {"mean": [score], "half95": [0.5]}
    return found


def write_run(name, hours, gain):
    rows = (1, 5.0, 8), (2, 5.25, 16), (4, 6.0, 16)  # the loss of fewer frames is another
    model = [{"step": step, "num_frames": n, "seconds": 60 * step, "val_loss": loss} for step, loss, n in rows]
    model.insert(2, {"step": 3, "num_frames": 16, "seconds": 180})
    write_lines(f"results/{name}/000-VAE-64px-f4/metrics.jsonl", {"step": 3, "val_psnr": 31.414})
    write_lines(f"results/{name}/001-EqM-S-2-f4-rope/metrics.jsonl", *model)
    Path("results", name, "settings").write_text(f"HOURS={hours} DATA=datasets/weizmann HOLD_OUT=7 8\n")
    real = {"clips": 32, "right": 31, "share": 31 / 32, "interval95": [0.843, 0.994]}
    samples = {"clips": 96, "right": 90, "share": 90 / 96, "interval95": [0.87, 0.97], "static": [3, 40]}
    nearest = {"rmse_ratio": 1.024, "nearer_than_95_percent": 0.052}
    write_lines(f"samples/{name}-classifier.json", {"result": {"real": real, "samples": samples}})
    ratio = {"rmse_ratio_interval95": [0.981, 1.066]}
    write_lines(f"samples/{name}-nearest.json", {"values": nearest, "result": ratio})
    for task, count in (("8of16", 8), ("4of16", 10)):
        write_lines(f"samples/{name}-{task}-decoded.json", {"result": predictions(count, gain)})
        write_lines(f"samples/{name}-{task}-background.json", {"result": predictions(count, gain + 2)})


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_run_is_a_column_in_the_order_of_the_hours(capsys):
    write_run("long", 3, 1.5)
    write_run("short", 0.5, -0.75)
    run_main(people, "long", "short", "--out", "out")
    rows = [line.strip("|").split("|") for line in Path("out/people.md").read_text().splitlines() if line[:1] == "|"]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    moving = "8 of 16 given, moving pixels above repeating (dB)"
    four = "4 of 16 given, moving pixels (dB)"
    expected = {
        "": ["HOURS=0.5", "HOURS=3"],
        "VAE, PSNR of held-out people (dB)": ["31.41"] * 2,
        "step of the checkpoint that is scored, best.pt": ["2"] * 2,
        "8 of 16 given, PSNR above repeating (dB): a sample": ["-0.75 (-1.25 to -0.50)", "1.50 (1.00 to 1.75)"],
        f"{moving}: the average of 8": ["0.25 (-0.25 to 0.50)", "2.50 (2.00 to 2.75)"],
        f"{moving}, background kept: a sample": ["2.25 (1.75 to 2.50)", "4.50 (4.00 to 4.75)"],
        **{f"{four}: {kind} of 10": ["20.25", "22.50"] for kind in ("mean", "best", "average")},
        f"{four}, background kept: best of 10": ["22.25", "24.50"],
        "4 of 16 given, moving pixels of repeating (dB)": ["20.00"] * 2,
        "classifier: samples that show the class that was asked for": ["90 of 96, 93.8% (87.0 - 97.0)"] * 2,
        "samples that move less than any real clip": ["2 of 96"] * 2,
        "nearest training clip, RMSE: samples / held-out": ["1.02 (0.98 to 1.07)"] * 2,
    }
    assert table.items() >= expected.items()
    assert [run["hours"] for run in json.loads(Path("out/people.json").read_text())] == [0.5, 3]
    assert "| classifier: real clips, one person held out | 31 of 32, 96.9% (84.3 - 99.4) |" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["results/one/000-VAE-64px-f4/metrics.jsonl", "samples/one-classifier.json"])
def test_a_run_that_is_not_finished_is_one_line(missing, capsys):
    write_run("one", 1, 0.5)
    Path(missing).unlink()
    line = refused(capsys, people, "one", "--out", "out")
    assert f"{missing}: no such file; expected finished runs of scripts/weizmann.sh" in line
    assert not Path("out").exists()

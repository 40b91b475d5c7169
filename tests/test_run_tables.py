"""The tables of runs of scripts/weizmann.sh and scripts/sprites.sh: each number is that of the files it comes from."""

import json
from pathlib import Path

import pytest

import people
import sprites
import sprites_descent
from training import refused, run_main


def write_lines(path, *rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table_of(script, *runs):
    """{title: cells} of the rows that a script writes of these runs."""
    run_main(script, *runs, "--out", "out")
    lines = Path("out", script.__name__).with_suffix(".md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {title: cells for title, *cells in rows}


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


def write_people(name, hours=1, gain=0.5):
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


def test_each_run_is_a_column_in_the_order_of_the_hours(capsys):
    write_people("long", 3, 1.5)
    write_people("short", 0.5, -0.75)
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
    assert table_of(people, "long", "short").items() >= expected.items()
    assert [run["hours"] for run in json.loads(Path("out/people.json").read_text())] == [0.5, 3]
    assert "| classifier: real clips, one person held out | 31 of 32, 96.9% (84.3 - 99.4) |" in capsys.readouterr().out


def write_sprites(name, hours=2, seed=0, valid=0.5, vae=None):
    rows = [{"step": 1, "val_psnr": 20.0}, {"step": 2, "val_psnr": 35.25}]
    write_lines(Path(vae).parent / "metrics.jsonl" if vae else f"results/{name}/000-VAE-64px/metrics.jsonl", *rows)
    write_lines(f"results/{name}/001-EqM-S-4-f4-8-rope/metrics.jsonl", {"step": 9000, "seconds": 4500})
    used = f" VAE={vae}" if vae else ""
    Path("results", name, "settings").write_text(f"HOURS={hours} DATA=datasets/sprites SEED={seed}{used}\n")
    judged = {"clips": 2664, "right": 2664, "share": 1.0, "interval95": [0.9986, 1.0], "IS": 8.994, "H(y|x)": 0.0006}
    judged["H(y)"] = 2.1972
    classifier = {"real": judged, "samples": judged | {"clips": 2592, "right": 2590, "IS": 8.875}}
    shares = {name: 0.5 for name in sprites.SHARES} | {"valid": valid, "true_attributes": 0.75, "true_clip": 0.625}
    census = shares | {f"{name}_interval95": [share - 0.125, share + 0.0625] for name, share in shares.items()}
    census |= {"held_out_expected": 0.228, "characters": 1100, "characters_expected": 1111.4}
    census |= {"rmse": 4.5, "rmse_interval95": [4.0, 5.0], "rmse_real": 3.25, "samples": {"valid": [True]}}
    census |= {"failures": {"attribute": 1, "pose": 2, "margin": 3, "rmse": 4}, "limits": {"margin": 0.5, "rmse": 9.0}}
    predicted = {"psnr": 28.5, "psnr_interval95": [28.0, 29.0], "psnr_repeated": 20.0, "psnr_by_frame": {"mean": [1]}}
    results = {"census": census, "classifier": classifier, "predicted": predicted, "predicted-census": census}
    for task, result in results.items():
        write_lines(f"samples/{name}-{task}.json", {"result": result})


def test_each_run_is_a_column_by_hours_and_seed_and_may_share_its_vae():
    write_sprites("first", 2, 0, 0.9375)
    write_sprites("second", 2, 1, 0.875, vae="results/first/000-VAE-64px/vae")
    write_sprites("short", 0.5, 0, 0.5)
    table = table_of(sprites, "second", "short", "first")
    assert table[""] == ["HOURS=0.5, seed 0", "HOURS=2, seed 0", "HOURS=2, seed 1"]
    assert table["census: valid samples (%)"] == ["50.0 (37.5 to 56.2)", "93.8 (81.2 to 100.0)", "87.5 (75.0 to 93.8)"]
    expected = {
        "minutes of the model's training": "75", "VAE, PSNR of held-out characters (dB)": "35.25",
        "classifier: wrong samples": "2 of 2592", "classifier: IS of samples": "8.8750",
        "census: failed for attribute, pose, margin, RMSE": "1, 2, 3, 4",
        "census: different characters expected": "1111", "one frame given: the true clip (%)": "62.5 (50.0 to 68.8)",
        "one frame given: PSNR (dB)": "28.50 (28.00 to 29.00)",
    }  # fmt: skip
    assert {title: table[title][2] for title in expected} == expected
    runs = json.loads(Path("out/sprites.json").read_text())
    assert [run["seed"] for run in runs] == [0, 0, 1] and "samples" not in runs[0]["census"]


def test_the_descent_has_a_row_per_setting_and_per_state():
    shares = {name: number / 10 for number, name in enumerate(sprites_descent.SHARES)}
    scores = {"1, 23": shares | {"rmse": 4.321}, "1.5, 11": dict.fromkeys(shares, 1.0) | {"rmse": 5.0}}
    together, final = [[0, 0.25, 0.5, 1]] * 3, [[0.125] * 4, [1] * 4]
    lines = sprites_descent.markdown({"scores": scores, "together": together, "final": final})
    assert "| 1, 23 | 0.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 4.32 |" in lines
    assert lines.count("| 2 | 0 | 25 | 50 | 100 |") == 1 and "| 1 | 100 | 100 | 100 | 100 |" in lines


@pytest.mark.parametrize(("script", "write", "missing", "runs"), [
    (people, write_people, "results/one/000-VAE-64px-f4/metrics.jsonl", "weizmann"),
    (people, write_people, "samples/one-classifier.json", "weizmann"),
    (sprites, write_sprites, "samples/one-predicted.json", "sprites"),
])  # fmt: skip
def test_a_run_that_is_not_finished_is_one_line(script, write, missing, runs, capsys):
    write("one")
    Path(missing).unlink()
    line = refused(capsys, script, "one", "--out", "out")
    assert f"{missing}: no such file; expected finished runs of scripts/{runs}.sh" in line
    assert not Path("out").exists()

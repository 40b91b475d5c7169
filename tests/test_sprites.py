"""The table of runs of scripts/sprites.sh: each number is that of the files it comes from."""

import json
from pathlib import Path

import pytest

import sprites
import sprites_descent
from test_people import write_lines
from training import run_main


def with_interval(values):
    return values | {f"{name}_interval95": [share - 0.125, share + 0.0625] for name, share in values.items()}


def write_run(name, hours, seed, valid, vae=None):
    rows = [{"step": 1, "val_psnr": 20.0}, {"step": 2, "val_psnr": 35.25}]
    write_lines(Path(vae).parent / "metrics.jsonl" if vae else f"results/{name}/000-VAE-64px/metrics.jsonl", *rows)
    write_lines(f"results/{name}/001-EqM-S-2-f4-8-rope/metrics.jsonl", {"step": 9000, "seconds": 4500})
    used = f" VAE={vae}" if vae else ""
    Path("results", name, "settings").write_text(f"HOURS={hours} DATA=datasets/sprites SEED={seed}{used}\n")
    judged = {"clips": 2664, "right": 2664, "share": 1.0, "interval95": [0.9986, 1.0], "IS": 8.994, "H(y|x)": 0.0006}
    judged["H(y)"] = 2.1972
    classifier = {"real": judged, "samples": judged | {"clips": 2592, "right": 2590, "IS": 8.875}}
    shares = {name: 0.5 for name in sprites.SHARES} | {"valid": valid, "true_attributes": 0.75, "true_clip": 0.625}
    census = with_interval(shares) | {"held_out_expected": 0.228, "characters": 1100, "characters_expected": 1111.4}
    census |= {"rmse": 4.5, "rmse_interval95": [4.0, 5.0], "rmse_real": 3.25, "samples": {"valid": [True]}}
    census |= {"failures": {"attribute": 1, "pose": 2, "margin": 3, "rmse": 4}, "limits": {"margin": 0.5, "rmse": 9.0}}
    predicted = {"psnr": 28.5, "psnr_interval95": [28.0, 29.0], "psnr_repeated": 20.0, "psnr_by_frame": {"mean": [1]}}
    results = {"census": census, "classifier": classifier, "predicted": predicted, "predicted-census": census}
    for task, result in results.items():
        write_lines(f"samples/{name}-{task}.json", {"result": result})


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_run_is_a_column_by_hours_and_seed_and_may_share_its_vae(capsys):
    write_run("first", 2, 0, 0.9375)
    write_run("second", 2, 1, 0.875, vae="results/first/000-VAE-64px/vae")
    write_run("short", 0.5, 0, 0.5)
    run_main(sprites, "second", "short", "first", "--out", "out")
    rows = [line.strip("|").split("|") for line in Path("out/sprites.md").read_text().splitlines() if line[:1] == "|"]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
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


def test_an_unfinished_run_is_one_line(capsys):
    write_run("one", 2, 0, 0.5)
    Path("samples/one-predicted.json").unlink()
    run_main(sprites, "one", status=2)
    error = capsys.readouterr().err
    assert "samples/one-predicted.json: no such file; expected finished runs of scripts/sprites.sh" in error


def test_the_descent_has_a_row_per_setting_and_per_state():
    shares = {name: number / 10 for number, name in enumerate(sprites_descent.SHARES)}
    scores = {"1, 23": shares | {"rmse": 4.321}, "1.5, 11": dict.fromkeys(shares, 1.0) | {"rmse": 5.0}}
    together, final = [[0, 0.25, 0.5, 1]] * 3, [[0.125] * 4, [1] * 4]
    lines = sprites_descent.markdown({"scores": scores, "together": together, "final": final})
    assert "| 1, 23 | 0.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 4.32 |" in lines
    assert lines.count("| 2 | 0 | 25 | 50 | 100 |") == 1 and "| 1 | 100 | 100 | 100 | 100 |" in lines

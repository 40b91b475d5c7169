"""The scores of the demo model are of this model, and it reaches them."""

import json
import sys
from pathlib import Path

import checkpoint
import evaluate
import make_moving_shapes
from scoring.manifest import read_manifest
from training import run_main

DEMO = Path(evaluate.__file__).resolve().parents[1] / "results/demo"


def test_the_demo_is_small_and_its_scores_are_of_this_model():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 5e6
    own = checkpoint.weights_sha256(checkpoint.load_model(DEMO)[0].state_dict())
    scores = list(DEMO.glob("motion-*.json"))
    assert len(scores) >= 3
    text = (DEMO / "README.md").read_text()
    for path in scores:
        found = read_manifest(path)
        assert found["generated"]["weights_sha256"] == own
        assert f"{found['values']['direction_accuracy']:.1%}" in text  # the table says what was measured


def test_the_scores_of_the_demo_can_be_repeated_though_evaluate_has_new_flags_since(monkeypatch):
    for path in DEMO.glob("motion-*.json"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", "x.json", "--manifest", str(path)])
        args, old = evaluate.repeat_flags(*evaluate.parse_args())
        assert (args.given_frames, args.samples_per_clip) == (None, 1)
        assert args.num_frames == old["generated"]["num_frames"]


def test_the_demo_moves_its_shapes_in_the_directions_of_their_classes(tmp_path):
    data, out = tmp_path / "shapes", tmp_path / "motion.json"
    make_moving_shapes.main(["--out", str(data), "--videos-per-class", "2"])
    flags = ["--ckpt", DEMO, "--data-path", data, "--num-samples", 12, "--num-real", 12, "--num-workers", 0]
    flags += ["--out", out, "--sampler", "ngd", "--num-sampling-steps", 16, "--stepsize", 0.0332, "--cfg-scale", 1.5]
    run_main(evaluate, *flags)
    assert json.loads(out.read_text())["values"]["direction_accuracy"] >= 10 / 12

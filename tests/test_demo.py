"""The scores of the demo model are of this model, and it reaches them."""

import json

import checkpoint
import evaluate
import sample_gd
from training import ROOT, run_main

DEMO = ROOT / "results/demo"


def test_the_demo_is_small_and_its_scores_are_of_this_model():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 5e6
    own = checkpoint.weights_sha256(checkpoint.load_model(DEMO)[0].state_dict())
    scores = [path.read_text() for path in DEMO.glob("motion-*.json")]
    text = (DEMO / "README.md").read_text()
    assert len(scores) >= 3 and all(f'"weights_sha256": "{own}"' in score for score in scores)
    for score in scores:  # the table says what was measured
        assert f"| {100 * json.loads(score)['values']['direction_accuracy']:.1f} (" in text


def test_the_demo_moves_its_shapes_in_the_directions_of_their_classes(shapes, tmp_path):
    flags = [
        "--sampler",
        "ngd",
        "--num-sampling-steps",
        16,
        "--stepsize",
        0.0332,
        "--cfg-scale",
        1.5,
    ]
    run_main(
        sample_gd,
        "--ckpt",
        DEMO,
        "--video",
        "--num-samples",
        12,
        "--folder",
        tmp_path / "samples",
        *flags,
    )
    flags = [
        "--samples",
        tmp_path / "samples",
        "--data-path",
        shapes,
        "--num-real",
        12,
        "--num-workers",
        0,
    ]
    run_main(evaluate, "--metric", "motion", *flags, "--out", tmp_path / "motion.json")
    assert (
        json.loads((tmp_path / "motion.json").read_text())["values"]["direction_accuracy"]
        >= 10 / 12
    )

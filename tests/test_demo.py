"""The scores of the demo models are of these models, and they reach them."""

import re
from shlex import split

import checkpoint
import make_world
import sample_gd
from runtime.untrusted import read_json
from sample_folders import run
from training import ROOT, run_main

DEMO = ROOT / "results/demo"
FEW = ROOT / "results/demo-few"
WORLD = ROOT / "results/demo-world"


def scores_of(demo, pattern):
    """The values of the scores of a small folder, which must be of its model."""
    assert sum(file.stat().st_size for file in demo.iterdir()) <= 4e6
    sha256 = checkpoint.weights_sha256(checkpoint.load(demo)["ema"])
    for path in demo.glob(pattern):
        scores = read_json(path)
        assert scores["generated"]["source"]["weights_sha256"] == sha256
        yield scores["values"]


def test_the_demo_is_small_and_its_scores_are_of_this_model():
    text = (DEMO / "README.md").read_text()
    scores = list(scores_of(DEMO, "motion-*.json"))
    assert len(scores) == 5
    for values in scores:  # the table says what was measured
        assert f"| {100 * values['direction_accuracy']:.1f} (" in text


def test_the_student_of_the_demo_is_small_and_its_scores_are_of_this_model():
    config = read_json(FEW / "config.json")
    teacher = checkpoint.weights_sha256(checkpoint.load(DEMO)["ema"])
    assert config["training"]["teacher"]["weights_sha256"] == teacher
    text = (FEW / "README.md").read_text()
    scores = [*scores_of(FEW, "motion-*.json"), read_json(FEW / "teacher.json")["values"]]
    assert len(scores) == 5
    for values in scores:
        numbers = [values[f"{what}_accuracy"] for what in ("both", "direction", "shape")]
        both, direction, shape = (f"{100 * number:.1f}" for number in numbers)
        assert re.search(rf"\| {both} \(.* \| {direction} \| {shape} \|", text), both


def test_the_demo_moves_its_shapes_in_the_directions_of_their_classes(shapes, tmp_path):
    samples = tmp_path / "samples"
    flags = split(
        "--sampler ngd --num-sampling-steps 16 --stepsize 0.0332 --num-samples 12 --num-frames 7"
    )
    run_main(sample_gd, "--ckpt", DEMO, "--video", "--folder", samples, *flags)
    flags = split("--metric motion --num-real 12")
    made = run(tmp_path / "motion.json", *flags, "--samples", samples, "--data-path", shapes)
    assert made["values"]["direction_accuracy"] >= 10 / 12


def test_the_world_is_small_and_its_scores_are_of_this_model():
    (values,) = scores_of(WORLD, "world-4.json")
    text = (WORLD / "README.md").read_text()  # the table says what was measured
    for measure in ("moved", "blocked", "determined", "sharp", "agent", "remembered", "chance"):
        assert re.search(rf"\| {100 * values[measure]:.4g}%", text), measure


def test_the_world_obeys_its_actions_on_new_maps(tmp_path):
    data = tmp_path / "world"
    flags = split("--episodes 1 --held-out 8 --frames 9 --seed 5")
    run_main(make_world, "--out", data, *flags)
    samples = tmp_path / "samples"
    flags = split(
        "--given-split val --given-frames 0 --no-keep-background --num-frames 9 --num-samples 8"
    )
    walks = ["--given", data, "--actions", data / "walks.npy"]
    run_main(sample_gd, "--ckpt", WORLD, "--video", "--folder", samples, *walks, *flags)
    flags = ["--metric", "world", "--samples", samples, "--data-path", data]
    values = run(tmp_path / "world.json", *flags)["values"]
    for measure in ("moved", "blocked", "determined", "sharp", "agent"):
        assert values[measure] >= 0.9, measure

"""A tiny model in the published format, compared with the float32 results of the published code."""

import argparse
import json
import os
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from safetensors import safe_open

import checkpoint
import export
import models
import sample_gd
import samplers
import train
import transport
from models import Condition, EqM, EqMConfig
from published import convert_published
from runtime.cli import UserError
from test_models import distance
from tiny_data import flip_bit, make_images, make_vae
from tiny_videos import write_equal_videos
from training import differences, error_of, refused, run_main

with safe_open(Path(__file__).parent / "eqm_image_tiny.safetensors", "pt") as file:
    # inputs and results; the file is not a dict
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    SETTINGS = json.loads(file.metadata()["config"])  # of the model
STATE = {name.removeprefix("state."): value for name, value in TENSORS.items() if "state." in name}
X = TENSORS["x"].unsqueeze(2)  # images of one frame
Y = TENSORS["y"]
FIELDS = SETTINGS.keys() & {field.name for field in fields(EqMConfig)}
CONFIG = EqMConfig(temporal_patch_size=1, **{name: SETTINGS[name] for name in FIELDS})


def make_model(**changes):
    config = replace(CONFIG, **changes)
    model = EqM(config).eval()
    model.load_state_dict(convert_published(STATE, config))
    return model


def guided(function, guidance):
    return samplers.guided(
        function=function,
        condition=Condition.of(Y, CONFIG),
        time_scale=torch.full((3,), 0.04),
        guidance=guidance,
    )


def descend(method):
    most = SETTINGS["sampler_evaluations"]
    x, evaluations = samplers.sample(
        guided(make_model(), 1.0),
        X,
        method,
        num_steps=most + 1,
        step_size=SETTINGS["sampler_eta"],
        momentum=SETTINGS["sampler_mu"],
    )
    assert evaluations.tolist() == [most] * 3
    return x


NOISE = TENSORS["loss.noise"].unsqueeze(2)
GAMMA = TENSORS["loss.gamma"]
X_GAMMA = transport.interpolate(X, NOISE, GAMMA)
TARGET = transport.OBJECTIVES["eqm"].target(X, NOISE, GAMMA)
RESULTS = {  # of the published code: what gives the same
    "output": lambda: make_model()(X, Y),
    "cfg4.output": lambda: guided(make_model(), SETTINGS["cfg_scale"])(X, torch.arange(3)),
    "loss.c": lambda: transport.decay(GAMMA),
    "loss.x_gamma": lambda: X_GAMMA,
    "loss.target": lambda: TARGET,
    "loss.per_sample": lambda: (make_model()(X_GAMMA, Y) - TARGET).square().flatten(1).mean(dim=1),
    "energy_dot.energy": lambda: make_model(ebm="dot").energy(X, Y),
    "energy_dot.gradient": lambda: make_model(ebm="dot")(X, Y),
    "energy_l2.energy": lambda: make_model(ebm="l2").energy(X, Y),
    "energy_l2.gradient": lambda: make_model(ebm="l2")(X, Y),
    "sampler_gd.final": lambda: descend("gd"),
    "sampler_ngd.final": lambda: descend("ngd"),
    "state.pos_embed": lambda: make_model().pos_embed,
}


@pytest.mark.parametrize("name", RESULTS)
@torch.no_grad()
def test_the_published_model_gives_the_results_of_the_published_code(name):
    expected = TENSORS[name]
    assert distance(RESULTS[name]().view_as(expected), expected) < 1e-5


# Files --------------------------------------------------------------------------------------------

BIAS = "final_layer.linear.bias"


@pytest.fixture(autouse=True)
def tiny_name(monkeypatch):
    """A --model for the tiny model."""
    monkeypatch.setitem(models.SIZES, "Tiny", (2, 48, 2))
    models.NAMES.append("EqM-Tiny/2")
    yield "EqM-Tiny/2"
    models.NAMES.remove("EqM-Tiny/2")


def write_file(path, state, kind):
    """Write a file as the published training script does, or only its network ("bare")."""
    ema = state | {BIAS: state[BIAS] + 1}  # so that the EMA weights differ from the raw ones
    args = argparse.Namespace(vae="mse")
    if kind == "of energies":
        args.ebm = "l2"
    whole = {"model": state, "ema": ema, "opt": {"state": {}}, "args": args}
    torch.save(ema if kind == "bare" else whole, path)
    return path


@pytest.mark.parametrize("kind", ["bare", "whole", "of energies"])
def test_a_published_file_loads_and_is_exported_with_its_ema_weights(tmp_path, tiny_name, kind):
    path = write_file(tmp_path / "0080000.pt", STATE, kind)
    model, config, step = checkpoint.load_model(path, model=tiny_name, video=False)
    expected = make_model(ebm=model.config.ebm)
    expected.final_layer.linear.bias.data += 1
    run_main(export, path, tmp_path / "shared", "--model", tiny_name)
    shared, shared_config, _ = checkpoint.load_model(tmp_path / "shared")  # which knows its model
    assert differences(model.state_dict(), expected.state_dict()) == []
    assert differences(shared.state_dict(), expected.state_dict()) == []
    assert shared_config == config
    assert model.config == replace(CONFIG, ebm="l2" if kind == "of energies" else "none")
    assert config["data"]["vae"] == ("ema" if kind == "bare" else "mse")
    assert config["data"]["classes"] == [str(label) for label in range(10)]
    assert step == 0
    if kind == "bare":
        line = error_of(checkpoint.load_model, path, use_ema=False, model=tiny_name)
        assert line.startswith("--no-ema: ")
        assert "holds EMA weights only" in line
    else:
        raw, _, _ = checkpoint.load_model(path, use_ema=False, model=tiny_name)
        torch.testing.assert_close(raw.final_layer.linear.bias + 1, model.final_layer.linear.bias)


def test_a_published_file_has_its_own_energy_or_the_energy_of_the_flag(tmp_path, tiny_name):
    bare = write_file(tmp_path / "bare.pt", STATE, "bare")
    model, _, _ = checkpoint.load_model(bare, model=tiny_name, ebm="dot")
    assert model.config.ebm == "dot"
    path = write_file(tmp_path / "a.pt", STATE, "of energies")
    line = error_of(checkpoint.load_model, path, model=tiny_name, ebm="dot")
    assert "has ebm l2, --ebm gives dot" in line
    # plain args, half precision
    half = {name: value.half() for name, value in STATE.items()}
    torch.save({"ema": half, "args": {"ebm": "dot", "vae": "mse"}}, path)
    model, config, _ = checkpoint.load_model(path, model=tiny_name)
    assert model.config.ebm == "dot"
    assert config["data"]["vae"] == "mse"


@pytest.mark.parametrize("part", ["model", "ema", "opt"])
def test_a_flipped_bit_of_a_published_file_is_found_if_it_is_used(tmp_path, tiny_name, part):
    weight = "blocks.1.mlp.fc1.weight"
    path = tmp_path / "a.pt"
    state = {
        "model": STATE,
        "ema": STATE | {weight: STATE[weight] + 1},
        "opt": {weight: torch.rand(100)},
    }
    torch.save(state, path)
    flip_bit(path, state[part][weight])

    def expect(is_used):
        return pytest.raises(UserError, match="a.pt: damaged") if is_used else nullcontext()

    with expect(part == "ema"):
        checkpoint.load_model(path, model=tiny_name)
    with expect(part == "model"):
        checkpoint.load_model(path, model=tiny_name, use_ema=False)
    with expect(part != "opt"):
        checkpoint.load(path, model=tiny_name)  # as training does


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"model": None}, "pass --model, such as EqM-XL/2"),
        ({"model": "EqM-Tiny/4"}, "holds EqM-Tiny/2, expected EqM-Tiny/4; pass another --model"),
        ({"model": "EqM-Tiny/2", "use_rope": True}, "cannot be converted"),
        ({"model": "EqM-Tiny/2", "video": True}, "holds an image model"),
    ],
)
def test_a_published_file_that_does_not_fit_the_flags_is_refused(tmp_path, flags, words):
    path = write_file(tmp_path / "a.pt", STATE, "bare")
    line = error_of(checkpoint.load_model, path, **flags)
    assert line.startswith(f"--ckpt {path}: ")
    assert words in line


TABLE = STATE["pos_embed"]
NO_TABLE = "pos_embed is not our table"


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("pos_embed", TABLE.roll(24, dims=2), NO_TABLE),  # height first, as in DiT forks
        ("pos_embed", TABLE[:, :9], NO_TABLE),
        ("pos_embed", None, "it has no pos_embed"),
        ("blocks.1.mlp.fc1.weight", None, "blocks.1.mlp.fc1.weight"),
    ],
)
def test_a_published_file_with_other_tensors_is_refused(tmp_path, tiny_name, name, tensor, words):
    state = STATE | {name: tensor}
    if tensor is None:
        del state[name]
    path = tmp_path / "a.pt"
    torch.save(state, path)
    assert words in error_of(checkpoint.load_model, path, model=tiny_name)
    args = argparse.Namespace(inflate=path, model=tiny_name, ebm=None)
    line = error_of(checkpoint.load_inflated, args)
    assert line.startswith(f"--inflate {path}: ")
    assert words in line


def rename_classes(data, names):
    """Rename class folders, {old name: new name}."""
    for old, new in names.items():
        (data / old).rename(data / new)


def test_a_published_file_samples_images_and_starts_a_training_run(tmp_path, tiny_name, capsys):
    path = write_file(tmp_path / "a.pt", STATE, "whole")
    vae = make_vae(tmp_path / "vae")
    shared = ["--ckpt", path, "--model", tiny_name, "--vae", vae, "--num-sampling-steps", 3]
    run_main(sample_gd, *shared, "--num-samples", 3, "--folder", tmp_path / "s", "--classes", 7)
    samples = np.load(tmp_path / "s/samples.npz")
    assert samples["arr_0"].shape == (3, 16, 16, 3)
    assert samples["labels"].tolist() == [7, 7, 7]

    data = make_images(tmp_path / "data", 4)
    rename_classes(data, {"A": "0", "B": "1"})
    flags = split("--image-size 16 --num-classes 10 --val-clips 2 --global-batch-size 2 --lr 1e-9")
    flags += split("--num-workers 0 --sample-every 2 --num-samples 2 --num-sampling-steps 3")
    flags += ["--model", tiny_name, "--vae", vae]
    flags += ["--data-path", data, "--results-dir", tmp_path / "results"]
    run_main(train, *flags, "--max-steps", 2, "--ckpt", path)
    (folder,) = (tmp_path / "results").iterdir()
    trained = checkpoint.load(folder / "checkpoints/0000002.pt")
    started = checkpoint.load(path, model=tiny_name)
    for name, value in trained["model"].items():
        assert (value - started["model"][name]).abs().max() < 1e-6
    before = started["ema"][BIAS] - started["model"][BIAS]
    after = trained["ema"][BIAS] - started["model"][BIAS]
    # the average began anew: see optim.ema_decay
    torch.testing.assert_close(after, before * 2 / 11 * 3 / 12)
    assert (folder / "samples/0000002.png").exists()

    # Only the classes of the published model have no names; those of this run are called 0 and 1
    rename_classes(data, {"0": "cat", "1": "dog"})
    run_main(export, path, tmp_path / "published", "--model", tiny_name)
    run_main(export, folder / "checkpoints/latest.pt", tmp_path / "trained")
    for start in (path, tmp_path / "published"):
        run_main(train, *flags, "--max-steps", 3, "--ckpt", start, "--dry-run")
    latest = folder / "checkpoints/latest.pt"
    for start in (["--ckpt", latest], ["--ckpt", tmp_path / "trained"], ["--resume"]):
        line = refused(capsys, train, *flags, "--max-steps", 3, *start)
        assert "has the classes cat, dog, " in line
        assert " has 0, 1; " in line


@torch.no_grad()
def test_a_published_file_starts_clips_with_the_field_of_the_published_code(
    tmp_path, tiny_name, capsys
):
    path = write_file(tmp_path / "a.pt", STATE, "whole")
    vae = make_vae(tmp_path / "vae")
    data = write_equal_videos(tmp_path / "data", 10, size=(16, 16))
    flags = split("--video --use-rope --image-size 16 --num-frames 4 --max-steps 1 --lr 1e-9")
    flags += split("--global-batch-size 2 --num-workers 0 --sample-every 0 --val-clips 2")
    flags += ["--inflate", path, "--model", tiny_name, "--vae", vae]
    flags += ["--data-path", data, "--results-dir", tmp_path / "results"]
    assert "add --new-classes" in refused(capsys, train, *flags)
    with torch.enable_grad():
        run_main(train, *flags, "--new-classes")
    (latest,) = tmp_path.glob("results/*/checkpoints/latest.pt")
    model, config, _ = checkpoint.load_model(latest, use_ema=False)
    assert model.config == replace(
        CONFIG,
        use_rope=True,
        rope_split="8,0,0",
        position_table="space",
        num_frames=4,
        temporal_patch_size=2,
        num_classes=2,
    )
    assert config["data"]["classes"] == ["A", "B"]

    image = make_model()
    image.final_layer.linear.bias += 1  # of the EMA weights
    expected = image(X, torch.full((3,), CONFIG.num_classes))  # new classes start as none
    for fps in (12, 25, 50):
        f = model(X.expand(-1, -1, 2, -1, -1), torch.tensor([0, 1, 2]), torch.full((3,), 1 / fps))
        assert distance(f, expected.expand_as(f)) < 1e-5


def test_a_folder_instead_of_a_checkpoint_names_its_newest_checkpoint(tmp_path):
    for number, name in enumerate(("000-a", "001-b")):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "best.pt").touch()
        os.utime(folder / "best.pt", (number, number))
    newest = tmp_path / "001-b/checkpoints/best.pt"
    for folder in (tmp_path, tmp_path / "001-b"):
        assert f"a checkpoint file such as {newest}" in error_of(checkpoint.load_model, folder)

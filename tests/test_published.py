"""A tiny model in the published format and the float32 results of the published code with it."""

import argparse
import functools
import json
import os
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import checkpoint
import export
import generation
import models
import published
import sample_gd
import samplers
import train
import transport
import validation
from models import EqM, EqMConfig
from runtime.cli import UserError
from test_checkpoint import Code, flip_bit
from tiny_data import make_images, make_vae
from training import differences, run_main


def distance(a, b):
    """The relative distance of a from b."""
    return ((a - b).norm() / b.norm()).item()


def read_reference():
    """(inputs and results of the published code, the settings of its model)."""
    with safe_open(Path(__file__).parent / "eqm_image_tiny.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return tensors, json.loads(file.metadata()["config"])


def published_state():
    """The state dict of the published model."""
    return {name.removeprefix("state."): value for name, value in read_reference()[0].items() if "state." in name}


@pytest.fixture(scope="module")
def reference():
    """(state dict, inputs and results of the published code, its settings)."""
    return published_state(), *read_reference()


@pytest.fixture(scope="module")
def published_config(reference):
    _, _, settings = reference
    names = {field.name for field in fields(EqMConfig)}
    return EqMConfig(temporal_patch_size=1, **{name: value for name, value in settings.items() if name in names})


def make_model(state, config):
    model = EqM(config).eval()
    model.load_state_dict(published.convert_published(state, config))
    return model


@pytest.fixture(scope="module")
def published_model(reference, published_config):
    return make_model(reference[0], published_config)


@torch.no_grad()
def test_the_published_image_model_has_our_positions_its_published_output_and_guided_output(reference, published_model):
    state, tensors, settings = reference
    assert torch.equal(state["pos_embed"], published_model.pos_embed)
    x, y = tensors["x"].unsqueeze(2), tensors["y"]
    assert distance(published_model(x, y).squeeze(2), tensors["output"]) < 1e-5
    field = samplers.guided(published_model, y, torch.full((3,), 0.04), settings["cfg_scale"], 10)
    assert distance(field(x, torch.arange(3)).squeeze(2), tensors["cfg4.output"]) < 1e-5


@torch.no_grad()
def test_the_published_image_model_has_its_published_loss(reference, published_model):
    _, tensors, _ = reference
    x, noise, gamma = tensors["x"], tensors["loss.noise"], tensors["loss.gamma"]
    assert distance(transport.decay(gamma), tensors["loss.c"]) < 1e-5
    assert distance(transport.interpolate(x, noise, gamma), tensors["loss.x_gamma"]) < 1e-5
    assert distance(transport.target(x, noise, gamma), tensors["loss.target"]) < 1e-5
    f = published_model(tensors["loss.x_gamma"].unsqueeze(2), tensors["y"])
    losses = transport.loss(f, x.unsqueeze(2), noise.unsqueeze(2), gamma)
    assert distance(losses, tensors["loss.per_sample"]) < 1e-5


@pytest.mark.parametrize("method", ["gd", "ngd"])
@torch.no_grad()
def test_the_published_image_model_descends_as_published(reference, published_model, method):
    _, tensors, settings = reference
    field = samplers.guided(published_model, tensors["y"], torch.full((3,), 0.04), 1.0, 10)
    x, evaluations = samplers.sample(
        field, tensors["x"].unsqueeze(2), method, num_steps=settings["sampler_evaluations"] + 1,
        step_size=settings["sampler_eta"], momentum=settings["sampler_mu"],
    )  # fmt: skip
    assert evaluations.tolist() == [settings["sampler_evaluations"]] * 3
    assert distance(x.squeeze(2), tensors[f"sampler_{method}.final"]) < 1e-5


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_the_published_image_model_has_its_published_energies_and_their_gradients(reference, published_config, ebm):
    state, tensors, _ = reference
    model, x = make_model(state, replace(published_config, ebm=ebm)), tensors["x"].unsqueeze(2)
    with torch.no_grad():
        assert distance(model.energy(x, tensors["y"]), tensors[f"energy_{ebm}.energy"]) < 1e-5
        assert distance(model(x, tensors["y"]).squeeze(2), tensors[f"energy_{ebm}.gradient"]) < 1e-5
    assert distance(model(x, tensors["y"]).squeeze(2), tensors[f"energy_{ebm}.gradient"]) < 1e-5


def test_the_published_guided_energy_has_the_guided_field_as_its_negative_gradient(reference, published_config):
    state, tensors, settings = reference
    model, x, y = make_model(state, replace(published_config, ebm="dot")), tensors["x"].unsqueeze(2), tensors["y"]
    args = y, torch.full((3,), 0.04), settings["cfg_scale"], 10
    energy = samplers.guided(model.energy, *args)(x.requires_grad_(), torch.arange(3))
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    with torch.no_grad():
        f = samplers.guided(model, *args)(x.detach(), torch.arange(3))
    assert distance(f, -gradient) < 1e-5


# Files --------------------------------------------------------------------------------------------------------------

SHAPE = {"depth": 2, "hidden_size": 48, "num_heads": 2, "patch_size": 2}


@pytest.fixture
def tiny_name(monkeypatch):
    """A --model for the tiny model."""
    monkeypatch.setitem(models.SIZES, "Tiny", (2, 48, 2))
    for script in (train, generation):
        monkeypatch.setattr(script, "NAMES", [*models.NAMES, "EqM-Tiny/2"])
    return "EqM-Tiny/2"


def write_file(path, state, kind):
    """Write a file as the published training script does, or only its network ("bare")."""
    ema = {name: value.clone() for name, value in state.items()}
    ema["final_layer.linear.bias"] += 1  # so that the EMA weights differ from the raw ones
    opt = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    contents = {
        "bare": ema,
        "whole": {"model": state, "ema": ema, "opt": opt, "args": argparse.Namespace(model="EqM-Tiny/2", vae="mse")},
        "of energies": {"model": state, "ema": ema, "opt": opt, "args": argparse.Namespace(vae="mse", ebm="l2")},
    }
    torch.save(contents[kind], path)
    return path


@pytest.mark.parametrize("kind", ["bare", "whole", "of energies"])
def test_a_published_file_loads_with_its_ema_weights(reference, published_config, tmp_path, tiny_name, kind):
    state, tensors, _ = reference
    path = write_file(tmp_path / "0080000.pt", state, kind)
    model, config, step = checkpoint.load_model(path, model=tiny_name, video=False)
    expected = make_model(state, model.config)
    expected.final_layer.linear.bias.data += 1
    with torch.no_grad():
        f, wanted = (network(tensors["x"].unsqueeze(2), tensors["y"]) for network in (model, expected))
    assert torch.equal(f, wanted)
    assert model.config == replace(published_config, ebm="l2" if kind == "of energies" else "none")
    assert config["data"]["vae"] == ("ema" if kind == "bare" else "mse")
    assert config["data"]["classes"] == [str(label) for label in range(10)]
    assert step == 0
    if kind == "bare":
        with pytest.raises(UserError, match="--no-ema: .* holds EMA weights only"):
            checkpoint.load_model(path, use_ema=False, model=tiny_name)
    else:
        raw, _, _ = checkpoint.load_model(path, use_ema=False, model=tiny_name)
        torch.testing.assert_close(raw.final_layer.linear.bias + 1, model.final_layer.linear.bias)


@pytest.mark.parametrize("part", ["model", "ema", "opt"])
def test_a_bit_that_is_flipped_in_a_published_file_is_found_where_it_is_used(reference, tmp_path, tiny_name, part):
    weight, path = "blocks.1.mlp.fc1.weight", tmp_path / "a.pt"
    ema = {name: value + 1 if name == weight else value for name, value in reference[0].items()}
    tensors = {"model": reference[0][weight], "ema": ema[weight], "opt": torch.rand(100)}
    torch.save({"model": reference[0], "ema": ema, "opt": {"exp_avg": tensors["opt"]}}, path)
    flip_bit(path, tensors[part])
    for load, used in (
        (checkpoint.load_model, {"ema"}),
        (functools.partial(checkpoint.load_model, use_ema=False), {"model"}),
        (lambda path, model: checkpoint.load(path, **SHAPE), {"model", "ema"}),  # as training does
    ):
        with pytest.raises(UserError, match="a.pt: damaged") if part in used else nullcontext():
            load(path, model=tiny_name)


def test_a_published_file_in_half_precision_or_with_plain_args_loads(reference, tmp_path):
    half = {name: value.half() for name, value in reference[0].items()}
    torch.save({"ema": half, "args": {"ebm": "dot", "vae": "mse"}}, tmp_path / "a.pt")
    config = checkpoint.load(tmp_path / "a.pt", **SHAPE)["config"]
    assert (config["model"]["ebm"], config["data"]["vae"]) == ("dot", "mse")


def test_a_bare_file_has_the_energy_that_is_asked_for(reference, tmp_path, tiny_name):
    path = write_file(tmp_path / "bare.pt", reference[0], "bare")
    assert checkpoint.load_model(path, model=tiny_name, ebm="dot")[0].config.ebm == "dot"
    path = write_file(tmp_path / "l2.pt", reference[0], "of energies")
    assert "was trained with --ebm l2, found --ebm dot" in refusal(path, **SHAPE, ebm="dot")


def test_a_published_file_can_be_exported(reference, tmp_path, tiny_name, monkeypatch):
    monkeypatch.setattr(export, "NAMES", [tiny_name])
    path = write_file(tmp_path / "a.pt", reference[0], "whole")
    run_main(export, path, tmp_path / "shared", "--model", tiny_name)
    expected, config, _ = checkpoint.load_model(path, model=tiny_name)
    model, exported_config, _ = checkpoint.load_model(tmp_path / "shared")  # which knows its model
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert exported_config == config


def test_a_conversion_does_not_change_the_published_state(reference, published_config):
    state = {name: value.clone() for name, value in reference[0].items()}
    assert "pos_embed" not in published.convert_published(state, published_config)
    assert differences(state, reference[0]) == []


def refusal(path, **asked):
    with pytest.raises(UserError) as error:
        checkpoint.load(path, **asked)
    message = str(error.value)
    assert message.startswith(f"--ckpt {path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["bare", "whole"])
def test_a_mismatch_with_a_published_file_is_named(reference, tmp_path, kind):
    path = write_file(tmp_path / "a.pt", reference[0], kind)
    assert "give --model, such as EqM-XL/2" in refusal(path)
    xl = models.model_shape("EqM-XL/2")
    assert "has depth 2, EqM-XL/2 has depth 28: give another --model" in refusal(path, **xl)
    assert "has hidden size 48, EqM-(depth 2, width 96, heads 2)/2" in refusal(path, **SHAPE | {"hidden_size": 96})
    assert "has patch size 2" in refusal(path, **SHAPE | {"patch_size": 4})


CHANGES = {
    "moved": lambda table: table.roll(1, dims=1),
    "height first": lambda table: table.roll(table.shape[-1] // 2, dims=-1),  # as in DiT forks with "ij" indexing
    "cut": lambda table: table[:, :9],
}


@pytest.mark.parametrize("change", CHANGES)
def test_positions_other_than_our_table_are_refused(reference, tmp_path, change):
    state = reference[0] | {"pos_embed": CHANGES[change](reference[0]["pos_embed"])}
    message = refusal(write_file(tmp_path / "a.pt", state, "bare"), **SHAPE)
    assert "pos_embed is not our table" in message


def test_a_published_file_that_lacks_a_tensor_or_its_positions_is_refused(reference, tmp_path, tiny_name):
    for name in ("pos_embed", "blocks.1.mlp.fc1.weight", "final_layer.linear.bias"):
        state = {key: value for key, value in reference[0].items() if key != name}
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(UserError) as error:
            checkpoint.load_model(tmp_path / "a.pt", model=tiny_name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["inside args", "opt", "alone"])
def test_a_published_file_that_holds_code_is_refused_and_runs_nothing(reference, tmp_path, place):
    victim = tmp_path / "ran"
    code = Code(victim)
    state = {"model": reference[0], "ema": reference[0], "opt": {}, "args": argparse.Namespace(vae="ema")}
    state = {
        "inside args": state | {"args": argparse.Namespace(vae=code)},
        "opt": state | {"opt": {"state": code}},
        "alone": code,
    }[place]
    path = tmp_path / "a.pt"
    torch.save(state, path)
    assert "holds code" in refusal(path, **SHAPE)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # what the refusal has prevented
    assert victim.exists()


def test_a_published_file_samples_images_and_starts_a_training_run(reference, tmp_path, tiny_name, monkeypatch):
    path, vae = write_file(tmp_path / "a.pt", reference[0], "whole"), make_vae(tmp_path / "vae")
    shared = ["--ckpt", path, "--model", tiny_name, "--vae", vae, "--num-sampling-steps", 3]
    run_main(sample_gd, *shared, "--num-samples", 3, "--folder", tmp_path / "s", "--classes", 7)
    samples = np.load(tmp_path / "s/samples.npz")
    assert samples["arr_0"].shape == (3, 16, 16, 3)
    assert samples["labels"].tolist() == [7, 7, 7]

    data = make_images(tmp_path / "data", 4)
    monkeypatch.setattr(validation, "CHUNK", 2)
    run_main(
        train, *shared, "--data-path", data, "--image-size", 16, "--num-classes", 10,
        "--results-dir", tmp_path / "results", "--max-steps", 2, "--global-batch-size", 2, "--num-workers", 0,
        "--lr", 1e-9, "--log-every", 1, "--sample-every", 2, "--num-samples", 2,
    )  # fmt: skip
    (folder,) = (tmp_path / "results").iterdir()
    trained = checkpoint.load(folder / "checkpoints/0000002.pt")
    started = checkpoint.load(path, **SHAPE)
    assert all((value - started["model"][name]).abs().max() < 1e-6 for name, value in trained["model"].items())
    bias = "final_layer.linear.bias"
    before, after = (one["ema"][bias] - started["model"][bias] for one in (started, trained))
    torch.testing.assert_close(after, before * 2 / 11 * 3 / 12)  # the average began anew: see optim.ema_decay
    assert (folder / "samples/0000002.png").exists()


def test_scripts_refuse_flags_that_do_not_fit_a_published_file(reference, tmp_path, tiny_name, capsys):
    path, vae = write_file(tmp_path / "a.pt", reference[0], "bare"), make_vae(tmp_path / "vae")
    data = make_images(tmp_path / "data", 4)
    training = [train, "--data-path", data, "--results-dir", tmp_path / "r", "--image-size", 16]
    sampling = [sample_gd, "--folder", tmp_path / "s"]

    def line(script, *flags):
        with pytest.raises(SystemExit) as ended:
            run_main(script, "--ckpt", path, "--vae", vae, *flags)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    for script, *flags in (training, sampling):
        assert "give --model" in line(script, *flags)
        assert "has depth 2, EqM-B/2 has depth 12" in line(script, *flags, "--model", "EqM-B/2")
        assert "cannot be converted" in line(script, *flags, "--model", tiny_name, "--use-rope")
    assert "holds an image model" in line(*sampling, "--model", tiny_name, "--video")
    assert "--report-energy" in line(*sampling, "--model", tiny_name, "--report-energy")
    assert "--image-size 32" in line(*sampling, "--model", tiny_name, "--image-size", 32)
    assert "--num-classes gives 2" in line(*training, "--model", tiny_name)  # 10 classes cannot become 2
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "s").exists()


def test_a_folder_of_runs_in_place_of_a_checkpoint_names_the_newest_one_in_it(tmp_path):
    for number, name in enumerate(("000-a", "001-b")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints/best.pt").touch()
        os.utime(tmp_path / name / "checkpoints/best.pt", (number, number))
    newest = tmp_path / "001-b/checkpoints/best.pt"
    assert f"wanted a checkpoint file such as {newest}" in refusal(tmp_path)
    assert f"wanted a checkpoint file such as {newest}" in refusal(newest.parent.parent)

"""hubconf.py: samples in another program, whose modules and search path stay as they are."""

import sys

import pytest
import torch

import sample_gd
from runtime.cli import UserError
from tiny_data import random_checkpoint
from training import ROOT, run_main
from video.samples import read_samples

OWN_MODULES = "models", "vae", "run", "generation"
FEW = {"num_sampling_steps": 3}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program whose folder has modules with names of ours, and has imported one of them."""
    for name in OWN_MODULES:
        (tmp_path / f"{name}.py").write_text("OWNER = 'program'\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    import models

    assert models.OWNER == "program"
    return tmp_path


def load(entry, **flags):
    return torch.hub.load(str(ROOT), entry, source="local", **flags)


def test_the_demo_samples_in_a_program_as_sample_gd_does(program, tmp_path, monkeypatch):
    modules = {name: module for name, module in sys.modules.items() if "." not in name}
    path = list(sys.path)
    hook = sys.excepthook

    sampler = load("demo")
    clips = sampler(classes=["CircleLeft", "SquareUp"], num_frames=8, num_samples=3, **FEW)

    assert clips.dtype == torch.uint8
    assert clips.shape == (3, 8, 16, 16, 3)
    assert sys.path == path and sys.excepthook is hook
    assert {name: sys.modules[name] for name in modules} == modules
    import run  # the first import of this name after load returned

    assert run.OWNER == "program"

    sys.modules.pop("run")
    monkeypatch.syspath_prepend(ROOT / "EqM")
    for name in OWN_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    flags = ["--video", "--ckpt", ROOT / "results/demo", "--folder", tmp_path / "samples"]
    flags += ["--classes", "CircleLeft", "SquareUp", "--num-frames", 8, "--num-samples", 3]
    run_main(sample_gd, *flags, "--num-sampling-steps", 3, "--no-previews")
    assert (clips.numpy() == read_samples("", tmp_path / "samples")[1]).all()


def test_a_sampler_of_any_checkpoint_keeps_one_model_for_all_lengths(places):
    sampler = load("model", ckpt=places / "plain.pt")
    short = sampler(num_samples=1, num_frames=4, **FEW)
    long = sampler(num_samples=1, **FEW)
    assert len(short[0]) == 4 and len(long[0]) == 8
    assert torch.equal(short, sampler(num_samples=1, num_frames=4, **FEW))
    assert not torch.equal(short, sampler(num_samples=1, num_frames=4, seed=1, **FEW))
    for one in ("none", 0):
        assert torch.equal(sampler(classes=one, **FEW), sampler(classes=[one], **FEW))


def test_the_stream_of_a_causal_model_makes_the_samplers_videos_step_by_step(tmp_path, monkeypatch):
    settings = {"use_rope": True, "num_frames": 8, "causal": True, "context": 8}
    ckpt = random_checkpoint(tmp_path / "causal.pt", **settings)
    sampler = load("model", ckpt=ckpt)
    whole = sampler(classes=["B", "A"], num_samples=3, num_frames=8, seed=2, **FEW)
    stream = sampler.stream(num_samples=3, seed=2, **FEW)
    steps = [stream.step(["B", "A"]), stream.step([1, 0])]
    assert torch.equal(torch.cat(steps, dim=1), whole)
    stream.reset()
    assert torch.equal(stream.step(["B", "A"]), steps[0])
    assert not torch.equal(stream.step(["none"]), steps[1])
    stream.reset(steps[0], ["B", "A"])
    again = stream.step(["B", "A"])
    assert (again.float() - steps[1].float()).abs().mean() < 2  # the given frames are rounded
    stream = sampler.stream(classes=["B*4"], seed=2, **FEW)
    assert torch.equal(stream.step(), steps[0][:1])
    assert not torch.equal(stream.step(["A"]), steps[1][:1])
    with pytest.raises(Exception, match="the spans end after 4 frames; name the class"):
        stream.step()
    with pytest.raises(Exception, match="stream: the model was trained without --causal"):
        load("demo").stream()


def test_models_run_on_the_device_and_in_the_precision_of_the_call(places):
    sampler = load("model", ckpt=places / "plain.pt", device="meta")
    with pytest.raises(RuntimeError, match="meta tensor"):  # at the end: it has no values
        sampler(num_samples=1, weak_ckpt=places / "plain.pt", **FEW)
    sampler = load("model", ckpt=places / "plain.pt", device="cpu")
    seen = set()
    sampler.model.register_forward_pre_hook(
        lambda *_: seen.add(torch.backends.cudnn.allow_tf32) and None
    )
    before = torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "bf16"):
        sampler(num_samples=1, precision=precision, **FEW)
    assert seen == {False, True}
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_cpu_beside_a_gpu_keeps_the_precision_of_cpus(places, monkeypatch):
    sampler = load("model", ckpt=places / "plain.pt", device="cpu")
    of_cpu = sampler(num_samples=1, **FEW)
    modules = sampler._plan.__globals__["_own_modules"]
    monkeypatch.setattr(modules["runtime.cli"], "precisions", lambda: ["bf16", "fp32"])
    assert torch.equal(sampler(num_samples=1, **FEW), of_cpu)
    assert not torch.equal(sampler(num_samples=1, precision="bf16", **FEW), of_cpu)


def test_mistakes_are_exceptions_for_the_program():
    sampler = load("demo")
    for name in ("cfg", "given", "no_ema"):
        with pytest.raises(TypeError, match=f"{name}: no such argument; expected one of actions, "):
            sampler(**{name: "x"})
    for flags, words in (
        ({"classes": ["Heart"]}, "--classes Heart: no such class; expected one of"),
        ({"sampler": "NGD"}, "argument --sampler: invalid choice: 'NGD'"),
        ({"num_sampling_steps": 1}, "--num-sampling-steps: got 1, expected an integer at least 2"),
        ({"overlap": 4}, "--overlap 4: applies to several windows"),
        ({"num_frames": [8, 16]}, "--num-frames: got .8, 16., expected an integer"),
    ):
        with pytest.raises(Exception, match=words) as error:
            sampler(**flags)
        assert type(error.value).__name__ == UserError.__name__

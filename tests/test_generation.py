"""Samples leave the device batch by batch, and matrix products have weights that are cast once."""

import json
import re
import shutil
import weakref
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import generation
import sample_gd
import train
from generation import Source, cast_products, generate_clips
from runtime import distributed
from runtime.cli import UserError
from scoring import manifest
from test_models import clip, labels, tiny
from tiny_data import make_images, make_state
from training import run_main
from vae import VAE
from video import writers
from video.inputs import InputClip
from video.samples import read_samples

SETTINGS = {"method": "ngd", "num_steps": 4, "step_size": 0.05, "momentum": 0.3, "guidance": 2.0}


def make_source(count, **changes):
    model = tiny(in_channels=3, **changes)
    return Source(model, VAE("none"), ["A", "B"], torch.arange(count) % 2, model.config.num_frames, 0.04)


# Batches ------------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_and_clips_are_held_for_one_batch_at_a_time(monkeypatch):
    drawn, normal = [], generation.normal

    def record(seed, purpose, stream, indices, *args):
        drawn.append(list(indices))
        return normal(seed, purpose, stream, indices, *args)

    monkeypatch.setattr(generation, "normal", record)
    made, batches = [], generate_clips(make_source(11), range(11), 0, "cpu", SETTINGS, batch_size=2, show=False)
    for count in range(1, 7):
        videos, evaluations, energies = next(batches)
        assert drawn == [list(range(first, min(first + 2, 11))) for first in range(0, 2 * count, 2)]
        assert len(videos) == len(evaluations) == len(drawn[-1])
        assert energies is None
        made.append(weakref.ref(videos))
        assert sum(ref() is not None for ref in made) <= 2
    assert next(batches, None) is None


def test_the_clips_to_start_from_are_asked_for_batch_by_batch():
    source, asked = make_source(5), []

    def init(indices):
        asked.append(list(indices))
        grey = torch.tensor([40 * index for index in indices], dtype=torch.uint8)
        return grey[:, None, None, None, None].expand(-1, 3, source.num_frames, 4, 4)

    settings = SETTINGS | {"step_size": 1e-9}
    batches = generate_clips(source, range(5), 0, "cpu", settings, batch_size=2, init=init, init_gamma=1.0, show=False)
    for videos, _, _ in batches:
        assert torch.equal(videos[:, 0, 0, 0, 0], 40 * torch.tensor(asked[-1], dtype=torch.uint8))
    assert asked == [[0, 1], [2, 3], [4]]


# sample_gd.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint of an image model whose weights are random."""
    state = make_state(input_size=8, depth=1, hidden_size=48, num_heads=2, temporal_patch_size=1, num_frames=1)
    for weight in state["ema"].values():
        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    state["config"]["data"]["image_size"] = 8
    path = tmp_path_factory.mktemp("ckpt") / "image.pt"
    checkpoint.save(path, state)
    return path


def sample(ckpt, folder, count, *flags, **kwargs):
    flags = ["--num-samples", count, "--batch-size", 2, "--num-sampling-steps", 3, "--stepsize", 0.05, *flags]
    run_main(sample_gd, "--ckpt", ckpt, "--folder", folder, *flags, **kwargs)


def names_of(count):
    images = {f"{index:06d}.png" for index in range(count)}
    return images | {"samples.npz", "samples.json", "grid.png"}


def watch(monkeypatch, look):
    """Have sample_gd.py call look(number) when it asks for a batch, after this was made; look may raise."""
    generate = generation.generate_parts

    def watched(*args, **kwargs):
        for number, batch in enumerate(generate(*args, **kwargs)):
            look(number)
            yield batch

    monkeypatch.setattr(generation, "generate_parts", watched)


def test_a_batch_is_on_the_disk_before_the_next_is_made_and_few_are_in_memory(ckpt, tmp_path, monkeypatch):
    numbers, arrays, write_videos = [], [], writers.write_videos

    def record(folder, videos, *args, **kwargs):
        arrays.append(weakref.ref(videos))
        return write_videos(folder, videos, *args, **kwargs)

    def look(number):
        numbers.append(number)
        written = sorted(path.name for path in tmp_path.glob("s/*.png"))
        assert written == [f"{index:06d}.png" for index in range(2 * number)]
        pixels = 2 * number * 8 * 8 * 3  # bytes
        assert number == 0 or (tmp_path / "s/samples.npz.tmp").stat().st_size > pixels - 2**14  # but for a buffer
        assert sum(array() is not None for array in arrays) <= 2

    monkeypatch.setattr(writers, "write_videos", record)
    watch(monkeypatch, look)
    sample(ckpt, tmp_path / "s", 161)
    assert numbers == list(range(81))
    assert len(np.load(tmp_path / "s/samples.npz")["arr_0"]) == 161
    assert {path.name for path in (tmp_path / "s").iterdir()} == names_of(161)


def test_samples_that_were_cut_short_are_not_taken_for_complete_and_the_next_call_removes_them(
    ckpt, tmp_path, monkeypatch
):
    folder, fail_at = tmp_path / "s", 0

    def full(number):
        if number == fail_at:
            raise OSError(28, "No space left on device")

    sample(ckpt, folder, 5)
    (folder / "notes.txt").write_text("of the user")
    content = {path: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        watch(patch, full)
        sample(ckpt, folder, 9, "--seed", 1, status=1)
        assert {path: path.read_bytes() for path in folder.iterdir()} == content  # not even begun
        fail_at = 3
        sample(ckpt, folder, 9, "--seed", 1, status=1)
    assert (folder / "000005.png").exists() and (folder / "notes.txt").exists()
    assert not (folder / "samples.json").exists() and not (folder / "samples.npz").exists()
    with pytest.raises(UserError, match="its samples are not finished: run sample_gd.py again"):
        read_samples("--samples s", folder)
    sample(ckpt, folder, 3)
    assert {path.name for path in folder.iterdir()} == names_of(3) | {"notes.txt"}
    assert len(read_samples("--samples s", folder)[1]) == 3


def test_without_previews_the_images_are_the_same_and_a_grid_of_an_earlier_call_is_removed(ckpt, tmp_path):
    sample(ckpt, tmp_path, 3)
    images = [(tmp_path / f"00000{index}.png").read_bytes() for index in range(3)]
    sample(ckpt, tmp_path, 3, "--no-previews")
    assert {path.name for path in tmp_path.iterdir()} == names_of(3) - {"grid.png"}
    assert [(tmp_path / f"00000{index}.png").read_bytes() for index in range(3)] == images


def test_numbered_images_of_the_user_stay_where_no_samples_were(ckpt, tmp_path):
    (tmp_path / "000007.png").write_bytes(b"of the user")
    sample(ckpt, tmp_path, 3)
    assert (tmp_path / "000007.png").read_bytes() == b"of the user"
    assert {path.name for path in tmp_path.iterdir()} == names_of(3) | {"000007.png"}


def test_samples_of_another_run_stay_unless_told_otherwise_and_no_score_stays_beside_new_ones(ckpt, tmp_path, capsys):
    folder, other = tmp_path / "s", tmp_path / "other.pt"
    shutil.copy(ckpt, other)
    sample(ckpt, folder, 2)
    found = dict.fromkeys(manifest.KEYS) | {"format": manifest.FORMAT}
    manifest.write_manifest(folder / "motion.json", found | {"generated": {"samples": str(folder)}})
    manifest.write_manifest(folder / "fvd.json", found | {"generated": {"weights_sha256": "of another model"}})
    for name in ("motion.png", "mine.json", "mine.png"):
        (folder / name).write_text("{}")
    content = {path: path.read_bytes() for path in folder.iterdir()}
    sample(other, folder, 2, "--no-overwrite", status=2)
    line = capsys.readouterr().err
    assert f"--folder {folder}: holds samples of {ckpt}: name another folder, or add --overwrite" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == content
    sample(ckpt, folder, 3, "--no-overwrite")  # of the same run
    assert {path.name for path in folder.iterdir()} == names_of(3) | {"mine.json", "mine.png", "fvd.json"}
    sample(other, folder, 2, "--no-overwrite", "--overwrite")
    assert json.loads((folder / "samples.json").read_text())["flags"]["ckpt"] == str(other)


def test_samples_that_are_not_finite_are_one_line_that_names_the_step_and_in_training_a_note(ckpt, tmp_path, capsys):
    sample(ckpt, tmp_path / "s", 2, "--stepsize", 1e30, "--num-sampling-steps", 6, status=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: step [1-5] of 5 made samples that are not finite \(--stepsize 1e\+30\)", line)
    assert not (tmp_path / "s").exists()
    settings = SETTINGS | {"step_size": 1e30, "num_steps": 6, "strict": False}
    assert len(list(generate_clips(make_source(1), range(1), 0, "cpu", settings, show=False))) == 1
    assert "note: step" in capsys.readouterr().out


def test_samples_json_comes_last(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_gd, "write_evaluations", lambda *_: pytest.fail("here"))
    with pytest.raises(pytest.fail.Exception, match="here"):
        sample(ckpt, tmp_path / "s", 3, "--stop-below", 0.1)
    assert (tmp_path / "s/samples.npz").exists() and not (tmp_path / "s/samples.json").exists()
    monkeypatch.undo()
    sample(ckpt, tmp_path / "s", 3)
    assert json.loads((tmp_path / "s/samples.json").read_text())["mean_evaluations"] == 2


def test_ranks_without_a_batch_are_named_once(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    sample(ckpt, tmp_path / "s", 2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    assert "3 of 4 ranks have nothing to do" in line and "--batch-size" in line
    monkeypatch.setenv("WORLD_SIZE", "1")
    sample(ckpt, tmp_path / "s", 2)
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("kept", [1, 32])
def test_images_to_start_from_are_taken_in_turn_however_many_are_kept(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_gd, "KEPT_CLIPS", kept)
    make_images(tmp_path, 3)
    args = Namespace(init=str(tmp_path / "A"), video=False, folder="elsewhere")
    files = sorted((tmp_path / "A").iterdir())
    source, seen = Namespace(num_frames=1, time_scale=0.04, image_size=16), []

    def read(clip, frames, *_):
        seen.append(clip.path)
        return torch.full((3, 1, 16, 16), files.index(type(files[0])(clip.path)), dtype=torch.uint8)

    monkeypatch.setattr(InputClip, "read", read)
    read = sample_gd.init_reader(args, source, range(5))
    assert seen == [str(path) for path in files]  # each once, before anything is sampled
    assert read([0, 1, 2, 3])[:, 0, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert read([4]).shape == (1, 3, 1, 16, 16)
    assert len(seen) == (2 if kept > 1 else 7)


# Weights that are cast once -----------------------------------------------------------------------------------------


MODELS = {
    "rope": {"use_rope": True, "qk_norm": True},
    "table": {"use_rope": True, "position_table": "space", "rope_speed": 0.5},
    "fixed": {"use_rope": False},
    "energy": {"use_rope": True, "ebm": "dot"},
}


def outputs(model, x):
    """The field and, if there is one, the energy under autocast."""
    with torch.no_grad(), distributed.autocast(x.device, "bf16"):
        found = [model(x, labels(len(x)), torch.full((len(x),), 0.05))]
        return found if model.config.ebm == "none" else [*found, model.energy(x, labels(len(x)))]


@pytest.mark.parametrize("kind", MODELS)
def test_weights_that_are_cast_once_change_no_bit_of_the_output_and_leave_the_model_as_it_is(kind):
    model = tiny(**MODELS[kind]).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = clip(model.config.num_frames, batch=3)
    expected = outputs(model, x)
    copy = cast_products(model, "bf16")
    assert copy is not model and copy.state_dict().keys() == before.keys()
    assert all(map(torch.equal, outputs(copy, x), expected))
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


class CountCasts(TorchDispatchMode):
    """Counts the casts of the matrices of a model to bf16."""

    def __init__(self, model):
        super().__init__()
        self.matrices = {weight.data_ptr() for weight in model.parameters() if weight.dim() > 1}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() in self.matrices
        return function(*args, **kwargs)


def test_no_matrix_is_cast_while_the_network_runs():
    model = tiny(use_rope=True, qk_norm=True).requires_grad_(False)
    counts = []
    for network in (model, cast_products(model, "bf16")):
        with CountCasts(network) as casts:
            outputs(network, clip(4))
        counts.append(casts.count)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert counts == [len(linear) + 1, 0]  # and the embedding of the patches


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_without_mixed_precision_nothing_is_copied(precision):
    model = tiny()
    assert cast_products(model, precision) is model


def test_weights_that_no_product_uses_are_shared_with_the_copy():
    model = tiny(use_rope=False, qk_norm=True)
    copy = cast_products(model, "bf16")
    assert copy.pos_embed is model.pos_embed
    assert copy.y_embedder.embedding_table.weight is model.y_embedder.embedding_table.weight
    assert copy.blocks[0].attn.q_norm.weight is model.blocks[0].attn.q_norm.weight
    assert copy.blocks[0].attn.qkv.weight.dtype == copy.x_embedder.proj.weight.dtype == torch.bfloat16


def test_the_copy_of_a_compiled_model_is_compiled():
    model = tiny(depth=2)
    assert all(block._compiled_call_impl is None for block in cast_products(model, "bf16").blocks)
    model.compile_blocks()
    copy = cast_products(model, "bf16")
    assert copy.is_compiled and all(block._compiled_call_impl is not None for block in copy.blocks)


def test_previews_in_bf16_are_those_of_autocast_alone_and_leave_the_averaged_weights_as_they_are():
    source = make_source(3, use_rope=True)
    args = Namespace(
        num_samples=3, global_seed=0, sampler="ngd", num_sampling_steps=4, stepsize=0.05, mu=0.3, stop_below=None,
        cfg_scale=2.0, precision="bf16", shard=False,
    )  # fmt: skip
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    settings = SETTINGS | {"precision": "bf16"}
    ((expected, _, _),) = generate_clips(source, range(3), 0, "cpu", settings, show=False)
    stop = Namespace(check=lambda: None, settle=lambda: None)
    assert torch.equal(train.sample_ema(source, args, torch.device("cpu"), stop), expected)
    assert expected.float().std() > 30
    for name, value in source.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])

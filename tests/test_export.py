"""An exported folder holds the EMA weights of a checkpoint, and everything that sampling and
training need.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import export
import sample_gd
import train
from runtime.metrics import read_metrics
from scoring import manifest
from tiny_data import make_images, make_vae, random_checkpoint
from training import content, differences, names, no_space, refused, run_main, sample_here

FILES = ["README.md", "config.json", "model.safetensors"]
LOCAL = {
    "data_path": "/home/somebody/videos",
    "real_data": "/home/somebody/real",
    "results_dir": "results",
    "lr": 1e-4,
    "teacher": {"checkpoint": "/home/somebody/000-teacher/checkpoints/best.pt", "guidance": 4.0},
}
VIDEO = {"num_frames": 4, "use_rope": True}
CARD = """EqM-(depth 1, width 48
weights of step 10
2: A, B
0.04 s apart
| data | videos |
1.0000
| 16 px |
| none, the model works on pixels |
--video --num-frames 4 --use-rope
sampler gd
| student of | 000-teacher, guidance 4 |
No scores yet."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(the checkpoint of a video model, the folder it was exported to); tests only read them."""
    folder = tmp_path_factory.mktemp("exported")
    path = random_checkpoint(folder / "best.pt", training=LOCAL, **VIDEO)
    run_main(export, path, folder / "shared")
    return path, folder / "shared"


def test_an_export_may_go_through_a_link_to_an_empty_folder(exported, tmp_path):
    ckpt, shared = exported
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    run_main(export, ckpt, tmp_path / "link")
    assert content(tmp_path / "disk") == content(shared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize(
    "settings",
    [VIDEO | {"position_table": "space", "rope_speed": 0.5}, {"use_rope": True, "ebm": "dot"}],
)
def test_an_export_samples_bit_for_bit_what_its_checkpoint_samples(tmp_path, settings):
    name = "video" if "num_frames" in settings else "image"
    path = random_checkpoint(tmp_path / f"{name}.pt", **settings)
    folder = tmp_path / "shared" / name
    run_main(export, path, folder)
    assert names(folder) == FILES
    model, config, step = checkpoint.load_model(folder)
    saved = checkpoint.load(path)
    assert differences(model.state_dict(), saved["ema"]) == []
    assert differences(saved["model"], saved["ema"]) != []
    assert vars(model.config) == saved["config"]["model"]
    assert (config["data"], step) == (saved["config"]["data"], 10)
    before, _ = sample_here(path, tmp_path / "before", "--no-previews")
    after, _ = sample_here(folder, tmp_path / "after", "--no-previews")
    assert np.array_equal(before, after)
    assert before.std() > 30  # the network had an effect


def test_an_export_brings_its_own_vae_wherever_you_move_it(tmp_path, capsys):
    vae = make_vae(tmp_path / "vae-64")
    other = make_vae(tmp_path / "other", block_out_channels=(8, 16))
    path = random_checkpoint(tmp_path / "best.pt", vae, training={"vae": str(vae)}, **VIDEO)
    before, _ = sample_here(path, tmp_path / "before", "--no-previews")
    vae = vae.rename(tmp_path / "moved")
    shared = tmp_path / "shared"
    line = refused(capsys, export, path, shared)
    assert "vae-64: not found; pass its new path with --vae" in line
    refused(capsys, export, path, shared, "--vae", tmp_path / "nowhere")
    run_main(export, path, shared, "--vae", vae)
    card = (shared / "README.md").read_text()
    assert "| VAE | its own, in `vae/` |" in card
    assert "vae-64" not in card + (shared / "config.json").read_text()
    folder = shared.rename(tmp_path / "elsewhere")
    vae = vae.rename(tmp_path / "gone")
    # an export of an export has it too
    run_main(export, folder, tmp_path / "half", "--dtype", "fp16")
    assert content(vae) == content(folder / "vae") == content(tmp_path / "half/vae")
    after, about = sample_here(folder, tmp_path / "after", "--no-previews")
    assert np.array_equal(before, after)
    assert about["source"]["vae"] == str(folder / "vae")
    assert "another VAE" in refused(capsys, export, folder, tmp_path / "new", "--vae", other)
    assert not (tmp_path / "new").exists()


def test_the_card_names_a_vae_that_is_downloaded(tmp_path):
    path = random_checkpoint(tmp_path / "best.pt", "mse")
    run_main(export, path, tmp_path / "shared")  # without downloading it
    card = (tmp_path / "shared/README.md").read_text()
    assert "stabilityai/sd-vae-ft-mse, downloaded on first use" in card
    assert names(tmp_path / "shared") == FILES


def test_half_precision_is_half_as_large_and_rounded(exported, tmp_path):
    path, folder = exported
    half = tmp_path / "half"
    half.mkdir()  # an empty folder may exist
    run_main(export, path, half, "--dtype", "fp16")
    weights = load_file(folder / "model.safetensors")
    model, _, _ = checkpoint.load_model(half)
    loaded = model.state_dict()
    for name, value in load_file(half / "model.safetensors").items():
        assert torch.equal(value, weights[name].half())
        assert torch.equal(value.float(), loaded[name])


def test_config_and_card_say_what_it_is_and_no_path_of_the_machine(exported, tmp_path, capsys):
    ckpt, shared = exported
    text = (shared / "config.json").read_text()
    card = (shared / "README.md").read_text()
    about = json.loads(text)
    saved = checkpoint.load(ckpt)
    assert (about["step"], about["dtype"], about["training"]["lr"]) == (10, "fp32", 1e-4)
    assert about["model"] == saved["config"]["model"]
    assert about["data"] == saved["config"]["data"]
    assert "somebody" not in text + card
    assert text.count("\n") > 20  # readable
    for words in CARD.splitlines():
        assert words in card
    commands = [line for line in card.splitlines() if line.startswith("python EqM/")]
    for line, script in zip(commands, (sample_gd, train), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", line.split()[1:])
            script.parse_args()

    values = {"speed": 0.98765, "loss": None}
    scores = {"format": manifest.FORMAT, "protocol": "motion8_4f", "values": values, "code": None}
    for sha256, status in (("0", 2), (checkpoint.weights_sha256(saved["ema"]), 0)):
        scores["generated"] = {"source": {"weights_sha256": sha256}}
        manifest.write_manifest(tmp_path / "m.json", scores)
        run_main(export, ckpt, tmp_path / "scored", "--scores", tmp_path / "m.json", status=status)
    assert "--scores" in capsys.readouterr().err
    card = (tmp_path / "scored/README.md").read_text()
    assert "`motion8_4f`" in card
    assert "| speed | 0.9877 |\n| loss | - |" in card


def test_a_full_disk_leaves_no_partial_export(exported, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", no_space)
        line = refused(capsys, export, exported[0], tmp_path / "new/shared", status=1)
    assert "shared can't be written (No space left on device" in line
    assert names(tmp_path / "new") == []
    run_main(export, exported[0], tmp_path / "new/shared")  # works now
    assert names(tmp_path / "new/shared") == FILES


MUON = (
    "--optimizer muon --lr 0.01 --muon-lr 0.02 --global-batch-size 2 --num-workers 0 "
    "--ckpt-every 1 --log-every 1"
)


def test_fine_tuning_averages_from_its_start_and_a_chained_phase_continues(tmp_path, capsys):
    run_main(export, random_checkpoint(tmp_path / "best.pt"), tmp_path / "shared")
    data = make_images(tmp_path / "data", 4)
    (data / "A").rename(data / "C")  # the model knows A and B

    def trained(name, ckpt, steps, *flags):
        """(checkpoint files, their contents) of the steps of a run."""
        flags += ("--data-path", data, "--results-dir", tmp_path / name, "--ckpt", ckpt)
        run_main(train, *MUON.split(), *flags, "--max-steps", steps[-1])
        files = sorted((tmp_path / name).glob("*/checkpoints/00*.pt"))
        assert [int(file.stem) for file in files] == steps
        return files, [checkpoint.load(file) for file in files]

    def follows(before, states, first):
        """Check that the average is as if it had begun `first` steps before."""
        for count, state in enumerate(states, first + 1):
            decay = min(0.9999, (1 + count) / (10 + count))
            for name, value in state["ema"].items():
                expected = decay * before[name] + (1 - decay) * state["model"][name]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
            before = state["ema"]

    files, states = trained("a", tmp_path / "shared", [11, 12], "--new-classes")
    assert "has 1 of your 2 classes; others start" in capsys.readouterr().out
    shared = load_file(tmp_path / "shared/model.safetensors")
    table = "y_embedder.embedding_table.weight"
    shared[table] = shared[table][[1, 2, 2]]  # B, and C begins with the embedding of no class
    follows(shared, states, 0)
    changes = [(value - shared[name]).abs().max() for name, value in states[0]["model"].items()]
    assert 0 < max(changes) < 0.1  # it has learned from there on
    about = states[0]["config"]["data"]
    assert (about["classes"], about["image_size"], about["vae"]) == (["B", "C"], 16, "none")
    assert states[0]["phase"].items() >= {"first_step": 10, "position": 2, "ema_start": 10}.items()
    (row, _), _ = read_metrics(files[0].parents[1] / "metrics.jsonl")
    assert (row["lr"], row["muon_lr"]) == (0.01, 0.02)  # those of the flags, with a fresh optimizer

    _, chained = trained("b", files[-1], [13])
    follows(states[-1]["ema"], chained, 2)
    assert chained[0]["phase"]["ema_start"] == 10
    (data / "C").rename(data / "D")
    _, renamed = trained("c", files[-1], [13], "--new-classes")
    assert renamed[0]["phase"]["ema_start"] == 12

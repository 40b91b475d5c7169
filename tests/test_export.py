import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import export
import sample_gd
import train
from models import EqM, model_config
from runtime.cli import UserError
from scoring import manifest
from test_checkpoint import flip_bit
from tiny_data import make_images
from training import run_main

FILES = ["README.md", "config.json", "model.safetensors"]


def make_checkpoint(path, video=True, **settings):
    """Write a checkpoint as train.py does, with EMA weights that differ from the raw weights."""
    shape = {"temporal_patch_size": 4, "num_frames": 4} if video else {"temporal_patch_size": 1, "num_frames": 1}
    config = model_config("EqM-Ti/4", input_size=8, in_channels=3, num_classes=2, depth=1, **shape, **settings)
    state = {"version": checkpoint.VERSION, "optimizer": {"kind": "adamw", "states": []}, "best_loss": 1.0}
    for seed, part in enumerate(("model", "ema")):
        torch.manual_seed(seed)
        state[part] = {name: torch.randn_like(value) / 5 for name, value in EqM(config).state_dict().items()}
    data = {"vae": "none", "image_size": 8, "fps": 12.5, "frame_interval": [2], "classes": ["left", "right"]}
    training = {"model": "EqM-Ti/4", "depth": 1, "num_frames": shape["num_frames"], "video": video, "lr": 1e-4}
    local = {"data_path": "/home/somebody/videos", "results_dir": "results", "ckpt": None}
    state["config"] = {"model": vars(config), "data": data, "training": training | local}
    state |= {"step": 70, "phase": {"first_step": 50, "position": 640}}
    checkpoint.save(path, state)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(the checkpoint of a video model, the folder it was exported to); tests only read them."""
    folder = tmp_path_factory.mktemp("exported")
    path = make_checkpoint(folder / "best.pt", use_rope=True)
    run_main(export, path, folder / "shared")
    return path, folder / "shared"


def sample(ckpt, folder, *flags):
    flags = ["--num-samples", 3, "--num-sampling-steps", 4, "--stepsize", 0.05, *flags]
    run_main(sample_gd, "--ckpt", ckpt, "--folder", folder, *flags)
    return np.load(folder / "samples.npz")["arr_0"]


@pytest.mark.parametrize(
    ("video", "settings"),
    [
        (True, {"use_rope": True, "position_table": "space", "rope_speed": 0.5}),
        (True, {}),
        (False, {}),
        (False, {"use_rope": True, "ebm": "dot"}),
    ],
)
def test_an_exported_model_samples_bit_for_bit_what_its_checkpoint_samples(tmp_path, video, settings):
    path = make_checkpoint(tmp_path / "best.pt", video, **settings)
    run_main(export, path, tmp_path / "shared")
    assert sorted(file.name for file in (tmp_path / "shared").iterdir()) == FILES
    kind = ["--video"] if video else []
    before = sample(path, tmp_path / "a", *kind)
    assert np.array_equal(before, sample(tmp_path / "shared", tmp_path / "b", *kind))
    assert before.std() > 30  # the network had an effect
    raw = sample(path, tmp_path / "c", *kind, "--no-ema")
    assert not np.array_equal(before, raw)  # the EMA weights are exported

    model, config, step = checkpoint.load_model(tmp_path / "shared")
    original, _, _ = checkpoint.load_model(path)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.config == original.config
    assert step == 70


@pytest.mark.parametrize(("part", "status"), [("ema", 2), ("model", 0)])
def test_a_bit_that_is_flipped_in_a_checkpoint_stops_an_export_if_it_is_in_the_ema(tmp_path, capsys, part, status):
    path = make_checkpoint(tmp_path / "best.pt")
    flip_bit(path, checkpoint.load(path)[part]["blocks.0.mlp.fc1.weight"])
    run_main(export, path, tmp_path / "shared", status=status)
    assert (f"{path}: damaged" in capsys.readouterr().err) == (status == 2)
    assert (tmp_path / "shared").exists() == (status == 0)


def test_half_precision_is_half_as_large_and_close(exported, tmp_path):
    path, whole = exported
    half = tmp_path / "half"
    run_main(export, path, half, "--dtype", "fp16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.01)
    assert {value.dtype for value in load_file(half / "model.safetensors").values()} == {torch.float16}
    a, b = (sample(folder, tmp_path / f"of {folder.name}", "--video") for folder in (whole, half))
    assert np.abs(a.astype(int) - b.astype(int)).mean() < 1


def test_config_json_holds_all_that_sampling_needs_and_no_paths_of_the_machine(exported):
    text = (exported[1] / "config.json").read_text()
    about = json.loads(text)
    assert (about["step"], about["dtype"], about["training"]["lr"]) == (70, "fp32", 1e-4)
    assert about["model"].items() >= {"hidden_size": 192, "use_rope": True}.items()
    assert about["data"] == {
        "vae": "none", "image_size": 8, "fps": 12.5, "frame_interval": [2], "classes": ["left", "right"]
    }  # fmt: skip
    assert "somebody" not in text
    assert text.count("\n") > 20  # readable


def test_the_model_card_says_what_it_is_how_it_is_sampled_and_what_it_scores(exported, tmp_path, capsys):
    ckpt, shared = exported
    text = (shared / "README.md").read_text()
    wanted = "EqM-(depth 1, width 192", "weights of step 70", "2: left, right", "0.16 s apart", "validation loss"
    assert all(words in text for words in wanted) and "None were given." in text
    assert "somebody" not in text  # of the place of the data, only the name of the folder
    commands = [line for line in text.splitlines() if line.startswith("python EqM/")]
    for line, script in zip(commands, (sample_gd, train), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", line.split()[1:])
            script.parse_args()
    found = dict.fromkeys(manifest.KEYS, {}) | {"format": 1, "protocol": "motion8_4f", "values": {"speed": 0.98765}}
    own = checkpoint.weights_sha256(checkpoint.load(ckpt)["ema"])
    assert own == checkpoint.weights_sha256(checkpoint.load_model(shared)[0].state_dict())  # the export's are the same
    for sha256, status in (("0", 2), (own, 0)):
        manifest.write_manifest(tmp_path / "m.json", found | {"generated": {"weights_sha256": sha256}})
        run_main(export, ckpt, tmp_path / "scored", "--scores", tmp_path / "m.json", status=status)
    assert "--scores" in capsys.readouterr().err
    card = (tmp_path / "scored/README.md").read_text()
    assert "`motion8_4f`" in card and "| speed | 0.9877 |" in card


def test_a_folder_that_is_not_empty_is_left_as_it_is(exported, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run_main(export, exported[0], tmp_path / "full")
    assert ended.value.code == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    run_main(export, exported[0], tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").exists()


EDITS = {
    "other weights": ('"hidden_size": 192', '"hidden_size": 96'),
    "no step": ('"step"', '"steps"'),
    "no kind": ('"video"', '"film"'),
    "no frame rate": ('"fps"', '"rate"'),
    "a word for a number": ('"depth": 1', '"depth": "x"'),
    "an impossible model": ('"num_heads": 3', '"num_heads": 5'),
    "another version": ('"version": 1', '"version": 2'),
}


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut weights", "cut config", *EDITS])
def test_a_damaged_export_is_one_line(exported, tmp_path, damage):
    folder = shutil.copytree(exported[1], tmp_path / "shared")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage in EDITS:
        assert EDITS[damage][0] in config.read_text()
        config.write_text(config.read_text().replace(*EDITS[damage]))
    else:
        path = config if "config" in damage else weights
        path.unlink() if damage.startswith("no ") else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        checkpoint.load_model(folder)
    assert str(error.value).startswith(f"--ckpt {folder}: ")
    assert "\n" not in str(error.value)
    assert ("format version 2" in str(error.value)) == (damage == "another version")


def fail_on_config(path, text):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_no_partial_export(exported, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as full, pytest.raises(SystemExit) as ended:
        full.setattr("pathlib.Path.write_text", fail_on_config)
        run_main(export, exported[0], tmp_path / "new/shared")
    assert ended.value.code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []
    run_main(export, exported[0], tmp_path / "new/shared")  # works now
    assert sorted(file.name for file in (tmp_path / "new/shared").iterdir()) == FILES


def test_flags_that_contradict_the_checkpoint_are_refused(exported, tmp_path, capsys):
    path, shared = exported
    for script, arguments, words in (
        (export, (path, tmp_path / "new", "--model", "EqM-XL/2"), "--model EqM-XL/2"),
        (export, (path, tmp_path / "new", "--ebm", "dot"), "--ebm gives dot"),
        (sample_gd, ("--video", "--ckpt", shared, "--model", "EqM-XL/2"), "--model EqM-XL/2"),
        (sample_gd, ("--video", "--ckpt", shared, "--no-ema"), "--no-ema"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_main(script, *arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_fine_tuning_averages_from_its_own_start_and_a_chained_phase_continues(tmp_path):
    run_main(export, make_checkpoint(tmp_path / "best.pt", video=False), tmp_path / "shared")
    data = make_images(tmp_path / "data", 4)

    def trained(name, ckpt, steps, *flags):
        """[the start and the checkpoint of each step] of a run."""
        flags = ["--data-path", data, "--results-dir", tmp_path / name, "--lr", 0.01, "--ckpt-every", 1, *flags]
        flags += ["--global-batch-size", 2, "--num-workers", 0, "--max-steps", steps[-1]]
        run_main(train, "--ckpt", ckpt, *flags)
        (folder,) = (tmp_path / name).iterdir()
        files = {step: folder / f"checkpoints/{step:07d}.pt" for step in steps}
        return files, [checkpoint.load(file) for file in files.values()]

    def follows(before, states, first):
        """Whether the average is as if it had begun `first` steps before."""
        for count, state in enumerate(states, first + 1):
            decay = min(0.9999, (1 + count) / (10 + count))
            for name, value in state["ema"].items():
                expected = decay * before[name] + (1 - decay) * state["model"][name]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
            before = state["ema"]
        return states[-1]["phase"]["ema_start"]

    files, states = trained("a", tmp_path / "shared", (71, 72), "--new-classes")
    shared = load_file(tmp_path / "shared/model.safetensors")
    shared["y_embedder.embedding_table.weight"][:2] = shared["y_embedder.embedding_table.weight"][2]  # A and B are new
    assert follows(shared, states, 0) == 70
    assert all((state["ema"]["blocks.0.attn.qkv.weight"] - state["model"]["blocks.0.attn.qkv.weight"]).norm() > 0
               for state in states)  # fmt: skip
    _, chained = trained("b", files[72], (73,))
    assert follows(states[-1]["ema"], chained, 2) == 70
    (data / "B").rename(data / "C")
    _, renamed = trained("c", files[72], (73,), "--new-classes")
    assert renamed[0]["phase"]["ema_start"] == 72


def test_sampling_again_removes_the_files_of_the_run_before(tmp_path):
    path, folder = make_checkpoint(tmp_path / "best.pt", video=False, ebm="dot"), tmp_path / "s"
    sample(path, folder, "--report-energy", "--stop-below", 1e-9)
    (folder / "notes.txt").write_text("mine")
    sample(path, folder, "--num-samples", 1)
    names = {file.name for file in folder.iterdir()}
    assert names == {"000000.png", "grid.png", "samples.npz", "samples.json", "notes.txt"}


def test_training_continues_from_an_exported_model_on_new_classes_at_its_size_with_a_fresh_optimizer(tmp_path, capsys):
    run_main(export, make_checkpoint(tmp_path / "best.pt", video=False), tmp_path / "shared")
    data = make_images(tmp_path / "data", 4)  # of the classes A and B
    (data / "B").rename(data / "right")
    flags = ["--data-path", data, "--results-dir", tmp_path / "results", "--lr", 1e-9, "--muon-lr", 1e-9]
    flags += ["--max-steps", 72, "--global-batch-size", 2, "--num-workers", 0, "--optimizer", "muon", "--log-every", 1]
    run_main(train, "--ckpt", tmp_path / "shared", *flags, status=2)
    assert "--new-classes trains on with those of the data" in capsys.readouterr().err
    run_main(train, "--ckpt", tmp_path / "shared", *flags, "--new-classes")
    assert "--new-classes: 1 of 2 are known" in capsys.readouterr().out
    (folder,) = (tmp_path / "results").iterdir()
    trained = checkpoint.load(folder / "checkpoints/0000072.pt")
    assert trained["config"]["data"].items() >= {"classes": ["A", "right"], "image_size": 8, "vae": "none"}.items()
    shared, table = load_file(tmp_path / "shared/model.safetensors"), "y_embedder.embedding_table.weight"
    shared[table] = shared[table][[2, 1, 2]]  # A begins with the embedding of no label
    assert all((value - shared[name]).abs().max() < 1e-6 for name, value in trained["model"].items())
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (row["lr"], row["muon_lr"]) == (1e-9, 1e-9)
    assert trained["phase"].items() >= {"first_step": 70, "position": 4, "ema_start": 70}.items()

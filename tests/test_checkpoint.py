"""Checkpoints: no crash damages one, no damaged or foreign file is taken for one, mismatches name
the flag.
"""

import concurrent.futures
import errno
import functools
import itertools
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import tiny_data
from models import EqM, model_config
from optim import make_optimizers
from runtime import runs
from runtime.atomic import link
from tiny_data import flip_bit
from training import differences, error_of, names, record_calls

SETTINGS = {
    "input_size": 4,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "num_frames": 4,
    "use_rope": True,
}
CONFIG = model_config("EqM-Ti/2", in_channels=3, **SETTINGS)


def make_state(settings=(), **changes):
    """The dict of a checkpoint with random weights, always the same; changes replace its parts."""
    state = tiny_data.make_state(70, **SETTINGS | dict(settings))
    generator = torch.Generator().manual_seed(1)
    for weight in [*state["model"].values(), *state["ema"].values()]:
        weight.normal_(generator=generator)
    return state | changes


def load_refusal(path):
    message = error_of(checkpoint.load, path)
    assert message.startswith(f"--ckpt {path}: ")
    return message


# Writing ------------------------------------------------------------------------------------------


def full_disk(state, file):
    file.write(b"half of a file")
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_names_what_a_checkpoint_needs_and_what_is_free(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a.pt", make_state())
    size = (tmp_path / "a.pt").stat().st_size / 1e6
    monkeypatch.setattr("torch.save", full_disk)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=123_456))
    message = error_of(checkpoint.save, tmp_path / "a.pt", make_state())
    pattern = r"has 0.123 MB free, the file needs ([0-9.]+) MB\); free some space there$"
    assert float(re.search(pattern, message)[1]) == pytest.approx(size, rel=0.1)
    large = {"model": torch.empty(2**31, dtype=torch.int8, device="meta")}
    assert "the file needs 2.1 GB" in error_of(checkpoint.save, tmp_path / "b.pt", large)


@pytest.mark.parametrize(
    "where, failure, reason",
    [
        ("torch.save", full_disk, "No space left on device"),
        ("os.fsync", refused, "Input/output error"),
        ("os.replace", refused, "Input/output error"),
    ],
)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, where, failure, reason
):
    checkpoint.save(tmp_path / "latest.pt", make_state(step=1))
    before = (tmp_path / "latest.pt").read_bytes()
    for name in ("latest.pt", "new.pt"):
        with monkeypatch.context() as patch:
            patch.setattr(where, failure)
            message = error_of(checkpoint.save, tmp_path / name, make_state(step=2))
        assert str(tmp_path / name) in message
        assert reason in message
        assert names(tmp_path) == ["latest.pt"]
        assert (tmp_path / "latest.pt").read_bytes() == before


def test_a_file_is_on_disk_before_it_replaces_another_and_loading_returns_its_state(
    tmp_path, monkeypatch
):
    temporary = tmp_path / "latest.pt.tmp"
    order = []
    checkpoint.save(tmp_path / "latest.pt", make_state(step=69))
    temporary.write_bytes(b"left over by a crash")

    def note_fsync(descriptor):
        for place in (temporary, tmp_path):
            if place.exists() and os.path.samestat(os.fstat(descriptor), place.stat()):
                order.append(("fsync", place.name))

    def note_replace(old, new):
        assert checkpoint.load(old)["step"] == 70  # complete before it is renamed
        order.append(("rename", Path(new).name))

    record_calls(monkeypatch, os, "fsync", note_fsync)
    record_calls(monkeypatch, os, "replace", note_replace)
    checkpoint.save(tmp_path / "latest.pt", make_state())
    assert order == [("fsync", "latest.pt.tmp"), ("rename", "latest.pt"), ("fsync", tmp_path.name)]
    assert differences(checkpoint.load(tmp_path / "latest.pt"), make_state()) == []
    assert names(tmp_path) == ["latest.pt"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_link_is_the_newest_checkpoint_under_a_second_name(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr("os.link", refused)
    (tmp_path / "latest.pt.tmp").write_bytes(b"left over")
    for step in (1, 2):
        checkpoint.save(tmp_path / f"{step:07d}.pt", make_state(step=step))
        link(tmp_path / f"{step:07d}.pt", "latest.pt")
    assert names(tmp_path) == ["0000001.pt", "0000002.pt", "latest.pt"]
    assert (tmp_path / "latest.pt").samefile(tmp_path / "0000002.pt") == hard_links
    checkpoint.save(tmp_path / "0000002.pt", make_state(step=3))  # leaves its second name alone
    assert checkpoint.load(tmp_path / "0000001.pt")["step"] == 1
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 2


# Saving in a thread -------------------------------------------------------------------------------


def nothing():
    pass


@pytest.fixture
def writer(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return checkpoint.Writer(tmp_path)


def test_a_checkpoint_holds_the_state_at_the_time_of_the_call(writer, monkeypatch):
    begin = threading.Event()
    record_calls(monkeypatch, torch, "save", lambda *_: begin.wait(60))  # a slow disk
    state = make_state(step=7)
    writer.write(state, [], nothing, nothing)
    for weight in state["model"].values():
        weight.add_(1)
    state["step"] = 8
    assert not writer.path.exists()
    begin.set()
    writer.wait()
    assert differences(make_state(step=7), checkpoint.load(writer.path)) == []


def test_checkpoints_are_written_one_at_a_time_from_the_same_memory(writer):
    events = []
    memory = []
    for step in (1, 2):
        writer.write(
            make_state(step=step),
            ["best.pt", f"{step:07d}.pt"],
            before=functools.partial(events.append, f"begin {step}"),
            after=functools.partial(events.append, f"end {step}"),
        )
        memory.append({name: tensor.data_ptr() for name, tensor in writer.copies.items()})
    writer.wait()
    assert events == ["begin 1", "end 1", "begin 2", "end 2"]
    steps = {path.name: checkpoint.load(path)["step"] for path in writer.path.parent.iterdir()}
    assert steps == {"latest.pt": 2, "best.pt": 2, "0000001.pt": 1, "0000002.pt": 2}
    assert memory[0] == memory[1]


def test_the_next_call_raises_the_error_of_the_thread(writer, monkeypatch):
    writer.write(make_state(step=1), [], nothing, nothing)
    writer.wait()
    monkeypatch.setattr(torch, "save", full_disk)
    writer.write(make_state(step=2), ["best.pt"], nothing, nothing)
    concurrent.futures.wait([writer.pending])
    write = functools.partial(writer.write, make_state(step=3), [], nothing, nothing)
    for call in (writer.check, writer.wait, write):
        assert "No space left on device" in error_of(call)
    assert names(writer.path.parent) == ["latest.pt"]
    assert checkpoint.load(writer.path)["step"] == 1


# Reading ------------------------------------------------------------------------------------------


def test_cut_and_foreign_files_are_one_line_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "best.pt"
    odd = tmp_path / os.fsdecode(b"\xff 'best.pt")
    state = make_state()
    checkpoint.save(path, state)
    whole = path.read_bytes()
    odd.write_bytes(whole)
    assert "a UTF-8 name" in load_refusal(odd)
    path.write_bytes(whole[:-1])
    load_refusal(path)
    others = [{"state_dict": {}}, [1, 2], torch.zeros(3)]
    for part in ("version", "config", "model", "ema", "step"):
        others.append({name: value for name, value in state.items() if name != part})
    for other in others:
        torch.save(other, path)
        assert "not a checkpoint of this project" in load_refusal(path)
    torch.save(state | {"config": {"training": {}}}, path)  # of train_vae.py
    assert "holds a VAE; expected a model" in load_refusal(path)
    torch.save(state | {"version": 2}, path)
    assert "format version 2, this code reads version 1" in load_refusal(path)
    assert len(recwarn) == 0


WEIGHT = "blocks.1.mlp.fc1.weight"


def save_damaged(path, part, **changes):
    """Save a checkpoint that has tensors in all its parts, and flip one bit of a tensor in this
    part.
    """
    memory = torch.rand(1000)
    rows = torch.rand(1000)
    optimizer = {"kind": "adamw", "states": [{"state": {0: {"exp_avg": memory}}}]}
    state = make_state(optimizer=optimizer, run={"window": {"rows": rows}}, **changes)
    checkpoint.save(path, state)
    tensors = {"optimizer": memory, "run": rows}
    flip_bit(path, tensors[part] if part in tensors else state[part][WEIGHT])


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "run"])
def test_only_readers_of_a_damaged_part_refuse_the_file(tmp_path, part):
    path = tmp_path / "best.pt"
    save_damaged(path, part)
    assert "damaged" in load_refusal(path)
    for use_ema, weights in ((True, "ema"), (False, "model")):
        if weights == part:
            refusal = error_of(checkpoint.load_model, path, use_ema=use_ema)
            assert f"{path}: damaged" in refusal
        else:
            model, _, _ = checkpoint.load_model(path, use_ema=use_ema)
            assert torch.equal(model.state_dict()[WEIGHT], make_state()[weights][WEIGHT])


def test_a_rank_that_reads_for_itself_finds_the_damage(tmp_path, monkeypatch):
    path = tmp_path / "latest.pt"
    save_damaged(path, "model")
    monkeypatch.setenv("LOCAL_RANK", "1")
    checkpoint.load(path)  # the first rank of the machine would refuse it
    assert f"{path}: damaged" in error_of(checkpoint.read_file, path)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_load_the_state_of_each_weight_and_keep_their_settings(kind):
    model = EqM(CONFIG)
    flags = SimpleNamespace(optimizer=kind, lr=1.0, muon_lr=1.0, weight_decay=0.0)
    before = make_optimizers(model, flags)
    after = make_optimizers(model, flags)
    sum(weight.square().sum() for weight in model.parameters()).backward()
    for optimizer in before:
        optimizer.step()
    saved = [optimizer.state_dict() for optimizer in before]
    for state in saved:
        state["param_groups"][0]["lr"] = "of another run"
    checkpoint.load_optimizers(after, saved)
    for optimizer, state in zip(after, saved, strict=True):
        assert optimizer.param_groups[0]["lr"] == 1.0
        assert state["state"]
        assert differences(optimizer.state_dict()["state"], state["state"]) == []


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rope": False}, {"qk_norm": True, "rope_theta": 500.0, "position_table": "space"}],
    ids=str,
)
def test_a_model_that_matches_the_checks_loads_bit_for_bit(tmp_path, recwarn, settings):
    path = tmp_path / "best.pt"
    config = replace(CONFIG, **settings)
    state = make_state(settings)
    checkpoint.save(path, state)
    for use_ema, part in ((True, "ema"), (False, "model")):
        model, config_of_file, step = checkpoint.load_model(
            path,
            use_ema=use_ema,
            num_classes=5,
            use_rope=config.use_rope,
            model="EqM-Ti/4",
            video=True,
            ebm=None,
        )
        assert model.config == config
        assert config_of_file == state["config"]
        assert step == 70
        assert not model.training
        assert differences(model.state_dict(), state[part]) == []
    assert len(recwarn) == 0  # though the model is narrow


INVALID = "settings of its model are invalid"
OTHER_SHAPE = "its weights do not match its config"


@pytest.mark.parametrize(
    "part, changes, reason, name",
    [
        ("settings", {"new_field": 1}, INVALID, "new_field"),
        ("settings", {"num_heads": 5}, INVALID, "5 heads"),
        ("settings", {"depth": 3}, OTHER_SHAPE, "blocks.2."),
        ("model", {WEIGHT: torch.zeros(95, 24)}, OTHER_SHAPE, WEIGHT),
        ("ema", {WEIGHT: torch.zeros(95, 24)}, OTHER_SHAPE, WEIGHT),
    ],
)
def test_settings_that_are_unknown_or_do_not_fit_the_weights_are_refused(
    part, changes, reason, name
):
    state = make_state()
    state.get(part, state["config"]["model"]).update(changes)
    message = error_of(checkpoint.config_of, "--ckpt a.pt", state)
    assert reason in message
    assert name in message


@pytest.mark.parametrize("newest, is_said", [(70, False), (86, False), (88, True)])
def test_a_best_checkpoint_older_than_a_fifth_of_its_phase_is_noted(
    newest, is_said, tmp_path, capsys
):
    path = tmp_path / "checkpoints/best.pt"
    state = make_state()
    checkpoint.save(path, state | {"phase": state["phase"] | {"first_step": 4}})
    (tmp_path / checkpoint.SAVED_STEP).write_text(f"{newest}\n")
    checkpoint.load_model(path)
    assert (f"latest.pt has step {newest}" in capsys.readouterr().out) == is_said


def test_a_run_resumes_from_its_newest_intact_checkpoint(tmp_path, capsys):
    folder = runs.make_run_folder(tmp_path, "a") / "checkpoints"
    assert checkpoint.newest_checkpoint(folder.parent) == (None, None)
    for step, name in ((10, "0000010.pt"), (20, "0000020.pt"), (15, "best.pt"), (25, "latest.pt")):
        checkpoint.save(folder / name, make_state(step=step))
    path, state = checkpoint.newest_checkpoint(folder.parent)
    assert path.name == "latest.pt"
    assert state["step"] == 25
    assert capsys.readouterr().out == ""
    names = ["latest.pt", "0000020.pt", "best.pt", "0000010.pt"]
    for damaged, expected in itertools.pairwise(names):
        os.truncate(folder / damaged, 1000)
        path, _ = checkpoint.newest_checkpoint(folder.parent)
        assert path.name == expected
        assert f"{damaged}: damaged" in capsys.readouterr().out
    save_damaged(folder / "latest.pt", "optimizer", step=25)  # which sampling could use
    path, _ = checkpoint.newest_checkpoint(folder.parent)
    assert path.name == "0000010.pt"

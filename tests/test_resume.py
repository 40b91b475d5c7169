"""A run that is interrupted anywhere and resumed ends as one that was not, bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path
from shlex import split

import pytest

import checkpoint
import train
import train_vae
from training import (
    OFTEN,
    TINY,
    TINY_VAE,
    Training,
    compare,
    content,
    counted_steps,
    refused,
    run_here,
    run_main,
    snapshot,
)

STEPS = 7


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """A run that nothing has disturbed."""
    training = Training(shapes, tmp_path_factory.mktemp("whole") / "r", STEPS)
    assert run_here(training) == STEPS
    return training


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run."""
    return replace(whole, results=shutil.copytree(whole.results, tmp_path / "copy"))


def check_in_parts(whole, results, stops):
    """A run that is stopped after so many steps each time (None = not at all) ends as the whole
    one.
    """
    parts = replace(whole, results=results)
    for number, steps in enumerate(stops):
        other = ["--num-workers", 1, "--cache-frames"] if number == 3 else []
        assert run_here(parts, "--resume", *other, stop_after=steps) == steps or steps is None
    assert compare(whole, parts) == []


def test_a_run_stopped_after_every_step_ends_like_an_uninterrupted_run(whole, tmp_path):
    check_in_parts(whole, tmp_path / "parts", [*[1] * STEPS, None])
    assert len([*tmp_path.glob("parts/.pixels-*/*.safetensors")]) == 24


CACHED = [flag for flag in TINY if flag not in ("--vae", "none")]
KINDS = {  # data, flags that replace TINY's or add to them
    "bf16, muon": ("shapes", TINY, "--precision bf16 --optimizer muon"),
    # The second start ends in the warm-up, at step 4, which the third logs before its first step
    "accumulation": ("shapes", TINY, "--grad-accum 2 --disp --lr-decay 0.5 --warmup-steps 5"),
    "an energy": (
        "shapes",
        TINY,
        "--ebm dot --forcing 0.5 --gamma-shift 3 --temporal-patch-size 3",
    ),
    "causal, latents": (
        "latents",
        CACHED,
        "--causal --temporal-patch-size 2 --context 2 --context-noise 0.2 --own-context 0.5 --disp",
    ),
}


@pytest.mark.parametrize("data, base, flags", KINDS.values(), ids=KINDS)
def test_every_kind_of_training_resumes_bit_for_bit(data, base, flags, request, tmp_path):
    data = request.getfixturevalue(data)
    whole = Training(data, tmp_path / "whole", STEPS, base=base, flags=split(flags))
    assert run_here(whole) == STEPS
    check_in_parts(whole, tmp_path / "parts", (1, 3, None))


@pytest.mark.parametrize("where", ["latents_of", "sample_ema", "validate"])
def test_a_resumed_run_repeats_the_work_that_a_signal_interrupted(where, whole, tmp_path):
    parts = replace(whole, results=tmp_path / "parts")
    steps = run_here(parts, "--resume", stop_in=where)
    assert steps == (5 if where == "sample_ema" else 2)
    assert checkpoint.load(parts.folder / "checkpoints/latest.pt")["step"] == steps
    assert parts.rows() == whole.rows()[: len(parts.rows())]
    assert all(row["step"] < steps for row in parts.rows())
    run_here(parts, "--resume")
    assert compare(whole, parts) == []


def test_no_step_is_logged_twice_by_a_run_that_is_stopped_then_killed(shapes, tmp_path):
    parts = Training(shapes, tmp_path / "parts", STEPS)
    run_here(parts, "--log-every", 1, stop_after=3)  # step 3 is not logged yet
    latest = parts.folder / "checkpoints/latest.pt"
    saved = latest.read_bytes()
    run_here(parts, "--resume", "--log-every", 1)
    for path in latest.parent.glob("*.pt"):
        path.unlink()
    latest.write_bytes(saved)  # as if that had been killed before it saved
    run_here(parts, "--resume", "--log-every", 1)
    assert [row["step"] for row in parts.rows()] == list(range(1, STEPS + 1))


def test_a_resume_links_a_checkpoint_to_its_missing_names(copy):
    checkpoints = copy.folder / "checkpoints"
    before = content(checkpoints)
    for name in (f"{STEPS:07d}.pt", "latest.pt"):
        (checkpoints / name).unlink()
        run_here(copy, "--resume")
        assert content(checkpoints) == before


@pytest.mark.parametrize(
    "end, words",
    [
        (
            ["--max-steps", 5],
            "the checkpoint is at step 7 already; steps are counted over all phases; give",
        ),
        (["--epochs", 1], "12 clips, but the checkpoint has trained on 28 in"),
    ],
)
def test_a_run_that_is_past_the_last_step_of_the_flags_is_refused(end, words, copy, capsys):
    before = snapshot(copy.folder)
    del before[copy.folder / "lock"]
    past = replace(copy, steps=None, flags=end)
    line = refused(capsys, train, *past.command_flags(*OFTEN, "--resume"))
    assert f"error: {end[0]} {end[1]}: {words}" in line
    assert before.items() <= snapshot(copy.folder).items()
    run_here(copy, "--resume")  # it ends where the flags end
    assert f"{copy.folder} is finished at step 7" in capsys.readouterr().out


def with_other_weights(path, new):
    """Write a copy of a checkpoint, of the same step, whose weights differ."""
    state = checkpoint.load(path)
    for part in ("model", "ema"):
        for value in state[part].values():
            value += 1
    checkpoint.save(new, state)
    return new


def test_a_phase_resumes_only_with_its_first_weights(copy, tmp_path, capsys, monkeypatch):
    start = copy.folder / "checkpoints" / f"{STEPS:07d}.pt"
    longer = Training(copy.data, tmp_path / "longer", STEPS + 2, flags=["--num-frames", 8])
    assert run_here(longer, "--ckpt", start, stop_after=1) == 1
    latest = longer.folder / "checkpoints/latest.pt"
    other = with_other_weights(start, tmp_path / "other.pt")
    earlier = start.with_name("0000004.pt")
    moved = Path(shutil.copy(start, tmp_path / "moved.pt"))
    gone = tmp_path / "gone.pt"

    def accept(ckpt):
        """What a resume with this --ckpt prints."""
        capsys.readouterr()
        run_here(longer, "--resume", "--ckpt", ckpt, "--dry-run")
        return capsys.readouterr().out

    def refuse(training, ckpt, words):
        line = refused(capsys, train, *training.command_flags(*OFTEN, "--resume", "--ckpt", ckpt))
        assert f"--ckpt {ckpt}: --resume continues {training.folder}, which began {words}" in line

    other_weights = f"from other weights ({start}); remove one of the two"
    for same in (start, start.with_name("latest.pt"), moved, latest):  # latest: the phase's own
        assert "note: " not in accept(same)
    for wrong in (other, earlier):
        refuse(longer, wrong, other_weights)
    refuse(copy, start.parents[2] / "gone.pt", "without it; remove one of the two")
    own = shutil.copy(earlier, latest.with_name("0000004.pt"))
    line = refused(capsys, train, *longer.command_flags(*OFTEN, "--resume", "--ckpt", own))
    assert f"--ckpt {own}: has step 4, but --resume continues {longer.folder} from step" in line
    own.unlink()
    assert f"note: --ckpt {gone}: no such file" in accept(gone)  # nothing to compare with

    state = checkpoint.load(latest)
    weights = checkpoint.load(start)["model"]
    assert state["config"]["training"]["start_sha256"] == checkpoint.weights_sha256(weights)
    with monkeypatch.context() as patch:  # torchrun repeats a command that was accepted
        patch.setattr(checkpoint, "is_restarted", lambda folder: True)
        accept(other)
    del state["config"]["training"]["start_sha256"]
    checkpoint.save(latest, state)  # as an older version wrote it: the steps are known
    refuse(longer, earlier, other_weights)
    accept(other)
    assert run_here(longer, "--resume", "--ckpt", start) == 1


def test_a_run_with_deleted_checkpoints_is_named_and_stays_unchanged(whole, copy, capsys):
    checkpoints = copy.folder / "checkpoints"
    shutil.rmtree(checkpoints)
    words = f"--resume: the checkpoints of {copy.folder} were deleted (its metrics reach step 7): "
    for _ in ("without the folder", "with an empty one"):
        line = refused(capsys, train, *copy.command_flags(*OFTEN, "--resume"))
        assert f"{words}restore one" in line
        assert copy.rows() == whole.rows()
        checkpoints.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"nothing")], ids=["none", "damaged"]
)
def test_a_run_without_an_intact_checkpoint_starts_over_in_its_folder(damage, whole, copy, capsys):
    for path in (copy.folder / "checkpoints").iterdir():
        damage(path)
    if damage is Path.unlink:  # as if killed before the first checkpoint
        (copy.folder / checkpoint.SAVED_STEP).unlink()
    run_here(copy, "--resume")
    assert ("latest.pt: " in capsys.readouterr().out) == (damage is not Path.unlink)
    assert compare(whole, copy) == []


def test_a_run_whose_checkpoints_only_other_code_reads_stays_unchanged(copy, capsys, monkeypatch):
    before = content(copy.folder)
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    line = refused(capsys, train, *copy.command_flags(*OFTEN, "--resume"))
    assert "latest.pt: has format version" in line
    assert content(copy.folder) == before


@pytest.mark.parametrize(
    "script, base, flags",
    [(train, TINY, OFTEN), (train_vae, TINY_VAE, ["--save-minutes", 1e-9])],
)
def test_a_deleted_run_folder_is_one_line_and_deleted_subfolders_are_recreated(
    script, base, flags, whole, tmp_path, capsys, monkeypatch
):
    write = checkpoint.Writer.write

    def write_and_wait(self, *arguments, **keywords):
        write(self, *arguments, **keywords)
        self.wait()

    # so that nothing is deleted while the thread adds files to it
    monkeypatch.setattr(checkpoint.Writer, "write", write_and_wait)

    def delete(run, *names):
        for name in names:
            shutil.rmtree(run.folder / name)

    run = replace(whole, results=tmp_path / "run", base=base, flags=flags)
    with counted_steps(script, 2, lambda: delete(run, "checkpoints", "samples")):
        run_main(script, *run.command_flags())
    if script is train:
        assert compare(whole, run) == []
    assert {path.name for path in run.folder.iterdir()} >= {"checkpoints", "samples"}
    again = replace(run, results=tmp_path / "again")
    with counted_steps(script, 2, lambda: delete(again, "")):
        run_main(script, *again.command_flags(), status=1)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "error" in line]  # beside the bar's
    folder = again.results / run.folder.name
    words = f"{folder} was deleted or moved during the run; put it back, then continue"
    assert line.startswith(f"{script.__name__}.py: error: {words}")

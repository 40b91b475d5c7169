"""The study of students: its selection and recall in closed form, the choice by tuning, its tables,
and a miniature.
"""

import itertools
import os
from collections import Counter

import pytest
import torch

import few
from runtime.untrusted import read_json
from sample_folders import SOURCE, read_clips, write_samples
from test_studies import SEED, commands, run_miniature  # noqa: F401
from training import error_of, no_space
from video.pairs import OF_TEACHER, Pairs


def tuning_rows(best):
    """Rows of the tuning in which a configuration does best."""
    rows = []
    for name, number in itertools.product(few.TUNED, range(len(few.CONFIGURATIONS))):
        right = 0.9 if number == best else 0.5
        values = {few.task_of(16, few.MAIN): {"both_accuracy": right}}
        rows.append({"arm": name, "configuration": number, "seed": 100, "values": values})
    return rows


def main_rows():
    """Rows of 5 seeds: the student of pairs loses 1 point, that of other noise 10."""
    rows = []
    lost = {"teacher": 0.0, "pairs": 0.01, "independent noise": 0.1}
    for seed, (name, points) in itertools.product(range(5), lost.items()):
        right = 0.95 - points + 0.001 * (seed % 3) * (name != "teacher")
        values = {}
        for frames, count in itertools.product(few.FRAMES, few.COUNTS):
            values[few.task_of(frames, count)] = {"both_accuracy": right, "recall": count / 100}
        for count in few.GIVEN_COUNTS:
            values[few.given_task(count)] = {"psnr_gain": count}
        values[few.disturb.LEFT] = {"both_accuracy": right}
        rows.append({"arm": name, "seed": seed, "values": {"": {"cost": 0.9}} | values})
    return rows


def test_the_control_is_tuned_as_much_as_the_pairs_on_another_seed():
    assert {arm.tuned_as for arm in few.ARMS.values()} == set(few.TUNED)
    assert min(few.TUNING_SEEDS) >= 5
    assert few.choose(tuning_rows(best=4), "pairs") == 4
    assert "the tuning of pairs is not complete" in error_of(
        few.choose, tuning_rows(best=4)[1:], "pairs"
    )


def test_the_tables_compare_students_with_15_guided_evaluations_of_the_teacher():
    text = "\n".join(few.markdown(main_rows()))
    pairs, control = text.split(", differences")[1:]
    # 16 frames: 1, 2, 4 evaluations; other lengths: 4; healing
    assert pairs.count("pairs minus teacher is -0.9") == 6
    assert control.count("independent noise minus teacher is -9.9") == 6
    assert text.count("teacher is -11.00 (the same with") == 4  # recall and PSNR: 4 - 15
    assert control.count("independent noise minus pairs is -9.00") == 6
    assert "- 16 frames, 4 evaluations: pairs minus teacher" in pairs
    assert "Second round" not in text  # it has no rows
    assert "| pairs | 94.1 (94.0 to 94.2) |" in text
    assert text.count("| teacher | 95.0 (95.0 to 95.0) |") == 3
    assert "| pairs | 2 | 3 | 90.0 |" in "\n".join(few.tuning_markdown(tuning_rows(best=5)))


def test_recall_is_the_share_of_the_real_places_that_are_covered():
    real = Counter(a=2, b=1, c=1), 4
    assert few.overlap(real, real) == 1
    assert few.overlap((Counter(a=4), 4), real) == 0.5  # only the place of half the real clips
    assert few.overlap((Counter(a=1, b=1, c=1), 4), real) == 0.75  # one clip shows nothing
    assert few.overlap((Counter(), 4), real) == 0


def test_selected_pairs_keep_the_noise_of_their_samples_and_real_clips_cover_themselves(
    shapes, tmp_path, monkeypatch
):
    clips, labels, classes = read_clips(shapes, "all", 12, frames=16, stream="recall")
    labels[3] = (labels[3] + 1) % 12  # another direction
    clips[7] = 0
    source = SOURCE | dict.fromkeys(("checkpoint", "weak_sha256", "method", "num_steps", "vae"))
    source |= {"seed": 1000, "window": 16, "num_frames": 16, "image_size": 16}
    folder = write_samples(tmp_path / "s", clips, labels, classes, source=source)
    few.select_right(folder, tmp_path / "right")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", no_space)
        few.select_right(folder, tmp_path / "cut")
    assert not (tmp_path / "cut/samples.json").exists()  # which marks a complete folder
    pairs = Pairs(tmp_path / "right").pairs
    rows = [row for row in range(12) if row not in (3, 7)]
    assert list(pairs.values()) == [(1000, row, 16) for row in rows]
    covered = few.recall(folder, shapes, 12)
    # the black clip does not count, so a place of the others may have a larger share
    assert 11 / 12 <= covered < 1


def test_a_miniature_of_the_study_trains_tunes_and_measures_students(
    commands,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    for name, value in {
        "FRAMES": (16,),
        "COUNTS": (2, few.MAIN, few.USUAL),
        "GIVEN_COUNTS": (few.MAIN,),
        "CONFIGURATIONS": few.CONFIGURATIONS[:1],
        "is_right": lambda clip, name: name.endswith("Left"),
    }.items():
        monkeypatch.setattr(few, name, value)
    monkeypatch.setattr(few.disturb, "AGAIN", 2)
    run_miniature(few, tmp_path, "--tune", "--arms", "pairs")
    commands.clear()
    run_miniature(few, tmp_path, "--arms", "accepted pairs", *SEED)
    rows = {row["arm"]: row for row in read_json(tmp_path / "few.json")}
    assert rows.keys() == {"teacher", "accepted pairs"}
    values = rows["accepted pairs"]["values"]
    assert values[few.task_of(16, few.MAIN)].keys() > {"both_accuracy", "recall", "rmse"}
    assert values[few.disturb.LEFT].keys() == {"both_accuracy"}
    assert values[""]["cost"] > 0
    (ckpt,) = tmp_path.glob("runs/accepted-pairs-0*/*/checkpoints/latest.pt")
    state = torch.load(ckpt, weights_only=True)
    (teacher,) = tmp_path.glob("runs/teacher-0*/pairs/samples.json")
    assert state["config"]["training"]["teacher"] == {
        name: read_json(teacher)["source"][name] for name in OF_TEACHER
    }
    commands.clear()
    run_miniature(few, tmp_path, "--arms", "accepted pairs", *SEED)
    assert not commands

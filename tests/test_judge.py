"""The judge of the classes of clips: what it learns, on which videos, and what it reports."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import judge
from tiny_data import write_npz
from tiny_videos import write_ucf_list
from training import run_main
from video.writers import write_mp4

CLASSES, PEOPLE, FRAMES, WINDOW = ["Left", "Right"], 3, 19, 4
ARGS = Namespace(window=WINDOW, interval=1, flip=False, steps=25, seed=0)


def bar(class_name, number, num_frames=FRAMES):
    """uint8 (num_frames, 32, 32, 3): a bar that moves left or right, of the grey and the start of this number."""
    step = -2 if class_name == "Left" else 2
    place = (np.arange(32) - step * np.arange(num_frames)[:, None] - 5 * number) % 32 < 6  # (T, W)
    frames = np.where(place, 160 + 15 * (number % 6), 30).astype(np.uint8)
    return np.broadcast_to(frames[:, None, :, None], (num_frames, 32, 32, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos of three people; person3 is held out."""
    root = tmp_path_factory.mktemp("data") / "bars"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for person in range(1, PEOPLE + 1):
            write_mp4(root / name / f"person{person}.mp4", bar(name, person), 25)
    write_ucf_list(root, [f"{name}/person{person}" for name in CLASSES for person in (1, 2)])
    return root


def make_samples(folder, classes=CLASSES, labels=(0, 1, 0, 1), num_frames=WINDOW, size=32, time_scale=1 / 25):
    """Samples that show their class, but for the last, which moves left."""
    shown = [CLASSES[max(label, 0) % 2] for label in labels[:-1]] + ["Left"]
    clips = np.stack([bar(name, number, num_frames)[:, :size, :size] for number, name in enumerate(shown)])
    folder.mkdir()
    write_npz(folder / "samples.npz", clips, list(labels))
    (folder / "samples.json").write_text(json.dumps({"classes": classes, "time_scale": time_scale}))
    return folder


def spy_on_training(monkeypatch):
    """[(name of a judge, its training clips)], filled by `train`, which trains as it did."""
    calls, train = [], judge.train

    def spy(clips, num_classes, args, name):
        calls.append((name, clips))
        return train(clips, num_classes, args, name)

    monkeypatch.setattr(judge, "train", spy)
    return calls


# ----------------------------------------------------------------------------------------------------------------------
# The judge


@pytest.mark.parametrize(("length", "window", "interval", "count"), [(16, 16, 1, 1), (17, 16, 1, 2), (48, 16, 1, 5),
                                                                      (48, 16, 2, 3), (7, 4, 2, 1)])  # fmt: skip
def test_windows_cover_a_clip_and_share_half_of_their_time(length, window, interval, count):
    clip = torch.arange(length).view(-1, 1, 1).expand(-1, 2, 2)
    found = judge.windows_of(clip, window, interval)[..., 0, 0]
    assert found.shape == (count, window)
    assert (found.diff(dim=1) == interval).all()
    assert found[0, 0] == 0 and found[-1, -1] == length - 1
    assert (found[:, 0].diff() <= (window * interval + 1) // 2).all()


def test_a_group_is_judged_by_one_that_was_trained_on_none_of_its_clips(monkeypatch):
    clips = [(torch.full((WINDOW, 32, 32), 10 * group + label).byte(), label) for group in range(4) for label in (0, 1)]
    groups = [f"person{clip[0, 0, 0] // 10}" for clip, _ in clips]
    calls = spy_on_training(monkeypatch)
    judge.leave_one_out(clips, groups, 2, Namespace(**vars(ARGS) | {"steps": 1}))
    assert [name for name, _ in calls] == [f"without person{group}" for group in range(4)]
    for group, (_, used) in enumerate(calls):
        levels = sorted(clip[0, 0, 0].item() for clip, _ in used)
        assert levels == [10 * other + label for other in range(4) if other != group for label in (0, 1)]


def test_a_judge_learns_classes_and_nothing_from_shuffled_labels():
    numbers, names = range(20), [name for name in CLASSES for _ in range(20)]
    clips = [judge.look(bar(name, number), 32) for name in CLASSES for number in numbers]
    groups, true = [f"person{number % 2}" for _ in CLASSES for number in numbers], [*map(CLASSES.index, names)]
    shuffled = torch.randint(2, (len(true),), generator=torch.Generator().manual_seed(0)).tolist()
    for labels, is_chance in ((true, False), (shuffled, True)):
        logits = judge.leave_one_out(list(zip(clips, labels, strict=True)), groups, 2, ARGS)
        found = judge.summarize(logits, labels, CLASSES)
        low, high = found["interval95"]
        assert low < 0.5 < high if is_chance else found["share"] > 0.95


def test_training_windows_are_of_their_class_as_often_as_others_and_mirrored_only_with_flip():
    left, right = (judge.look(bar(name, 1), 32) for name in CLASSES)
    of_class = {0: [left], 1: [right, right, right]}

    def motions(flip):
        """(labels, how far the bar moves to the right from frame to frame)."""
        args, rows = Namespace(**vars(ARGS) | {"flip": flip}), []
        for step in range(20):
            x, y = judge.random_windows(of_class, args, torch.Generator().manual_seed(step))
            rows += zip(y.tolist(), x.mean(dim=2), strict=True)  # windows as (T, W)
        shifts = range(-4, 5)
        gaps = [[(row[0].roll(shift) - row[1]).abs().mean() for shift in shifts] for _, row in rows]
        return np.array([label for label, _ in rows]), np.array([shifts[np.argmin(gap)] for gap in gaps])

    labels, moved = motions(flip=False)
    assert 0.4 < labels.mean() < 0.6
    agree = np.sign(moved) == np.where(labels, 1, -1)
    assert agree.mean() > 0.9
    labels, moved = motions(flip=True)
    assert 0.35 < (np.sign(moved) == np.where(labels, 1, -1)).mean() < 0.65


# ----------------------------------------------------------------------------------------------------------------------
# What it reports


def test_shares_intervals_and_confusion_are_those_of_the_clips():
    wins = {0: [3.0, 0.0, 0.0], 1: [0.0, 2.0, 0.0], 2: [0.0, 0.0, 1.0]}
    windows = [[0, 0], [0, 1], [1, 1], [1, 2, 2]]  # which class each window of four clips is for
    logits = [torch.tensor([wins[one] for one in own]) for own in windows]
    found = judge.summarize(logits, [0, 1, 1, 2], ["a", "b", "c"])
    assert found["judged"] == [0, 0, 1, 1]  # by mean logits: the last has 2/3 against 2/3, the first of equals
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert (found["right"], found["clips"], found["share"]) == (2, 4, 0.5)
    assert found["windows"]["count"] == 9
    assert found["windows"]["share"] == pytest.approx((1 + 0.5 + 1 + 2 / 3) / 4)
    assert found["per_class"]["b"]["share"] == 0.5 and found["per_class"]["c"]["right"] == 0
    for part in (found, *found["per_class"].values()):
        for end in part["interval95"]:  # by its definition: the share is 1.96 standard errors from each end
            error = 1.96 * (end * (1 - end) / part["clips"]) ** 0.5
            assert abs(part["share"] - end) == pytest.approx(error, abs=1e-9)
    low, high = found["windows"]["interval95"]
    assert 0.5 <= low < found["windows"]["share"] < high <= 1
    empty = judge.summarize(logits[:1], [0], ["a", "b", "c"])["per_class"]["b"]
    assert empty == {"clips": 0, "right": 0, "share": None, "interval95": None}


def test_samples_that_stop_for_a_window_are_those_that_move_less_than_real_clips():
    real = [(judge.look(bar(name, number), 32), label) for label, name in enumerate(CLASSES) for number in range(3)]
    slow = [(torch.zeros(FRAMES, 32, 32).byte(), 2)]  # a class that stands still: nothing moves less
    moves, length = judge.look(bar("Left", 4), 32), 3 * WINDOW
    stops = torch.cat([moves[:WINDOW], moves[WINDOW : WINDOW + 1].expand(length - WINDOW, -1, -1)])
    flickers = moves[:1].expand(length, -1, -1) + 30 * (torch.arange(length) % 2).byte().view(-1, 1, 1)
    clips = [moves[:length], stops, flickers, 255 - moves[:length], flickers]
    assert judge.find_still(clips, [0, 0, 1, 1, 2], real + slow, WINDOW, 1) == [1, 2]
    assert judge.find_still([moves[:WINDOW]], [0], real, WINDOW, 3) == [0]  # real windows of three times as long


def test_samples_are_judged_by_one_that_only_the_training_split_has_trained(data, tmp_path, monkeypatch, capsys):
    calls = spy_on_training(monkeypatch)
    short, long = make_samples(tmp_path / "short"), make_samples(tmp_path / "long", ["Right", "Left"], num_frames=9)
    flags = ["--data-path", data, "--samples", short, long, "--window", WINDOW, "--no-flip", "--steps", 40]
    run_main(judge, *flags, "--out", tmp_path / "new/j.json")
    found = json.loads((tmp_path / "new/j.json").read_text())
    assert [len(clips) for _, clips in calls] == [4, 4, 4, 4] and calls[3][0] == "of the training split"
    brightest = [max(clip.max() for clip, _ in clips) for _, clips in calls]  # person3 is
    assert brightest[2] == brightest[3] < min(brightest[:2])
    assert found["values"] == {
        "accuracy": 1, "window_accuracy": 1, f"asked_class {short}": 0.75, f"asked_class {long}": 0.25
    }  # fmt: skip
    assert found["result"]["samples"][str(short)]["confusion"] == [[2, 0], [1, 1]]
    assert found["result"]["samples"][str(long)]["confusion"] == [[1, 1], [2, 0]]  # asked: its own order of classes
    assert found["result"]["samples"][str(long)]["windows"]["count"] == 4 * 4
    assert found["real"]["groups"] == ["person1", "person2", "person3"] and found["real"]["num_training"] == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "6 of 6, 100.0% (61.0% to 100.0%)" in lines[0] and "3 of 4, 75.0%" in lines[2]
    assert lines[3] == f"{short}, that move less than any real clip of their class: 0"


def test_real_windows_are_spaced_as_the_samples_and_a_command_gives_one_result(data, tmp_path):
    folder, found = make_samples(tmp_path / "s", time_scale=3 / 25), []
    flags = ["--data-path", data, "--samples", folder, "--window", WINDOW, "--steps", 2, "--out", tmp_path / "j.json"]
    for _ in range(2):
        run_main(judge, *flags)
        found.append(json.loads((tmp_path / "j.json").read_text()))
    assert found[0]["real"]["frame_interval"] == 3
    assert found[0]["result"]["real"]["windows"]["count"] == 6 * 3  # of 10 frames, (4 - 1) * 3 + 1, in videos of 19
    assert found[0] == found[1]


def test_the_weights_of_a_judge_are_a_function_of_the_seed_its_name_and_its_clips():
    clips = [(judge.look(bar(name, 0), 32), label) for label, name in enumerate(CLASSES)]
    args = Namespace(**vars(ARGS) | {"steps": 2})

    def weights(name, **changes):
        torch.rand(1)  # of a generator that a judge must not depend on
        own = judge.train(clips, 2, Namespace(**vars(args) | changes), name)
        return torch.nn.utils.parameters_to_vector(own.parameters())

    first = weights("a")
    assert torch.equal(first, weights("a"))
    assert not torch.equal(first, weights("b")) and not torch.equal(first, weights("a", seed=1))


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"classes": ["Left", "Up"]}, "has class Up, --data-path has Left, Right: name the data set of its training"),
        ({"labels": (0, -1)}, "some without a class"),
        ({"num_frames": 3}, "clips of 3 frames, --window is 4"),
        ({"size": 16}, "clips of 16 px at 25 fps, those of {other} have 32 px at 25 fps"),
        ({"time_scale": 0.08}, "clips of 32 px at 12.5 fps"),
        (None, "no such folder"),
    ],
)
def test_samples_that_do_not_fit_are_refused_in_one_line(change, line, data, tmp_path, capsys):
    other, bad = make_samples(tmp_path / "good"), tmp_path / "bad"
    if change is not None:
        make_samples(bad, **change)
    failure(capsys, data, "--samples", other, bad, line=f"--samples {bad}: ", also=line.format(other=other))


def failure(capsys, data, *flags, line, also):
    run_main(judge, "--data-path", data, "--out", data.parent / "x.json", "--window", WINDOW, *flags, status=2)
    (found,) = [text for text in capsys.readouterr().err.splitlines() if "opening videos" not in text]
    assert found.startswith(f"judge.py: error: {line}") and also in found
    assert not (data.parent / "x.json").exists()


def test_data_that_can_not_be_judged_is_refused_in_one_line(data, tmp_path, capsys):
    failure(capsys, tmp_path / "no", line=f"--data-path {tmp_path}/no: no such folder", also="")
    root = tmp_path / "few"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        (root / name / "person1.mp4").write_bytes((data / name / "person1.mp4").read_bytes())
    found = "2 classes, of Left videos of 1 groups (file stems), wanted at least 2 of both"
    failure(capsys, root, line=f"--data-path {root}: {found}", also="")
    (root / "Left/person2.mp4").write_bytes((data / "Left/person2.mp4").read_bytes())
    failure(capsys, root, line=f"--data-path {root}: 2 classes, of Right videos of 1 groups", also="")
    failure(capsys, data, "--window", FRAMES + 1, line=f"--data-path {data}: ", also="of Left videos of 0 groups")
    failure(capsys, data, "--out", tmp_path, line=f"--out {tmp_path}: a folder", also="")
    (root / "Right/person2.mp4").write_bytes((data / "Right/person2.mp4").read_bytes())
    write_ucf_list(root, ["Left/person1"])
    samples = make_samples(tmp_path / "s")
    failure(capsys, root, "--samples", samples, line=f"--data-path {root}: no video of class Right in the", also="")

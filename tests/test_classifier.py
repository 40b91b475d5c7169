"""The classifier of clips: what it learns from which videos, and what it reports."""

import shutil

import numpy as np
import pytest
import torch

from sample_folders import refused, run, write_samples
from scoring import classifier
from tiny_videos import write_ucf_list
from video.files import UnreadableError, read_frames
from video.writers import write_mp4

CLASSES, PEOPLE, FRAMES, WINDOW = ["Down", "Up"], 3, 19, 4
SETTINGS = {"num_classes": 2, "window": WINDOW, "interval": 1, "steps": 25, "seed": 0}


def bar(class_name, number, num_frames=FRAMES):
    """uint8 (num_frames, 32, 32, 3): a bar that moves down or up; number sets its gray level and start."""
    step = -2 if class_name == "Up" else 2
    place = (np.arange(32) - step * np.arange(num_frames)[:, None] - 5 * number) % 32 < 6  # (T, H)
    frames = np.where(place, 160 + 15 * (number % 6), 30).astype(np.uint8)
    return np.broadcast_to(frames[:, :, None, None], (num_frames, 32, 32, 3))


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


def make_samples(folder, classes=CLASSES, labels=(0, 1, 0, 1), num_frames=WINDOW, **about):
    """Samples that show their class, except the last one, which moves down."""
    shown = [classes[label] for label in labels[:-1]] + ["Down"]
    clips = np.stack([bar(name, number, num_frames) for number, name in enumerate(shown)])
    return write_samples(folder, clips, list(labels), classes, **about)


@pytest.mark.parametrize(("length", "window", "interval", "count"), [(16, 16, 1, 1), (17, 16, 1, 2), (48, 16, 1, 5),
                                                                      (48, 16, 2, 3), (7, 4, 2, 1)])  # fmt: skip
def test_windows_cover_a_clip_and_overlap_by_half(length, window, interval, count):
    clip = torch.arange(length).view(-1, 1, 1).expand(-1, 2, 2)
    found = classifier.windows_of(clip, window, interval)[..., 0, 0]
    assert found.shape == (count, window)
    assert (found.diff(dim=1) == interval).all()
    assert found[0, 0] == 0 and found[-1, -1] == length - 1
    assert (found[:, 0].diff() <= (window * interval + 1) // 2).all()


def test_the_classifier_learns_classes_but_nothing_from_shuffled_labels():
    numbers, true = range(20), [0] * 20 + [1] * 20
    clips = [classifier.prepare(bar(name, number), 32) for name in CLASSES for number in numbers]
    groups = [f"person{number % 2}" for _ in CLASSES for number in numbers]
    shuffled = torch.randint(2, (len(true),), generator=torch.Generator().manual_seed(0)).tolist()
    for labels, is_chance in ((true, False), (shuffled, True)):
        logits = classifier.leave_one_out([*zip(clips, labels, groups, strict=True)], SETTINGS)
        found = classifier.summarize(logits, labels, CLASSES)
        low, high = found["interval95"]
        assert low < 0.5 < high if is_chance else found["share"] > 0.95


def test_training_windows_balance_classes_and_half_are_mirrored():
    down, up = (classifier.prepare(bar(name, 1), 32) for name in CLASSES)
    down, up = down.transpose(1, 2), up.transpose(1, 2)  # to the right and to the left
    rows = []
    for step in range(20):
        random = torch.Generator().manual_seed(step)
        x, y = classifier.random_windows({0: [down], 1: [up, up, up]}, WINDOW, 1, random)
        rows += zip(y.tolist(), x.mean(dim=2), strict=True)  # windows as (T, W)
    labels, shifts = np.array([label for label, _ in rows]), range(-4, 5)
    gaps = [[(row[0].roll(shift) - row[1]).abs().mean() for shift in shifts] for _, row in rows]
    moved = np.sign([shifts[np.argmin(gap)] for gap in gaps])
    assert 0.4 < labels.mean() < 0.6 and 0.35 < (moved == np.where(labels, -1, 1)).mean() < 0.65
    assert (moved != 0).mean() > 0.95


def test_accuracy_intervals_and_confusion_equal_their_definitions():
    wins = {0: [3.0, 0.0, 0.0], 1: [0.0, 2.0, 0.0], 2: [0.0, 0.0, 1.0]}
    windows = [[0, 0], [0, 1], [1, 1], [1, 2, 2]]  # which class each window of four clips is for
    logits = [torch.tensor([wins[one] for one in own]) for own in windows]
    found = classifier.summarize(logits, [0, 1, 1, 2], ["a", "b", "c"])
    assert found["found"] == [0, 0, 1, 1]  # by mean logits: the last has 2/3 against 2/3, the first of equals
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert (found["right"], found["clips"], found["share"]) == (2, 4, 0.5)
    assert found["windows"]["count"] == 9
    assert found["windows"]["share"] == pytest.approx((1 + 0.5 + 1 + 2 / 3) / 4)
    low, high = found["windows"]["interval95"]
    assert 0.5 <= low < found["windows"]["share"] < high <= 1


def test_samples_that_move_less_than_real_clips_are_static():
    real = [classifier.prepare(bar(name, number), 32) for name in CLASSES for number in range(3)]
    real.append(torch.zeros(FRAMES, 32, 32).byte())  # a static class: nothing moves less
    real = [*zip(real, [0] * 3 + [1] * 3 + [2], strict=True)]
    moves, length = classifier.prepare(bar("Down", 4), 32), 3 * WINDOW
    stops = torch.cat([moves[:WINDOW], moves[WINDOW : WINDOW + 1].expand(length - WINDOW, -1, -1)])
    flickers = moves[:1].expand(length, -1, -1) + 30 * (torch.arange(length) % 2).byte().view(-1, 1, 1)
    clips = [moves[:length], stops, flickers, 255 - moves[:length], flickers]
    assert classifier.find_static(clips, [0, 0, 1, 1, 2], real, WINDOW, 1) == [1, 2]
    assert classifier.find_static([moves[:WINDOW]], [0], real, WINDOW, 3) == [0]  # real ones: three times as long


def test_evaluate_trains_the_classifier_only_on_the_training_split(data, tmp_path, monkeypatch, capsys):
    calls, train = [], classifier.train

    def spy(rows, name, **settings):
        calls.append((name, len(rows), max(clip.max() for clip, _ in rows)))
        return train(rows, name, **settings)

    monkeypatch.setattr(classifier, "train", spy)
    samples = make_samples(tmp_path / "s", ["Up", "Down"], [1, 0, 1, 0])  # their own order of classes
    flags = ["--metric", "classifier", "--data-path", data, "--classifier-steps", 40, "--samples", samples]
    made = run(tmp_path / "new/c.json", *flags)
    names, counts, brightest = zip(*calls, strict=True)
    assert names == (*(f"without person{number}" for number in (1, 2, 3)), "of the training split")
    assert counts == (4, 4, 4, 4)
    assert brightest[2] == brightest[3] < min(brightest[:2])  # person3 is brightest, and the last two did not see it
    assert made["protocol"] == "classifier4_4f"
    assert made["values"] == {"accuracy": 1, "window_accuracy": 1, "asked_class": 0.75}
    assert made["result"]["samples"]["confusion"] == [[2, 0], [1, 1]] and made["result"]["samples"]["static"] == []
    assert made["result"]["groups"] == ["person1", "person2", "person3"] and made["result"]["num_training"] == 4
    assert "correctly: 6 of 6, 100.0% (61.0% to 100.0%)" in (said := capsys.readouterr().out)
    assert "3 of 4, 75.0%" in said and "static samples, which move less than any real clip of their class: 0" in said


def test_real_windows_have_the_frame_interval_of_samples_and_repeat_bit_for_bit(data, tmp_path, monkeypatch):
    samples, weights, forward = make_samples(tmp_path / "s", time_scale=3 / 25), [], classifier.Classifier.forward

    def spy(network, x):
        weights.append(sum(parameter.double().sum().item() for parameter in network.parameters()))
        return forward(network, x)

    monkeypatch.setattr(classifier.Classifier, "forward", spy)
    flags = ["--metric", "classifier", "--data-path", data, "--samples", samples, "--classifier-steps", 2]
    made = run(tmp_path / "c.json", *flags)
    assert made["real"]["frame_interval"] == 3
    assert made["result"]["real"]["windows"]["count"] == 6 * 3  # of 10 frames, (4 - 1) * 3 + 1, in videos of 19
    torch.rand(1)  # networks must not depend on this generator
    again = run(tmp_path / "d.json", "--manifest", tmp_path / "c.json")
    assert again["repeats"]["bit_equal"] and again["result"] == made["result"]
    run(tmp_path / "e.json", *flags, "--seed", 1)
    assert len(set(weights)) == 2 * 4 * 3  # two seeds, four networks, three of their states


def test_corrupt_videos_are_skipped_unless_too_few_remain(data, tmp_path, monkeypatch, capsys):
    corrupt = ["Up/person3.mp4"]

    def read(root, video, frames):
        if video.path in corrupt:
            raise UnreadableError(video.path)
        return read_frames(root, video, frames)

    monkeypatch.setattr(classifier, "read_frames", read)
    flags = ["--metric", "classifier", "--data-path", data, "--classifier-steps", 2]
    flags += ["--samples", make_samples(tmp_path / "s")]
    made = run(tmp_path / "c.json", *flags)
    assert made["real"]["bad_videos"] == corrupt and made["result"]["real"]["clips"] == 5
    assert "Up/person3.mp4 can't be decoded; it is skipped" in capsys.readouterr().out
    corrupt.append("Up/person1.mp4")
    refused(capsys, tmp_path / "d.json", *flags, words=["1 group (file stems) in Up"], status=1)


BAD = {
    "other classes": ({"classes": ["Down", "Left"]}, ["has class Left, --data-path", "Down, Up; pass the data set"]),
    "no class": ({"labels": (0, -1)}, ["has samples without a class"]),
    "one person": ({}, ["2 classes, 1 group (file stems) in Down; expected at least 2 of both"]),
    "nothing to train on": ({}, ["no training video of class Up"]),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_do_not_fit_the_samples_are_refused(case, data, tmp_path, capsys):
    about, words = BAD[case]
    if people := {"one person": ["person1"], "nothing to train on": ["person1", "person2"]}.get(case):
        others = {f"person{number}.mp4" for number in (1, 2, 3)} - {f"{person}.mp4" for person in people}
        data = shutil.copytree(data, tmp_path / "few", ignore=shutil.ignore_patterns("ucf*", *others))
    if case == "nothing to train on":
        write_ucf_list(data, ["Down/person1"])
    flags = ["--metric", "classifier", "--samples", make_samples(tmp_path / "s", **about), "--data-path", data]
    refused(capsys, tmp_path / "x.json", *flags, words=words)
    assert not (tmp_path / "x.json").exists()

"""The classifier of clips: what it learns from which videos, and what it reports."""

import math
import re

import numpy as np
import pytest
import torch

from sample_folders import refused, run, write_samples
from scoring import classifier
from scoring.sources import find_real
from scoring.stats import wilson
from tiny_videos import write_ucf_list
from training import record_calls
from video.files import UnreadableError
from video.source import Files
from video.writers import write_mp4

CLASSES = ["Down", "Up"]
FRAMES = 19
WINDOW = 4
SETTINGS = {"num_classes": 2, "steps": 25, "seed": 0, "recipe": classifier.RECIPES["groups"]}


def bar(class_name, number, num_frames=FRAMES):
    """uint8 (num_frames, 32, 32, 3): a bar that moves down or up; number sets its gray level and
    start.
    """
    step = -2 if class_name == "Up" else 2
    place = (np.arange(32) - step * np.arange(num_frames)[:, None] - 5 * number) % 32 < 6  # (T, H)
    frames = np.where(place, 160 + 15 * (number % 6), 30).astype(np.uint8)
    return np.broadcast_to(frames[:, :, None, None], (num_frames, 32, 32, 3))


def write_people(root, people, trained, draw=bar):
    """Write a video of each class and person. The first people train. Returns root."""
    keys = []
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for person in range(1, people + 1):
            write_mp4(root / name / f"person{person}.mp4", draw(name, person), 25)
        keys += [f"{name}/person{person}" for person in range(1, trained + 1)]
    write_ucf_list(root, keys)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos of three people; person3 is held out."""
    return write_people(tmp_path_factory.mktemp("data") / "bars", people=3, trained=2)


def every_window(clip, interval=1):
    return classifier.every_window(clip, WINDOW, interval)


def prepared(class_name, number):
    """A bar as the network gets it: (FRAMES, 32, 32)."""
    return classifier.prepare(torch.tensor(bar(class_name, number)).permute(0, 3, 1, 2))


FLAGS = ["--metric", "classifier", "--data-path"]


def make_samples(folder, classes=CLASSES, labels=(0, 1, 0, 1), **about):
    """Samples that show their class, except the last one, which moves down."""
    shown = [classes[label] for label in labels[:-1]] + ["Down"]
    clips = np.stack([bar(name, number, WINDOW) for number, name in enumerate(shown)])
    return write_samples(folder, clips, labels, classes, **about)


@pytest.mark.parametrize(
    ("length", "window", "interval", "count"),
    [(17, 16, 1, 2), (48, 16, 2, 3)],
)
def test_windows_cover_a_clip_and_overlap_by_half(length, window, interval, count):
    clip = torch.arange(length).view(-1, 1, 1).expand(-1, 2, 2)
    every = classifier.every_window(clip, window, interval)
    found = classifier.windows_of(every, (window - 1) * interval + 1)[..., 0, 0]
    assert found.shape == (count, window)
    assert (found.diff(dim=1) == interval).all()
    assert found[0, 0] == 0 and found[-1, -1] == length - 1
    assert (found[:, 0].diff() <= (window * interval + 1) // 2).all()


def test_the_classifier_learns_classes_but_nothing_from_shuffled_labels():
    true = [0] * 20 + [1] * 20
    clips = [every_window(prepared(name, number)) for name in CLASSES for number in range(20)]
    groups = ["person0", "person1"] * 20

    def summarize(labels):
        real = [*map(classifier.Real, clips, labels, groups, groups)]
        logits = classifier.leave_one_out(real, WINDOW, SETTINGS)
        return classifier.summarize(logits, labels)

    assert summarize(true)["share"] > 0.95
    shuffled = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    low, high = summarize(shuffled)["interval95"]
    assert low < 0.5 < high


def test_training_windows_balance_classes_and_half_are_mirrored():
    # to the right and to the left
    down, up = (every_window(prepared(name, 1).transpose(1, 2)) for name in CLASSES)
    rows = []
    for step in range(20):
        random = torch.Generator().manual_seed(step)
        x, y = classifier.random_windows({0: [down], 1: [up, up, up]}, random, 16)
        x = classifier.change(x, classifier.RECIPES["groups"], random)
        rows += zip(y.tolist(), x.mean(dim=2), strict=True)  # windows as (T, W)
    labels = np.array([label for label, _ in rows])
    shifts = range(-4, 5)
    gaps = [[(row[0].roll(shift) - row[1]).abs().mean() for shift in shifts] for _, row in rows]
    moved = np.sign([shifts[np.argmin(gap)] for gap in gaps])
    assert 0.4 < labels.mean() < 0.6 and 0.35 < (moved == np.where(labels, -1, 1)).mean() < 0.65
    assert (moved != 0).mean() > 0.95


def test_accuracy_intervals_and_confusion_equal_their_definitions():
    wins = {0: [3.0, 0.0, 0.0], 1: [0.0, 2.0, 0.0], 2: [0.0, 0.0, 1.0]}
    windows = [[0, 0], [0, 1], [1, 1], [1, 2, 2]]  # which class each window of four clips is for
    logits = [torch.tensor([wins[one] for one in own]) for own in windows]
    found = classifier.summarize(logits, [0, 1, 1, 2])
    # by mean logits: the last has 2/3 against 2/3, the first of equals
    assert found["found"] == [0, 0, 1, 1]
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert (found["right"], found["clips"], found["share"]) == (2, 4, 0.5)
    assert found["windows"]["count"] == 9
    assert found["windows"]["share"] == pytest.approx((1 + 0.5 + 1 + 2 / 3) / 4)
    assert found["interval95"] == wilson(2, 4)
    assert found["windows"]["interval95"] == pytest.approx(wilson(1 + 0.5 + 1 + 2 / 3, 4))
    people = ["a/person1.mkv", "b/person1.mkv", "b/person2.mkv", "c/person2.mkv"]
    clustered = classifier.summarize(logits, [0, 1, 1, 2], people)
    assert clustered["share"] == 0.5
    assert clustered["interval95"] is clustered["windows"]["interval95"] is None  # of two people
    many = [f"{name}/{person}.mkv" for person in range(10) for name in "ab"]
    clustered = classifier.summarize(logits * 5, [0, 1, 1, 2] * 5, many)
    assert clustered["interval95"] == pytest.approx(wilson(5, 10))


def test_inception_score_and_entropies_equal_their_closed_forms():
    sure = 1e4 * torch.eye(4)[:, None]  # one window per clip
    doubt = torch.zeros(3, 1, 4)
    log4 = math.log(4)
    likely = torch.eye(4)[:, None] * math.log(7)  # 0.7 for one class, 0.1 for each other
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.1)
    for logits, values in (
        (sure, (4, 0, log4)),
        (sure[:1].repeat(5, 1, 1), (1, 0, 0)),
        (doubt, (1, log4, log4)),
        (likely, (4 * math.exp(-entropy), entropy, log4)),
    ):
        found = classifier.sharpness([*logits])
        assert [*found.values()] == pytest.approx(values, abs=1e-6)
    random = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    p = random.mean(dim=1).softmax(dim=1).numpy()
    divergences = (p * np.log(p / p.mean(axis=0))).sum(axis=1)  # KL(p(y|x) || p(y))
    naive = np.exp(divergences.mean())
    assert classifier.sharpness([*random])["IS"] == pytest.approx(naive, rel=1e-5)


def test_samples_that_move_less_than_real_clips_are_static():
    real = [prepared(name, number) for name in CLASSES for number in range(3)]
    real.append(torch.zeros(FRAMES, 32, 32).byte())  # a static class: nothing moves less

    def find_static(clips, asked, interval):
        windows = [every_window(clip, interval) for clip in real]
        labels = [0] * 3 + [1] * 3 + [2]
        rows = [*map(classifier.Real, windows, labels, labels, labels)]
        return classifier.find_static([*map(every_window, clips)], asked, rows)

    moves = prepared("Down", 4)
    length = 3 * WINDOW
    stops = moves[torch.arange(length).clamp(max=WINDOW)]
    flickers = moves[:1] + 30 * (torch.arange(length) % 2).byte()[:, None, None]
    clips = [moves[:length], stops, flickers, 255 - moves[:length], flickers]
    assert find_static(clips, [0, 0, 1, 1, 2], 1) == [1, 2]
    assert find_static([moves[:WINDOW]], [0], 3) == [0]  # real ones: three times as long


def test_evaluate_trains_the_classifier_only_on_the_training_split(
    data, tmp_path, monkeypatch, capsys
):
    def note(rows, name, **settings):
        return name, len(rows), max(one.windows.max() for one in rows)

    calls = record_calls(monkeypatch, classifier, "train", note)
    # their own order of classes
    samples = make_samples(tmp_path / "s", ["Up", "Down"], [1, 0, 1, 0])
    flags = [*FLAGS, data, "--classifier-steps", 40, "--samples", samples]
    made = run(tmp_path / "new/c.json", *flags)
    names, counts, brightest = zip(*calls, strict=True)
    assert names == (*(f"without person{number}" for number in (1, 2, 3)), "of the training split")
    assert counts == (4, 4, 4, 4)
    # person3 is brightest, and the last two did not see it
    assert brightest[2] == brightest[3] < min(brightest[:2])
    assert made["protocol"] == "classifier4_4f"
    assert made["values"] == {"accuracy": 1, "window_accuracy": 1, "asked_class": 0.75}
    result = made["result"]
    assert result["samples"]["confusion"] == [[2, 0], [1, 1]]
    assert result["samples"]["static"] == []
    assert result["groups"] == ["person1", "person2", "person3"] and result["num_training"] == 4
    said = capsys.readouterr().out
    assert re.search(r"3 groups held out once\) +0 +6 +1.0000\n  samples +1 +4 +0.7500 \(", said)
    missing = "no interval of shares: fewer than 10 groups of videos"
    assert f"over 3 groups of videos (real; {missing}), 4 clips (samples)" in said
    assert "static samples, which move less than any real clip of their class: 0" in said


def test_groups_are_units_of_videos(tmp_path):
    """Clips of one recording of UCF-101 and copies of a video are held out together."""
    (tmp_path / "Up").mkdir()
    for name in ("person1", "person1-copy2", "v_Up_g01_c01", "v_Up_g01_c02"):
        write_mp4(tmp_path / f"Up/{name}.mp4", bar("Up", 1), 25)
    clips, _, _ = find_real(tmp_path, "all", 0.05, WINDOW, 1 / 25, 32)
    groups = [one.group for one in classifier.read_real(clips, num_workers=0, corrupt=[])]
    assert groups == ["person1", "person1", "v_Up_g01", "v_Up_g01"]


def test_the_validation_split_tests_the_classifier_of_the_samples(tmp_path, monkeypatch, capsys):
    """The classes are mirror images. In one validation video and one sample, the bar moves the
    wrong way.
    """

    def sideways(class_name, number):
        """A bar that moves to the right (Down) or to the left (Up)."""
        shown = "Down" if (class_name, number) == ("Up", 8) else class_name
        return bar(shown, number).swapaxes(1, 2)

    def note(rows, name, **settings):
        return name, len(rows)

    root = write_people(tmp_path / "sides", people=8, trained=5, draw=sideways)
    calls = record_calls(monkeypatch, classifier, "train", note)
    clips = [sideways(name, 3)[start : start + WINDOW] for name in CLASSES for start in (0, 5)]
    # the last one moves up
    samples = write_samples(tmp_path / "s", np.stack(clips), [0, 0, 1, 0], CLASSES)
    flags = [*FLAGS, root, "--classifier-test", "val", "--classifier-steps", 150]
    made = run(tmp_path / "c.json", *flags, "--samples", samples, "--num-workers", 2)
    real = made["result"]["real"]
    found = made["result"]["samples"]
    assert calls == [("of the training split", 10)] and made["protocol"] == "classifier4_4f_val"
    assert real["clips"] == 6 and real["wrong"] == ["Up/person8.mp4"]
    assert made["values"]["accuracy"] == 5 / 6
    assert found["confusion"] == [[2, 1], [0, 1]] and made["values"]["asked_class"] == 0.75
    assert made["values"]["IS"] == pytest.approx(2, abs=0.1) and made["values"]["H(y|x)"] < 0.05
    assert made["values"]["H(y)"] == pytest.approx(math.log(2), abs=0.01)
    said = capsys.readouterr().out
    assert "note: below 99.9% on real clips" in said
    assert re.search(r"trained on 10 others\) +1 +6 +0.8333 .*\n  samples +1 +4 +0.7500 \(", said)


def test_real_windows_have_the_frame_interval_of_samples_and_repeat_bit_for_bit(
    data, tmp_path, monkeypatch
):
    def sum_of_weights(network, x):
        return sum(parameter.double().sum().item() for parameter in network.parameters())

    weights = record_calls(monkeypatch, classifier.Classifier, "forward", sum_of_weights)
    samples = make_samples(tmp_path / "s", time_scale=3 / 25)
    flags = [*FLAGS, data, "--samples", samples, "--classifier-steps", 2]
    made = run(tmp_path / "c.json", *flags)
    assert made["real"]["frame_interval"] == 3
    # of 10 frames, (4 - 1) * 3 + 1, in videos of 19
    assert made["result"]["real"]["windows"]["count"] == 6 * 3
    torch.rand(1)  # networks must not depend on this generator
    again = run(tmp_path / "d.json", *flags)
    assert again["values"] == made["values"] and again["result"] == made["result"]
    run(tmp_path / "e.json", *flags, "--seed", 1)
    assert len(set(weights)) == 2 * 4 * 3  # two seeds, four networks, three of their states


def test_corrupt_videos_are_skipped_unless_too_few_remain(data, tmp_path, monkeypatch, capsys):
    corrupt = ["Up/person3.mp4"]

    def decode(source, video):
        if video.path in corrupt:
            raise UnreadableError(video.path)

    record_calls(monkeypatch, Files, "decode", decode)
    flags = [*FLAGS, data, "--classifier-steps", 2, "--samples", make_samples(tmp_path / "s")]
    made = run(tmp_path / "c.json", *flags)
    assert made["real"]["bad_videos"] == corrupt and made["result"]["real"]["clips"] == 5
    assert "Up/person3.mp4 can't be decoded; it is skipped" in capsys.readouterr().out
    corrupt.append("Up/person1.mp4")
    refused(capsys, tmp_path / "d.json", *flags, words=["1 group in Up"], status=1)

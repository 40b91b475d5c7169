"""The census of a small world, in which layers hide each other as in Sprites: what is matched, decoded and valid."""

import json
import shutil
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from sample_folders import FEW, refused, run, write_samples
from scoring import census
from tiny_data import make_vae
from tiny_videos import write_ucf_list, write_video
from training import on_two_ranks
from video.writers import write_lossless

T, SIZE, VALUES = 8, 16, [[0, 1], [0, 1], [0, 1], [0, 1, 2]]
ORDER = {"Slash": (0, 1, 2, 3, 4, 5, 4, 0), "Walk": (7, 0, 1, 2, 3, 4, 5, 6)}
CHARACTERS, PLACES = [*product(*VALUES)], census.places_of([*ORDER], VALUES)
COLORS = np.random.default_rng(0).integers(60, 256, (4, 3, 3))  # attribute, value, RGB


def compose(name, who):
    """uint8 (T, SIZE, SIZE, 3): four layers of rectangles over black, at a place that tells the pose."""
    frames = np.zeros((T, SIZE, SIZE, 3), np.uint8)
    for frame, pose in zip(frames, ORDER[name], strict=True):
        top, left = (1, pose) if name == "Slash" else (pose // 2, 8 - pose)
        for a, (first, last, width) in enumerate([(1, 11, 6), (6, 10, 8), (3, 8, 7), (0, 4, 5 + who[3])]):
            frame[top + first : top + last, left + 1 : left + 1 + width] = COLORS[a, who[a]]
    frames[7, -1, -1] += 40 * (name == "Slash")  # a pixel that a VAE may lose
    return frames


TRUE = {key: compose([*ORDER][c], CHARACTERS[k]) for key, (c, k) in PLACES.items()}
WORLD = census.World([*ORDER], VALUES, torch.tensor(np.stack([*TRUE.values()])).unflatten(0, (2, -1)))
HELD_OUT = ["0102", "1010", "1101"]


class NoisyVAE:
    """Stands for a VAE: what it loses is noise that depends on the frame alone."""

    name, sha256, noise = "noisy", "b", 12

    def to(self, device):
        return self

    def encode(self, clips):
        return clips.double()

    def decode(self, latents):
        clips = latents.permute(0, 2, 3, 4, 1)
        for frame in clips.flatten(0, 1):
            seed = int(frame.flatten() @ torch.arange(1.0, frame.numel() + 1, dtype=torch.float64)) % 2**31
            frame += self.noise * torch.randn(frame.shape, generator=torch.Generator().manual_seed(seed))
        return clips.clamp(0, 255).round().byte()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The world as videos, split by character."""
    root = tmp_path_factory.mktemp("data") / "sprites"
    write_ucf_list(root, [key for key in TRUE if key[-4:] not in HELD_OUT])
    for key, clip in TRUE.items():
        (root / key).parent.mkdir(exist_ok=True)
        write_lossless(root / f"{key}.mkv", clip, 8)
    return root


def write(folder, clips, names, vae="noisy", **about):
    """A sample folder of clips that claim to show the classes `names`."""
    labels = [[*ORDER].index(name) for name in names]
    return write_samples(folder, np.stack(clips), labels, [*ORDER], 1 / 8, source={"vae": str(vae)}, **about)


def noisy(clip):
    return NoisyVAE().decode(torch.tensor(clip).permute(3, 0, 1, 2)[None].double())[0].numpy()


def compare(frame, best, other):
    """(position of a frame on the line from best to other, how much closer it is to other), None if those are equal."""
    delta, error = other - best, frame - best
    if (delta**2).mean() > 9:
        return (error * delta).sum() / (delta**2).sum(), (error**2).sum() - ((frame - other) ** 2).sum()
    return None


def naive(clip):
    """(key of the closest clip, smallest margins, values of each frame (T, 4), RMSE of each frame), step by step."""
    clip, true = clip.astype(float), {key: own.astype(float) for key, own in TRUE.items()}
    key = min(true, key=lambda other: ((clip - true[other]) ** 2).sum())
    who, attributes, poses, decoded = key[-4:], [], [], []
    choices = [(a, str(value)) for a in range(4) for value in VALUES[a] if str(value) != who[a]]
    for t in range(T):

        def changes(name, u, frame=clip[t]):
            changed = {(a, value): f"{name}/character{who[:a]}{value}{who[a + 1 :]}" for a, value in choices}
            found = {one: compare(frame, true[f"{name}/character{who}"][u], true[changed[one]][u]) for one in choices}
            return {one: pair for one, pair in found.items() if pair}

        every = {(name, u): compare(clip[t], true[key][t], true[f"{name}/character{who}"][u])
                 for name in ORDER for u in range(T)}  # fmt: skip
        every, here = {one: pair for one, pair in every.items() if pair}, changes(key.split("/")[0], t)
        gain, pose = max((pair[1], one) for one, pair in every.items())
        if gain > max(0, *(pair[1] for pair in here.values())):
            here = changes(*pose)
        poses += [1 - 2 * s for s, _ in every.values()]
        attributes += [1 - 2 * s for s, _ in here.values()]
        values = [max((s, value) for (other, value), (s, _) in here.items() if other == a) for a in range(4)]
        decoded.append([int(value if s >= 0.5 else own) for (s, value), own in zip(values, who, strict=True)])
    return key, [min(attributes), min(poses)], decoded, np.sqrt(((clip - true[key]) ** 2).mean(axis=(1, 2, 3)))


def test_clips_are_matched_and_decoded_as_step_by_step():
    random, keys = np.random.default_rng(0), list(TRUE)
    clips = [noisy(TRUE[key]) for key in keys[::7]]
    for one, other in pairwise(keys[::5]):  # frames and pixels of several clips, and plain noise
        clips.append(np.where(random.random((T, 1, 1, 1)) < 0.3, TRUE[one], TRUE[other]))
        clips.append(np.where(random.random((T, SIZE, SIZE, 1)) < 0.3, TRUE[one], TRUE[other]))
    clips.append(clips[0][[0, 2, 1, 3, 4, 5, 6, 7]])
    clips.append(random.integers(0, 256, (T, SIZE, SIZE, 3)).astype(np.uint8))
    found, expected = census.measure(WORLD, np.stack(clips), ""), [naive(clip) for clip in clips]
    for row, (key, margins, decoded, rmse) in enumerate(expected):
        assert tuple(found["place"][row]) == PLACES[key]
        assert found["margins"][row] == pytest.approx(margins, abs=1e-9)
        assert found["decoded"][row].tolist() == decoded and found["rmse"][row] == pytest.approx(rmse)
    assert {tuple(np.sign(row)) for row in found["margins"]} == {(1, 1), (1, -1), (-1, 1), (-1, -1)}


def test_samples_get_the_reason_that_they_fail_for(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(census, "load_vae", lambda typed, made, owner: NoisyVAE())
    clip, held_out = (noisy(TRUE[f"Walk/character{who}"]) for who in ("0101", "1101"))
    other_hair, other_body = (noisy(TRUE[f"Walk/character{who}"]) for who in ("0102", "1101"))
    switched, swapped, spot, both = (clip.copy() for _ in range(4))
    switched[3], swapped[[1, 2]], spot[5, 12:, :5] = other_hair[3], swapped[[2, 1]], 255
    both[4] = other_body[2]
    blended = np.rint(clip * 0.6 + other_hair * 0.4).astype(np.uint8)
    clips, names = [clip, held_out, held_out, switched, swapped, blended, spot, both], ["Walk", "Slash", *["Walk"] * 6]
    shown = ["0101", "1101", "1101", "0101", "0101", "0101", "0101", "0101"]
    given = [{"source": f"sprites/Walk/character{who}.mkv, clip {n}", "frames": "0-3"} for n, who in enumerate(shown)]
    given[0]["source"] = given[0]["source"].replace("0101", "0102")
    samples = write(tmp_path / "s", clips, names, given=given)
    flags = ["--metric", "census", "--samples", samples, "--data-path", data, "--num-real", 24]
    made = run(tmp_path / "c.json", *flags)
    result, values = made["result"], made["values"]
    assert made["protocol"] == "census8_real24_8f" and result["num_real"] == 6  # videos of the three held-out ones
    assert result["samples"]["reason"] == ["", "", "", "attribute", "pose", "margin", "rmse", "attribute"]
    assert result["samples"]["matched"] == [f"Walk/character{who}" for who in shown]
    assert result["samples"]["valid"] == [True] * 3 + [False] * 5 and values["valid"] == 3 / 8
    assert result["failures"] == {"attribute": 2, "pose": 1, "margin": 1, "rmse": 1}
    assert values["class_right"] == 7 / 8 and values["topwear"] == values["bottomwear"] == 1
    assert values["hair"] == 7 / 8 and values["body"] == 7 / 8
    assert values["true_attributes"] == 5 / 8 and values["true_clip"] == 4 / 8  # a clip with a spot still decodes
    assert values["held_out"] == 2 / 3 and values["held_out_expected"] == pytest.approx(3 / 24)
    assert values["characters"] == 2 and values["characters_expected"] == pytest.approx(24 * (1 - (23 / 24) ** 3))
    assert values["rmse_real"] == pytest.approx(values["rmse"], rel=0.5) and values["real_true"] == 1
    assert values["real_valid"] >= 5 / 6
    assert [values[name] for name in [*census.TITLES][-4:]] == [0] * 4
    limits, margins = result["limits"], result["samples"]["margin"]
    assert 0 < margins[5] < limits["margin"] < margins[0] and result["samples"]["worst_rmse"][6] > limits["rmse"]
    said = capsys.readouterr().out
    assert "not valid because of: attribute 2, pose 1, margin 1, rmse 1" in said
    why = "no interval of shares: fewer than 10"
    assert result["interval_units"] == {
        "samples": f"3 videos; {why} videos",
        "validation": f"3 groups of videos; {why} groups of videos",  # 6 clips of 3 characters
    }
    assert result["valid_interval95"] is result["real_valid_interval95"] is None


def test_one_and_two_ranks_and_a_moved_vae_give_the_same_values(data, tmp_path):
    vae = make_vae(tmp_path / "vae")
    samples = write(tmp_path / "s", [noisy(clip) for clip in [*TRUE.values()][:3]], ["Slash"] * 3, vae)
    made = run(tmp_path / "1.json", "--metric", "census", "--samples", samples, "--data-path", data, "--num-real", 4)
    assert made["values"]["held_out"] is None if made["values"]["valid"] == 0 else made["values"]["held_out"] >= 0
    assert "true_clip" not in made["values"] and made["values"]["rmse"] > 0 and made["real"]["vae_sha256"]
    vae.rename(tmp_path / "new")
    flags = ["--manifest", tmp_path / "1.json", "--vae", tmp_path / "new", *FEW[:2]]
    on_two_ranks("evaluate.py", "--out", tmp_path / "2.json", *flags)
    again = json.loads((tmp_path / "2.json").read_text())
    assert again["machine"]["ranks"] == 2 and again["repeats"]["bit_equal"]


SHORT = {"codec": "ffv1", "size": (SIZE, SIZE), "pixel_format": "bgr0"}
WALK = "Walk/character0101.mkv"
MISTAKES = {  # change of the data, change of samples.json, words of the message
    "a missing video": (lambda root: (root / WALK).unlink(), {}, ["0101 is missing", "prepare_sprites.py"]),
    "another name": (lambda root: (root / WALK).rename(root / "Walk/other.mkv"), {},
                     ["not the complete Sprites data set", "Walk/character0101 is missing"]),
    "one hair style": (lambda root: [path.unlink() for path in root.glob("*/*[12].mkv")], {}, ["one value each"]),
    "another length": (lambda root: write_video(root / WALK, 9, 8, **SHORT), {}, ["0101 has 9 frames of 16 x 16 px"]),
    "an unknown class": (None, {"classes": ["Slash", "Run"]}, ["has class Run", "has Slash, Walk"]),
    "pixels": (None, {"source": {"vae": "none"}}, ["--samples", "has no VAE (--vae none)"]),
    "no VAE in samples.json": (None, {"source": {}}, ["names no VAE"]),
    "a VAE that is gone": (None, {}, ["VAE gone: not found; pass its new path with --vae"]),
    "another VAE": (None, {"source": {"vae": "vae", "vae_sha256": "0" * 64}}, ["/vae: another VAE"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_what_census_cannot_score_is_refused(case, data, tmp_path, capsys, monkeypatch):
    change, about, words = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    if change:
        data = shutil.copytree(data, tmp_path / "data")
        change(data)
    if "vae_sha256" in about.get("source", ()):
        make_vae(tmp_path / "vae")
    samples = write(tmp_path / "s", [*TRUE.values()][:2], ["Slash"] * 2, "gone")
    content = json.loads((samples / "samples.json").read_text()) | about
    (samples / "samples.json").write_text(json.dumps(content))
    flags = ["--metric", "census", "--samples", samples, "--data-path", data]
    refused(capsys, tmp_path / "c.json", *flags, words=words)

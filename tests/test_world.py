"""The world of make_world.py: its rules, its files, and its scores against naive versions and
controls.
"""

import os
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest

import make_world
import world_rules
import world_truth
from runtime.untrusted import read_json
from sample_folders import SOURCE, refused, run, write_samples
from scoring.sources import find_real
from scoring.stats import psnr
from tiny_videos import decode
from training import content
from world_rules import ACTIONS, AGENT, GRASS, TREE, WATER

EPISODES, HELD_OUT, FRAMES = 3, 5, 40
SMALL = ["--episodes", EPISODES, "--held-out", HELD_OUT, "--frames", FRAMES, "--map-size", 16]
STEPS = {"stay": (0, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # y, x


def make(out, *flags):
    make_world.main(["--out", str(out), *map(str, [*SMALL, *flags])])
    with np.load(out / "world.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "world"
    return out, make(out)


@pytest.fixture(scope="module")
def held_out(made):
    """(the true tiles, the actions) of roll-outs of the held-out episodes, two each."""
    out, _ = made
    truth = world_truth.Truth(out)
    walks = np.load(out / "walks.npy")
    episodes = np.arange(EPISODES, EPISODES + HELD_OUT).repeat(2)
    real = truth.play(episodes, np.zeros(len(episodes), int), walks)
    return real, np.pad(walks, ((0, 0), (1, 0)))


def score(frames, real, actions, context=None):
    starts = [number // 2 for number in range(len(real))]
    return world_truth.summarize(frames, real, actions, starts=starts, context=context)


def noisy_world(seed=0, clips=3, frames=60):
    """(tiles, actions) of an agent in a world that often breaks the rules."""
    random = np.random.default_rng(seed)
    maps = random.choice([GRASS, WATER, TREE], size=(clips, 20, 20), p=[0.6, 0.2, 0.2])
    maps[:, 10, 10] = GRASS
    actions = random.integers(0, 5, (clips, frames))
    starts = np.full((clips, 2), 10)
    agents = np.full(clips, AGENT + 1)
    maps = np.pad(maps[:, 1:-1, 1:-1], ((0, 0), (1, 1), (1, 1)), constant_values=WATER)
    tiles = world_rules.views(maps, *world_rules.simulate(maps, starts, agents, actions))
    late = random.random((clips, frames - 1)) < 0.1
    tiles[:, 1:][late] = tiles[:, :-1][late]
    wrong = random.random(tiles.shape) < 0.03
    return np.where(wrong, random.integers(0, 7, tiles.shape), tiles), actions


# Rules and files ----------------------------------------------------------------------------------


def test_a_world_is_made_of_its_flags_alone_and_has_the_layout_of_ucf101(tmp_path, made):
    out, truth = made
    make(tmp_path / "again")
    assert content(tmp_path / "again") == content(out)
    other = make(tmp_path / "other", "--seed", 1)
    assert (other["maps"] != truth["maps"]).any(axis=(1, 2)).all()
    lists = [
        (out / f"ucfTrainTestlist/{name}list01.txt").read_text().split()
        for name in ("train", "test")
    ]
    files = [f"{name}.mkv" for name in truth["names"]]
    assert lists == [[word for file in files[:EPISODES] for word in (file, "1")], files[EPISODES:]]
    about = read_json(out / "actions.json")
    assert about == {"names": [*STEPS], "mirror": {"left": "right", "right": "left"}}
    for name, actions in zip(truth["names"], truth["actions"], strict=True):
        stored = np.load(out / f"{name}.actions.npy")
        assert stored.dtype == np.int64 and (stored == actions).all()


def test_videos_show_exactly_what_a_walk_on_the_map_sees(made):
    out, truth = made
    for number, name in enumerate(truth["names"]):
        frames, _ = decode(out / f"{name}.mkv")
        y, x = truth["positions"][number, 0].astype(int)
        agent = truth["agents"][number, 0]
        tiles = truth["maps"][number]
        for t, action in enumerate(truth["actions"][number]):
            if t and ACTIONS[action] != "stay":
                agent = AGENT + action
                dy, dx = STEPS[ACTIONS[action]]
                if tiles[y + dy, x + dx] == GRASS:
                    y += dy
                    x += dx
            for row, column in np.ndindex(5, 5):
                kind = tiles[y + row - 2, x + column - 2]
                if row == column == 2:
                    assert kind == GRASS
                    kind = agent
                shown = frames[t, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                assert (shown == world_rules.TEXTURES[kind]).all()


def test_walks_differ_and_use_all_actions_walls_and_ways(made, held_out):
    _, truth = made
    assert len({actions.tobytes() for actions in truth["actions"]}) == EPISODES + HELD_OUT
    real, actions = held_out
    assert (real[::2, 0] == real[1::2, 0]).all()
    assert (actions[::2] != actions[1::2]).any(axis=1).all()
    assert np.bincount(actions[:, 1:].ravel(), minlength=5).min() > 10
    moves = world_truth.expected_moves(real[:, :-1], actions[:, 1:])
    share = moves.any(axis=2).mean()
    assert 0.3 < share < 0.8


def test_mirrored_frames_with_mirrored_actions_obey_the_rules(held_out):
    real, actions = held_out
    numbers = [ACTIONS.index(world_rules.MIRROR.get(name, name)) for name in ACTIONS]
    frames = world_rules.draw(real)[:, :, :, ::-1]
    tiles, margins = world_truth.decode(frames)
    assert margins.min() == 1
    measured = world_truth.measure_transitions(tiles, np.array(numbers)[actions])
    assert all(np.nanmin(values) == 1 for values in measured.values())


# Scores -------------------------------------------------------------------------------------------


def test_a_tile_is_sharp_up_to_a_quarter_of_the_way_to_another_texture_and_no_average_is():
    textures = world_rules.TEXTURES.astype(float)
    gaps = np.linalg.norm((textures[:, None] - textures).reshape(7, 7, -1), axis=-1)
    np.fill_diagonal(gaps, np.inf)
    for kind, closest in enumerate(gaps.argmin(axis=1)):
        for share, is_sharp in ((0, True), (0.2, True), (0.3, False), (0.45, False)):
            tile = (1 - share) * textures[kind] + share * textures[closest]
            frame = np.tile(np.rint(tile).astype(np.uint8), (5, 5, 1))
            kinds, margins = world_truth.decode(frame)
            assert (kinds == kind).all()
            assert ((margins >= world_truth.SHARP) == is_sharp).all()
            assert margins == pytest.approx(1 - 2 * share, abs=0.03)
        flat = np.broadcast_to(textures[kind].mean(axis=(0, 1)), (20, 20, 3)).astype(np.uint8)
        assert (world_truth.decode(flat)[1] < world_truth.SHARP).all()
    noise = np.random.default_rng(0).normal(0, 8, (50, 20, 20, 3))  # gray levels
    frames = world_rules.draw(np.random.default_rng(1).integers(0, 7, (50, 5, 5)))
    noisy = np.clip(frames + noise, 0, 255).astype(np.uint8)
    assert (world_truth.decode(noisy)[1] >= world_truth.SHARP).all()


def naive_transition(before, after, action):
    """(kind of transition, share of determined tiles that are right, is it right or None)."""
    dy, dx = STEPS[ACTIONS[action]]
    goes = action > 0 and before[2 + dy][2 + dx] == GRASS
    kind = "moved" if goes else ("blocked" if action else "stayed")

    def outcome(dy, dx):
        shown = {}
        for y, x in np.ndindex(5, 5):
            inside = 0 <= y + dy < 5 and 0 <= x + dx < 5
            if (y, x) != (2, 2) and inside:
                was_agent = (y + dy, x + dx) == (2, 2)
                shown[y, x] = GRASS if was_agent else before[y + dy][x + dx]
        return shown

    shares = {}
    expected = outcome(dy * goes, dx * goes)
    tellable = True
    for step in STEPS.values():
        shown = outcome(*step)
        shares[step] = np.mean([after[y][x] == tile for (y, x), tile in shown.items()])
        if step != (dy * goes, dx * goes):
            common = shown.keys() & expected.keys()
            tellable = tellable and any(shown[place] != expected[place] for place in common)
    own = shares.pop((dy * goes, dx * goes))
    return kind, own, (own > max(shares.values()) if tellable else None)


def test_transitions_equal_a_naive_version():
    tiles, actions = noisy_world()
    measured = world_truth.measure_transitions(tiles, actions)
    seen = Counter()
    for clip in range(len(tiles)):
        for t in range(1, tiles.shape[1]):
            kind, share, right = naive_transition(
                tiles[clip, t - 1].tolist(), tiles[clip, t].tolist(), actions[clip, t]
            )
            assert measured["determined"][clip, t - 1] == pytest.approx(share)
            for name in ("moved", "blocked", "stayed"):
                value = measured[name][clip, t - 1]
                counts = name == kind and right is not None
                assert value == right if counts else np.isnan(value)
            seen[kind, right] += 1
    assert min(seen[kind, right] for kind in ("moved", "blocked") for right in (True, False)) > 0


def test_the_agent_is_right_if_one_agent_in_the_middle_faces_as_told():
    tiles, actions = noisy_world(seed=1)
    right = world_truth.agent_is_right(tiles, actions, np.full(len(tiles), AGENT + 1))
    for clip in range(len(tiles)):
        facing = AGENT + 1
        for t in range(tiles.shape[1]):
            if t and actions[clip, t]:
                facing = AGENT + actions[clip, t]
            agents = [kind for kind in tiles[clip, t].ravel() if kind > AGENT]
            expected = agents == [facing] and tiles[clip, t, 2, 2] == facing
            assert right[clip, t] == expected
    assert 0.2 < right.mean() < 0.95


def test_memory_equals_a_naive_version():
    tiles, actions = noisy_world(seed=2)
    returned = []
    drawn = defaultdict(Counter)
    for clip in range(len(tiles)):
        y = x = 0
        seen = {}
        for t, frame in enumerate(tiles[clip].tolist()):
            old = (y, x)
            if t:
                dy, dx = STEPS[ACTIONS[actions[clip, t]]]
                if tiles[clip, t - 1, 2 + dy, 2 + dx] == GRASS:
                    y += dy
                    x += dx
            frame[2][2] = GRASS  # below the agent
            for row, column in np.ndindex(5, 5):
                place = (y + row, x + column)
                kind = frame[row][column]
                was_in_view = 0 <= place[0] - old[0] < 5 and 0 <= place[1] - old[1] < 5
                if t and not was_in_view:
                    inner = frame[row - y + old[0]][column - x + old[1]]
                    drawn[inner][kind] += 1
                    if place in seen:
                        returned.append((inner, kind, *seen[place], t))
                seen[place] = (kind, t)
    entries = world_truth.find_entries(tiles, actions)
    for within in (None, 6):
        back = [row for row in returned if within is None or row[4] - row[3] <= within]
        agree = np.mean([kind == last for _, kind, last, _, _ in back])
        chance = np.mean(
            [drawn[inner][last] / drawn[inner].total() for inner, _, last, _, _ in back]
        )
        memory = world_truth.remember(entries, within)
        assert memory["returns"] == len(back) > 20
        assert memory["remembered"] == pytest.approx(agree)
        assert memory["chance"] == pytest.approx(chance)
        assert memory["above_chance"] == pytest.approx((agree - chance) / (1 - chance))


def test_drift_is_the_distance_of_the_statistics():
    grass = np.full((4, 5, 5), GRASS)
    half = grass.copy()
    half[:, :, ::2] = WATER  # 3 of 5 columns; the middle tile does not count
    assert world_truth.drift(grass, grass) == {"shares": 0, "neighbors": 0}
    drifted = world_truth.drift(half, grass)
    assert drifted["shares"] == pytest.approx(14 / 24)
    # all pairs in rows differ from grass, and 3 of 5 in columns
    assert drifted["neighbors"] == pytest.approx((1 + 3 / 5) / 2)


def test_real_episodes_are_right_and_each_control_loses_what_it_lacks(held_out):
    real, actions = held_out
    scores = {}
    for name, frames, told in world_truth.make_controls(real, actions):
        scores[name] = score(frames, real, told)
    right = scores["real"]
    for name in ("decodes", "sharp", "agent", "determined", "moved", "blocked", "stayed"):
        assert right[name] == 1
    assert right["remembered"] == right["above_chance"] == 1 and right["returns"] > 100
    assert right["shares"] == right["neighbors"] == 0 and right["psnr"] == 60
    assert right["delta_psnr"] > 20
    shifted = scores["actions_shifted"]
    assert shifted["agent"] < 0.9 and shifted["moved"] < 0.9 and shifted["blocked"] < 0.9
    frozen = scores["frozen"]
    assert frozen["moved"] == 0 and frozen["blocked"] == 1 and frozen["delta_psnr"] == 0
    wrong = scores["wrong_tile"]
    assert wrong["decodes"] == wrong["agent"] == 1 and wrong["determined"] < 0.96
    dull = scores["dull"]
    assert dull["determined"] == dull["moved"] == dull["blocked"] == 1  # it obeys the rules
    assert dull["shares"] > 0.2 and dull["neighbors"] > 0.2
    assert dull["remembered"] > 0.9 and dull["above_chance"] == pytest.approx(0, abs=1e-9)


def test_columns_cover_all_generated_frames_once_and_means_skip_what_does_not_count(held_out):
    assert world_truth.columns(1) == {1: slice(0, 1)}
    real, actions = held_out
    frames = world_rules.draw(real)
    frames[:, 9:] = 128  # frame 8 is the last right one
    result = score(frames, real, actions)
    parts = result["by_frame"]
    assert [*parts] == ["1", "8", "16", "32", "39"]
    assert parts["1"]["decodes"] == parts["8"]["decodes"] == 1 and parts["16"]["decodes"] == 0
    assert result["decodes"] == pytest.approx(8 / 39)
    expected = np.mean([psnr(frames[:, t], world_rules.draw(real)[:, t]) for t in range(9, 17)])
    assert parts["16"]["psnr"] == pytest.approx(expected, abs=0.5)


# evaluate.py --------------------------------------------------------------------------------------


def sampled(made, held_out, folder, frames=None, **about):
    """A folder of samples that continue the held-out episodes, by default as they are."""
    out, truth = made
    real, actions = held_out
    clips, _, record = find_real(out, "val", 0.05, FRAMES, time_scale=1 / 5, image_size=20)
    order = [[*truth["names"]].index(clips.draw(index)[0].key) for index in range(HELD_OUT)]
    rows = [2 * (number - EPISODES) + take for number in order for take in range(2)]
    names = [[("none", *ACTIONS)[action + 1] for action in actions[row]] for row in rows]
    for of_sample in names:
        of_sample[0] = "none"
    given = [
        {"source": f"{clips.draw(index)[0].path}, clip {index}", "frames": "0"}
        for index in range(HELD_OUT)
        for _ in range(2)
    ]
    record |= {"num_clips": HELD_OUT, "samples_per_clip": 2}
    frames = world_rules.draw(real) if frames is None else frames
    everything = {
        "source": SOURCE | {"context": 16},
        "given": given,
        "real": record,
        "actions": names,
    }
    return write_samples(
        folder, frames[rows], [0] * len(rows), ["world"], time_scale=1 / 5, **everything | about
    )


def test_samples_without_a_truth_and_another_split_are_refused(made, held_out, tmp_path, capsys):
    out, _ = made
    samples = sampled(made, held_out, tmp_path / "samples")
    plain = sampled(made, held_out, tmp_path / "plain", actions=None)
    idle = sampled(made, held_out, tmp_path / "idle", actions=[["none"] * FRAMES] * 10)
    lacking = shutil.copytree(out, tmp_path / "lacking")
    (lacking / "world.npz").unlink()
    cut = shutil.copytree(out, tmp_path / "cut")
    os.truncate(cut / "world.npz", 2000)
    for folder, data, words in (
        (plain, [out], ["has no actions"]),
        (idle, [out], ["frame 1 of sample 0", "'none'", "--actions"]),
        (samples, [lacking], ["world.npz", "make_world.py"]),
        (samples, [cut], ["world.npz can't be read", "make_world.py"]),
        (samples, [out, "--val-fraction", 0.9], ["--val-fraction 0.9", "remove"]),
    ):
        flags = ["--metric", "world", "--samples", folder, "--data-path", *data]
        refused(capsys, tmp_path / "x.json", *flags, words=words)


def test_evaluate_scores_generated_frames_only(made, held_out, tmp_path, capsys):
    out, _ = made
    frames = world_rules.draw(held_out[0])
    frames[:, 0] = 0  # it is given
    folder = sampled(made, held_out, tmp_path / "samples", frames)
    manifest = run(
        tmp_path / "x.json", "--metric", "world", "--samples", folder, "--data-path", out
    )
    assert manifest["protocol"] == f"world{HELD_OUT}_each2_1of{FRAMES}f"
    values = manifest["values"]
    assert values["decodes"] == 1 and values["psnr"] == 60
    assert manifest["result"]["context"] == 16
    assert manifest["result"]["controls"]["frozen"]["moved"] == 0
    assert "tiles remembered" in capsys.readouterr().out

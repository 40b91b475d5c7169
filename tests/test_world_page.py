"""The page that plays a causal model: its frames against torch, its controls and its map."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import export
import world_rules
from browser import AXE, drag, press
from models import Condition
from runtime.rng import normal
from test_causal import stream_of
from test_descent import STILL, TIME_SCALE, write_page
from tiny_data import random_checkpoint
from tiny_videos import picture, save
from training import run_main

READY = "!$('app').className && world"
CAUSAL = {"causal": True, "temporal_patch_size": 1}
MODELS = {  # changes of the tiny model, guidance, evaluations, shift of the steps
    "one frame": ({"context": 5, "input_size": 6}, 1.0, 4, 6.0),
    "moving, guided, patches of two": (
        {"temporal_patch_size": 2, "context": 7, "rope_speed": 0.5, "position_table": "space"},
        1.5,
        3,
        1.0,
    ),
    "actions": ({"context": 3, "actions": "stay,left,right", "num_classes": 1}, 2.0, 2, 2.0),
    "normed, head 24": (
        {"context": 2, "hidden_size": 72, "num_heads": 3, "qk_norm": True, "in_channels": 1},
        2.0,
        1,
        2.0,
    ),
}


def ask(browser, task, **values):
    """The worker's answer to a task, whose values may be tensors."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.flatten().tolist()
    call = f"{{...{json.dumps(values)}, x: Float32Array.from({values.get('x', [])})}}"
    return browser.ask(f"ask('{task}', {call}).then(x => x && [...x])")


@pytest.mark.parametrize("name", MODELS)
def test_frames_far_beyond_the_context_equal_those_of_torch_in_both_kernels(
    browser, tmp_path, name
):
    changes, guidance, evaluations, shift = MODELS[name]
    page, model = write_page(tmp_path / "page.html", **CAUSAL | changes)
    config = model.config
    pt = config.temporal_patch_size
    count = 1 + (config.context + 64) // pt
    conditions = []
    words = []  # of the page
    for number in range(count):
        label = -1 if number % 7 == 3 else number % config.num_classes
        y = [label]
        if config.actions:
            y.append(number % 4 - 1)  # "none" first
        rows = torch.tensor([y] if config.actions else y)
        conditions.append(Condition.of(rows, config))
        known = [None if value < 0 else value for value in y]
        words.append(dict(zip(("label", "action"), known, strict=False)))
    steps = {"method": "euler", "num_steps": evaluations + 1, "shift": shift}
    stream = stream_of(model.requires_grad_(False), [0], guidance=guidance, **steps)
    shape = (config.in_channels, pt, config.input_size, config.input_size)
    noises = [normal(0, "sample", number, [0], shape) for number in range(count)]
    first = noises[0].clamp(-1, 1)
    stream.remember(first, conditions[0])
    expected = torch.cat([stream.step(condition) for condition in conditions[1:]], dim=2)
    about = {"guidance": guidance, "numFrames": pt, "timeScale": TIME_SCALE}
    for kernel, query in (("wasm", ""), ("plain", "?plain")):
        browser.open(page, READY, query=query, **STILL)
        assert browser.ask("eqm.kernel()") == kernel
        ask(browser, "restart", guidance=guidance)
        ask(browser, "show", x=first, **words[0], **about)
        steps = about | {"evaluations": evaluations, "shift": shift}
        frames = []
        for noise, condition in zip(noises[1:], words[1:], strict=True):
            made = ask(browser, "make", x=noise, **condition, **steps)
            frames.append(torch.tensor(made).view_as(noise))
        frames = torch.cat(frames, dim=2)
        assert expected.std() > 0.1
        assert (frames - expected).abs().max() < 1e-4


# The page -----------------------------------------------------------------------------------------

ACTIONS = "stay,left,right,up,down"
# what the page asks its worker for, in words
LISTEN = """
window.requested = [];
const answer = ask;
ask = (task, input) => {
  if (task === "make") requested.push(input.action === null ? "none" : facts.actions[input.action]);
  return answer(task, input);
};
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "world.html"
    start = {"pixels": torch.full((3, 1, 20, 20), 255, dtype=torch.uint8), "label": 0}
    shape = {"input_size": 20, "patch_size": 4, "num_classes": 1}
    return write_page(path, [start], **CAUSAL, **shape, context=4, actions=ACTIONS)[0]


@pytest.fixture
def page(browser, file):
    """A world that stands still, with its start in the first frame."""
    browser.open(file, f"{READY} && world.frames === 1", **STILL)
    browser.ask(LISTEN)
    return browser


def test_keys_fingers_the_picture_and_a_gamepad_make_a_frame_each(page):
    def made(*expected):
        page.wait(
            f"requested.length >= {len(expected)} && !playing && world.frames > {len(expected)}"
        )
        assert page.ask("requested") == list(expected)
        page.ask("requested = []; world.frames = 1")

    for key in ("ArrowLeft", "w", "3", "1"):
        press(page, key)
        page.wait("!playing")
    made("left", "up", "right", "stay")
    for selector, x in (("#pad :nth-child(5)", 0.5), ("#screen", 0.9)):
        drag(page, selector, (x, 0.5))
        page.wait("!playing")
    made("down", "right")
    page.ask(
        "window.still = {axes: [0, 0], buttons: []}; navigator.getGamepads = () => [null, pad]"
    )
    page.ask("window.cross = Array.from({length: 16}, (_, i) => ({pressed: i === 14}))")
    page.ask("window.pad = still; ongamepadconnected(); ongamepadconnected()")
    for pad, name in (("axes: [0, -0.9]", "up"), ("buttons: cross", "left")):
        page.ask(f"window.pad = {{...still, {pad}}}")
        page.wait(f"requested.includes('{name}')")
        page.ask("window.pad = still")
        page.wait("held === null && !playing")
    assert page.ask("[...new Set(requested)]") == ["up", "left"]  # one that stays repeats
    page.ask("window.pad = {...still, axes: [1, 0]}")
    page.wait("held !== null")
    page.ask("window.pad = null")  # pulled out
    page.wait("held === null && !playing")
    page.ask("requested = []; world.frames = 1")
    page.ask("$('letters').click()")
    press(page, "w")
    press(page, "n")
    press(page, "ArrowDown")
    made("down")


def test_a_key_repeats_while_it_is_down_and_the_dream_stays(page):
    press_down = {"key": "ArrowUp", "type": "keyDown"}
    page.call("Input.dispatchKeyEvent", **press_down)
    page.wait("requested.length >= 3")
    page.call("Input.dispatchKeyEvent", **press_down | {"type": "keyUp"})
    page.wait("!playing")
    assert set(page.ask("requested")) == {"up"}
    page.ask("requested = []")
    press(page, " ")
    page.wait("requested.length >= 3")
    press(page, "ArrowUp")
    page.wait("requested.includes('up')")
    page.wait("requested.at(-1) === 'stay'")
    assert re.fullmatch(
        r"frame \d+ · [\d.]+ frames per second · \d+ ms to draw one · \d+ ms from key to frame",
        page.ask("$('count').textContent"),
    )
    page.ask("world.dreamed = LONGEST")
    page.wait("!playing && !dreaming")
    assert "frames without a key: enough" in page.ask("$('line').textContent")


def test_a_new_world_begins_with_the_start_again_and_the_same_steps_make_the_same_frames(page):
    frames = []
    for _ in range(2):
        press(page, "ArrowLeft")
        page.wait("world.frames === 2 && !playing")
        images = page.ask("world.recent.map(image => [...image.data])")
        assert set(images[0]) == {255}
        frames.append(images[1])
        page.ask("begin(1); begin(0); tap(2); setDreaming(true); setDreaming(false)")  # too early
        page.wait("world.isReady && !playing")
        assert page.ask("[world.frames, world.patches]") == [1, 1]
    assert frames[0] == frames[1] != images[0]


def test_a_new_world_begins_after_frames_that_are_not_finite_and_errors_are_said(page):
    huge = "x: new Float32Array(1200).fill(3e38), evaluations: 1, shift: 1"
    assert (
        page.ask(f"ask('make', {{...settings(0), {huge}}}).then(x => x.every(Number.isFinite))")
        is False
    )
    press(page, "n")
    page.wait("world.number === 1 && world.isReady")
    press(page, "ArrowLeft")
    page.wait("world.frames === 2 || $('line').textContent.includes('ended')")
    assert page.ask("world.frames") == 2
    page.ask("ask = () => Promise.reject(Error('no memory'))")
    press(page, "n")
    page.wait("$('line').textContent === 'The world has ended: no memory.'")


def test_a_gif_has_the_last_64_frames(page):
    page.ask(
        "for (let i = 0; i < 70; i++) showFrame(imageOf(new Float32Array(1200).fill(i / 70), 0, 1))"
    )
    gif = Image.open(io.BytesIO(bytes(page.ask("[...eqm.gif()]"))))
    assert gif.n_frames == 64
    first = round((6 / 70 + 1) * 127.5)
    assert abs(int(np.array(gif.convert("RGB"))[0, 0, 0]) - first) <= 1
    press(page, "g")
    assert "Saved world-0-71.gif" in page.ask("$('line').textContent")


def test_the_map_follows_blocked_and_free_moves_and_marks_the_tile_that_changed(page):
    """Against the true positions in a real world, in which one tile changes while it is hidden."""
    tiles = np.random.default_rng(0).choice([0, 0, 0, 1, 2], size=(20, 20))
    tiles[10, 4:16] = world_rules.GRASS
    tiles[9:12, 16] = world_rules.TREE
    changed = tiles.copy()
    changed[9, 8] = world_rules.WATER if tiles[9, 8] != world_rules.WATER else world_rules.TREE
    walk = ["stay", *["right"] * 9, *["left"] * 9]
    actions = np.array([[world_rules.ACTIONS.index(name) for name in walk]])
    start = np.array([[10, 8]])
    agents = np.array([world_rules.AGENT + 2])
    positions, agents = world_rules.simulate(tiles[None], start, agents, actions)
    # two of the moves are blocked
    assert positions[0, 9].tolist() == [10, 15] and positions[0, -1].tolist() == [10, 6]
    kinds = world_rules.views(tiles[None], positions, agents)[0]
    kinds[10:] = world_rules.views(changed[None], positions, agents)[0, 10:]
    page.ask("clearMap(); world.recent = []")
    for t, frame in enumerate(world_rules.draw(kinds)):
        pixels = np.dstack([frame, np.full((20, 20, 1), 255, np.uint8)]).flatten().tolist()
        choice = actions[0, t] if t else "null"
        page.ask(f"showFrame(new ImageData(Uint8ClampedArray.from({pixels}), 20), {choice})")
    state = page.ask("eqm.state()")
    assert state["tile"] == 4
    assert state["place"] == [-2, 0]
    assert page.ask("[...cells].filter(([, cell]) => cell.isForgotten).map(([key]) => key)") == [
        "0,-1"
    ]
    assert state["forgotten"] == 1
    assert state["returned"] > 20
    assert "tiles came back, 1 of them different." in page.ask("$('memory').textContent")


def test_controls_are_large_and_pass_the_rules_of_axe(page):
    page.ask(AXE)
    page.ask("document.querySelector('details').open = true")
    press(page, "ArrowLeft")
    for scheme in ("light", "dark"):
        for width in (400, 900):
            page.screen(width, 800, **STILL, **{"prefers-color-scheme": scheme})
            assert page.ask("document.documentElement.scrollWidth") == width
            least = 44 if width == 400 else 36
            sizes = "[...document.querySelectorAll('button')].map(one => one.offsetHeight)"
            assert min(page.ask(sizes)) >= least
            problems = (
                "axe.run().then(all => all.violations.map(one => [one.id, one.nodes[0].html]))"
            )
            assert page.ask(problems) == []


def test_a_model_with_classes_is_steered_by_class_from_noise_and_dreams_on(browser, tmp_path):
    path, _ = write_page(tmp_path / "page.html", **CAUSAL | {"temporal_patch_size": 2}, context=4)
    browser.open(path, f"{READY} && dreaming")
    assert browser.ask("document.title") == "A film that you steer"
    assert browser.ask("$('atlas').hidden")
    press(browser, "3")
    browser.wait("last === 2 && !presses.length")
    count = browser.ask("world.frames")
    browser.wait(f"world.frames >= {count + 4}")
    assert browser.ask("[...$('pad').children].findIndex(one => one.ariaPressed === 'true')") == 2


def test_export_stores_starts_of_causal_models(tmp_path):
    causal = {"use_rope": True, "num_frames": 8, "causal": True, "context": 8}
    flags = {"gamma_shift": 6.0}  # of training only: EqM takes steps of equal size
    ckpt = random_checkpoint(
        tmp_path / "causal.pt", training=flags, **causal, temporal_patch_size=1
    )
    first = tmp_path / "first.png"
    save(first, picture(16, 16))
    page = tmp_path / "page.html"
    run_main(export, ckpt, "--html", page, "--given", first)
    facts = json.loads(re.search('id="facts">(.*?)</script>', page.read_text())[1])
    assert [start["label"] for start in facts["starts"]] == [None]
    assert facts["actions"] == []
    assert facts["shift"] == 1.0

"""The page that rolls a model's clips downhill: its field against torch, its controls, and what it
refuses.
"""

import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wasmtime
from PIL import Image

import checkpoint
import descent
import disturb
import export
from browser import press
from models import Condition
from samplers import guided, sample
from test_models import clip, distance, tiny
from tiny_data import make_vae, random_checkpoint
from training import ROOT, refused, run_main

DEMO = ROOT / "results/demo"
READY = "!$('app').hidden"
TIME_SCALE = 0.04
MODELS = {
    "rotary": ({}, [(4, 1, TIME_SCALE, 1), (7, None, 0.08, 1), (32, 3, TIME_SCALE, 1.5)]),
    "fixed": ({"use_rope": False}, [(8, 1, TIME_SCALE, 2)]),
    "moving, table, head 20": (
        {"hidden_size": 40, "rope_speed": 0.5, "position_table": "space"},
        [(5, 1, 1 / 30, 1), (8, 4, TIME_SCALE, 0)],
    ),
    "normed, head 24, patch 1": (
        {
            "hidden_size": 72,
            "num_heads": 3,
            "qk_norm": True,
            "patch_size": 1,
            "temporal_patch_size": 2,
            "rope_theta": 100.0,
            "rope_split": "6,8,6",
            "in_channels": 1,
        },
        [(5, 0, 0.08, 1.5)],
    ),
    "image": (
        {"use_rope": False, "temporal_patch_size": 1, "num_frames": 1, "input_size": 6},
        [(1, 2, 0.04, 1.5)],
    ),
}


def write_page(path, **changes):
    """Write the page of a tiny model with weights of float16. Returns (path, model)."""
    model = tiny(**changes)
    for weight in model.parameters():
        weight.data = weight.half().float()
    config = model.config
    classes = [f"<{label}>" for label in range(config.num_classes)]
    data = {"classes": classes, "time_scale": TIME_SCALE, "vae": "none"}
    training = {"num_frames": config.num_frames, "video": config.num_frames > 1}
    state = {"ema": model.state_dict(), "step": 3, "config": {"data": data, "training": training}}
    path.write_text(descent.make_page("tiny & small", state, config))
    return path, model


def field_of(model, label, time_scale, guidance):
    """The guided field of one clip as a function, as samplers.sample takes it."""
    if label is None:
        label = -1
        guidance = 1.0
    condition = Condition.of(torch.tensor([label]), model.config)
    return guided(model.requires_grad_(False), condition, torch.tensor([time_scale]), guidance)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The file of the demo model's page, which no test changes."""
    out = tmp_path_factory.mktemp("page") / "new/descent.html"
    run_main(export, DEMO, "--html", out)
    return out


@pytest.fixture
def page(browser, demo):
    """A browser that shows the demo model's page."""
    browser.open(demo, READY, height=1200)
    return browser


# The file -----------------------------------------------------------------------------------------


def test_the_committed_kernel_is_the_translation_of_its_text():
    text = descent.KERNEL.with_suffix(".wat").read_text()
    assert descent.KERNEL.read_bytes() == wasmtime.wat2wasm(text)


def test_the_demos_page_is_one_small_file_that_loads_nothing(demo):
    text = demo.read_text()
    assert len(text) <= 4e6
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "default-src 'none'" in text
    assert not re.search(r'://|\b(?:src|href)="(?!data:)', text)
    facts = json.loads(re.search('id="facts">(.*?)</script>', text)[1])
    config = json.loads((DEMO / "config.json").read_text())
    assert facts["classes"] == config["data"]["classes"]
    assert facts["frames"] == {"least": 4, "most": 32, "usual": 16}
    assert [*facts["sampler"].values()] == [0.0262, 1.5, 0.3, descent.REST]


def test_a_page_and_a_folder_can_be_written_at_once(tmp_path):
    ckpt = random_checkpoint(tmp_path / "best.pt", num_frames=4, use_rope=True)
    page = tmp_path / "page.html"
    run_main(export, ckpt, tmp_path / "shared", "--html", page)
    assert (tmp_path / "shared/model.safetensors").exists()
    assert "best.pt" in page.read_text()


def test_many_short_steps_become_few_long_ones_of_the_same_path():
    values = descent.slider_values({"sampler": "gd", "num_sampling_steps": 250, "stepsize": 0.002})
    assert values["stepSize"] * descent.EVALUATIONS == pytest.approx(249 * 0.002)
    assert values["momentum"] == 0  # that of ngd


def test_what_a_page_cannot_run_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    ckpt = tmp_path / "model.pt"
    page = tmp_path / "page.html"
    cases = {
        "needs the VAE mse": {"vae": "mse"},
        "needs the VAE in its folder": {"vae": make_vae(tmp_path / "vae")},
        "has an energy (ebm dot)": {"ebm": "dot"},
        "learned objective flow": {"objective": "flow"},
        "": {},
    }
    for words, settings in cases.items():
        random_checkpoint(ckpt, num_frames=4, use_rope=True, **settings)
        if words:
            assert words in refused(capsys, export, ckpt, "--html", page)
    for limit, words in {"MOST_WEIGHTS": "M weights", "MOST_GFLOPS": "GFLOP per eval"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(descent, limit, 1e-5)
            assert words in refused(capsys, export, ckpt, "--html", page)
    state = checkpoint.load(ckpt)
    state["ema"]["final_layer.linear.bias"][0] = 1e5
    checkpoint.save(ckpt, state)
    assert "weights up to 1e+05" in refused(capsys, export, ckpt, "--html", page)
    assert "DIR: missing" in refused(capsys, export, ckpt)
    assert not page.exists()


# The field ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_field_equals_that_of_torch_in_both_kernels(browser, tmp_path, name):
    changes, cases = MODELS[name]
    page, model = write_page(tmp_path / "page.html", **changes)
    for kernel, query in (("wasm", ""), ("plain", "?plain")):
        browser.open(page, READY, query=query)
        assert browser.ask("eqm.kernel()") == kernel
        for num_frames, label, time_scale, guidance in cases:
            x = clip(num_frames, model.config)
            expected = field_of(model, label, time_scale, guidance)(x, torch.arange(1))
            about = {
                "label": label,
                "numFrames": num_frames,
                "timeScale": time_scale,
                "guidance": guidance,
            }
            call = f"eqm.field({x.flatten().tolist()}, {json.dumps(about)}).then(f => [...f])"
            f = torch.tensor(browser.ask(call)).view_as(x)
            assert distance(f, expected) < 1e-5


def test_a_wrong_call_of_the_field_says_what_it_expects(browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html")[0], READY)
    call = "eqm.field(%s).catch(error => error.message)"
    message = browser.ask(call % "[1], {numFrames: 4}")
    assert message == "x has 1 values; expected 3 x 4 x 4 x 4"
    message = browser.ask(call % "new Array(192).fill(0), {numFrames: 4, label: 5}")
    assert message == "label 5; expected null or an integer from 0 to 4"
    set_slider(browser, "level", 0.2)
    browser.ask("document.querySelector('[data-region=left]').click()")
    assert "trained without --forcing-regions" in browser.ask("$('line').textContent")
    browser.ask("document.querySelector('[data-region=later]').click()")
    assert "Disturbed." in browser.ask("$('line').textContent")
    assert browser.ask("document.title") == "tiny & small: roll a video downhill"
    assert browser.ask("$('label').options[1].text") == "<1>"


# Whole trajectories -------------------------------------------------------------------------------


def state(browser):
    """The clip on the page, (1, 3, T, 16, 16)."""
    values = browser.ask("[...moment().x]")
    return torch.tensor(values).view(1, 3, browser.ask("moment().numFrames"), 16, 16)


def set_slider(browser, name, value):
    browser.ask(f"$('{name}').value = {value}; $('{name}').dispatchEvent(new Event('input'))")


def take_steps(browser, count):
    """Take so many steps. Returns the clip after them."""
    for _ in range(count):
        target = browser.ask("moment().evaluations") + 1
        browser.ask("$('step').click()")
        browser.wait(f"moment().evaluations === {target} && !busy")
    return state(browser)


def test_a_trajectory_with_a_disturbance_equals_that_of_torch(page):
    model = checkpoint.load_model(DEMO)[0]
    field = field_of(model, 0, TIME_SCALE, 1.5)
    expected, _ = sample(field, state(page), "ngd", 7, 0.0262, 0.3)
    before = take_steps(page, 6)
    assert (before - expected).abs().max() < 2e-3
    page.ask("document.querySelector('[data-region=left]').click()")
    after = state(page)
    assert torch.equal(after[..., 8:], before[..., 8:])
    fresh = (after - 0.3 * before)[..., :8] / 0.7
    assert abs(fresh.mean()) < 0.1
    assert abs(fresh.std() - 1) < 0.1
    expected, _ = sample(field, after, "ngd", 7, 0.0262, 0.3)
    assert (take_steps(page, 6) - expected).abs().max() < 2e-3


def test_a_trajectory_with_a_pinned_frame_equals_that_of_torch(page):
    model = checkpoint.load_model(DEMO)[0]
    for name, value in {"frameCount": 9, "level": 0, "guidance": 1, "momentum": 0}.items():
        set_slider(page, name, value)
    before = take_steps(page, 3)
    page.ask("$('label').value = 7; $('label').dispatchEvent(new Event('change'))")
    page.ask("document.querySelectorAll('#frames button')[2].click()")
    page.ask("document.querySelector('[data-region=square]').click()")
    after = state(page)
    mask = torch.zeros(1, 1, 9, 1, 1, dtype=torch.bool)
    mask[:, :, 2] = True
    changed = (after != before).any(dim=1)[0]  # (T, H, W)
    assert changed.sum() == 8 * 6 * 6
    assert changed[0, 5:11, 5:11].all()
    field = field_of(model, 7, TIME_SCALE, 1)
    expected, _ = sample(field, after, "gd", 6, 0.0262, given=after, mask=mask)
    reached = take_steps(page, 5)
    assert (reached - expected).abs().max() < 2e-3
    assert torch.equal(reached[:, :, 2], before[:, :, 2])


def test_the_study_disturbs_only_what_it_says(monkeypatch, tmp_path):
    x = torch.rand(2, 3, 8, 16, 16)
    for name, y, labels in disturb.disturbances(x, torch.tensor([0, 11]), 12, 0):
        share = (y != x).float().mean()
        if "square" in name:
            assert share == 36 / 256, name
        elif "half" in name and "mirrored" not in name:
            assert share == pytest.approx(0.5, abs=1e-3), name
        elif name == "another class":
            assert share == 0
        assert labels.tolist() == ([1, 0] if "another" in name else [0, 11])
    for name, value in {"FIRST": 1, "AGAIN": 1, "FRAMES": 4, "LEVELS": (0.3,)}.items():
        monkeypatch.setattr(disturb, name, value)
    run_main(disturb, "--num-clips", 2, "--out", tmp_path)
    assert len((tmp_path / "disturb.md").read_text().splitlines()) == 4 + 2 + 9
    rows = json.loads((tmp_path / "disturb.json").read_text())["rows"]
    assert rows["before"]["shape"] == [False, False]  # still noise


# The controls -------------------------------------------------------------------------------------


def count_of(browser, name="evaluations"):
    return browser.ask(f"moment().{name}")


def test_a_clip_rolls_until_it_rests_and_a_disturbance_wakes_it(page):
    assert page.ask("$('line').textContent").startswith("Noise.")
    press(page, " ")
    page.wait("running && resting")
    rested = state(page)
    assert 10 <= count_of(page) <= 25
    assert rested.abs().max() < 1.5
    assert page.ask("$('line').textContent").startswith("At rest")
    page.ask("$('label').value = 5; $('label').dispatchEvent(new Event('change'))")
    page.wait("resting")
    assert "suits every class" in page.ask("$('line').textContent")
    assert (state(page) - rested).abs().mean() < 0.1
    press(page, "d")  # the later half
    assert page.ask("!resting")
    page.wait("resting")
    assert (state(page)[:, :, :8] - rested[:, :, :8]).abs().mean() < 0.1
    assert np.isfinite(page.ask("moments.filter(one => one.rms).map(one => one.rms)")).all()


def test_pause_step_back_and_the_plot_move_through_the_descent(page):
    start = state(page)
    page.ask("$('play').click()")
    page.wait("moment().evaluations >= 3")
    page.ask("$('play').click()")
    assert page.ask("$('play').textContent") == "Play"
    page.wait("!busy")
    reached = count_of(page)
    page.ask("$('back').click(); $('back').click()")
    assert count_of(page) == reached - 2
    press(page, "ArrowRight")
    assert count_of(page) == reached - 1
    press(page, "ArrowLeft")
    page.ask(
        "$('plot').dispatchEvent(new MouseEvent('click', {clientX: "
        "$('plot').getBoundingClientRect().x + 30}))"
    )
    assert count_of(page) == 0
    assert torch.equal(state(page), start)
    assert page.ask("$('back').disabled")
    set_slider(page, "stepSize", 0.0131)  # another future
    assert page.ask("moments.length") == 1
    set_slider(page, "stopBelow", 2)
    assert page.ask("$('stopBelow').closest('label').querySelector('output').value") == "2"


def test_new_noise_frames_pins_and_every_disturbance(page):
    first = state(page)
    page.ask("document.querySelector('#frames button').click()")
    assert count_of(page, "pinned") == [0]
    press(page, "n")
    second = state(page)
    is_same = (first == second).all(dim=(0, 1, 3, 4))
    assert is_same.nonzero().tolist() == [[0]]
    for count in (32, 4, 6):
        set_slider(page, "frameCount", count)
        assert torch.equal(state(page)[:, :, :4], second[:, :, :4])
        assert page.ask("document.querySelectorAll('#frames canvas').length") == count
    for frame in range(1, 6):
        page.ask(f"document.querySelectorAll('#frames button')[{frame}].click()")
    assert count_of(page, "pinned.length") == 5
    assert "must be free" in page.ask("$('line').textContent")
    page.ask("document.querySelectorAll('#frames button')[0].click()")
    assert count_of(page, "pinned") == [1, 2, 3, 4]
    page.ask("$('label').value = ''; $('label').dispatchEvent(new Event('change'))")
    assert count_of(page, "label") is None
    page.ask("$('kind').value = 'blur'; $('kind').dispatchEvent(new Event('change'))")
    before = state(page)[:, :, :1]
    page.ask("document.querySelector('[data-region=all]').click()")
    padded = F.pad(before[0, :, 0], (1, 1, 1, 1), mode="replicate")[:, None]
    weights = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1])) / 16
    expected = F.conv2d(padded, weights[None, None])[:, 0]
    assert torch.allclose(state(page)[0, :, 0], expected, atol=1e-6)


def test_the_mouse_paints_in_all_frames_or_in_one_and_the_descent_waits(page):
    before = state(page)

    def drag(selector, *places):
        box = page.ask(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        mouse = {"button": "left", "clickCount": 1, "buttons": 1, "type": "mousePressed"}
        for x, y in places:
            mouse["x"] = box["x"] + box["width"] * x
            mouse["y"] = box["y"] + box["width"] * y
            page.call("Input.dispatchMouseEvent", **mouse)
            mouse["type"] = "mouseMoved"
        page.wait("stroke")
        page.call("Input.dispatchMouseEvent", **mouse | {"type": "mouseReleased", "buttons": 0})
        page.wait("!stroke")

    drag("#player", (0.25, 0.5), (0.5, 0.5), (0.75, 0.5))
    changed = (state(page) != before).any(dim=1)[0]
    assert changed[:, 5:11, 1:15].all()
    assert changed.sum() == 16 * 6 * changed[0, 8].sum()
    middle = state(page)
    drag("#frames > :nth-child(3) canvas", (0.5, 0.5))
    assert page.ask("moments.length") == 3
    changed = (middle != state(page)).any(dim=1)[0]
    assert changed.sum(dim=(1, 2)).tolist() == [36 * (frame == 2) for frame in range(16)]


def test_a_gif_has_all_frames_and_their_colors(page):
    set_slider(page, "frameCount", 5)
    file = Image.open(io.BytesIO(bytes(page.ask("[...eqm.gif()]"))))
    assert (file.n_frames, *file.size) == (5, 256, 256)
    assert (file.info["duration"], file.info["loop"]) == (40, 0)
    shown = ((state(page)[0] + 1) * 127.5).clamp(0, 255)  # (3, T, 16, 16)
    for frame in range(5):
        file.seek(frame)
        pixels = np.array(file.convert("RGB"))
        small = pixels[::16, ::16]
        assert np.array_equal(pixels, small.repeat(16, 0).repeat(16, 1))
        assert np.abs(small - shown[:, frame].permute(1, 2, 0).numpy()).max() <= 0.51
    press(page, "s")
    assert re.match(r"Saved CircleDown-5.gif, \d+ kB", page.ask("$('line').textContent"))


def test_the_tour_ends_with_one_frame_that_became_sixteen(browser, demo):
    browser.open(demo, READY, width=400, height=800)
    # the first step ends by itself
    browser.ask("TOUR.forEach((part, index) => { part[1] = index ? Infinity : 0; })")
    assert browser.ask("facts.healsRegions") is True
    press(browser, "t")
    browser.wait("tourAt === 1")
    for number in range(2, 7):
        assert browser.ask("$('guide').firstElementChild.textContent").startswith(f"{number}/6")
        if number in (2, 4, 5):
            browser.wait("resting")
        browser.ask("$('next').click()")
    assert browser.ask("$('guide').hidden")
    assert count_of(browser, "pinned") == [0]
    reached = state(browser)
    assert reached.shape[2] == 16
    assert reached.abs().max() < 1.5
    assert browser.ask("document.documentElement.scrollWidth") <= 400


def test_input_is_handled_while_the_field_is_computed(browser, demo):
    browser.open(demo, READY, query="?plain")
    browser.ask(
        "window.late = []; onkeyup = event => late.push(performance.now() - event.timeStamp)"
    )
    set_slider(browser, "frameCount", 32)
    browser.ask("$('play').click()")
    for _ in range(10):
        browser.wait("busy")
        press(browser, "x")
    assert np.median(browser.ask("late")) < 100  # ms
    assert count_of(browser, "rms") is None  # the first evaluation takes longer than all of these


@pytest.mark.parametrize("before", ["async function start", 'id="facts"', "</script>\n</body>"])
def test_a_truncated_file_says_so(browser, demo, tmp_path, before):
    content, _, _ = demo.read_text().partition(before)
    (tmp_path / "cut.html").write_text(content[:-4])
    says = "document.getElementById('line').textContent.includes('incomplete')"
    browser.open(tmp_path / "cut.html", says)
    assert browser.ask("document.getElementById('app')?.hidden !== false")

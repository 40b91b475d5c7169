"""The page that rolls a model's clips downhill: its field against torch, its controls, and what it
refuses.
"""

import io
import json
import re

import numpy as np
import pytest
import torch
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


def write_page(path, model):
    """Write the page of a model, whose weights are rounded to float16. Returns the path."""
    model.load_state_dict(
        {name: value.half().float() for name, value in model.state_dict().items()}
    )
    config = model.config
    count = model.config.num_classes
    data = {
        "classes": [f"<{label}>" for label in range(count)],
        "time_scale": TIME_SCALE,
        "vae": "none",
    }
    training = {"num_frames": config.num_frames, "video": config.num_frames > 1}
    state = {"ema": model.state_dict(), "step": 3, "config": {"data": data, "training": training}}
    path.write_text(descent.make_page("tiny & small", state, config))
    return path


def field_of(model, label, time_scale, guidance):
    """The guided field of one clip as a function, as samplers.sample takes it."""
    condition = Condition.of(torch.tensor([-1 if label is None else label]), model.config)
    scale = 1.0 if label is None else guidance
    return guided(model.requires_grad_(False), condition, torch.full((1,), time_scale), scale)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The page of the demo model, which no test changes."""
    out = tmp_path_factory.mktemp("page") / "new/descent.html"
    run_main(export, DEMO, "--html", out)
    return out


# The file -----------------------------------------------------------------------------------------


def test_the_committed_kernel_is_the_translation_of_its_text():
    text = descent.KERNEL.with_suffix(".wat").read_text()
    assert descent.KERNEL.read_bytes() == wasmtime.wat2wasm(text)


def test_the_demos_page_is_one_small_file_that_loads_nothing(demo):
    text = demo.read_text()
    assert (
        len(text) <= 4e6
        and "://" not in text
        and "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )
    assert "default-src 'none'" in text and not re.search(r'\b(?:src|href)="(?!data:)', text)
    facts = json.loads(re.search('id="facts">(.*?)</script>', text)[1])
    config = json.loads((DEMO / "config.json").read_text())
    assert facts["classes"] == config["data"]["classes"] and facts["frames"] == {
        "least": 4,
        "most": 32,
        "usual": 16,
    }
    assert facts["sampler"] == {
        "stepSize": 0.0262,
        "guidance": 1.5,
        "momentum": 0.3,
        "stopBelow": descent.REST,
    }


def test_a_page_and_a_folder_can_be_written_at_once(tmp_path):
    ckpt = random_checkpoint(tmp_path / "best.pt", num_frames=4, use_rope=True)
    run_main(export, ckpt, tmp_path / "shared", "--html", tmp_path / "page.html")
    assert (tmp_path / "shared/model.safetensors").exists() and "best.pt" in (
        tmp_path / "page.html"
    ).read_text()
    many = {
        "sampler": "gd",
        "num_sampling_steps": 250,
        "stepsize": 0.002,
        "mu": 0.3,
        "cfg_scale": 3.0,
    }
    assert descent.slider_values(many)["stepSize"] == pytest.approx(
        249 * 0.002 / descent.EVALUATIONS
    )
    assert (descent.slider_values(many)["momentum"], descent.slider_values(many)["guidance"]) == (
        0,
        3.0,
    )


def test_what_a_page_cannot_run_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    video = {"num_frames": 4, "use_rope": True}
    cases = {
        "needs the VAE mse": {"vae": "mse"},
        "needs the VAE in its folder": {"vae": make_vae(tmp_path / "vae")},
        "has an energy (ebm dot)": {"ebm": "dot"},
        "learned objective flow": {"objective": "flow"},
    }
    for words, settings in cases.items():
        ckpt = random_checkpoint(tmp_path / "model.pt", **video | settings)
        assert words in refused(capsys, export, ckpt, "--html", tmp_path / "page.html")
    ckpt = random_checkpoint(tmp_path / "model.pt", **video)
    for limit, words in {
        "MOST_WEIGHTS": "M weights; expected at most",
        "MOST_GFLOPS": "GFLOP per eval",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(descent, limit, 1e-5)
            assert words in refused(capsys, export, ckpt, "--html", tmp_path / "page.html")
    state = checkpoint.load(ckpt)
    state["ema"]["final_layer.linear.bias"][0] = 1e5
    checkpoint.save(tmp_path / "large.pt", state)
    assert "weights up to 1e+05" in refused(
        capsys, export, tmp_path / "large.pt", "--html", tmp_path / "page.html"
    )
    assert "DIR: missing" in refused(capsys, export, ckpt)
    assert not [*tmp_path.glob("p*")]


# The field ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_field_equals_that_of_torch_in_both_kernels(browser, tmp_path, name):
    changes, cases = MODELS[name]
    page = write_page(tmp_path / "page.html", tiny(**changes))
    model = tiny(**changes)
    model.load_state_dict(
        {name: value.half().float() for name, value in model.state_dict().items()}
    )
    for kernel, query in (("wasm", ""), ("plain", "?plain")):
        browser.open(page, READY, query=query)
        assert browser.ask("eqm.kernel()") == kernel
        for num_frames, label, time_scale, guidance in cases:
            x = clip(num_frames, model.config)
            about = {
                "label": label,
                "numFrames": num_frames,
                "timeScale": time_scale,
                "guidance": guidance,
            }
            call = (
                f"eqm.field({json.dumps(x.flatten().tolist())}, {json.dumps(about)}).then(f => "
                "[...f])"
            )
            f = torch.tensor(browser.ask(call)).view_as(x)
            assert (
                distance(f, field_of(model, label, time_scale, guidance)(x, torch.arange(1))) < 1e-5
            )


def test_a_wrong_call_of_the_field_says_what_it_expects(browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", tiny()), READY)
    for call, words in {
        "[1], {numFrames: 4}": "x has 1 values; expected 3 x 4 x 4 x 4",
        "new Array(192).fill(0), {numFrames: 4, label: 5}": (
            "label 5; expected null or an integer from 0 to 4"
        ),
    }.items():
        assert browser.ask(f"eqm.field({call}).catch(error => error.message)") == words
    set_slider(browser, "level", 0.2)
    for region, words in {
        "left": "trained without --forcing-regions",
        "later": "Disturbed.",
    }.items():
        browser.ask(f"document.querySelector('[data-region={region}]').click()")
        assert words in browser.ask("$('line').textContent")
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


def test_two_trajectories_with_disturbances_equal_those_of_torch(browser, demo):
    model = checkpoint.load_model(DEMO)[0]
    about = ("ngd", 7, 0.0262, 0.3)
    browser.open(demo, READY)
    first = state(browser)
    expected, _ = sample(field_of(model, 0, TIME_SCALE, 1.5), first, *about)
    assert (take_steps(browser, 6) - expected).abs().max() < 2e-3
    before = state(browser)
    browser.ask("document.querySelector('[data-region=left]').click()")
    after = state(browser)
    assert torch.equal(after[..., 8:], before[..., 8:])
    fresh = (after - 0.3 * before)[..., :8] / 0.7
    assert abs(fresh.mean()) < 0.1 and abs(fresh.std() - 1) < 0.1
    expected, _ = sample(field_of(model, 0, TIME_SCALE, 1.5), after, *about)
    assert (take_steps(browser, 6) - expected).abs().max() < 2e-3

    browser.open(demo, READY)
    set_slider(browser, "frameCount", 9)
    set_slider(browser, "level", 0)
    set_slider(browser, "guidance", 1)
    set_slider(browser, "momentum", 0)
    before = take_steps(browser, 3)
    browser.ask("$('label').value = 7; $('label').dispatchEvent(new Event('change'))")
    browser.ask("document.querySelectorAll('#frames button')[2].click()")
    browser.ask("document.querySelector('[data-region=square]').click()")
    after = state(browser)
    mask = torch.zeros(1, 1, 9, 1, 1, dtype=torch.bool)
    mask[:, :, 2] = True
    changed = (after != before).any(dim=1)[0]  # (T, H, W)
    assert changed.sum() == 8 * 6 * 6 and not changed[2].any() and changed[0, 5:11, 5:11].all()
    field = field_of(model, 7, TIME_SCALE, 1)
    expected, _ = sample(field, after, "gd", 6, 0.0262, given=after, mask=mask)
    found = take_steps(browser, 5)
    assert (found - expected).abs().max() < 2e-3 and torch.equal(found[:, :, 2], before[:, :, 2])


def test_the_study_disturbs_only_what_it_says(monkeypatch, tmp_path):
    x = torch.rand(2, 3, 8, 16, 16)
    labels = torch.tensor([0, 11])
    changed = {
        name: ((y != x).float().mean(), own)
        for name, y, own in disturb.disturbances(x, labels, 12, 0)
    }
    for name, (share, own) in changed.items():
        half = "half" in name and "mirrored" not in name
        square = "square" in name
        expected = 0.5 if half else 36 / 256 if square else 0 if name == "another class" else None
        assert expected is None or share == pytest.approx(expected, abs=1e-3), name
        assert own.tolist() == ([1, 0] if "another" in name else [0, 11])
    for name, value in {"FIRST": 1, "AGAIN": 1, "FRAMES": 4, "LEVELS": (0.3,)}.items():
        monkeypatch.setattr(disturb, name, value)
    run_main(disturb, "--num-clips", 2, "--out", tmp_path)
    assert len((tmp_path / "disturb.md").read_text().splitlines()) == 4 + 2 + 9
    rows = json.loads((tmp_path / "disturb.json").read_text())["rows"]
    assert rows["before"]["shape"] == [False, False]  # still noise


# The controls -------------------------------------------------------------------------------------


def count_of(browser, name="evaluations"):
    return browser.ask(f"moment().{name}")


def test_a_clip_rolls_until_it_rests_and_a_disturbance_wakes_it(browser, demo):
    browser.open(demo, READY)
    assert browser.ask("$('line').textContent").startswith("Noise.")
    press(browser, " ")
    browser.wait("running && resting")
    rested = state(browser)
    assert 10 <= count_of(browser) <= 25 and rested.abs().max() < 1.5
    assert browser.ask("$('line').textContent").startswith("At rest")
    browser.ask("$('label').value = 5; $('label').dispatchEvent(new Event('change'))")
    browser.wait("resting")
    assert "suits every class" in browser.ask("$('line').textContent")
    assert (state(browser) - rested).abs().mean() < 0.1
    press(browser, "d")  # the later half
    assert browser.ask("!resting")
    browser.wait("resting")
    assert (state(browser)[:, :, :8] - rested[:, :, :8]).abs().mean() < 0.1
    assert np.isfinite(browser.ask("moments.filter(one => one.rms).map(one => one.rms)")).all()


def test_pause_step_back_and_the_plot_move_through_the_descent(browser, demo):
    browser.open(demo, READY)
    start = state(browser)
    browser.ask("$('play').click()")
    browser.wait("moment().evaluations >= 3")
    browser.ask("$('play').click()")
    assert browser.ask("$('play').textContent") == "Play"
    browser.wait("!busy")
    reached = count_of(browser)
    browser.ask("$('back').click(); $('back').click()")
    assert count_of(browser) == reached - 2
    press(browser, "ArrowRight")
    assert count_of(browser) == reached - 1
    press(browser, "ArrowLeft")
    browser.ask(
        "$('plot').dispatchEvent(new MouseEvent('click', {clientX: "
        "$('plot').getBoundingClientRect().x + 30}))"
    )
    assert (
        count_of(browser) == 0
        and torch.equal(state(browser), start)
        and browser.ask("$('back').disabled")
    )
    set_slider(browser, "stepSize", 0.0131)  # another future
    assert browser.ask("moments.length") == 1
    half = take_steps(browser, 1)
    model = checkpoint.load_model(DEMO)[0]
    f = field_of(model, 0, TIME_SCALE, 1.5)(start, torch.arange(1))
    assert (half - start - float(browser.ask("$('stepSize').value")) * f).abs().max() < 1e-4
    set_slider(browser, "stopBelow", 2)
    assert browser.ask("$('stopBelow').closest('label').querySelector('output').value") == "2"


def test_new_noise_frames_pins_and_every_disturbance(browser, demo):
    browser.open(demo, READY)
    first = state(browser)
    browser.ask("document.querySelector('#frames button').click()")
    assert count_of(browser, "pinned") == [0]
    press(browser, "n")
    second = state(browser)
    assert (
        torch.equal(first[:, :, 0], second[:, :, 0])
        and not (first[:, :, 1:] == second[:, :, 1:]).any()
    )
    for count in (32, 4, 6):
        set_slider(browser, "frameCount", count)
        kept = min(count, 4)
        assert torch.equal(state(browser)[:, :, :kept], second[:, :, :kept])
        assert browser.ask("document.querySelectorAll('#frames canvas').length") == count
    for frame in (1, 2, 3, 4, 5):
        browser.ask(f"document.querySelectorAll('#frames button')[{frame}].click()")
    assert count_of(browser, "pinned.length") == 5 and "must be free" in browser.ask(
        "$('line').textContent"
    )
    browser.ask("document.querySelectorAll('#frames button')[0].click()")
    assert count_of(browser, "pinned") == [1, 2, 3, 4]
    browser.ask("$('label').value = ''; $('label').dispatchEvent(new Event('change'))")
    assert count_of(browser, "label") is None
    browser.ask("$('kind').value = 'blur'; $('kind').dispatchEvent(new Event('change'))")
    before = state(browser)[:, :, :1]
    browser.ask("document.querySelector('[data-region=all]').click()")
    padded = torch.nn.functional.pad(before[0, :, 0], (1, 1, 1, 1), mode="replicate")[:, None]
    weights = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
    expected = torch.nn.functional.conv2d(padded, weights[None, None])[:, 0]
    assert torch.allclose(state(browser)[0, :, 0], expected, atol=1e-6)


def test_the_mouse_paints_in_all_frames_or_in_one_and_the_descent_waits(browser, demo):
    browser.open(demo, READY, height=1200)
    before = state(browser)

    def drag(selector, *places):
        box = browser.ask(
            f"(({{x, y, width}}) => [x, y, width])($$('{selector}').getBoundingClientRect())"
        )
        for kind, place in zip(
            ("mousePressed", *["mouseMoved"] * (len(places) - 1)), places, strict=True
        ):
            x, y = (box[axis] + box[2] * place[axis] for axis in range(2))
            browser.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="left",
                buttons=1,
                clickCount=1,
            )
        browser.wait("stroke")
        browser.call(
            "Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1
        )
        browser.wait("!stroke")

    browser.ask("window.$$ = selector => document.querySelector(selector)")
    drag("#player", (0.25, 0.5), (0.5, 0.5), (0.75, 0.5))
    changed = (state(browser) != before).any(dim=1)[0]
    assert (
        changed[:, 5:11, 1:15].float().mean() == 1 and changed.sum() == 16 * 6 * changed[0, 8].sum()
    )
    drag("#frames > :nth-child(3) canvas", (0.5, 0.5))
    assert browser.ask("moments.length") == 3
    middle = state(browser)
    press(browser, "ArrowLeft")
    changed = (middle != state(browser)).any(dim=1)[0]
    assert changed.sum(dim=(1, 2)).tolist() == [36 * (frame == 2) for frame in range(16)]


def test_a_gif_has_all_frames_and_their_colors(browser, demo):
    browser.open(demo, READY)
    set_slider(browser, "frameCount", 5)
    file = Image.open(io.BytesIO(bytes(browser.ask("[...eqm.gif()]"))))
    assert (file.n_frames, file.size, file.info["duration"], file.info["loop"]) == (
        5,
        (256, 256),
        40,
        0,
    )
    shown = ((state(browser)[0] + 1) * 127.5).clamp(0, 255)  # (3, T, 16, 16)
    for frame in range(5):
        file.seek(frame)
        pixels = np.array(file.convert("RGB"))
        assert np.array_equal(pixels, pixels[::16, ::16].repeat(16, 0).repeat(16, 1))
        assert np.abs(pixels[::16, ::16] - shown[:, frame].permute(1, 2, 0).numpy()).max() <= 0.51
    press(browser, "s")
    assert re.match(r"Saved CircleDown-5.gif, \d+ kB", browser.ask("$('line').textContent"))


def test_the_tour_ends_with_one_frame_that_became_sixteen(browser, demo):
    browser.open(demo, READY, width=400, height=800)
    browser.ask(
        "TOUR.forEach((part, index) => { part[1] = index ? Infinity : 0; })"
    )  # the first step ends by itself
    assert browser.ask("facts.healsRegions") is True
    press(browser, "t")
    browser.wait("tourAt === 1")
    for number in range(2, 7):
        assert browser.ask("$('guide').firstElementChild.textContent").startswith(f"{number}/6")
        if number in (2, 4, 5):
            browser.wait("resting")
        browser.ask("$('next').click()")
    assert browser.ask("$('guide').hidden") and count_of(browser, "pinned") == [0]
    found = state(browser)
    assert found.shape[2] == 16 and found.abs().max() < 1.5
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


@pytest.mark.parametrize(
    "before", ["async function start", 'id="facts"', 'id="weights"', "</script>\n</body>"]
)
def test_a_truncated_file_says_so(browser, demo, tmp_path, before):
    content = demo.read_text()
    (tmp_path / "cut.html").write_text(content[: content.index(before) - 4])
    browser.open(
        tmp_path / "cut.html", "document.getElementById('line').textContent.includes('incomplete')"
    )
    assert browser.ask("!document.getElementById('app') || document.getElementById('app').hidden")

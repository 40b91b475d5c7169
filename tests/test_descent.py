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
import yaml
from PIL import Image

import checkpoint
import descent
import export
from browser import AXE, drag, press
from models import Condition
from samplers import guided, sample
from test_docs import check_command, commands
from test_models import clip, distance, tiny
from tiny_data import random_checkpoint
from training import ROOT, refused, run_main

DEMO = ROOT / "results/demo"
READY = "!$('app').className && moments.length"
STILL = {"prefers-reduced-motion": "reduce"}  # the clip then waits for Descend
LINE = "$('line').textContent"
TESTS = (ROOT / "tests/descent_page.js").read_text()
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


def write_page(path, starts=(), **changes):
    """Write the page of a tiny model with weights of float16. Returns (path, model)."""
    model = tiny(**changes)
    for weight in model.parameters():
        weight.data = weight.half().float()
    config = model.config
    classes = [f"<{label}>" for label in range(config.num_classes)]
    data = {"classes": classes, "time_scale": TIME_SCALE, "vae": "none"}
    training = {"num_frames": config.num_frames, "video": config.num_frames > 1}
    state = {"ema": model.state_dict(), "step": 3, "config": {"data": data, "training": training}}
    path.write_text(descent.make_page("tiny & small", state, config, starts))
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
    """The file of the demo model's page, without its pauses; no test changes it."""
    out = tmp_path_factory.mktemp("page") / "new/descent.html"
    run_main(export, DEMO, "--html", out)
    out.write_text(out.read_text().replace("PACE = 120", "PACE = 0"))
    return out


@pytest.fixture
def page(browser, demo):
    """A browser that shows the demo model's page at noise. It is loaded once for adjacent tests."""
    if browser.ask("location.pathname + location.search") == str(demo):
        browser.screen(height=1200, **STILL)
        browser.ask("reset()")
    else:
        browser.open(demo, READY, height=1200, **STILL)
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
    assert "<title>Break this video. It heals.</title>" in text
    assert "<p>demo: EqM-" in text


def test_a_page_and_a_folder_can_be_written_at_once(tmp_path):
    folder = tmp_path / "002-EqM-S-4-f4-rope/checkpoints"
    folder.mkdir(parents=True)
    ckpt = random_checkpoint(folder / "best.pt", num_frames=4, use_rope=True)
    page = tmp_path / "page.html"
    run_main(export, ckpt, tmp_path / "shared", "--html", page)
    assert (tmp_path / "shared/model.safetensors").exists()
    assert "<p>002-EqM-S-4-f4-rope: EqM-" in page.read_text()


def test_many_short_steps_become_few_long_ones_of_the_same_path():
    values = descent.slider_values({"sampler": "gd", "num_sampling_steps": 250, "stepsize": 0.002})
    assert values["stepSize"] * descent.EVALUATIONS == pytest.approx(249 * 0.002)
    assert values["momentum"] == 0  # that of ngd
    student = descent.slider_values({"sampler": "euler", "num_sampling_steps": 5, "cfg_scale": 1.0})
    assert student == descent.slider_values({"cfg_scale": 1.0})
    assert student["guidance"] == 1.0


def test_what_a_page_cannot_run_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    ckpt = tmp_path / "model.pt"
    page = tmp_path / "page.html"
    cases = {
        "needs the VAE mse": {"vae": "mse"},
        "needs the VAE in its folder": {"vae": tmp_path / "vae"},
        "": {},
    }
    for words, settings in cases.items():
        random_checkpoint(ckpt, num_frames=4, use_rope=True, **settings)
        if words:
            assert words in refused(capsys, export, ckpt, "--html", page)
    state = checkpoint.load(ckpt)
    gflops = checkpoint.config_of("CKPT", state).flops(4) / 1e9  # half of those with guidance
    limits = {"MOST_WEIGHTS": (1e-5, "M weights"), "MOST_GFLOPS": (1.9 * gflops, "per guided eval")}
    for limit, (value, words) in limits.items():
        with monkeypatch.context() as patch:
            patch.setattr(descent, limit, value)
            assert words in refused(capsys, export, ckpt, "--html", page)
    state["ema"]["final_layer.linear.bias"][0] = 1e5
    checkpoint.save(ckpt, state)
    assert "weights up to 1e+05" in refused(capsys, export, ckpt, "--html", page)
    assert not page.exists()


def test_the_workflow_calls_our_scripts_with_flags_that_they_have(monkeypatch):
    workflow = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text())
    assert workflow[True]["release"] == {"types": ["published"]}  # the key "on"
    assert workflow["permissions"] == {"contents": "read"}
    script = "".join(step.get("run", "") for step in workflow["jobs"]["build"]["steps"])
    calls = list(commands(f"```bash\n{script}```"))
    assert len(calls) == 5
    for names, words in calls:
        check_command(names, words, monkeypatch)


# The field ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_field_equals_that_of_torch_in_both_kernels(browser, tmp_path, name):
    changes, cases = MODELS[name]
    page, model = write_page(tmp_path / "page.html", **changes)
    for kernel, query in (("wasm", ""), ("plain", "?plain")):
        browser.open(page, READY, query=query, **STILL)
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


def test_a_small_weak_model_gets_other_words_and_wrong_calls_say_what_they_expect(
    browser, tmp_path
):
    browser.open(write_page(tmp_path / "page.html")[0], READY)
    assert browser.ask("document.title") == "A video generator in one file"
    assert browser.ask("$('label').options[1].text") == "<1>"
    browser.ask("remaining = 1")
    browser.wait("resting")
    assert "this model has not converged; train longer" in browser.ask(LINE)
    for value, region, words in (
        (0.2, "left", "trained without --forcing-regions"),
        (0.2, "later", "Scratched."),
        (0.3, "square", "Scratched."),
    ):
        set_value(browser, "level", value)
        scratch(browser, region)
        assert words in browser.ask(LINE)
    assert "heal" not in browser.ask("TOUR[3].text()")
    for call, words in {
        "[1], {numFrames: 4}": "x has 1 values; expected 3 x 4 x 4 x 4",
        "zeros, {numFrames: 4, label: 5}": "label 5; expected null or an integer from 0 to 4",
        "zeros": "numFrames undefined; expected an integer from 1 on",
        "zeros, {numFrames: 4, guidance: 'a'}": "guidance a; expected a number",
    }.items():
        call = call.replace("zeros", "new Array(192).fill(0)")
        assert browser.ask(f"eqm.field({call}).catch(error => error.message)") == words
    values = {"stepSize": 0.0261, "momentum": 0.33, "guidance": 7.5, "stopBelow": 3}
    browser.ask(f"facts.sampler = {values}; facts.frames.most = 1; connectSliders()")
    assert browser.ask("SETTINGS.map(id => Number($(id).value))") == [*values.values()]
    assert browser.ask("document.querySelector('[data-region=later]').hidden")


# Whole trajectories -------------------------------------------------------------------------------


def state(browser):
    """The clip on the page, (1, 3, T, 16, 16)."""
    values = browser.ask("[...moment().x]")
    return torch.tensor(values).view(1, 3, browser.ask("moment().numFrames"), 16, 16)


def set_value(browser, name, value, event="input"):
    browser.ask(f"$('{name}').value = {value}; $('{name}').dispatchEvent(new Event('{event}'))")


def scratch(browser, region):
    browser.ask(f"document.querySelector('[data-region={region}]').click()")


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
    scratch(page, "left")
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
        set_value(page, name, value)
    before = take_steps(page, 3)
    set_value(page, "label", 7, event="change")
    page.ask("document.querySelectorAll('#frames button')[2].click()")
    scratch(page, "square")
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


def run_in(page, name):
    """Call a function of descent_page.js."""
    page.ask(f"(() => {{ {TESTS}\nreturn {name}(); }})()")


# The first ten seconds ----------------------------------------------------------------------------


def test_the_page_starts_by_itself_and_a_scratch_heals_on_a_phone(browser, demo):
    browser.open(demo, READY, width=400)
    run_in(browser, "aClipIsMadeAndHeals")


def test_every_control_is_large_near_the_clip_and_passes_the_rules_of_axe(page):
    page.screen(400, **STILL)
    run_in(page, "everyControlIsLargeAndNearTheClip")
    page.ask(AXE)
    page.ask(
        "$('mapped').click(); $('tour').click(); document.querySelector('details').open = true"
    )
    for scheme in ("light", "dark"):
        for width in (400, 900, 1600):
            page.screen(width, 800, **STILL, **{"prefers-color-scheme": scheme})
            run_in(page, "theLooksPass")
            run_in(page, "theRowsAreEvenAndTheLeftSideFits")


# The controls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", re.findall(r"^(?:async )?function (test\w+)", TESTS, re.M))
def test_in_the_page(page, name):
    run_in(page, name)


def test_the_mouse_paints_in_all_frames_or_in_one_and_the_descent_waits(page):
    before = state(page)
    drag(page, "#player", (0.25, 0.5), (0.5, 0.5), (0.75, 0.5))
    page.wait("!stroke")
    changed = (state(page) != before).any(dim=1)[0]
    assert changed[:, 5:11, 1:15].all()
    assert changed.sum() == 16 * 6 * changed[0, 8].sum()
    middle = state(page)
    drag(page, "#frames > :nth-child(3) canvas", (0.5, 0.5))
    page.wait("!stroke")
    assert page.ask("moments.length") == 3
    changed = (middle != state(page)).any(dim=1)[0]
    assert changed.sum(dim=(1, 2)).tolist() == [36 * (frame == 2) for frame in range(16)]


def test_the_button_copies_the_link_and_says_what_it_holds(page):
    page.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    press(page, "n")
    drag(page, "#link", (0.5, 0.5))
    page.wait(f"{LINE} === 'The link is copied.'")
    copied = page.ask("navigator.clipboard.readText()")
    assert copied.endswith(".html#seed=1&class=CircleDown&frames=16")
    said = page.ask("$('along').parentElement.innerText")
    assert said.startswith("The link holds seed, class and frames, but no scratches")
    assert "send the file along" in said


def test_a_second_finger_does_nothing_and_a_change_ends_a_stroke(page):
    before = state(page)
    box = page.ask("$('player').getBoundingClientRect().toJSON()")

    def touch(kind, *places):
        points = [
            {"id": index, "x": box["x"] + box["width"] * x, "y": box["y"] + box["width"] / 2}
            for index, x in enumerate(places)
        ]
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    page.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
    touch("touchStart", 0.1)
    page.wait("stroke")
    touch("touchStart", 0.1, 0.9)
    touch("touchMove", 0.15, 0.8)
    changed = (state(page) != before).any(dim=1)[0, 0]
    assert changed[:, :5].any()
    assert not changed[:, 8:].any()
    set_value(page, "frameCount", 9)
    assert page.ask("stroke") is None
    shorter = state(page)
    touch("touchMove", 0.3, 0.8)
    touch("touchEnd")
    assert torch.equal(state(page), shorter)
    assert shorter.isfinite().all()


def test_a_tap_on_a_frame_paints_it_although_the_click_of_an_older_browser_names_no_finger(page):
    before = state(page)
    page.ask("""
        const canvas = document.querySelector("#frames > :nth-child(3) canvas");
        const box = canvas.getBoundingClientRect();
        const middle = {clientX: box.x + box.width / 2, clientY: box.y + box.width / 2};
        const finger = {...middle, pointerType: "touch", pointerId: 5};
        canvas.dispatchEvent(new PointerEvent("pointerdown", finger));
        canvas.dispatchEvent(new MouseEvent("click", middle));
    """)
    page.wait("!stroke")
    changed = (before != state(page)).any(dim=1)[0]
    assert changed.sum(dim=(1, 2)).tolist() == [36 * (frame == 2) for frame in range(16)]


def test_a_gif_has_all_frames_and_their_colors(page):
    set_value(page, "frameCount", 5)
    file = Image.open(io.BytesIO(bytes(page.ask("[...eqm.gif()]"))))
    assert (file.n_frames, *file.size) == (5, 256, 256)
    assert file.info["duration"] == 40
    assert file.info["loop"] == 0
    shown = ((state(page)[0] + 1) * 127.5).clamp(0, 255)  # (3, T, 16, 16)
    for frame in range(5):
        file.seek(frame)
        pixels = np.array(file.convert("RGB"))
        small = pixels[::16, ::16]
        assert np.array_equal(pixels, small.repeat(16, 0).repeat(16, 1))
        assert np.abs(small - shown[:, frame].permute(1, 2, 0).numpy()).max() <= 0.51
    press(page, "s")
    press(page, "s", autoRepeat=True)
    assert re.match(r"Saved CircleDown-5.gif, \d+ kB", page.ask("$('line').textContent"))


def test_input_is_handled_while_the_field_is_computed(browser, demo):
    browser.open(demo, READY, query="?plain", **STILL)
    browser.ask(
        "window.late = []; onkeyup = event => late.push(performance.now() - event.timeStamp)"
    )
    set_value(browser, "frameCount", 32)
    browser.ask("$('descend').click()")
    for _ in range(10):
        browser.wait("busy")
        press(browser, "x")
    assert np.median(browser.ask("late")) < 100  # ms
    assert (
        browser.ask("moment().rms") is None
    )  # the first evaluation takes longer than all of these


@pytest.mark.parametrize("before", ["async function start", 'id="facts"', "</script>\n</body>"])
def test_a_truncated_file_says_so(browser, demo, tmp_path, before):
    content, _, _ = demo.read_text().partition(before)
    (tmp_path / "cut.html").write_text(content[:-4])
    says = "document.getElementById('line').textContent.includes('incomplete')"
    browser.open(tmp_path / "cut.html", says)
    assert browser.ask("document.getElementById('app').className") == "loading"

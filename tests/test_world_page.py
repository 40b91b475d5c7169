"""The page that plays a causal model: its frames against torch, its controls and its map."""

import json

import pytest
import torch

from causal import Cache
from models import Condition
from samplers import guided, sample
from test_descent import STILL, TIME_SCALE, write_page
from test_models import distance

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


def torch_patches(model, first, noises, conditions, guidance, evaluations, shift):
    """The patches of a stream in float64, which begins with `first` and its condition."""
    model = model.double().requires_grad_(False)
    config = model.config
    pt = config.temporal_patch_size
    (_, height, width) = config.grid(pt)
    cache = Cache(config.depth, config.context_patches, height * width)
    time_scale = torch.tensor([TIME_SCALE]).double()
    patches = []
    for number, condition in enumerate(conditions):
        x = first.double()
        if number:
            x, _ = sample(
                guided(
                    lambda *inputs: model(*inputs, cache=cache), condition, time_scale, guidance
                ),
                noises[number].double(),
                "euler",
                num_steps=evaluations + 1,
                objective=config.learns,
                shift=shift,
            )
            patches.append(x)
        both = condition.y
        if guidance != 1:
            both = torch.cat([condition.null().y, condition.y])
        n = len(both)
        cache.fills = True
        model(x.double().repeat(n, 1, 1, 1, 1), both, time_scale.repeat(n), cache=cache)
        cache.fills = False
    return torch.cat(patches, dim=2)


@pytest.mark.parametrize("name", MODELS)
def test_frames_far_beyond_the_context_equal_those_of_torch_in_both_kernels(
    browser, tmp_path, name
):
    changes, guidance, evaluations, shift = MODELS[name]
    page, model = write_page(tmp_path / "page.html", **CAUSAL | changes)
    config = model.config
    pt = config.temporal_patch_size
    count = 1 + (config.context + 64) // pt
    shape = (config.in_channels, pt, config.input_size, config.input_size)
    noises = torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(3))
    conditions = []
    words = []  # of the page
    for number in range(count):
        label = -1 if number % 7 == 3 else number % config.num_classes
        y = [label]
        if config.actions:
            y.append(number % 4 - 1)  # "none" first
        conditions.append(Condition.of(torch.tensor([y] if config.actions else y), config))
        known = [None if value < 0 else value for value in y]
        words.append(dict(zip(("label", "action"), known, strict=False)))
    first = noises[0].clamp(-1, 1)
    expected = torch_patches(
        model, first, noises, conditions, guidance=guidance, evaluations=evaluations, shift=shift
    )
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
            frames.append(torch.tensor(made).view(1, *shape))
        frames = torch.cat(frames, dim=2)
        assert expected.std() > 0.1
        assert (frames - expected).abs().max() < 1e-4

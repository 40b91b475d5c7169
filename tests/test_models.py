"""The network: positions, frame rates, precision, initialization, energies, grad checkpointing,
FLOPs.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from models import PLAIN_TOKENS, EqM, EqM_models, EqMConfig, attend, model_config, position_table
from rope import apply_rotary
from runtime.distributed import autocast
from test_transport import normal

TINY = EqMConfig(
    input_size=4,
    patch_size=2,
    temporal_patch_size=4,
    in_channels=3,
    hidden_size=64,
    depth=2,
    num_heads=2,
    num_classes=5,
    num_frames=8,
    use_rope=True,
)
KINDS = {  # of positions
    "fixed": {"use_rope": False},
    "rotary": {},
    "rotary and table": {"position_table": "space"},
    "rotary, moving": {"rope_speed": 0.5},
}


def labels(batch=1):
    return torch.arange(batch)


ONE = labels()
TWO = labels(2)


def tiny(**changes):
    return randomized(EqM(replace(TINY, **changes)))


@torch.no_grad()
def randomized(model, seed=0):
    """Random parameters (f = 0 at initialization), large enough that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = 1.5 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.5
        parameter.normal_(std=std, generator=generator)
    return model.eval()


def clip(num_frames, config=TINY, batch=1, seed=1):
    side = config.input_size
    return normal(batch, config.in_channels, num_frames, side, side, seed=seed)


def distance(a, b):
    """The distance of a from b, relative to the norm of b."""
    return ((a - b).norm() / b.norm()).item()


# Positions ----------------------------------------------------------------------------------------

MOVES = {
    # temporal patches, not their frames
    "time reversed": lambda x: x.unflatten(2, (-1, 2)).flip(2).flatten(2, 3),
    "rows rolled": lambda x: x.roll(2, dims=3),
    "columns rolled": lambda x: x.roll(2, dims=4),
}


@pytest.fixture(params=["rotary", "fixed"])
def shallow(request):
    """A model of one block with 4 x 3 x 3 patches, and a clip."""
    model = tiny(**KINDS[request.param], input_size=6, temporal_patch_size=2, depth=1)
    return model, clip(8, model.config)


def without_positions(model, monkeypatch):
    if model.config.use_rope:
        rotary = model.rope.forward

        def unrotated(*args, **settings):
            cos, sin = rotary(*args, **settings)
            return torch.ones_like(cos), torch.zeros_like(sin)

        monkeypatch.setattr(model.rope, "forward", unrotated)
    else:
        monkeypatch.setitem(model._buffers, "pos_embed", torch.zeros_like(model.pos_embed))


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@torch.no_grad()
def test_only_positions_tell_where_a_patch_is(shallow, move, monkeypatch):
    model, x = shallow
    assert distance(model(move(x), ONE), move(model(x, ONE))) > 0.05
    without_positions(model, monkeypatch)
    assert distance(model(move(x), ONE), move(model(x, ONE))) < 1e-5


@torch.no_grad()
def test_the_time_scale_acts_through_its_embedding_and_rotary_positions(shallow, monkeypatch):
    model, x = shallow

    def difference():
        slow = model(x, ONE, torch.tensor([0.12]))
        return distance(slow, model(x, ONE, torch.tensor([0.04])))

    with monkeypatch.context() as patch:
        without_positions(model, patch)
        assert difference() > 0.05
    no_embedding = torch.zeros(1, model.config.hidden_size)
    monkeypatch.setattr(model.t_embedder, "forward", lambda time_scale: no_embedding)
    assert (difference() > 0.05) == model.config.use_rope


def naive_axis(position, channels):
    angles = [position * 10_000 ** (-2 * j / channels) for j in range(channels // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


VIDEO = {"num_frames": 10}
SPACE = {"num_frames": 10, "use_rope": True, "position_table": "space"}
IMAGE = {"num_frames": 1, "temporal_patch_size": 1}


@pytest.mark.parametrize(
    "size, side, kind",
    [
        ("Ti", 3, VIDEO),
        ("L", 3, VIDEO),
        ("S", 5, IMAGE),
        ("S", 5, SPACE),
    ],
)
def test_the_position_table_equals_a_naive_one_and_has_distinct_rows(size, side, kind):
    config = model_config(f"EqM-{size}/4", input_size=4 * side, in_channels=3, **kind)
    table = position_table(config)
    D = config.hidden_size
    if kind is VIDEO:
        # a third of the channels for each axis, the rest zero: 1024 channels are no multiple of 6
        third = 2 * (D // 6)
        zeros = [0] * (D - 3 * third)
        naive = []
        for t, h, w in np.ndindex(3, side, side):  # 10 frames: 3 patches
            axes = naive_axis(t, third) + naive_axis(h, third) + naive_axis(w, third)
            naive.append(axes + zeros)
    else:  # of MAE, the width first, whatever the number of frames
        half = D // 2
        naive = [naive_axis(w, half) + naive_axis(h, half) for h, w in np.ndindex(side, side)]
    assert_close(table, torch.tensor([naive]))
    assert len(table[0].unique(dim=0)) == len(naive)


@pytest.mark.parametrize(
    "kind", [KINDS["fixed"], KINDS["rotary and table"]], ids=["fixed", "space"]
)
def test_blocks_get_patches_plus_positions_and_return_the_features(kind):
    model = tiny(**kind)
    x = clip(8, batch=2)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    f, features = model(x, TWO, return_features=True)
    table = position_table(model.config)
    table = table.repeat(1, 8 // table.shape[1], 1)  # the same for every temporal patch
    assert torch.equal(seen[0], model.x_embedder(x) + table)
    assert torch.equal(seen[1], features)
    assert features.shape == (2, 2 * 2 * 2, 64)
    assert torch.equal(f, model(x, TWO))


# Frame rates and numbers of frames ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_clip_is_padded_with_its_last_frame_to_fill_its_last_patch(kind):
    model = tiny(**KINDS[kind], num_frames=18)
    filled = tiny(**KINDS[kind], num_frames=20)
    x = clip(18, batch=2)
    f = model(x, TWO)
    padded = torch.cat([x] + [x[:, :, -1:]] * 2, dim=2)
    assert torch.equal(f, filled(padded, TWO)[:, :, :18])
    if kind != "fixed":  # whatever number of frames a rotary model was made for, it takes any other
        assert torch.equal(f, tiny(**KINDS[kind])(x, TWO))


@pytest.mark.parametrize(
    "kind, num_frames, message",
    [
        ("rotary", 3, "at least 4 frames"),
        ("fixed", 7, "to num_frames 8"),
        ("fixed", 9, "to num_frames 8"),
    ],
)
def test_clips_that_do_not_fit_patches_or_fixed_positions_are_refused(kind, num_frames, message):
    with pytest.raises(ValueError, match=f"{message}, got {num_frames}"):
        tiny(**KINDS[kind])(clip(num_frames), ONE)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_not_saved_and_gradients_reach_all_frames_and_weights(kind):
    model = tiny(**KINDS[kind], num_frames=5)
    x = clip(5).requires_grad_()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    model(x, ONE).square().sum().backward()
    assert (x.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("use_rope", [True, False])
@torch.no_grad()
def test_bfloat16_rounds_little_and_autocast_keeps_tokens_in_float32(use_rope):
    model = tiny(use_rope=use_rope)
    x = clip(8)
    dtypes = set()
    f = model(x, ONE)
    for block in model.blocks:
        block.register_forward_hook(
            lambda block, args, out: dtypes.update({args[0].dtype, out.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        mixed, features = model(x, ONE, return_features=True)
    assert {*dtypes, features.dtype} == {torch.float32}
    assert distance(mixed.float(), f) < 0.05
    dtypes.clear()
    low = model.bfloat16()(x.bfloat16(), ONE)
    assert {*dtypes, low.dtype} == {torch.bfloat16}
    assert distance(low.float(), f) < 0.05


@pytest.mark.parametrize(
    "dtype, num_queries, num_keys, calls",
    [
        (torch.bfloat16, PLAIN_TOKENS, 64, []),
        (torch.bfloat16, 8, 2 * PLAIN_TOKENS, []),
        # more tokens would hold too many weights
        (torch.bfloat16, PLAIN_TOKENS + 1, 64, [torch.float32]),
        (torch.bfloat16, 8, 2 * PLAIN_TOKENS + 1, [torch.float32]),
        (torch.float32, 64, 64, [torch.float32]),
        (torch.float64, 64, 64, [torch.float64]),
    ],
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_training_attention_on_a_cpu_is_exact_and_avoids_the_bf16_kernel(
    dtype, num_queries, num_keys, calls, is_masked, monkeypatch
):
    kernel = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    shapes = [(1, 2, num_queries, 16), (1, 2, num_keys, 16), (1, 2, num_keys, 16)]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    sees = torch.rand(num_queries, num_keys) < (0.7 if is_masked else 1)
    mask = sees if is_masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs, mask)
        assert [call.args[0].dtype for call in kernel.call_args_list] == calls
        with torch.no_grad():
            assert torch.equal(attend(*inputs, mask), kernel(*inputs, mask))
    q, k, v = (part.detach().double().requires_grad_() for part in inputs)
    scores = q @ k.mT / 16**0.5
    exact = scores.masked_fill(~sees, -math.inf).softmax(dim=-1) @ v
    gradients = torch.autograd.grad(out.double().square().sum(), inputs)
    expected = torch.autograd.grad(exact.square().sum(), (q, k, v))
    most = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip((out, *gradients), (exact, *expected), strict=True):
        assert a.dtype == dtype
        assert distance(a.double(), b) < most


# Initialization, names, sizes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": True}, {"use_rope": False, "hidden_size": 8}, {"ebm": "dot"}, {"ebm": "l2"}],
)
def test_a_new_model_predicts_zero_and_has_a_gradient_to_learn_from(changes):
    model = EqM(replace(TINY, **changes))
    x = clip(8, batch=2)
    f = model(x, TWO, torch.tensor([0.04, 0.1]))
    # the square of a zero output would have no gradient
    assert f.any() == (model.config.ebm == "l2")
    (f - clip(8, batch=2, seed=2)).square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert any(gradient.any() for gradient in gradients if gradient is not None)


def test_a_model_name_sets_size_and_patches_and_overrides_win():
    assert len(EqM_models) == 5 * 3
    config = EqM_models["EqM-S/4"](depth=1).config
    expected = EqMConfig(
        input_size=32,
        patch_size=4,
        temporal_patch_size=4,
        in_channels=4,
        hidden_size=384,
        depth=1,
        num_heads=6,
        num_classes=1000,
        num_frames=4,
    )
    assert config == expected
    config = EqM_models["EqM-S/4"](depth=1, temporal_patch_size=2).config
    assert config == replace(expected, temporal_patch_size=2, num_frames=2)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("input_size 5 is not a multiple of patch_size 2", {"input_size": 5}),
        ("must be one of none, space, .* 'time'", {"position_table": "time"}),
    ],
)
def test_an_inconsistent_configuration_is_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_a_width_below_the_values_per_token_warns(recwarn):
    model_config("EqM-Ti/4", in_channels=3).warn_if_narrow()  # 192 values, hidden_size 192
    model_config("EqM-S/4").warn_if_narrow()
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match=r"a token holds 256 values .* hidden_size is only 192"):
        model_config("EqM-Ti/4").warn_if_narrow()


@torch.no_grad()
def test_attention_normalizes_rotates_and_mixes_like_a_naive_version():
    model = tiny(qk_norm=True)
    x = torch.randn(2, 8, 64)
    attention = model.blocks[0].attn
    rotary = model.rope((2, 2, 2), torch.tensor([0.04, 0.1]))
    q, k, v = attention.qkv(x).reshape(2, 8, 3, 2, 32).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
    q = q / q.square().mean(dim=-1, keepdim=True).sqrt() * attention.q_norm.weight
    k = k / k.square().mean(dim=-1, keepdim=True).sqrt() * attention.k_norm.weight
    q = apply_rotary(q, *rotary)
    k = apply_rotary(k, *rotary)
    weights = (q @ k.mT / 32**0.5).softmax(dim=-1)
    heads = (weights @ v).transpose(1, 2).reshape(2, 8, 64)
    naive = attention.proj(heads)
    assert_close(attention(x, rotary), naive, atol=1e-5, rtol=1e-5)


def test_the_frame_rate_is_embedded_in_octaves_from_25_fps():
    model = tiny()
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0]))
    model(clip(4, batch=3), torch.tensor([0, 1, 2]), torch.tensor([1 / 25, 2 / 25, 1 / 100]))
    octaves = torch.tensor([[0], [1], [-2]])
    angles = octaves * 10_000 ** (-torch.arange(128) / 128)
    assert_close(seen[0], torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_patches_are_embedded_like_a_convolution_and_put_back_in_place(monkeypatch):
    values = TINY.values_per_token  # 4 x 2 x 2 x 3 = 48
    model = tiny(hidden_size=values)
    x = clip(12, batch=2)
    proj = model.x_embedder.proj
    expected = proj(x).flatten(2).mT  # (B, N, D), width fastest
    assert_close(model.x_embedder(x), expected)
    proj.weight.copy_(torch.eye(values).unflatten(1, (3, 4, 2, 2)))
    proj.bias.zero_()
    # in the order of the convolution: channel, time, row, column
    tokens = model.x_embedder(x)
    # in the order of the last layer: time, row, column, channel
    last = tokens.unflatten(-1, (3, 16)).mT.flatten(-2)
    monkeypatch.setattr(model.final_layer, "forward", lambda *_: last)
    assert torch.equal(model(x, TWO), x)


# Energies -----------------------------------------------------------------------------------------


@pytest.fixture(params=[("dot", 6), ("l2", 8)])  # 6 frames are padded
def energy(request):
    """(a model with an energy, the same network without one, clips)."""
    ebm, num_frames = request.param
    settings = {"num_frames": num_frames, "qk_norm": True}
    model = tiny(ebm=ebm, **settings).double()
    plain = tiny(**settings).double()
    return model, plain, clip(num_frames, batch=2).double()


def test_the_field_is_minus_the_gradient_of_the_defined_energy(energy):
    model, plain, x = energy
    scale = torch.tensor([0.04, 0.1])
    f = model(x, TWO, scale).detach()

    def energy_of(x):
        return model.energy(x, TWO, scale)

    with torch.no_grad():
        g = plain(x, TWO, scale)
        terms = -g * x if model.config.ebm == "dot" else g.square() / 2
        assert_close(energy_of(x), terms.sum(dim=(1, 2, 3, 4)))
        with pytest.raises(ValueError, match="no energy"):
            plain.energy(x, TWO, scale)
        for _ in range(4):
            direction = torch.randn_like(x)
            change = energy_of(x + 1e-5 * direction) - energy_of(x - 1e-5 * direction)
            along = (f * direction).sum(dim=(1, 2, 3, 4))
            assert_close(along, -change / 2e-5, rtol=1e-5, atol=1e-6)


def test_training_gradients_of_an_energy_equal_finite_differences(energy):
    model, _, x = energy
    target = torch.randn_like(x)

    def loss():
        return (model(x, TWO) - target).square().mean()

    loss().backward()
    for weight in (
        model.blocks[0].attn.qkv.weight,
        model.blocks[1].mlp.fc1.weight,
        model.x_embedder.proj.weight,
        model.final_layer.linear.bias,
    ):
        direction = torch.randn_like(weight)
        along = (weight.grad * direction).sum()
        weight.data += 1e-5 * direction
        after = loss()
        weight.data -= 2e-5 * direction
        change = after - loss()
        weight.data += 1e-5 * direction
        assert along.item() == pytest.approx(change.item() / 2e-5, rel=1e-4)


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_sampling_an_energy_gives_the_same_field_without_a_graph(ebm):
    model = tiny(ebm=ebm)
    x = clip(7, batch=2)
    expected = model(x, TWO)
    with torch.no_grad():
        f, features = model(x, TWO, return_features=True)
        energy = model.energy(x, TWO)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.energy(x, TWO).dtype == torch.float32
            assert distance(model(x, TWO), f) < 0.1
    assert distance(f, expected.detach()) < 1e-4  # training uses another attention kernel
    assert expected.requires_grad
    assert not any(part.requires_grad for part in (f, features, energy, x))
    assert all(parameter.grad is None for parameter in model.parameters())


def loss_and_gradients(model, x, y, gamma=None):
    loss = model(x, y, gamma=gamma).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), gradients


@pytest.mark.parametrize(
    "kind, ebm, precision, use_rope",
    [
        ("full", "none", "bf16", True),
        ("full", "dot", "fp32", False),
        ("selective", "none", "fp32", True),
        ("selective", "none", "bf16", False),
    ],
)  # --compile: test_compile.py; --shard: test_sharding.py
def test_grad_checkpointing_changes_neither_loss_nor_gradient(kind, ebm, precision, use_rope):
    model = tiny(ebm=ebm, use_rope=use_rope)
    x = clip(8, batch=2)
    y = torch.tensor([0, model.config.num_classes])  # the second one without a class
    calls = []
    with autocast(x.device, precision):
        loss, gradients = loss_and_gradients(model, x, y)
        model.blocks[0].norm1.register_forward_pre_hook(lambda *_: calls.append(1))
        model.grad_checkpoint = kind
        again, same = loss_and_gradients(model, x, y)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    # forward, once for the field, once for the loss
    assert len(calls) == (2 if ebm == "none" else 3)
    if ebm == "none":
        with torch.no_grad():
            model(x, y)
        assert len(calls) == 3  # once


class NoTracker(nullcontext):
    """Replaces the counter's module tracker, which fails if the forward pass computes a
    gradient.
    """

    parents = ("Global",)


def counted_flops(function):
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoTracker()
    # the counter misses the backward pass of other kernels
    with counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name, num_frames, ebm, grad_checkpoint, objective",
    [
        ("EqM-Ti/4", 7, "none", None, "eqm"),
        ("EqM-Ti/4", 16, "none", None, "flow"),
        ("EqM-Ti/4", 8, "dot", None, "eqm"),
        ("EqM-S/2", 4, "none", "full", "eqm"),
        ("EqM-Ti/4", 8, "none", "selective", "eqm"),
    ],
)
def test_flops_equal_the_count_of_torch(name, num_frames, ebm, grad_checkpoint, objective):
    settings = {"input_size": 8, "in_channels": 4, "num_classes": 3, "use_rope": True, "depth": 2}
    config = model_config(name, ebm=ebm, objective=objective, **settings)
    model = randomized(EqM(config))  # with a zero output some parts get no gradient
    model.grad_checkpoint = grad_checkpoint
    x = torch.randn(2, 4, num_frames, 8, 8)
    gamma = torch.rand(2, num_frames) if objective == "flow" else None

    def forward():
        return model(x, TWO, gamma=gamma)

    if ebm == "none":
        assert counted_flops(forward) == 2 * config.flops(num_frames)
    error = 0.1 if grad_checkpoint == "full" or ebm != "none" else 0.02
    trained = counted_flops(lambda: forward().square().mean().backward())
    expected = 2 * config.training_flops(num_frames, grad_checkpoint)
    assert trained == pytest.approx(expected, rel=error)

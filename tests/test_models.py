import dataclasses
import itertools
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import (
    PLAIN_TOKENS,
    POSITION_TABLES,
    EqM,
    EqM_models,
    EqMConfig,
    TimeScaleEmbedder,
    attend,
    math_attention,
    model_config,
    position_table,
)
from rope import apply_rotary

SIZES = {"Ti": (6, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
TINY = EqMConfig(
    input_size=4, patch_size=2, temporal_patch_size=4, in_channels=3, hidden_size=64, depth=2, num_heads=2,
    num_classes=5, num_frames=8, use_rope=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_warning_of_narrow_models():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a token holds")
        yield


def tiny(**changes):
    return randomised(EqM(dataclasses.replace(TINY, **changes)))


@torch.no_grad()
def randomised(model, seed=0):
    """Random parameters (f = 0 at initialisation), large enough that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = 1.5 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.5
        parameter.normal_(std=std, generator=generator)
    return model.eval()


def clip(num_frames, config=TINY, batch=1, seed=1):
    shape = (batch, config.in_channels, num_frames, config.input_size, config.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(batch=1):
    return torch.arange(batch)


def distance(a, b):
    """The relative distance of a from b."""
    return ((a - b).norm() / b.norm()).item()


def reverse_patches(x, pt):
    """Reverse the order of the temporal patches, not of the frames within a patch."""
    return x.unflatten(2, (-1, pt)).flip(2).flatten(2, 3)


MOVES = {
    "time reversed": lambda x: reverse_patches(x, 2),
    "rows rolled": lambda x: x.roll(2, dims=3),
    "columns rolled": lambda x: x.roll(2, dims=4),
}


# Positions ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(size, rope) for size in ("Ti", "XL") for rope in (True, False)], ids=str)
def shallow(request):
    """The smallest and the largest size, with rotary and fixed positions: full width, one block, 4 x 3 x 3 patches."""
    size, use_rope = request.param
    settings = dict(input_size=6, num_frames=8, in_channels=2, num_classes=3, depth=1, use_rope=use_rope)
    return randomised(EqM_models[f"EqM-{size}/2"](**settings))


def without_rotary_angles(model, monkeypatch):
    rotary = model.rope.forward

    def no_angles(grid, time_scale):
        cos, sin = rotary(grid, time_scale)
        return torch.ones_like(cos), torch.zeros_like(sin)

    monkeypatch.setattr(model.rope, "forward", no_angles)


def without_positions(model, monkeypatch):
    if model.config.use_rope:
        without_rotary_angles(model, monkeypatch)
    else:
        monkeypatch.setitem(model._buffers, "pos_embed", torch.zeros_like(model.pos_embed))


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@torch.no_grad()
def test_positions_matter_in_time_and_space(shallow, move):
    x, y = clip(8, shallow.config), labels()
    assert distance(shallow(move(x), y), move(shallow(x, y))) > 0.05


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@torch.no_grad()
def test_without_positions_a_moved_input_only_moves_the_output(shallow, move, monkeypatch):
    without_positions(shallow, monkeypatch)
    x, y = clip(8, shallow.config), labels()
    assert distance(shallow(move(x), y), move(shallow(x, y))) < 1e-5


def offset_of_space(model, offset, monkeypatch):
    """Count all indices of height and width from an offset instead of 0, in the table and in the rotary angles."""
    H, W = (side + offset for side in model.config.grid(4)[1:])
    rotary = model.rope.forward

    def from_offset(grid, time_scale):
        parts = (part.unflatten(2, (-1, H, W)) for part in rotary((grid[0], H, W), time_scale))
        return [part[..., offset:, offset:, :].flatten(2, 4) for part in parts]

    monkeypatch.setattr(model.rope, "forward", from_offset)
    if model.config.position_table == "space":
        larger = dataclasses.replace(model.config, input_size=H * model.config.patch_size)
        table = position_table(larger).unflatten(1, (H, W))[:, offset:, offset:].flatten(1, 2)
        monkeypatch.setitem(model._buffers, "pos_embed", table)


@pytest.mark.parametrize("offset", [1, 5])
@pytest.mark.parametrize("speed", [0.0, 0.5])
@torch.no_grad()
def test_only_with_a_position_table_does_it_matter_from_where_height_and_width_are_counted(offset, speed, monkeypatch):
    changes, x = {}, clip(8, dataclasses.replace(TINY, input_size=8))
    for table in POSITION_TABLES:
        model = tiny(position_table=table, rope_speed=speed, input_size=8)
        before = model(x, labels())
        offset_of_space(model, offset, monkeypatch)
        changes[table] = distance(model(x, labels()), before)
    assert changes["none"] < 1e-5 and changes["space"] > 0.05


@pytest.mark.parametrize("move", MOVES)
@torch.no_grad()
def test_the_position_table_alone_tells_height_and_width_but_not_time(move, monkeypatch):
    model, x = tiny(position_table="space"), clip(16)
    without_rotary_angles(model, monkeypatch)
    moved = MOVES[move] if move != "time reversed" else lambda clip: reverse_patches(clip, 4)
    change = distance(model(moved(x), labels()), moved(model(x, labels())))
    assert change < 1e-5 if move == "time reversed" else change > 0.05


@torch.no_grad()
def test_the_time_scale_matters_through_its_embedding_alone_and_through_rotary_positions_alone(shallow, monkeypatch):
    x, y = clip(8, shallow.config), labels()

    def difference():
        return distance(shallow(x, y, torch.tensor([0.12])), shallow(x, y, torch.tensor([0.04])))

    assert difference() > 0.05
    with monkeypatch.context() as patch:
        without_positions(shallow, patch)
        assert difference() > 0.05
    monkeypatch.setattr(shallow.t_embedder, "forward", lambda time_scale: torch.zeros(1, shallow.config.hidden_size))
    assert difference() > 0.05 if shallow.config.use_rope else difference() == 0


@torch.no_grad()
def test_no_time_scale_is_25_frames_per_second(shallow):
    x, y = clip(8, shallow.config, batch=2), labels(2)
    assert torch.equal(shallow(x, y), shallow(x, y, torch.tensor([0.04, 0.04])))


@torch.no_grad()
def test_a_frame_changes_the_field_of_the_other_frames(shallow):
    x, y = clip(8, shallow.config), labels()
    changed = x.clone()
    changed[:, :, 0] += 1
    assert distance(shallow(changed, y)[:, :, 2:], shallow(x, y)[:, :, 2:]) > 1e-3


# Fixed positions ----------------------------------------------------------------------------------------------------


def naive_axis(position, channels):
    angles = [position * 10_000 ** (-2 * j / channels) for j in range(channels // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


@pytest.mark.parametrize("size", ["Ti", "L"])  # 1024 channels are no multiple of 6
def test_the_fixed_table_of_videos_gives_a_third_of_the_channels_to_each_axis(size):
    config = model_config(f"EqM-{size}/4", input_size=12, num_frames=10, in_channels=3)
    table, D = position_table(config), config.hidden_size
    third = 2 * (D // 6)
    places = itertools.product(range(3), range(3), range(3))  # 10 frames are 3 temporal patches of 4
    naive = [sum((naive_axis(p, third) for p in place), []) + [0] * (D - 3 * third) for place in places]
    assert table.isfinite().all()
    assert table.shape == (1, 27, D)
    torch.testing.assert_close(table[0], torch.tensor(naive))
    assert len(table[0].unique(dim=0)) == 27  # all positions differ


def test_the_fixed_table_of_images_is_that_of_mae_with_the_width_first():
    config = model_config("EqM-S/2", input_size=10, temporal_patch_size=1)
    naive = [naive_axis(w, 192) + naive_axis(h, 192) for h in range(5) for w in range(5)]
    torch.testing.assert_close(position_table(config)[0], torch.tensor(naive))


@pytest.mark.parametrize("num_frames", [1, 16])
def test_the_table_beside_rotary_positions_is_that_of_images(num_frames):
    patch = 4 if num_frames > 1 else 1
    config = model_config("EqM-S/2", input_size=10, temporal_patch_size=patch, num_frames=num_frames)
    images = dataclasses.replace(config, temporal_patch_size=1, num_frames=1)
    beside = dataclasses.replace(config, use_rope=True, position_table="space")
    assert torch.equal(position_table(beside), position_table(images))


@pytest.mark.parametrize("size", ["Ti", "L"])
def test_a_larger_picture_has_the_smaller_ones_positions_at_the_same_indices(size):
    settings = dict(in_channels=3, num_frames=8, use_rope=True, position_table="space")
    small, large = (
        position_table(model_config(f"EqM-{size}/4", input_size=side, **settings))[0].unflatten(0, (side // 4, -1))
        for side in (12, 20)
    )
    assert torch.equal(small, large[:3, :3])
    assert len(large.flatten(0, 1).unique(dim=0)) == 25  # all positions differ


def tokens_of(model, x):
    """What the first block is given."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(x, labels(len(x)))
    handle.remove()
    return seen[0]


def test_the_fixed_table_is_added_to_the_tokens():
    model, x = tiny(use_rope=False), clip(8)
    assert torch.equal(tokens_of(model, x), model.x_embedder(x) + position_table(model.config))


def test_the_table_of_space_is_added_to_the_tokens_of_every_temporal_patch():
    model, plain, x = tiny(position_table="space"), tiny(), clip(12, batch=2)
    added = tokens_of(model, x) - tokens_of(plain, x)
    table = position_table(model.config)[0]  # of the 2 x 2 patches of a frame
    for patches in added.unflatten(1, (3, 4)).flatten(0, 1):
        torch.testing.assert_close(patches, table, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [7, 9])
def test_fixed_positions_refuse_another_number_of_frames(num_frames):
    with pytest.raises(ValueError, match=f"tied to 8 frames, found {num_frames}"):
        tiny(use_rope=False)(clip(num_frames), labels())


# Frame rates and numbers of frames ----------------------------------------------------------------------------------


KINDS = {  # of positions
    "fixed": {"use_rope": False},
    "rotary": {},
    "rotary and table": {"position_table": "space"},
    "rotary, moving": {"rope_speed": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_of_mixed_time_scales_equals_its_samples_alone(kind):
    model, x, y = tiny(**KINDS[kind]), clip(8, batch=4), torch.tensor([0, 3, 5, 1])
    time_scale = torch.tensor([0.04, 0.08, 1 / 30, 0.5])
    alone = torch.cat([model(x[i : i + 1], y[i : i + 1], time_scale[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, y, time_scale), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("table", POSITION_TABLES)
@pytest.mark.parametrize("num_frames", [5, 7])
@torch.no_grad()
def test_a_clip_that_does_not_fill_its_last_patch_is_padded_with_its_last_frame(num_frames, table):
    model, x, y = tiny(position_table=table), clip(num_frames, batch=2), labels(2)
    f = model(x, y)
    padded = torch.cat([x] + [x[:, :, -1:]] * (-num_frames % 4), dim=2)
    assert f.shape == x.shape
    assert torch.equal(f, model(padded, y)[:, :, :num_frames])


@torch.no_grad()
def test_fixed_positions_pad_as_well():
    model, x = tiny(use_rope=False, num_frames=6), clip(6)
    assert model(x, labels()).shape == x.shape
    assert model.pos_embed.shape == (1, 2 * 2 * 2, 64)


@pytest.mark.parametrize("table", POSITION_TABLES)
@torch.no_grad()
def test_rotary_positions_work_for_every_number_of_frames_from_a_temporal_patch_up(table):
    model = tiny(position_table=table)
    for num_frames in (4, 5, 6, 7, 8, 19):
        f = model(clip(num_frames), labels())
        assert f.shape == (1, 3, num_frames, 4, 4)
        assert f.isfinite().all()


@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_fewer_frames_than_a_temporal_patch_are_refused(use_rope, num_frames):
    with pytest.raises(ValueError, match=f"needs at least 4 frames, found {num_frames}"):
        tiny(use_rope=use_rope)(clip(num_frames), labels())


@pytest.mark.parametrize("num_frames", [5, 8])
def test_the_gradient_reaches_every_frame_and_every_parameter(num_frames):
    model, x = tiny(), clip(num_frames).requires_grad_()
    model(x, labels()).square().sum().backward()
    assert (x.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_model_can_be_loaded_into_one_for_another_number_of_frames():
    model, other = tiny(), EqM(dataclasses.replace(TINY, num_frames=16)).eval()
    other.load_state_dict(model.state_dict())
    x = clip(12)
    assert torch.equal(other(x, labels()), model(x, labels()))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_not_in_the_state_dict(kind):
    model = tiny(**KINDS[kind])
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not any("rope" in name or "pos" in name for name in model.state_dict())


# Precision ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def spied_rotary(model, monkeypatch, x, time_scale):
    """The angles of a forward pass, and the dtypes of the rotated queries and keys."""
    angles, dtypes = [], []
    model.rope.register_forward_hook(lambda rope, args, out: angles.append(torch.stack(out)))

    def spy(x, cos, sin):
        turned = apply_rotary(x, cos, sin)
        dtypes.append((x.dtype, turned.dtype))
        return turned

    monkeypatch.setattr("models.apply_rotary", spy)
    model(x, labels(len(x)), time_scale)
    return angles, dtypes


def test_angles_are_computed_once_per_forward_and_rotate_queries_and_keys_of_every_block(monkeypatch):
    angles, dtypes = spied_rotary(tiny(), monkeypatch, clip(8), None)
    assert len(angles) == 1
    assert len(dtypes) == 2 * TINY.depth


@pytest.mark.parametrize("under_autocast", [True, False])
def test_angles_stay_float32_in_a_model_in_bfloat16_and_under_autocast(under_autocast, monkeypatch):
    time_scale = torch.tensor([0.033])
    expected = torch.stack(tiny().rope((2, 2, 2), time_scale))
    model, x = (tiny(), clip(8)) if under_autocast else (tiny().bfloat16(), clip(8).bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        angles, dtypes = spied_rotary(model, monkeypatch, x, time_scale)
    assert torch.equal(angles[0], expected)
    assert angles[0].dtype == torch.float32
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("use_rope", [True, False])
@torch.no_grad()
def test_bfloat16_changes_the_field_by_its_rounding_only(use_rope):
    model, x, y = tiny(use_rope=use_rope), clip(8), labels()
    f = model(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(model(x, y).float(), f) < 0.05
    low = model.bfloat16()(x.bfloat16(), y)
    assert low.dtype == torch.bfloat16
    assert distance(low.float(), f) < 0.05


@pytest.mark.parametrize("num_tokens", [64, PLAIN_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention_of_training_on_a_cpu_is_right(dtype, num_tokens):
    torch.manual_seed(0)  # the largest rounding of random inputs is close to the limit
    inputs = [torch.randn(1, 2, num_tokens, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    precise = [part.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for part in inputs]
    expected = F.scaled_dot_product_attention(*precise)
    expected.square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*inputs)
        found.to(expected.dtype).square().sum().backward()
        with torch.no_grad():
            sampled, plain = attend(*inputs), F.scaled_dot_product_attention(*inputs)
    assert found.dtype == dtype
    rounding = {torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert distance(found, expected.to(dtype)) < rounding
    for part, exact in zip(inputs, precise, strict=True):
        assert distance(part.grad, exact.grad.to(dtype)) < rounding
    assert torch.equal(sampled, plain)  # without a gradient as ever


def test_many_tokens_are_attended_to_in_float32_by_a_kernel_that_does_not_hold_all_weights():
    seen = []
    model = tiny().train()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append(q.dtype) or v)
        patch.setattr("models.PLAIN_TOKENS", 0)
        model(clip(8), labels())
        with torch.no_grad():
            model(clip(8), labels())
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize("use_rope", [True, False])
@torch.no_grad()
def test_the_residual_stream_is_float32_under_autocast(use_rope):
    model, dtypes = tiny(use_rope=use_rope), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        _, features = model(clip(8), labels(), return_features=True)
    assert dtypes == [(torch.float32, torch.float32)] * TINY.depth
    assert features.dtype == torch.float32
    dtypes.clear()
    model.bfloat16()(clip(8).bfloat16(), labels())
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}  # a model in bf16 stays in bf16


@torch.no_grad()
def test_mixed_precision_rounds_a_deep_model_no_more_with_rotary_positions_than_with_fixed_ones():
    errors = {}
    for use_rope in (True, False):
        torch.manual_seed(0)
        model = EqM(dataclasses.replace(TINY, depth=24, use_rope=use_rope))
        for parameter in model.parameters():
            if not parameter.any():  # what opens a branch is zero at initialisation
                parameter.normal_(std=0.02)
        x, y = clip(8, batch=4), labels(4)
        f = model(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            errors[use_rope] = distance(model(x, y).float(), f)
    assert errors[True] < 1.3 * errors[False]  # with a stream in bf16 it was 2.5 times as large


# Initialisation, names, sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_field_is_zero_at_initialisation(use_rope, qk_norm):
    model = EqM(dataclasses.replace(TINY, use_rope=use_rope, qk_norm=qk_norm))
    f = model(clip(8, batch=2), labels(2), torch.tensor([0.04, 0.1]))
    assert torch.equal(f, torch.zeros_like(f))


def test_parameter_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = EqM_models["EqM-S/2"](temporal_patch_size=1)
    D = 384
    expected = {
        "x_embedder.proj.weight": (D, 4, 1, 2, 2),  # published as (D, 4, 2, 2)
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (1001, D),
        "final_layer.linear.weight": (2 * 2 * 4, D),  # published with an unused second half, sigma
        "final_layer.linear.bias": (2 * 2 * 4,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    widths = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    for n, (layer, shape) in itertools.product(range(12), (widths | {"adaLN_modulation.1": (6 * D, D)}).items()):
        expected |= {f"blocks.{n}.{layer}.weight": shape, f"blocks.{n}.{layer}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(("size", "millions"), [("S", 33.0), ("B", 130.5), ("L", 458.1), ("XL", 675.1)])
def test_image_models_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = EqM_models[f"EqM-{size}/2"](temporal_patch_size=1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_there_are_fifteen_names_of_the_published_depths_widths_and_heads():
    assert list(EqM_models) == [f"EqM-{size}/{p}" for size in SIZES for p in (2, 4, 8)]
    for (size, shape), p in itertools.product(SIZES.items(), (2, 4, 8)):
        config = model_config(f"EqM-{size}/{p}")
        assert (config.depth, config.hidden_size, config.num_heads) == shape
        assert (config.patch_size, config.temporal_patch_size) == (p, p)


def test_the_temporal_patch_is_the_spatial_one_unless_told_otherwise():
    model = EqM_models["EqM-Ti/4"](depth=1, temporal_patch_size=2, num_frames=6, num_classes=7)
    assert model.x_embedder.proj.weight.shape == (192, 4, 2, 4, 4)
    assert model.config.num_frames == 6
    assert model.config.num_classes == 7


# Configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 5}, "input_size 5 is not a multiple of patch_size 2"),
        ({"hidden_size": 65}, "must be a multiple of 2 x 2 heads, found 65"),
        ({"hidden_size": 66, "num_heads": 2}, "must be a multiple of 2 x 2 heads, found 66"),
        ({"hidden_size": 8}, "head_dim of at least 6, found 4"),
        ({"use_rope": False, "num_frames": 3}, "needs at least 4 frames, found 3"),
        ({"rope_speed": -1.0}, "rope_speed must be in"),
        ({"rope_speed": 0.5, "use_rope": False}, "rope_speed 0.5 needs use_rope"),
        ({"rope_speed": 0.5, "num_heads": 4}, "rope_speed 0.5 needs 6 channels of a head"),
        ({"position_table": "time"}, "must be one of none, space, found 'time'"),
        ({"position_table": "space", "use_rope": False}, "position_table space needs use_rope"),
        ({"ebm": "energy"}, "ebm must be one of none, dot, l2, found 'energy'"),
        ({"rope_theta": 0.0}, r"rope_theta must be in \(0, 1e12\], found 0.0"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob must be in \[0, 1\], found 1.5"),
    ],
)
def test_a_configuration_that_is_inconsistent_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_with_rotary_positions_the_number_of_frames_is_a_record_only():
    assert dataclasses.replace(TINY, num_frames=1).num_frames == 1


def test_small_heads_are_fine_without_rotary_positions():
    model = tiny(hidden_size=8, use_rope=False)
    assert model(clip(8), labels()).shape == (1, 3, 8, 4, 4)


def test_a_hidden_size_below_the_number_of_values_of_a_token_warns():
    with pytest.warns(UserWarning, match=r"a token holds 256 values .* hidden_size is only 192"):
        EqM_models["EqM-Ti/4"](depth=1)


def test_a_large_enough_hidden_size_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EqM_models["EqM-Ti/4"](depth=1, in_channels=3)  # 192 values, hidden_size 192
        EqM_models["EqM-S/4"](depth=1)


# Parts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rope", [True, False])
@torch.no_grad()
def test_normalised_queries_and_keys_ignore_the_scale_of_their_projection(use_rope):
    x, y = clip(8), labels()

    def change_of_larger_queries(model):
        before = model(x, y)
        for block in model.blocks:
            block.attn.qkv.weight[:64] *= 3
            block.attn.qkv.bias[:64] *= 3
        return distance(model(x, y), before)

    assert change_of_larger_queries(tiny(use_rope=use_rope, qk_norm=True)) < 1e-5
    assert change_of_larger_queries(tiny(use_rope=use_rope, qk_norm=False)) > 0.01


@torch.no_grad()
def test_attention_normalises_then_rotates_queries_and_keys():
    model = tiny(qk_norm=True)
    attention, x, rotary = model.blocks[0].attn, torch.randn(2, 8, 64), model.rope((2, 2, 2), torch.tensor([0.04, 0.1]))
    q, k, v = attention.qkv(x).reshape(2, 8, 3, 2, 32).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
    q = q / q.square().mean(dim=-1, keepdim=True).sqrt() * attention.q_norm.weight
    k = k / k.square().mean(dim=-1, keepdim=True).sqrt() * attention.k_norm.weight
    scores = apply_rotary(q, *rotary) @ apply_rotary(k, *rotary).mT / 32**0.5
    naive = attention.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 8, 64))
    torch.testing.assert_close(attention(x, rotary), naive, atol=1e-5, rtol=1e-5)


def test_the_embedded_frame_rate_is_zero_at_25_frames_per_second_and_grows_by_one_per_octave():
    embedder = TimeScaleEmbedder(16)
    seen = []
    embedder.mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0]))
    embedder(torch.tensor([1 / 25, 2 / 25, 1 / 100]))
    frequencies = [10_000 ** (-j / 128) for j in range(128)]
    naive = [[math.cos(s * w) for w in frequencies] + [math.sin(s * w) for w in frequencies] for s in (0, 1, -2)]
    torch.testing.assert_close(seen[0], torch.tensor(naive), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_label_matters_and_there_is_one_more_for_no_label():
    model, x = tiny(), clip(8)
    fields = [model(x, torch.tensor([y])) for y in range(TINY.num_classes + 1)]
    assert all(distance(a, b) > 0.01 for a, b in itertools.combinations(fields, 2))
    with pytest.raises(IndexError):
        model(x, torch.tensor([TINY.num_classes + 1]))


def test_the_patch_embedding_is_the_convolution_of_its_weight():
    model, x = tiny(), clip(8, batch=2)
    by_convolution = model.x_embedder.proj(x).flatten(2).mT  # (B, N, D), width fastest
    torch.testing.assert_close(model.x_embedder(x), by_convolution)


@torch.no_grad()
def test_unpatchify_is_the_inverse_of_patchify():
    values = TINY.values_per_token  # 4 x 2 x 2 x 3 = 48
    model = tiny(hidden_size=values, num_frames=12)
    model.x_embedder.proj.weight.copy_(torch.eye(values).unflatten(1, (3, 4, 2, 2)))
    model.x_embedder.proj.bias.zero_()
    x = clip(12, batch=2)
    tokens = model.x_embedder(x)  # values in the order of the convolution: channel, time, row, column
    last = tokens.unflatten(-1, (3, 16)).mT.flatten(-2)  # in the order of the last layer: time, row, column, channel
    assert torch.equal(model.unpatchify(last, (3, 2, 2)), x)


@torch.no_grad()
def test_features_are_the_activations_of_the_last_block():
    model, seen = tiny(), []
    model.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    x, y = clip(7, batch=2), labels(2)
    f, features = model(x, y, return_features=True)
    assert features.shape == (2, 2 * 2 * 2, 64)
    assert torch.equal(features, seen[0])
    assert torch.equal(f, model(x, y))


# Energies -----------------------------------------------------------------------------------------------------------

ENERGIES = [("dot", True, 6), ("dot", False, 8), ("l2", True, 8), ("l2", False, 6)]  # 6 frames are padded


def energy_by_definition(model, x, y, time_scale):
    """The energies of EqM-E, from the output of the same network without an energy."""
    plain = EqM(dataclasses.replace(model.config, ebm="none")).to(x.dtype)
    plain.load_state_dict(model.state_dict())
    g = plain(x, y, time_scale)
    return {"dot": -(g * x).sum(dim=(1, 2, 3, 4)), "l2": (g * g).sum(dim=(1, 2, 3, 4)) / 2}[model.config.ebm]


@pytest.mark.parametrize(("ebm", "use_rope", "num_frames"), ENERGIES)
def test_the_field_of_an_energy_is_minus_its_gradient_by_finite_differences(ebm, use_rope, num_frames):
    model = tiny(ebm=ebm, use_rope=use_rope, num_frames=num_frames).double()
    x, y, scale = clip(num_frames, batch=2).double(), labels(2), torch.tensor([0.04, 0.1])
    f = model(x, y, scale).detach()
    assert f.shape == x.shape
    for seed in range(4):
        direction, h = clip(num_frames, batch=2, seed=10 + seed).double(), 1e-5
        with torch.no_grad():
            up, down = (model.energy(x + sign * h * direction, y, scale) for sign in (1, -1))
        along = (f * direction).sum(dim=(1, 2, 3, 4))
        torch.testing.assert_close(along, -(up - down) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ebm", "use_rope", "num_frames"), ENERGIES)
@torch.no_grad()
def test_the_energies_are_those_of_their_definition(ebm, use_rope, num_frames):
    model = tiny(ebm=ebm, use_rope=use_rope, num_frames=num_frames)
    x, y, scale = clip(num_frames, batch=2), labels(2), torch.tensor([0.04, 0.1])
    torch.testing.assert_close(model.energy(x, y, scale), energy_by_definition(model, x, y, scale))


@pytest.mark.parametrize(("ebm", "use_rope", "num_frames"), ENERGIES)
def test_training_differentiates_through_the_gradient_by_finite_differences(ebm, use_rope, num_frames):
    model = tiny(ebm=ebm, use_rope=use_rope, num_frames=num_frames, qk_norm=True).double()
    x, y, goal = clip(num_frames, batch=2).double(), labels(2), clip(num_frames, batch=2, seed=3).double()

    def loss():
        return (model(x, y) - goal).square().mean()

    loss().backward()
    names = ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "x_embedder.proj.weight", "final_layer.linear.bias")
    for name in names:
        weight, h = model.get_parameter(name), 1e-5
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            weight.data += sign * h * direction
            values.append(loss().item())
            weight.data -= sign * h * direction
        slope = (values[0] - values[1]) / (2 * h)
        assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4), name


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_the_field_of_an_energy_is_the_same_without_grad_and_leaves_no_graph(ebm):
    model, x, y = tiny(ebm=ebm), clip(7, batch=2), labels(2)
    expected = model(x, y)
    with torch.no_grad():
        f, features = model(x, y, return_features=True)
        energy = model.energy(x, y)
    assert distance(f, expected.detach()) < 1e-4  # training uses another attention kernel
    assert expected.requires_grad
    assert not any(part.requires_grad for part in (f, features, energy, x))
    assert all(parameter.grad is None for parameter in model.parameters())
    before = f.clone()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.energy(x, y).dtype == torch.float32
        assert distance(model(x, y), before) < 0.1


def test_training_on_an_energy_uses_math_attention_as_no_other_has_a_second_derivative(monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention

    def noted(*args):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    model, x, y = tiny(ebm="dot"), clip(8), labels(1)
    model(x, y)
    with torch.no_grad():
        model(x, y)
    tiny()(x, y)
    assert seen == [False, False, True, True, True, True]  # two blocks each
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="derivative"):
        q = torch.randn(1, 2, 4, 8, requires_grad=True)
        (first,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize(("ebm", "use_rope"), [("none", False), ("dot", True), ("l2", False)])
def test_a_new_model_learns_with_every_energy(ebm, use_rope):
    torch.manual_seed(0)
    model = EqM(dataclasses.replace(TINY, ebm=ebm, use_rope=use_rope))
    x, y, goal = clip(8, batch=4), labels(4), clip(8, batch=4, seed=2)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = (model(x, y) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_energy_of_a_model_without_one_is_an_error():
    with pytest.raises(ValueError, match="no energy"):
        tiny().energy(clip(8), labels(1))


# Grad checkpointing changes no result (nor does compilation: test_compile.py) ---------------------------------------


def loss_and_gradients(model, x, y):
    loss = model(x, y).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), gradients


@pytest.mark.parametrize("ebm", ["none", "dot"])
@pytest.mark.parametrize("use_rope", [True, False])
def test_grad_checkpointing_changes_no_loss_and_no_gradient(ebm, use_rope):
    model, x, y = tiny(ebm=ebm, use_rope=use_rope), clip(8, batch=2), labels(2)
    loss, gradients = loss_and_gradients(model, x, y)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.grad_checkpoint = True
    again, same = loss_and_gradients(model, x, y)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert len(calls) == (2 if ebm == "none" else 3)  # forward, once for the field, once for the loss
    with torch.no_grad():
        calls.clear()
        tiny_f = model(x, y)
    if ebm == "none":
        assert len(calls) == 1
    assert tiny_f.shape == x.shape


def test_grad_checkpointing_needs_less_memory():
    """The memory is that of saved tensors, counted by autograd's hooks."""
    kept = {}
    for grad_checkpoint in (False, True):
        model, bytes_kept = tiny(depth=8), 0
        model.grad_checkpoint = grad_checkpoint

        def count(tensor):
            nonlocal bytes_kept
            if tensor.grad_fn is not None or not tensor.requires_grad:
                bytes_kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(clip(32, batch=4), labels(4))
        kept[grad_checkpoint] = bytes_kept
    assert kept[True] < 0.3 * kept[False]


# FLOPs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_frames"), [("EqM-Ti/4", 7), ("EqM-Ti/4", 16), ("EqM-S/2", 4)])
def test_the_flops_are_those_that_torch_counts(name, num_frames):
    model = EqM(model_config(name, input_size=8, in_channels=4, num_classes=3, use_rope=True, depth=2))
    x, y = torch.randn(2, 4, num_frames, 8, 8), torch.tensor([0, 1])
    with FlopCounterMode(display=False) as counter, math_attention():
        model(x, y)
    assert counter.get_total_flops() == 2 * model.config.flops(num_frames)
    with FlopCounterMode(display=False) as counter, math_attention():
        model(x, y).square().mean().backward()
    assert counter.get_total_flops() == pytest.approx(2 * model.config.training_flops(num_frames), rel=0.02)


class NoTracker(nullcontext):
    """In place of the counter's module tracker, which fails if a gradient is part of the forward pass."""

    parents = ("Global",)


def test_the_flops_of_training_an_energy_and_of_grad_checkpointing():
    settings = {"input_size": 8, "in_channels": 4, "num_classes": 3, "use_rope": True, "depth": 2}
    x, y = torch.randn(2, 4, 8, 8, 8), torch.tensor([0, 1])
    for ebm, twice in (("dot", False), ("none", True)):
        model = EqM(model_config("EqM-Ti/4", **settings, ebm=ebm))
        for parameter in model.parameters():  # with a zero output layer some parts get no gradient
            parameter.data.normal_(std=0.1)
        model.grad_checkpoint = twice
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoTracker()
        with counter, math_attention():
            model.train()(x, y).square().mean().backward()
        assert counter.get_total_flops() == pytest.approx(2 * model.config.training_flops(8, twice), rel=0.1)

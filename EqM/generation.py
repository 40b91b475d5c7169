"""Generate clips by a Plan: noise, latents, videos; by batches and windows, or as a stream."""

import time
from functools import partial

import torch
from torch import nn

from causal import Cache
from given import Details
from plans import count_evaluations
from runtime import distributed
from runtime.cli import Bar, UserError, say
from runtime.rng import noise_of_samples
from samplers import guided, sample
from transport import interpolate


def cast_products(model, precision):
    """In mixed precision, cast the weights of a model's matrix products, which autocast would cast
    in every call.

    Outputs under autocast are bit-equal.
    """
    if precision not in distributed.MIXED:
        return
    for module in model.modules():
        # PatchEmbed's convolution is a matrix product, too
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.to(distributed.MIXED[precision])


@torch.no_grad()
def generate(
    plan,
    indices,
    seed,
    device,
    settings,
    batch_size=16,
    given=None,
    init=None,
    init_gamma=0.0,
    keep_background=True,
    energy=False,
    keep_latents=False,
    strict=True,
    before_evaluation=lambda: None,
):
    """Generate the samples `indices` of a Plan by batch and window, with one progress bar.

    The noise of a sample depends only on seed, index and window. A batch without any condition has
    no guidance by class. Yields the samples' indices, and what `sample_windows` yields.

    Args:
        settings: from `sampling_settings`.
        given: given(indices) returns clips uint8 (n, 3, T, H, W) and a mask (n, T), true where
            samples keep their frames; for keep_background see `Details`.
        init: as `given`; its clips replace a share init_gamma of the noise at the start.
        energy: also record the (guided) energy at every point.
        keep_latents: also yield the latents of the new frames, unless the model is causal.
        strict: raise UserError if samples are not finite; otherwise print a note.
        before_evaluation: called before each evaluation of the network; may raise.
    """
    most = count_evaluations(settings)
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    total = len(batches) * len(plan.window_starts) * most
    bar = Bar(total=total, desc="sampling", unit="evaluation", leave=False)
    began = time.monotonic()

    def on_evaluation(running):
        num_frames = bar.n / total * len(indices) * plan.num_frames
        rate = num_frames / (time.monotonic() - began)
        bar.set_postfix_str(f"{running} running, {rate:.3g} frames/s", refresh=False)
        bar.update()
        before_evaluation()

    with bar:
        for batch in batches:
            details = None
            if given:
                clips, mask = (tensor.to(device) for tensor in given(batch))
                details = Details(clips, mask, keep_background)
            if plan.model.config.causal:
                stream = Stream(plan, batch, settings, seed, device, strict, on_evaluation)
                windows = stream_windows(stream, details)
            else:
                windows = sample_windows(
                    plan,
                    batch,
                    settings | {"start_gamma": init_gamma},
                    seed=seed,
                    device=device,
                    details=details,
                    init=init,
                    energy=energy,
                    keep_latents=keep_latents,
                    strict=strict,
                    on_evaluation=on_evaluation,
                )
            for part in advance(bar, windows, most):
                yield batch, *part


def advance(bar, parts, most):
    """Yield these parts, each of which advances the bar by `most` evaluations, although samples may
    stop early.
    """
    end = bar.n
    for part in parts:
        end += most
        bar.update(end - bar.n)
        yield part


def whole_videos(plan, indices, parts):
    """The videos of the samples `indices`, uint8 (n, T, H, W, 3) on the CPU, from the parts that
    `generate` yields.
    """
    size = plan.image_size
    videos = torch.empty(len(indices), plan.num_frames, size, size, 3, dtype=torch.uint8)
    for batch, first, frames, *_ in parts:
        rows = [indices.index(index) for index in batch]
        videos[rows, first : first + frames.shape[1]] = frames.cpu()
    return videos


def sample_windows(
    plan,
    indices,
    settings,
    seed,
    device,
    details,
    init,
    energy,
    keep_latents,
    strict,
    on_evaluation,
):
    """Sample the windows of a batch, each from the last frames of the one before, and decode them.

    details: the Details of given clips, or None. Other arguments: see `sample_window`. Yields for
    each window the number of the first new frame, the new frames uint8 (n, k, H, W, 3), evaluations
    (n,), energies (n, num_steps) and latents (n, C, k, h, w); energies and latents are None unless
    they are recorded.
    """
    time_scale = plan.time_scale_of(indices).to(device)
    tail = None
    for index, start in enumerate(plan.window_starts):
        x = initial_latents(
            plan,
            indices,
            seed=seed,
            device=device,
            init=init,
            init_gamma=settings["start_gamma"],
            window=index,
        )
        kept = kept_part(plan, x, start=start, details=details, tail=tail)
        latents, evaluations, energies = sample_window(
            plan,
            x,
            condition=plan.condition_at(indices, frame=start).to(device),
            time_scale=time_scale,
            kept=kept,
            settings=settings,
            energy=energy,
            strict=strict,
            on_evaluation=on_evaluation,
        )
        tail = latents[:, :, -plan.overlap :]  # not used if there is one window
        first = plan.overlap if index else 0
        # the last window may reach beyond the video
        latents = latents[:, :, first : plan.num_frames - start]
        videos = plan.vae.decode(latents)
        if details:
            videos = details.add(videos, start + first)
        yield start + first, videos, evaluations, energies, latents if keep_latents else None


class Stream:
    """Samples videos of a causal model, one temporal patch after the other, without end.

    A patch sees the clean patches before it, as far back as the context of the model. So time and
    memory per patch do not grow. `evaluations` (n,) counts those of the last step, per sample.
    """

    def __init__(
        self,
        plan,
        indices,
        settings,
        seed=0,
        device="cpu",
        strict=True,
        on_evaluation=lambda running: None,
    ):
        """indices: of the samples of the Plan, which tell seeds and frame rates. settings: from
        `sampling_settings`. strict, on_evaluation: as in `sample_window`.
        """
        self.plan = plan
        self.indices = indices
        self.device = torch.device(device)
        self.precision = settings["precision"]
        self.is_guided = settings["guidance"] != 1
        self.time_scale = plan.time_scale_of(indices).to(device)
        self.noise_of = partial(
            initial_latents, plan, indices, seed=seed, device=device, init=None, init_gamma=0.0
        )
        self.sample_latents = partial(
            sample_window,
            plan,
            time_scale=self.time_scale,
            kept={},
            settings=settings,
            energy=False,
            strict=strict,
            on_evaluation=on_evaluation,
        )
        self.reset()

    def reset(self, clips=None, conditions=()):
        """Begin again, with nothing, or with clips uint8 (n, 3, T, H, W) of whole temporal patches
        and a list of what `step` takes for each patch.

        The same noise follows the same number of patches.
        """
        config = self.plan.model.config
        tokens = config.num_tokens(self.plan.window)
        self.cache = Cache(config.depth, config.context_patches, tokens)
        self.num_patches = 0  # that were sampled or shown
        if clips is not None:
            parts = clips.split(self.plan.window, dim=2)
            for part, condition in zip(parts, conditions, strict=True):
                self.show(part, condition)

    @torch.no_grad()
    def step(self, condition=None):
        """Sample the next temporal patch of these samples.

        condition: a Condition; None = that of the Plan. Returns its frames, uint8 (n, pt, H, W, 3).
        """
        condition = self.to_condition(condition)
        latents, self.evaluations, _ = self.sample_latents(
            self.noise_of(window=self.num_patches), condition=condition, cache=self.cache
        )
        self.remember(latents, condition)
        return self.plan.vae.decode(latents)

    @torch.no_grad()
    def show(self, clips, condition=None):
        """Let the videos continue with a temporal patch of clips uint8 (n, 3, pt, H, W).

        condition: as in `step`. Returns its frames as the VAE decodes them, uint8 (n, pt, H, W, 3).
        """
        latents = self.plan.vae.encode(clips.to(self.device))
        self.remember(latents, self.to_condition(condition))
        return self.plan.vae.decode(latents)

    def to_condition(self, condition):
        """The Condition of the next patch, on the device. condition: as in `step`."""
        if condition is None:
            frame = self.num_patches * self.plan.window
            condition = self.plan.condition_at(self.indices, frame)
        return condition.to(self.device)

    def remember(self, latents, condition):
        """Add a clean patch to the cache. With guidance, the cache holds it without condition and
        with it, as `guided` evaluates both.
        """
        y = condition.y
        time_scale = self.time_scale
        if self.is_guided:
            latents = latents.repeat(2, 1, 1, 1, 1)
            y = torch.cat([condition.null().y, y])
            time_scale = time_scale.repeat(2)
        model = self.plan.model
        is_told = model.config.learns.is_told
        told = {"gamma": torch.ones(len(y), device=self.device)} if is_told else {}
        self.cache.rows = slice(None)
        kept = [dict(vars(block)) for block in self.cache.blocks]
        self.cache.fills = True
        try:
            # a compiled graph that fills a cache would serve one pass per patch
            with distributed.autocast(self.device, self.precision), model.without_graphs():
                model(latents, y, time_scale, cache=self.cache, **told)
        except BaseException:  # such as Ctrl+C, after which a program may repeat the step
            for block, values in zip(self.cache.blocks, kept, strict=True):
                vars(block).update(values)
            raise
        finally:
            self.cache.fills = False
        self.num_patches += 1


def stream_windows(stream, details):
    """Yield what `sample_windows` yields, for each temporal patch of a Stream.

    details: of given first frames, or None.
    """
    plan = stream.plan
    num_given = 0
    if details:
        num_given = details.clips.shape[2]
        assert details.mask.all(), "a prefix"
    for start in plan.window_starts:
        evaluations = torch.zeros(len(stream.indices), dtype=torch.int64)
        if start < num_given:
            videos = stream.show(details.clips[:, :, start : start + plan.window])
        else:
            videos = stream.step()
            evaluations = stream.evaluations
        videos = videos[:, : plan.num_frames - start]  # the last patch may reach beyond the video
        if details:
            videos = details.add(videos, start)
        yield start, videos, evaluations, None, None


def sample_window(
    plan,
    x,
    condition,
    time_scale,
    kept,
    settings,
    energy,
    strict,
    on_evaluation,
    cache=None,
):
    """Follow the guided field of a Plan from x (B, C, T, H, W).

    Returns (samples, evaluations (B,), energies or None). Samples are float32;
    settings["precision"] applies to the network only. kept: from `kept_part`. on_evaluation(number
    of running samples) is called before each evaluation. Energies are (B, num_steps), NaN after a
    sample has stopped. cache: of the Stream of a causal model.
    """
    if kept and kept["mask"].all():  # nothing to sample
        return kept["given"], torch.zeros(len(x), dtype=torch.int64, device=x.device), None
    settings = dict(settings)
    precision = settings.pop("precision")
    guidance = settings.pop("guidance")
    model = plan.model
    weak = plan.weak
    objective = model.config.learns
    network = model if cache is None else partial(model, cache=cache)
    if settings["shift"] is None:
        settings["shift"] = objective.solver_shift(plan.gamma_shift)
    # A cache holds both halves of guidance, whatever the condition
    if condition.is_null() and weak is None and cache is None:
        guidance = 1.0
    field = guided(network, condition, time_scale, guidance=guidance, weak=weak)
    energies = None
    if energy:
        energy_of = guided(
            model.energy, condition, time_scale, guidance=guidance, weak=weak and weak.energy
        )
        energies = torch.full((len(x), settings["num_steps"]), torch.nan, device=x.device)
    points = iter(range(settings["num_steps"]))

    # keep: indices of the running samples; gamma: if the objective is told it
    def field_with_progress(x, keep, *gamma):
        on_evaluation(len(keep))
        if cache is not None:
            cache.rows = rows_of(keep, len(condition.y), guidance)
        return field(x, keep, *gamma)

    def observe(x, keep):
        if energy:
            energies[keep, next(points)] = energy_of(x, keep)

    with distributed.autocast(x.device, precision):
        samples, evaluations = sample(
            field_with_progress,
            x,
            objective=objective,
            observe=observe,
            **kept,
            **settings,
        )
    if not samples.isfinite().all():
        text = f"--sampler {settings['method']}: samples are not finite"
        if strict:
            raise UserError(f"{text}; use smaller steps, more steps or another checkpoint")
        say(f"note: {text}")
    return samples, evaluations, energies


def rows_of(keep, num_samples, guidance):
    """The rows of a Cache for the running samples `keep`, also those without a condition if there
    is guidance. A slice of all of them copies nothing.
    """
    if len(keep) == num_samples:
        return slice(None)
    return keep if guidance == 1 else torch.cat([keep, keep + num_samples])


def kept_part(plan, x, start, details, tail):
    """Return the arguments `given` and `mask` of `samplers.sample` for the window x from `start`:
    what the window keeps, and where.

    They hold the given frames of `details` and `tail`, the last latents of the previous window.
    Returns {} if both are None.
    """
    if details is None and tail is None:
        return {}
    latents = torch.zeros_like(x)
    is_kept = torch.zeros(len(x), plan.window, dtype=torch.bool, device=x.device)
    if details is not None:
        given = details.mask[:, start : start + plan.window]
        is_kept[:, : given.shape[1]] = given
        # encoding takes long, so only frames that some sample is given
        frames = is_kept.any(dim=0).nonzero()[:, 0]
        if len(frames):
            latents[:, :, frames] = plan.vae.encode(details.clips[:, :, start + frames])
    if tail is not None:
        latents[:, :, : plan.overlap] = tail
        is_kept[:, : plan.overlap] = True
    return {"given": latents, "mask": is_kept[:, None, :, None, None]}


def initial_latents(plan, indices, seed, device, init, init_gamma, window):
    """Return the initial latents of a window, (n, C, T, h, w): noise, or with `init` an
    interpolation with clips.
    """
    config = plan.model.config
    shape = (config.in_channels, plan.window, config.input_size, config.input_size)
    noise = noise_of_samples(seed, indices, shape, window).to(device)
    if init is None:
        return noise
    clips, _ = init(indices)
    encoded = plan.vae.encode(clips.to(device))
    gamma = torch.full((len(indices),), init_gamma, device=device)
    return interpolate(encoded, noise, gamma)

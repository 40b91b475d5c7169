"""Sample clips from your own Python program:

    import torch

    sampler = torch.hub.load(PATH, "demo", source="local")
    clips = sampler(classes=["CircleLeft"], num_frames=16)  # uint8 (1, 16, H, W, 3)

PATH is this folder. `torch.hub.load(PATH, "model", source="local", ckpt=FILE)` samples from any
other checkpoint. Its `stream` makes videos step by step, if the model is causal
(docs/long-videos.md). The sampler runs in your process, so your program needs the packages of
requirements.txt; its own modules may have the names of ours, such as models.py.
"""

import contextlib
import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "numpy", "decord", "einops", "tqdm", "av", "diffusers"]

_ROOT = Path(__file__).resolve().parent
_OWN_NAMES = {path.stem for path in (_ROOT / "EqM").iterdir()}
_own_modules = {}
_FLAGS = [  # of sample_gd.py
    "actions",
    "cfg_scale",
    "fps",
    "mu",
    "num_sampling_steps",
    "overlap",
    "precision",
    "rope_scale",
    "sampler",
    "solver_shift",
    "stepsize",
    "stop_below",
    "time_scale",
    "weak_ckpt",
    "window",
]


def demo(device=None):
    """A sampler of the demo model, which makes Moving Shapes of 16 x 16 px.

    device: a torch.device or its name; default: the first GPU, else the CPU.
    """
    return _Sampler(_ROOT / "results" / "demo", device)


def model(ckpt, device=None):
    """A sampler of any video model: a checkpoint of train.py, or a folder of scripts/export.py.

    device: a torch.device or its name; default: the first GPU, else the CPU.
    """
    return _Sampler(ckpt, device)


class _Sampler:
    """Samples clips from one checkpoint, whose classes are in `classes`."""

    def __init__(self, ckpt, device):
        import torch

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with _imports():
            import checkpoint
            import plans
            import sample_gd

            self.words = ["--video", "--ckpt", str(ckpt)]
            self.model, self.config, self.step = checkpoint.load_model(ckpt, video=True)
            data = self.config["data"]
            flags = sample_gd.parse_args(self.words)
            self.vae = plans.open_vae(flags, self.model.config, data)
        self.classes = data["classes"]
        self.model.to(self.device).requires_grad_(False)
        self.vae.to(self.device)

    def __call__(
        self, classes=None, num_frames=None, num_samples=None, seed=0, batch_size=16, **flags
    ):
        """Sample clips: uint8 (N, T, H, W, 3), on the CPU.

        Args:
            classes: names or indices, used in turn; "none" for no class; default: one of each.
            num_frames: T; default: as in training.
            num_samples: N; default: one for each of `classes`.
            seed: of the noise.
            batch_size: samples at a time.
            flags: of the sampler and of time, as those of sample_gd.py: cfg_scale=2.0,
                num_sampling_steps=100, fps=25, weak_ckpt=FILE, actions=["right*8"] and so on.
        """
        with _imports():
            from generation import generate, whole_videos
            from plans import sampling_settings
            from preflight import check_overlap

            classes = _listed(classes) or self.classes
            args, plan = self._plan(
                flags,
                classes=classes,
                num_frames=num_frames,
                num_samples=num_samples or len(classes),
                seed=seed,
                batch_size=batch_size,
            )
            check_overlap(args, [plan])
            indices = list(range(args.num_samples))
            parts = generate(
                plan,
                indices,
                seed=args.seed,
                device=self.device,
                settings=sampling_settings(args),
                batch_size=args.batch_size,
            )
            with _products(args.precision):
                return whole_videos(plan, indices, parts)

    def stream(self, num_samples=1, seed=0, classes=None, **flags):
        """Videos that a causal model makes step by step, without end: a `_Stream`.

        Args: num_samples; the others as in a call of the sampler. A step may name other classes.
        """
        with _imports():
            from generation import Stream
            from plans import sampling_settings
            from runtime.cli import UserError

            if not self.model.config.causal:
                raise UserError(
                    "stream: the model was trained without --causal, so it makes all frames of a "
                    "clip at once; call the sampler instead"
                )
            args, plan = self._plan(
                flags, classes=_listed(classes), num_samples=num_samples, seed=seed
            )
            indices = list(range(args.num_samples))
            settings = sampling_settings(args)
            return _Stream(Stream(plan, indices, settings, seed=args.seed, device=self.device))

    def _plan(self, flags, classes, num_frames=None, **others):
        """(flags of sample_gd.py, Plan) with these flags, which are checked as in its command."""
        from plans import make_plan
        from sample_gd import parse_args

        for name in flags:
            if name not in _FLAGS:
                raise TypeError(f"{name}: no such argument; expected one of {', '.join(_FLAGS)}")
        if self.device.type != "cuda":
            flags = {"precision": "fp32"} | flags  # not the best one of a GPU beside it
        words = list(self.words)
        for name, value in (flags | others | {"num_frames": num_frames, "actions": None}).items():
            if value is not None:
                words.append(f"--{name.replace('_', '-')}={value}")
        args = parse_args(words, error=_refuse)
        args = args.resolve(
            classes=classes and [str(name) for name in classes],
            actions=_listed(flags.get("actions")),
            num_frames=args.num_frames and args.num_frames[0],
        )
        values, plan = make_plan(args, self.model, config=self.config, step=self.step, vae=self.vae)
        if plan.weak:
            plan.weak.to(self.device).requires_grad_(False)
        return args.resolve(**values), plan


class _Stream:
    """Videos that a causal model makes step by step."""

    def __init__(self, stream):
        self._stream = stream

    def reset(self, clips=None, classes=None, actions=None):
        """Begin again, with nothing, or continue clips uint8 (N, T, H, W, 3) of whole temporal
        patches.

        classes: of the clips, as in `step`. actions: a list of T `actions` of `step`, default:
        none. The same frames follow if all is the same.
        """
        with _imports(), _products(self._stream.precision):
            conditions = []
            if clips is not None:
                clips = clips.permute(0, 4, 1, 2, 3)
                frames = range(0, clips.shape[2], self._stream.plan.window)
                actions = actions or [None] * len(frames)
                for frame, action in zip(frames, actions, strict=True):
                    conditions.append(self._condition(frame, classes, action))
            self._stream.reset(clips, conditions)

    def step(self, classes=None, actions=None):
        """Sample the next frames, one temporal patch: uint8 (N, pt, H, W, 3), on the CPU.

        classes: names or indices, used in turn; default: those of `stream`, else one of each.
            "none" means no class.
        actions: likewise, of a model with actions; default: none.
        """
        with _imports(), _products(self._stream.precision):
            frame = self._stream.num_patches * self._stream.plan.window
            return self._stream.step(self._condition(frame, classes, actions)).cpu()

    def _condition(self, frame, classes, actions):
        import torch

        from plans import label_of
        from video.actions import numbers_of

        plan = self._stream.plan
        indices = self._stream.indices
        if classes is None and plan.spans is not None:
            end = plan.spans.shape[1] * plan.window
            if frame >= end:
                _refuse(f"classes: the spans end after {end} frames; name the class of this step")
        order = torch.arange(len(indices))
        labels = None
        if classes is not None:
            chosen = [label_of(str(name), plan.classes) for name in _listed(classes)]
            labels = torch.tensor(chosen)[order % len(chosen)]
        numbers = None
        if actions is not None:
            chosen = numbers_of(actions, plan.model.config.action_names)
            numbers = chosen[order % len(chosen)]
        return plan.condition_at(indices, frame, action=numbers, labels=labels)


def _listed(names):
    """A list of names or indices, of which the caller may have given a single one; None stays
    None.
    """
    return [names] if isinstance(names, (str, int)) else names


def _refuse(message):
    from runtime.cli import UserError

    raise UserError(message)


@contextlib.contextmanager
def _products(precision):
    """Inside, float32 products have this --precision; outside, that of the program."""
    import torch

    from runtime.distributed import set_precision

    of_products = torch.get_float32_matmul_precision()
    of_convolutions = torch.backends.cudnn.allow_tf32
    set_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(of_products)
        torch.backends.cudnn.allow_tf32 = of_convolutions


@contextlib.contextmanager
def _imports():
    """Inside, imports find the modules of EqM/; outside, the program's own ones of these names."""
    hook = sys.excepthook  # the entry scripts replace it
    path = list(sys.path)
    program_modules = _take_own_names()
    sys.modules.update(_own_modules)
    sys.path.insert(0, str(_ROOT / "EqM"))
    try:
        yield
    finally:
        _own_modules.update(_take_own_names())
        sys.modules.update(program_modules)
        sys.path[:] = path
        sys.excepthook = hook


def _take_own_names():
    """Remove the modules with names of ours from sys.modules; returns {name: module}."""
    names = [name for name in sys.modules if name.split(".")[0] in _OWN_NAMES]
    return {name: sys.modules.pop(name) for name in names}

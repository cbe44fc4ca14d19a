"""The optimizers that are rebuilt from files: what their groups say, and what they keep for each parameter.

An optimizer file does not name its class. It is recognised by its groups having exactly the settings of one class, and
where two have the same settings by what is kept for the parameters. Sources: the classes of ``torch.optim`` and
``transformers.optimization.Adafactor``, whose step is then taken by their own code.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import InvalidValueError, UnsupportedError, first_line, shown

Shape = tuple[int, ...]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """What a key of a parameter's state holds."""

    # a tensor with an element for each of the parameter's (``whole``), its factors over rows or columns, a step count,
    # or one number
    form: Literal["whole", "rows", "columns", "count", "number"]
    low: float = -math.inf  # the smallest value it can have


SIGNED, SQUARES = Content("whole"), Content("whole", 0.0)
ROWS, COLUMNS = Content("rows", 0.0), Content("columns", 0.0)
COUNT, NUMBER = Content("count", 1.0), Content("number", 0.0)
Contents = dict[str, Content]


@dataclass(frozen=True)
class OptimizerKind:
    """One class of optimizers."""

    name: str  # what reports call it
    place: tuple[str, str]  # its module and name
    settings: frozenset[str]  # what every group has
    optional: frozenset[str]  # what a group may have besides, as versions differ
    contents: Callable[[Settings, Shape], Contents]  # what is kept for a parameter of a shape, by its group's settings
    # whether factors over rows and columns keep the dimension they were averaged over, of size 1
    keeps_ones: bool = False
    matrices_only: bool = False  # whether every parameter must have two dimensions
    plain_counts: bool = False  # whether step counts are plain numbers, not tensors
    eps: tuple[int, int] = (1, 0)  # how many numbers ``eps`` has, and of those how many, from the first, may be absent

    @property
    def public_name(self) -> str:
        """Module and name of the class."""
        return ".".join(self.place)

    def class_(self) -> Callable[..., torch.optim.Optimizer]:
        """The class itself."""
        return getattr(importlib.import_module(self.place[0]), self.place[1])

    def fits(self, groups: Sequence[Settings]) -> bool:
        """Whether groups have the settings of this class and no others."""
        return all(self.settings <= g.keys() - _ANY <= self.settings | self.optional for g in groups)

    def parameter_shape(self, entry: Mapping[str, Any]) -> Shape | None:
        """The shape of the parameter that an entry belongs to; None if nothing in it says."""
        tensors = {key: tuple(x.shape) for key, x in entry.items() if isinstance(x, Tensor)}
        whole = next((tensors[key] for key in _WHOLE if key in tensors), None)
        if whole is not None:
            return whole
        for rows, columns in _FACTORS:
            if rows in tensors and columns in tensors:
                lead = tensors[rows][:-1] if self.keeps_ones else tensors[rows]
                return (*lead, *tensors[columns][-1:])
        return None

    def shape_of(self, content: Content, shape: Shape) -> Shape:
        """The shape of a content of a parameter's state, from the parameter's own."""
        one = (1,) if self.keeps_ones else ()
        if content.form == "rows":
            return (*shape[:-1], *one)
        if content.form == "columns":
            return (*shape[:-2], *one, *shape[-1:])
        return shape if content.form == "whole" else ()


_ANY = {"params", "initial_lr", "min_lr", "max_lr", "param_names"}
"""Keys that any group may have: the parameters, and what schedulers and torch add."""
_WHOLE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf", "variance")
_FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))


def _adam(group: Settings, _: Shape) -> Contents:
    return {**_MOMENTS, **({"max_exp_avg_sq": SQUARES} if group["amsgrad"] else {})}


def _sgd(group: Settings, _: Shape) -> Contents:
    return {"momentum_buffer": SIGNED} if group["momentum"] else {}


def _rmsprop(group: Settings, _: Shape) -> Contents:
    momentum = {"momentum_buffer": SIGNED} if group["momentum"] else {}
    mean = {"grad_avg": SIGNED} if group["centered"] else {}
    return {"step": COUNT, "square_avg": SQUARES, **momentum, **mean}


def _adafactor(_: Settings, shape: Shape) -> Contents:
    factored = {"row_var": ROWS, "col_var": COLUMNS}
    return {"step": COUNT, **(factored if len(shape) > 1 else {"variance": SQUARES})}


def _adafactor_of_transformers(group: Settings, shape: Shape) -> Contents:
    factored = {"exp_avg_sq_row": ROWS, "exp_avg_sq_col": COLUMNS}
    moment = {} if group["beta1"] is None else {"exp_avg": SIGNED}
    return {"step": COUNT, "RMS": NUMBER, **moment, **(factored if len(shape) > 1 else {"exp_avg_sq": SQUARES})}


def _kind(
    name: str, settings: str, optional: str, contents: Contents | Callable[[Settings, Shape], Contents], **more: Any
) -> OptimizerKind:
    """A class of torch's, with the words of its settings; contents that depend on none may be given as they are."""
    of = contents if callable(contents) else lambda group, shape: contents
    return OptimizerKind(
        name, ("torch.optim", name), frozenset(settings.split()), frozenset(optional.split()), of, **more
    )


_BASE = "lr weight_decay maximize foreach"
_ADAM_SETTINGS = "lr betas eps weight_decay amsgrad"
_ADAM_OPTIONAL = "foreach maximize capturable differentiable fused decoupled_weight_decay"
_OLDER = "capturable decoupled_weight_decay"
_MOMENTS = {"step": COUNT, "exp_avg": SIGNED, "exp_avg_sq": SQUARES}

ADAMW = _kind("AdamW", _ADAM_SETTINGS, _ADAM_OPTIONAL, _adam)
ADAMW_8BIT = replace(ADAMW, name="AdamW, 8-bit state")
ADAM = _kind("Adam", _ADAM_SETTINGS, _ADAM_OPTIONAL, _adam)

KINDS = (
    ADAMW,
    _kind("SGD", f"{_BASE} momentum dampening nesterov differentiable", "fused", _sgd),
    _kind("RMSprop", f"{_BASE} momentum alpha eps centered differentiable", "capturable", _rmsprop),
    _kind("NAdam", f"{_BASE} betas eps momentum_decay differentiable", _OLDER, {**_MOMENTS, "mu_product": NUMBER}),
    _kind("RAdam", f"{_BASE} betas eps differentiable", _OLDER, _MOMENTS),
    _kind(
        "Adamax",
        f"{_BASE} betas eps differentiable",
        "capturable",
        {"step": COUNT, "exp_avg": SIGNED, "exp_inf": SQUARES},
    ),
    _kind(
        "Adagrad",
        f"{_BASE} lr_decay eps initial_accumulator_value differentiable",
        "fused",
        {"step": COUNT, "sum": SQUARES},
    ),
    _kind(
        "Adadelta",
        f"{_BASE} rho eps differentiable",
        "capturable",
        {"step": COUNT, "square_avg": SQUARES, "acc_delta": SQUARES},
    ),
    _kind("Adafactor", f"{_BASE} beta2_decay eps d", "", _adafactor, keeps_ones=True, eps=(2, 1)),
    _kind(
        "Muon",
        "lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
        "",
        {"momentum_buffer": SIGNED},
        matrices_only=True,
    ),
    replace(
        _kind(
            "Adafactor of transformers",
            "lr eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step warmup_init",
            "",
            _adafactor_of_transformers,
            plain_counts=True,
            eps=(2, 0),
        ),
        place=("transformers.optimization", "Adafactor"),
    ),
)

REMEDY = (
    f"only {', '.join(kind.name for kind in (ADAM, *KINDS))} load from files; for another optimizer of torch pass the "
    "live one to EntropyProbe"
)


def recognise(where: str, groups: Sequence[Settings], entries: Sequence[Mapping[str, Any]]) -> OptimizerKind:
    """The class of optimizers that groups and the entries of parameters belong to.

    The entries decide only between classes with the same settings.
    """
    fitting = [kind for kind in KINDS if kind.fits(groups)]
    if not fitting:
        nearest = min(KINDS, key=lambda kind: sum(len(_amiss(kind, g)[0]) + len(_amiss(kind, g)[1]) for g in groups))
        index, (missing, unknown) = next((i, x) for i, g in enumerate(groups) if any(x := _amiss(nearest, g)))
        raise UnsupportedError(
            f"{where}: group {index}: not supported: expected the settings of one of the optimizers that are rebuilt, "
            f"of which {nearest.name} is nearest; missing {missing}, unknown {shown(unknown, 200)}; {REMEDY}"
        )
    if len(fitting) > 1:
        keys = {key for entry in entries for key in entry}
        fitting = [kind for kind in fitting if keys <= kind.contents(groups[0], ()).keys()]
    if len(fitting) != 1:
        could = [kind.name for kind in KINDS if kind.fits(groups)]
        raise UnsupportedError(
            f"{where}: not supported: its groups could be those of {' or '.join(could)}, and what is kept for the "
            f"parameters {'fits each' if fitting else 'fits none'}; {REMEDY}"
        )
    (kind,) = fitting
    # files of torch before 2.7 do not say, and the Trainer only uses AdamW
    decoupled = groups[0].get("decoupled_weight_decay", True)
    return ADAM if kind is ADAMW and (decoupled is None or decoupled is False) else kind


def _amiss(kind: OptimizerKind, group: Settings) -> tuple[list[str], list[str]]:
    """Settings that a group lacks, and those that the class does not have."""
    unknown = group.keys() - _ANY - kind.settings - kind.optional
    return sorted(kind.settings - group.keys()), sorted(key if type(key) is str else shown(key) for key in unknown)


_AT_LEAST_0 = (0.0, math.inf)
_FRACTION = (0.0, 1.0)
_RANGES = {
    **dict.fromkeys(("lr", "weight_decay", "eps", "momentum_decay", "lr_decay", "clip_threshold"), _AT_LEAST_0),
    **dict.fromkeys(("betas", "momentum", "alpha", "rho", "beta1"), _FRACTION),
    **dict.fromkeys(("dampening", "ns_coefficients"), (-math.inf, math.inf)),
    **dict.fromkeys(("beta2_decay", "decay_rate"), (-math.inf, 0.0)),
    "initial_accumulator_value": _AT_LEAST_0,
    "d": (1.0, math.inf),
}
"""Of each setting that is a number or several, the smallest value and the first that is too large."""
_SEVERAL = {"betas": 2, "ns_coefficients": 3}
"""Settings that have several numbers; ``eps`` has as many as the class says, every other one."""
_WORDS = {1: "one number", 2: "two numbers", 3: "three numbers"}
_FLAGS = {*_ADAM_OPTIONAL.split()} | {
    "amsgrad",
    "centered",
    "nesterov",
    "scale_parameter",
    "relative_step",
    "warmup_init",
}


def check_settings(where: str, kind: OptimizerKind, group: Settings) -> dict[str, Any]:
    """A group with plain numbers."""
    clean = dict(group)
    for key, bounds in _RANGES.items():
        if key in group:
            count, absent = kind.eps if key == "eps" else (_SEVERAL.get(key, 1), key == "beta1")
            clean[key] = _checked(f"{where}: {key}", key, group[key], bounds, count, absent)
    for key in _FLAGS & group.keys():
        if not (group[key] is None or isinstance(group[key], bool)):
            raise InvalidValueError(f"{where}: {key}: expected true, false or nothing, got {shown(group[key])}")
    if group.get("maximize"):
        raise UnsupportedError(f"{where}: not supported: maximize=True; trainers minimise a loss, so the sign is wrong")
    if not (type(group.get("ns_steps", 1)) is int and 0 < group.get("ns_steps", 1) < 100):
        raise InvalidValueError(f"{where}: ns_steps: expected 1 to 99, got {shown(group['ns_steps'])}")
    if not isinstance(group.get("adjust_lr_fn"), str | None):
        raise InvalidValueError(f"{where}: adjust_lr_fn: expected a name, got {shown(group['adjust_lr_fn'])}")
    if group.get("relative_step"):
        raise UnsupportedError(f"{where}: not supported: relative_step=True, which sets rates of its own; use lr")
    _ask_the_class(where, kind, clean)
    return clean


def _checked(where: str, key: str, value: Any, bounds: tuple[float, float], count: int, absent: int) -> Any:
    """The number of a setting, or its ``count`` numbers as a tuple, of which the first ``absent`` may be None."""
    if key == "lr" and value is None:
        raise UnsupportedError(f"{where}: not supported: expected a rate, got none; use lr with relative_step=False")
    several = isinstance(value, tuple | list)
    if several != (count > 1) or (several and len(value) != count):
        raise InvalidValueError(f"{where}: expected {_WORDS[count]}, got {shown(value)}; the file is damaged")
    values, (low, high) = value if several else [value], bounds
    numbers = tuple(None if x is None and i < absent else number(where, x) for i, x in enumerate(values))
    if not all(x is None or low <= x < high for x in numbers):
        expected = f"{key} in [{low:g}, {high:g})" if math.isfinite(high) else f"at least {low:g}"
        got = numbers if several else numbers[0]
        raise InvalidValueError(f"{where}: expected {expected}, got {got}; the file is damaged")
    return numbers if several else numbers[0]


def number(where: str, value: Any) -> float:
    """A finite number as a float."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not float or not math.isfinite(value):
        raise InvalidValueError(f"{where}: expected a finite number, got {shown(value)}; the file is damaged")
    return value


def _ask_the_class(where: str, kind: OptimizerKind, group: Settings) -> None:
    """Let the class look at the settings as it does at those of a caller, on a parameter of no account."""
    settings = {key: value for key, value in group.items() if key in kind.settings | kind.optional}
    if kind is ADAMW:  # which sets it itself
        settings.pop("decoupled_weight_decay", None)
    try:
        kind.class_()([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        # ValueError for a value that the class rules out, RuntimeError for kernels that exclude each other; the other
        # two only from a class of another version, that expects other types than those checked above
        raise InvalidValueError(
            f"{where}: expected settings that {kind.name} takes, got: {first_line(error)}; the file is damaged"
        ) from error

"""What a transformer of a user is: its plain build and the habits in its code."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.passes.randomise import randomise_constants
from tests.fuzz.user_draft import Draft, load
from tests.fuzz.user_habits import HABITS


@dataclass(frozen=True)
class UserSpec:
    """A model. Every field's default is the plainest choice."""

    habits: tuple[str, ...] = ()
    seed: int = 0
    grid: tuple[int, int] = (8, 8)
    width: int = 16
    layout: str = "BNC"
    core: str = "sdpa"
    embed: str = "conv"
    prefix: bool = False
    position: bool = False
    depthwise: bool = False
    #: of the model that is converted
    dtype: str = "float32"
    #: that the converted model is cast to afterwards
    cast: str = "float64"
    #: images it is converted with
    examples: int = 2
    #: whether the user has run it before
    called: bool = False
    #: what is active around the conversion: "none", "no_grad", "inference" or "autocast"
    ambient: str = "none"
    #: whether the model itself is rewritten
    inplace: bool = False

    def __repr__(self) -> str:
        told = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"UserSpec({', '.join(told)})"


@dataclass
class Made:
    """A spec's model, ready to be converted."""

    spec: UserSpec
    draft: Draft
    source: str
    module: ModuleType
    model: nn.Module

    def kwargs(self, variant: str, images: Tensor) -> dict[str, Any]:
        """Keyword arguments of a call with these images."""
        height, width = images.shape[2] // 2, images.shape[3] // 2
        tokens = height * width + int(self.spec.prefix)
        scope = {"torch": torch, "B": images.shape[0], "N": tokens, "H": height, "W": width}
        return eval(variant, scope)


def draw(seed: str, first: str | None = None) -> UserSpec:
    """A random spec. Args: first: a habit it must have."""
    rng = random.Random(seed)
    count = rng.choice([1, 1, 1, 2, 2, 3])
    others = [name for name in HABITS if name != first]
    habits = rng.sample(others, count - (first is not None))
    habits = habits if first is None else [first, *habits]
    layout = rng.choice(["BNC", "BNC", "BHWC"])
    return UserSpec(
        habits=tuple(habits),
        seed=rng.randrange(1000),
        grid=rng.choice([(8, 8), (6, 10), (8, 6), (7, 9)]),
        width=rng.choice([16, 24, 32]),
        layout=layout,
        core=rng.choice(["sdpa", "written"]),
        embed=rng.choice(["conv", "conv", "cut"]),
        prefix=layout == "BNC" and rng.random() < 0.4,
        position=rng.random() < 0.5,
        depthwise=rng.random() < 0.25,
        dtype=rng.choice(["float32"] * 6 + ["float64", "bfloat16", "float16"]),
        cast=rng.choice(["float64", "bfloat16", "float16"]),
        examples=rng.choice([2, 2, 2, 1, 3]),
        called=rng.random() < 0.3,
        ambient=rng.choice(["none"] * 9 + ["no_grad", "inference", "autocast"]),
        inplace=rng.random() < 0.2,
    )


def make(spec: UserSpec) -> Made:
    """Build it, random throughout."""
    draft = Draft(spec.layout, spec.core, spec.embed, spec.prefix, spec.position, spec.depthwise)
    for name in spec.habits:
        # a habit's own draws stay the same when another one goes
        HABITS[name](draft, random.Random(f"{spec.seed} {name}"))
    source = draft.source()
    module = load(source, f"{'_'.join(spec.habits) or 'plain'} {spec.seed}")
    torch.manual_seed(spec.seed)
    random.seed(spec.seed)
    model = module.Model(spec.width, 2, spec.grid)
    randomise_constants(model)
    model = module.ready(model.to(getattr(torch, spec.dtype))).eval()
    return Made(spec, draft, source, module, module.mode(model))


def simpler(spec: UserSpec) -> list[UserSpec]:
    """Specs with one habit less or one field back to its default."""
    found = [
        replace(spec, habits=spec.habits[:i] + spec.habits[i + 1 :])
        for i in range(len(spec.habits))
        if len(spec.habits) > 1
    ]
    for field in fields(spec):
        if field.name not in ("habits", "seed") and getattr(spec, field.name) != field.default:
            found.append(replace(spec, **{field.name: field.default}))
    return found

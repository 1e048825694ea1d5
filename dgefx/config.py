"""`DGEConfig`: what a conversion is asked to do, as one frozen value.

It enters at `convert`, is carried by every converted block's router and is written to
`config.json` by `save`. Nothing else in the library holds settings.
"""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any, Literal

VERSION = 1

_CHOICES: dict[str, tuple[str, ...]] = {
    "budget": ("per_image", "average"),
    "routing": ("nested", "region", "layer"),
    "router": ("detail", "linear"),
}


@dataclasses.dataclass(frozen=True)
class DGEConfig:
    """Settings of the Dynamic Grained Encoder (arXiv 2301.03831, section 3).

    Args:
        granularities: patch sides in tokens, finest first. Must start with 1 (so that the finest
            level is the dense model), and each side must divide the next.
        region: side in tokens of the square region that shares one granularity; a multiple of the
            coarsest patch side. ``None`` means the coarsest patch side. With nested routing it is
            the second patch side, where the finest decisions are taken, and cannot be chosen.
        budget: ``"per_image"``: every image gets the same number of queries in a layer, so shapes
            are static and a result never depends on the rest of the batch. ``"average"``: the
            paper's, images differ in their number of queries and the budget holds over the batch:
            the linear router takes every region's arg max, the detail router shares the batch's
            queries out over all its images. A batch's queries are packed one image after the other.
        capacity: with ``budget="average"``. ``"budget"``: a batch has as many packed queries as the
            blocks' budgets allow, so shapes are static and `gamma` holds whatever the gates ask
            for: where that is more, the regions with the lowest scores become coarser. ``None``:
            as many as the gates of the linear router ask for, as in the paper: `gamma` is what
            training aims at, and every converted block reads one number back from the device.
        routing: ``"nested"``: every patch decides for itself whether it is split into the patches
            of the next finer level, so a region may hold several granularities; ``"region"``: the
            paper's, one granularity per region and image; ``"layer"``: one granularity per layer
            (the paper's ablation); with the linear router per layer and image, decided on the
            image's mean token. ``None`` means nested, or region where `region` is given or the
            router is linear.
        router: ``"detail"``: the training-free within-patch variance; ``"linear"``: the paper's
            gate, one linear layer on the region's mean token (section 3.2).
        version: format version, written to JSON.

    Raises:
        TypeError, ValueError: naming the field, what was found and what to do.
    """

    granularities: tuple[int, ...] = (1, 2, 4)
    region: int | None = None
    budget: Literal["per_image", "average"] = "per_image"
    capacity: Literal["budget"] | None = "budget"
    routing: Literal["nested", "region", "layer"] | None = None
    router: Literal["detail", "linear"] = "detail"
    version: int = VERSION

    def __post_init__(self) -> None:
        sides = self.granularities
        if isinstance(sides, str) or not hasattr(sides, "__iter__"):
            raise TypeError(f"granularities must be a tuple of patch sides, found {sides!r}")
        sides = tuple(sides)
        if not sides or any(isinstance(s, bool) or not isinstance(s, int) for s in sides):
            raise TypeError(
                f"granularities must be integers (patch sides in tokens), found {sides!r}"
            )
        if sides[0] != 1:
            raise ValueError(
                f"granularities must start with 1 (the finest level is the dense model), "
                f"found {sides!r}"
            )
        for fine, coarse in pairwise(sides):
            if coarse <= fine or coarse % fine:
                raise ValueError(
                    f"granularities must grow and each must divide the next, found {fine} then "
                    f"{coarse} in {sides!r}; use for example (1, 2, 4)"
                )
        unit = sides[min(1, len(sides) - 1)]
        object.__setattr__(self, "granularities", sides)
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed and not (field == "routing" and value is None):
                raise ValueError(f"{field} must be one of {allowed}, found {value!r}")
        self._check_capacity()
        if self.routing_mode == "nested" and self.router == "linear":
            raise ValueError(
                'routing "nested" has no linear router: the paper\'s gate picks one granularity '
                'per region; use routing="region" with router="linear", or router="detail"'
            )
        if self.routing == "layer" and self.router == "linear" and self.budget == "per_image":
            raise ValueError(
                'routing "layer" leaves a linear router nothing to decide under the per-image '
                "budget, where a layer has one granularity for all images; use "
                'budget="average", where every image asks for its own, or router="detail"'
            )
        if self.routing_mode == "nested" and self.region not in (None, unit):
            raise ValueError(
                f"region cannot be chosen with nested routing (its finest decisions are per patch "
                f'of side {unit}), found {self.region!r}; leave it out or use routing="region"'
            )
        region = self.region_side
        if isinstance(region, bool) or not isinstance(region, int):
            raise TypeError(f"region must be an integer number of tokens, found {region!r}")
        if self.routing_mode != "nested" and (region < 1 or region % sides[-1]):
            raise ValueError(
                f"region must be a multiple of the coarsest granularity {sides[-1]}, found {region}"
            )
        if self.version != VERSION:
            raise ValueError(
                f"version {self.version!r} of DGEConfig is not known to this dgefx (it writes "
                f"{VERSION}); use the dgefx that wrote it, or a newer one"
            )

    def _check_capacity(self) -> None:
        if self.capacity not in ("budget", None):
            raise ValueError(f'capacity must be "budget" or None, found {self.capacity!r}')
        if self.capacity is None and (self.budget != "average" or self.router != "linear"):
            raise ValueError(
                'capacity=None, as many queries as the gates ask for, needs budget="average" and '
                f'router="linear"; found budget={self.budget!r}, router={self.router!r}'
            )

    @property
    def packs(self) -> bool:
        """Whether the queries of a batch are packed, images differing in their number."""
        return self.budget == "average"

    def bounded(self) -> DGEConfig:
        """The same with the budget as its capacity: what a conversion is priced at."""
        return dataclasses.replace(self, capacity="budget")

    @property
    def routing_mode(self) -> str:
        """`routing` with its default filled in."""
        if self.routing is not None:
            return self.routing
        return "nested" if self.region is None and self.router != "linear" else "region"

    @property
    def region_side(self) -> int:
        """`region` with its default filled in: the side in tokens of the cells that
        `Routing.levels` counts in."""
        if self.region is not None:
            return self.region
        sides = self.granularities
        return sides[min(1, len(sides) - 1)] if self.routing_mode == "nested" else sides[-1]

    @property
    def levels(self) -> int:
        """Number of granularities."""
        return len(self.granularities)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "granularities": list(self.granularities)}

    def to_json(self) -> str:
        """This configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DGEConfig:
        """The inverse of `to_dict`; raises ValueError on a field this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"DGEConfig does not know the fields {unknown}; it has {sorted(known)}"
            )
        values = dict(values)
        if isinstance(values.get("granularities"), list):
            values["granularities"] = tuple(values["granularities"])
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> DGEConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

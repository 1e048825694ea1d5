"""What blocks read of modules, whichever way, and classes that mind being derived from."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dgefx
from tests.helpers import error, images, randomise, slow
from tests.robust.user_blocks import UserAttention, UserMLP, UserModel

X = images(2, 64)


class ScaledAttention(UserAttention):
    """Its queries are scaled by what `read` makes of it, from `temp` or `table`."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.read = read
        self.temp = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.ones(1))

    def change(self, q: Tensor) -> Tensor:
        return q * self.read(self)


def scaled(read: Callable[[Any], Any]) -> nn.Module:
    dense = UserModel()
    for block in dense.blocks:
        block.attn = ScaledAttention(read)
    return randomise(dense).eval()


def converted(dense: nn.Module) -> nn.Module:
    model = dgefx.convert(dense, 1.0, example_inputs=X).eval()
    assert error(model(X), dense(X)) < 1e-5
    return model


def refusal(model: nn.Module) -> str:
    (reason,) = {b.reason for b in dgefx.explain(model, example_inputs=X).blocks}
    return reason


READS: list[Any] = [
    lambda m: m._buffers["table"].exp(),
    slow(lambda m: m._buffers.get("table").exp()),
    lambda m: vars(m)["_buffers"]["table"].exp(),
    slow(lambda m: sum(b.exp() for b in m._buffers.values())),
    lambda m: sum(b.exp() for _, b in m._buffers.items()),
    slow(lambda m: dict(m._buffers)["table"].exp()),
    slow(lambda m: {**m._buffers}["table"].exp()),
    lambda m: m._buffers.copy()["table"].exp(),
    lambda m: (m._buffers | {})["table"].exp(),
    lambda m: next(m.buffers()).exp(),
    lambda m: dict(m.named_buffers(recurse=False))["table"].exp(),
    lambda m: m.get_buffer("table").exp(),
    lambda m: m._parameters["temp"].exp(),
    slow(lambda m: next(m.parameters(recurse=False)).exp()),
    lambda m: dict(m.named_parameters())["temp"].exp(),
    lambda m: m.state_dict()["temp"].exp(),
    lambda m: nn.utils.parameters_to_vector(m.parameters()).std(),
]


@pytest.mark.parametrize("read", READS)
def test_a_tensor_is_read_anew_however_it_is_reached(read: Callable[[Any], Any]) -> None:
    dense = scaled(read)
    model = converted(dense)
    state = {
        name: value + 1 if name.endswith(("temp", "table")) else value
        for name, value in dense.state_dict().items()
    }
    before = dense(X)
    for changed in (dense, model):
        changed.load_state_dict(state, strict=changed is dense)
    assert error(model(X), dense(X)) < 1e-5 < error(before, dense(X))


def test_a_tensor_with_two_names_is_listed_once() -> None:
    def read(m: Any) -> Any:
        every = [m.named_parameters(recurse=False, remove_duplicate=only) for only in (True, False)]
        return m.temp * len(list(every[0])) / len(list(every[1]))

    dense = scaled(read)
    for block in dense.blocks:
        block.attn.again = block.attn.temp
    converted(dense)


def test_what_is_asked_about_tensors_is_no_read() -> None:
    def read(m: Any) -> Any:
        names = [*m._parameters, *m._buffers.keys()]
        return 2.0 if "temp" in m._parameters and "table" in names else 1.0

    converted(scaled(read))


def test_a_buffer_that_forward_sets_is_told() -> None:
    def count(m: Any) -> Any:
        m._buffers["table"] = m._buffers["table"] + 1
        return m.table

    assert "its forward sets attn.table" in refusal(scaled(count))


LISTED: dict[str, type] = {}


class Listed(ScaledAttention):
    def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        LISTED[cls.__name__] = cls


class Tagged(Listed, tag="a keyword that has to be given"):
    pass


class Final(ScaledAttention):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


class Listing(abc.ABCMeta):
    def __new__(cls, name: str, bases: Any, members: Any, *, tag: str) -> Any:
        LISTED[name] = super().__new__(cls, name, bases, members)
        return LISTED[name]

    def __init__(cls, name: str, bases: Any, members: Any, **_options: Any) -> None:
        super().__init__(name, bases, members)


class ListedByItsType(ScaledAttention, metaclass=Listing, tag="of the metaclass"):
    pass


class OfFixedClass(ScaledAttention):
    __class__ = property(lambda self: OfFixedClass)


@pytest.mark.parametrize("kind", [Tagged, Final, ListedByItsType])
def test_classes_that_hear_who_derives_from_them(kind: Any) -> None:
    listed = dict(LISTED)
    dense = UserModel()
    for block in dense.blocks:
        block.attn = kind(lambda m: m._buffers["table"].exp() * m.temp)
    model = converted(randomise(dense).eval())
    assert listed == LISTED and set(map(type, (b.attn for b in dense.blocks))) == {kind}
    for changed in (dense, model):
        for name, buffer in changed.named_buffers():
            if name.endswith("table"):
                buffer.fill_(1.5)
    assert error(model(X), dense(X)) < 1e-5


def test_a_class_that_instances_cannot_leave_is_not_heard_of() -> None:
    dense = UserModel()
    for block in dense.blocks:
        block.attn = OfFixedClass(lambda m: m.temp)
    reports = dgefx.explain(randomise(dense).eval(), example_inputs=X).blocks
    assert all("fixes the class of its instances" in report.reason for report in reports)


def test_numbers_of_numpy_are_not_drawn_twice() -> None:
    """As another thread would see it that draws meanwhile."""
    drawn: list[float] = []

    class Noisy(UserMLP):
        def change(self, h: Tensor) -> Tensor:
            drawn.append(np.random.rand())
            return h + 0 * drawn[-1]

    dense = UserModel()
    for block in dense.blocks:
        block.mlp = Noisy()
    converted(dense.eval())
    assert len(drawn) == len(set(drawn)) > 4

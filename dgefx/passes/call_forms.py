"""Pass 6c, call forms: masks and flags of a block that other calls of the model give otherwise.

The same layer is given None by a model that runs eagerly, a mask of padded images, and under
`torch.export` an all-true mask. So a block that takes an optional mask is traced and split once
more, with a random mask in the place of None or the other way round, and used so once it was
compared with the dense block. And a flag of None is as good as one of False where the block does
the same with either. Asked by `analysis` for every verified block; blocks that differ in their
parameters only share the answer. Next: `passes.cost`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.nn.call_form import CallForm
from dgefx.nn.callspec import CallSpec, MaskInput, Path
from dgefx.nn.code import GraphCode
from dgefx.nn.guards import Guards
from dgefx.passes.capture import Call, tensors_in
from dgefx.passes.forms import randomise_constants
from dgefx.passes.hold import guards_of
from dgefx.passes.ops import op_name
from dgefx.passes.rewrite import BlockPlan, build_block, split_trace
from dgefx.passes.sizes import agrees, call_at, other_grids
from dgefx.passes.split import SplitBlock
from dgefx.passes.trace import Trace, TraceError, copy_block, shadow, trace
from dgefx.passes.twins import Twins
from dgefx.passes.verify import grid_shape, verify_block, verify_mixed
from dgefx.passes.worlds import Refused, block_flow

#: elements of a mask that is tried out
_LARGEST = 2**25
#: what tells the type of a tensor
_READS_DTYPE = frozenset({"dtype", "is_floating_point", "is_complex", "type"})


def with_forms(
    block: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    twins: Twins,
    first: BlockPlan | None = None,
) -> BlockPlan:
    """The plan with all forms of its call that hold.

    Args:
        block: not changed. call, shape: of its example run.
        first: the complete plan of a block that differs in its parameters only, if any.
    """
    if first is not None:
        forms = tuple(form.labelled(plan.name) for form in first.forms)
        spec = dataclasses.replace(plan.spec, masks=first.spec.masks, alike=first.spec.alike)
        return dataclasses.replace(plan, spec=spec, forms=forms, constants=first.constants)
    example = CallSpec.of(block, *call)
    names = _masks(example)
    plan = _with_alike(block, plan, call, shape, example, names)
    if not names or plan.windows is not None or has_parts(plan.layout.order):
        return plan
    return _Forms(block, plan, call, shape, config, twins, example, names).run()


def _masks(spec: CallSpec) -> list[str]:
    """Arguments that are a mask, or None where one could be."""
    leaves = [path for path, value in spec.fixed if value is None]
    leaves += [path for path in spec.inputs if isinstance(spec.example.get(path[0]), Tensor)]
    return [path[0] for path in leaves if len(path) == 1 and "mask" in str(path[0]).lower()]


def _with(call: Call, spec: CallSpec, name: str, value: Any) -> Call:
    """The call with another value of one argument."""
    args, kwargs = call
    place = spec.names.index(name) if name in spec.names else len(args)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _run(block: nn.Module, call: Call) -> Tensor | None:
    """The block's first result; None where it fails or is not finite."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, call)
    try:
        with torch.no_grad():
            found = tensors_in(block(*args, **kwargs))[0]
    except Exception:  # user code may raise anything on what it does not take
        return None
    return found if bool(torch.isfinite(found).all()) else None


def _small_calls(
    plan: BlockPlan, call: Call, shape: tuple[int, ...]
) -> Iterator[tuple[Call, tuple[int, int]]]:
    """The call on smaller and smaller grids that the dense block may take, then as it is."""
    height, width = plan.layout.grid
    if plan.layout.places is None and plan.windows is None and not has_parts(plan.layout.order):
        for grid in ((2, 3), (height // 2, width // 2)):
            if min(grid) > 1:
                yield call_at(call, plan, shape, grid)[0], grid
    yield call, plan.layout.grid


def _probe(
    block: nn.Module, plan: BlockPlan, call: Call, shape: tuple[int, ...]
) -> tuple[nn.Module, Call, tuple[int, int], Tensor] | None:
    """A copy of the block, the smallest call that it takes, its grid and its result."""
    copied = shadow(block).eval()
    for small, grid in _small_calls(plan, call, shape):
        found = _run(copied, small)
        if found is not None:
            return copied, small, grid, found
    return None


# -- flags -----------------------------------------------------------------------------------


def _with_alike(
    block: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    spec: CallSpec,
    masks: list[str],
) -> BlockPlan:
    """The plan, told for which arguments None and False are the same: with either, the block
    yields the same and its trace is the same."""
    paths = [path for path, value in spec.fixed if _is_flag(block, path, value, masks)]
    probe = _probe(block, plan, call, shape) if paths else None
    if probe is None:
        return plan
    copied, small, _, wanted = probe
    values = dict(spec.fixed)

    def flipped(given: Call, chosen: list[Path]) -> Call:
        for path in chosen:
            given = _with(given, spec, path[0], False if values[path] is None else None)
        return given

    def same(path: Path) -> bool:
        found = _run(copied, flipped(small, [path]))
        return found is not None and torch.equal(found, wanted)

    paths = [path for path in paths if same(path)]
    modes = (False,) if plan.train_code.is_same(plan.eval_code) else (False, True)
    before = [_code(block, call, training) for training in modes] if paths else []

    def traced_alike(chosen: list[Path]) -> bool:
        other = flipped(call, chosen)
        return None not in before and before == [_code(block, other, mode) for mode in modes]

    alike = paths if paths and traced_alike(paths) else []
    if not alike and len(paths) > 1:
        alike = [path for path in paths if traced_alike([path])]
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, alike=frozenset(alike)))


def _is_flag(block: nn.Module, path: Path, value: Any, masks: list[str]) -> bool:
    if len(path) > 1 or path[0] in masks or not (value is None or value is False):
        return False
    parameter = inspect.signature(type(block).forward).parameters.get(path[0])
    plain = parameter is None or parameter.annotation is inspect.Parameter.empty
    return plain or value is False or "bool" in str(parameter and parameter.annotation)


def _code(block: nn.Module, call: Call, training: bool) -> Any:
    """What the trace of a call is, to be compared; None where it fails."""
    try:
        traced = trace(block, CallSpec.of(block, *call), training)
    except TraceError:
        return None
    constants = [(name, value.tolist()) for name, value in traced.constants.items()]
    return traced.graph.python_code("self").src, constants


# -- masks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """A shape that a mask may have. per_query: see `MaskInput`."""

    of: Callable[[int, int], tuple[int, ...]]
    per_query: bool | None


#: of a mask, by images and tokens, as SDPA takes it and as nn.MultiheadAttention does
_SHAPES = (
    _Shape(lambda images, tokens: (images, 1, tokens, tokens), True),
    _Shape(lambda images, tokens: (tokens, tokens), True),
    _Shape(lambda images, tokens: (images, tokens), None),
)


def _random_mask(size: tuple[int, ...], boolean: bool, like: Tensor) -> Tensor:
    """A mask that leaves any patch of queries keys in common, whatever True stands for."""
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(size, generator=generator) > 0.4
    if len(size) > 1 and size[-2] == size[-1]:
        by_all = torch.rand((*size[:-2], 1, size[-1]), generator=generator)
        seen = (seen | (by_all > 0.8)) & (by_all > 0.2)
    seen[..., 0], seen[..., -1] = True, False
    if boolean:
        return seen.to(like.device)
    noise = torch.randn(size, generator=generator)
    return torch.where(seen, noise, -torch.inf).to(like)


class _Forms:
    """Plans the forms of one block. Arguments: see `with_forms`."""

    def __init__(
        self,
        block: nn.Module,
        plan: BlockPlan,
        call: Call,
        shape: tuple[int, ...],
        config: DGEConfig,
        twins: Twins,
        example: CallSpec,
        names: list[str],
    ) -> None:
        self.block, self.plan, self.call, self.shape = block, plan, call, shape
        self.config, self.twins, self.example, self.names = config, twins, example, names
        self.images = plan.layout.images(shape)
        self.like = next(
            leaf
            for leaf in pytree.tree_leaves(call)
            if isinstance(leaf, Tensor) and tuple(leaf.shape) == shape
        )
        self.forms: list[CallForm] = []
        self.constants = dict(plan.constants)
        self.needs_grid_shape = plan.needs_grid_shape

    def run(self) -> BlockPlan:
        probe = _probe(self.block, self.plan, self.call, self.shape)
        if probe is None:
            return self.plan
        copied, small, grid, _ = probe
        own = {name: self._own(name) for name in self.names}
        tokens = self.plan.layout.prefix + grid[0] * grid[1]
        for name in self.names:
            given = own[name]
            if (
                given is not None
                and _run(copied, _with(small, self.example, name, None)) is not None
            ):
                self._try(name, None, None, own)
            if given is None or not given.per_query:
                for shape in _SHAPES:
                    mask = self._input(copied, small, name, shape, tokens)
                    if mask is not None and self._try(name, mask, shape, own):
                        break
        if not self.forms:
            return self.plan
        return dataclasses.replace(
            self.plan,
            spec=dataclasses.replace(self.plan.spec, masks=tuple(own.items())),
            forms=tuple(self.forms),
            constants=self.constants,
            needs_grid_shape=self.needs_grid_shape,
        )

    def _own(self, name: str) -> MaskInput | None:
        """The mask of the example."""
        value = self.example.example.get(name)
        if not isinstance(value, Tensor):
            return None
        tokens, kinds = self.plan.layout.tokens, frozenset({value.dtype == torch.bool})
        for rows in (tokens, 1):
            if value.dim() == 4 and value.shape[-2:] == (rows, tokens):
                return MaskInput(kinds, 4, rows == tokens)
        return MaskInput(frozenset({True, False}), value.dim(), None)

    def _input(
        self, copied: nn.Module, small: Call, name: str, shape: _Shape, tokens: int
    ) -> MaskInput | None:
        """What masks of a shape the dense block takes, if any; those with fewer axes, or with one
        entry for all queries, have to be to it what they are once expanded."""
        size = shape.of(self.images, tokens)
        if self._size(shape) > _LARGEST:
            return None

        def run(mask: Tensor) -> Tensor | None:
            return _run(copied, _with(small, self.example, name, mask))

        kinds = [k for k in (True, False) if run(_random_mask(size, k, self.like)) is not None]
        if not kinds:
            return None
        given = MaskInput(frozenset(kinds), len(size), shape.per_query)
        if shape.per_query:
            lesser = [(*size[:-2], 1, size[-1]), size[-2:]]
            for mask in (_random_mask(part, kinds[0], self.like) for part in lesser):
                found, wanted = run(mask), run(given.shaped(mask).expand(size))
                if found is None or wanted is None or not torch.allclose(found, wanted, atol=1e-5):
                    return None
        return given

    def _size(self, shape: _Shape) -> int:
        return int(torch.Size(shape.of(self.images, self.plan.layout.tokens)).numel())

    def _try(
        self,
        name: str,
        mask: MaskInput | None,
        shape: _Shape | None,
        own: dict[str, MaskInput | None],
    ) -> bool:
        """Plan and verify one form; whether it holds."""
        value = self._value(mask, shape, self.plan.layout.tokens)
        call = _with(self.call, self.example, name, value)
        spec = CallSpec.of(self.block, *call)
        try:
            plan, mask = self._planned(call, spec, name, mask)
            self._verify(plan, call, name, mask, shape)
        except (Refused, TraceError):  # it stays as it was, and says so when it is called otherwise
            return False
        masks = tuple({**own, name: mask}.items())
        codes = [plan.eval_code, plan.train_code]
        known = self.constants
        if any(n not in known or not known[n].equal(c) for n, c in plan.constants.items()):
            prefix = f"{'abcdefghijklmnop'[len(self.forms)]}_"
            codes = [code.with_constants(prefix) for code in codes]
            known.update({prefix + n: c for n, c in plan.constants.items()})
        spec = dataclasses.replace(plan.spec, masks=masks, alike=self.plan.spec.alike)
        self.forms.append(CallForm(spec, codes[0], codes[1], plan.guards))
        self.needs_grid_shape = self.needs_grid_shape or plan.needs_grid_shape
        return True

    def _value(
        self, mask: MaskInput | None, shape: _Shape | None, tokens: int, boolean: bool = True
    ) -> Tensor | None:
        if mask is None or shape is None:
            return None
        kind = boolean if boolean in mask.kinds else not boolean
        return _random_mask(shape.of(self.images, tokens), kind, self.like)

    def _planned(
        self, call: Call, spec: CallSpec, name: str, mask: MaskInput | None
    ) -> tuple[BlockPlan, MaskInput | None]:
        """The block's plan for this form, and the mask as its trace takes it."""
        own = self.plan
        given = (own.layout, self.shape, self.config.packs, own.name, self.twins)
        traced = trace(self.block, spec, False, grid=own.layout.grid)
        if mask is not None and len(mask.kinds) > 1 and _reads_dtype(traced, name):
            mask = dataclasses.replace(mask, kinds=frozenset({True}))
        first, rank, place = split_trace(traced, *given)
        splits, traces = [first], [traced]
        if not own.train_code.is_same(own.eval_code):
            trained = trace(self.block, spec, True, grid=own.layout.grid)
            splits.append(split_trace(trained, *given, first)[0])
            traces.append(trained)
        parts = [split.block for split in splits]
        unlike = rank != own.stream_rank
        constants: dict[str, Tensor] = {}
        for part in parts:
            unlike = unlike or part.windows is not None or part.fixed_slots != own.fixed_slots
            unlike = unlike or not part.stencils <= own.stencils
            for key, value in part.constants.items():
                unlike = unlike or not constants.setdefault(key, value).equal(value)
        if unlike:
            raise Refused("another form of its call needs another router", "forward signature")
        return dataclasses.replace(
            own,
            spec=dataclasses.replace(spec.without_example(), stream=place),
            eval_code=GraphCode(parts[0].graph, own.name),
            train_code=GraphCode(parts[-1].graph, f"{own.name} train"),
            constants=constants,
            guards=self._guards(traces, place, parts),
            needs_grid_shape=any(part.needs_grid_shape for part in parts),
            exact_at_any_level=not any(part.positional or part.mixing for part in parts),
            tokens_apart=all(part.tokens_apart for part in parts),
            forms=(),
        ), mask

    def _guards(
        self, traces: list[Trace], place: int, parts: list[SplitBlock]
    ) -> tuple[Guards, Guards]:
        own = self.plan.guards
        made = [
            guards_of(self.block, traced, place, part.graph, held.types)
            for traced, part, held in zip(traces, parts, own, strict=False)
        ]
        # in train mode it is gone through as in the form of the example
        trained = made[1] if len(made) > 1 else dataclasses.replace(own[1], questions=None)
        return made[0], trained

    def _verify(
        self,
        plan: BlockPlan,
        call: Call,
        name: str,
        mask: MaskInput | None,
        shape: _Shape | None,
    ) -> None:
        """Compare the form with the dense block, at mixed granularities here and at the finest on
        another grid if there is one.

        Raises:
            Refused: it differs.
        """
        if not plan.train_code.is_same(plan.eval_code):
            verify_block(self.block, plan, call, self.shape, self.config)
        else:
            copied = copy_block(self.block).eval()
            randomise_constants(copied)
            converted = build_block(copied, plan, self.config, grid_shape(plan))
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                generator = torch.Generator().manual_seed(3)
                verify_mixed(copied, converted, plan, call, self.shape, self.config, generator)
        moving = plan.layout.places is None and not plan.only_here
        others = other_grids(plan.layout.grid, self.images) if moving else []
        for grid in (*sorted(others, key=lambda g: g[0] * g[1])[:1], plan.layout.grid):
            moved, stream = call_at(call, plan, self.shape, grid)
            tokens = plan.layout.prefix + grid[0] * grid[1]
            if mask is not None:
                value = self._value(mask, shape, tokens, boolean=False)
                moved = _with(moved, self.example, name, value)
            found = agrees(self.block, plan, moved, stream, self.config, grid)
            if found is False:
                raise Refused("verification: another form of its call", "verification failed")
            if found:
                return
        raise Refused("verification: the dense block fails", "verification failed")


def _reads_dtype(traced: Trace, name: str) -> bool:
    """Whether a trace asked for the type of a bool mask, and may have decided something by it."""
    nodes = traced.graph.nodes
    start = next(n for n in nodes if n.op == "placeholder" and n.target == name)
    reached = nx.descendants(block_flow(traced.graph), start)

    def is_bool(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == torch.bool

    for node in reached:
        asked = node.args[1] if node.target is getattr else op_name(node, traced.root)
        of = [n for n in node.all_input_nodes if n is start or n in reached]
        if asked in _READS_DTYPE and any(is_bool(traced.values.get(n)) for n in of):
            return True
    return False

"""`save_checkpoint` and `load_checkpoint`: one file to resume a fine-tuning from.

One code path for a plain model, torch.compile, DistributedDataParallel and FSDP2, by
`torch.distributed.checkpoint.state_dict`: the file holds whole tensors under the names of the bare
model, so it can be resumed on another number of ranks, and timm reads its weights. For use without
training there is `dgefx.save`, which also keeps how the model was converted.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dgefx.training.given import check_task
from dgefx.training.shard import reshard

_KEYS = ("state_dict", "state_dict_ema", "optimizer", "epoch", "extra")


def save_checkpoint(
    path: str | Path,
    task: TrainingTask,
    optimizer: Optimizer,
    *,
    epoch: int,
    extra: Any = None,
) -> None:
    """Write weights, EMA weights and the optimiser's state; on return the file is complete.

    To be called by all ranks, between two optimiser steps; rank 0 writes. The file takes its name
    only once it is written, so that an interrupted run leaves the previous one. What a conversion
    is (slots, budget) and how gates are trained (temperature, noise, path) are no weights: convert
    in the same way before loading, and let the gates' schedule set the rest.

    Args:
        path: of the file; its folder is made if missing.
        task: its trainable module is saved, with that of its EMA if it has one.
        optimizer: made over parameters of that module. Nothing in it changes, also before its
            first step.
        epoch: for the caller.
        extra: for the caller: plain Python values and tensors, such as a scheduler's state.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or `extra` holds something that
            `torch.load(weights_only=True)` would not read.
        OSError: the file cannot be written; on all ranks.
    """
    target = _path(path)
    model, ema = _modules(task)
    _check_optimizer(optimizer)
    if isinstance(epoch, bool) or not isinstance(epoch, int):
        raise TypeError(f"epoch must be an int, found {type(epoch).__name__}")
    _check_extra(extra)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    content = {
        "state_dict": get_model_state_dict(model, options=whole),
        "optimizer": _optimizer_state(model, optimizer),
        "epoch": epoch,
        "extra": extra,
    }
    if ema is not None:
        content["state_dict_ema"] = get_model_state_dict(ema, options=whole)
    with _failing_together():
        if _rank() == 0:
            _write(content, target)


def load_checkpoint(path: str | Path, task: TrainingTask, optimizer: Optimizer) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote into `task` and `optimizer`, in place.

    To be called by all ranks; rank 0 reads and sends. Model and groups of the optimiser must be
    made as they were for the saved run; the number of ranks and the wrappers may differ. Gradients
    are cleared. Nothing is changed where an error is raised.

    Returns:
        {"epoch": ..., "extra": ...} as they were saved.

    Raises:
        FileNotFoundError: no such file; on all ranks, as all errors are.
        TypeError, ValueError: an argument is of the wrong kind, the file is no checkpoint, or is
            one of another model or of other groups.
    """
    source = _path(path)
    model, ema = _modules(task)
    _check_optimizer(optimizer)
    for module in (model, ema):
        if module is not None:
            reshard(module)
    content: dict[str, Any] = {}
    with _failing_together():
        if _rank() == 0:
            content = _read(source)
            _check_weights(source, "state_dict", content, model)
            _check_weights(source, "state_dict_ema", content, ema)
            _check_groups(source, content["optimizer"], model, optimizer)
    kept = _from_rank_0({key: content.get(key) for key in ("epoch", "extra")})
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=_distributed())
    set_model_state_dict(model, dict(content.get("state_dict", {})), options=options)
    if ema is not None:
        set_model_state_dict(ema, dict(content.get("state_dict_ema", {})), options=options)
    _set_optimizer_state(model, optimizer, content.get("optimizer"))
    return kept


def _path(path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be a str or a Path, found {type(path).__name__}")
    return Path(path)


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, found {type(optimizer).__name__}"
        )


def _check_extra(extra: Any) -> None:
    """Raise ValueError where `extra` could be written, but not read again."""
    buffer = io.BytesIO()
    try:
        torch.save(extra, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # whatever pickling its content raises
        raise ValueError(
            f"extra must be made of plain Python values and tensors: {_first_line(error)}"
        ) from error


def _modules(task: TrainingTask) -> tuple[nn.Module, nn.Module | None]:
    """What `task` trains, and the average of it."""
    check_task(task)
    model, ema = task.get_trainable_module(), task.get_trainable_module(ema=True)
    if model is None:
        raise ValueError(f"task {type(task).__name__} has no trainable module")
    return model, ema.module if isinstance(ema, ModelEmaV3) else ema


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _from_rank_0(value: Any) -> Any:
    """`value` of rank 0, on all ranks."""
    if not _distributed():
        return value
    sent = [value]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    """What fails on rank 0 raises on every rank, which would otherwise wait for it for ever."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # the body only works on rank 0
        failure = error
    kinds = (FileNotFoundError, OSError, ValueError)
    kind = next((kind for kind in kinds if isinstance(failure, kind)), RuntimeError)
    known = _from_rank_0(None if failure is None else (kind, str(failure)))
    if failure is not None:
        raise failure
    if known is not None:
        kind, text = known
        raise kind(text)


def _write(content: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside it: os.replace is atomic within one file system only
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(source: Path) -> dict[str, Any]:
    if not source.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{source} is no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{source} is no checkpoint: it holds a {type(content).__name__}, not a dict"
        )
    if missing := [k for k in _KEYS if k not in content and k != "state_dict_ema"]:
        found = [str(key) for key in content]
        raise ValueError(
            f"{source} is no checkpoint of save_checkpoint: {missing} missing, found {_some(found)}"
        )
    state = content["optimizer"]
    if not (
        isinstance(content["state_dict"], dict)
        and isinstance(content.get("state_dict_ema", {}), dict)
        and isinstance(state, dict)
        and isinstance(state.get("state"), dict)
        and isinstance(state.get("param_groups"), list)
    ):
        kinds = {key: type(value).__name__ for key, value in content.items()}
        raise ValueError(f"{source} is no checkpoint of save_checkpoint: it holds {kinds}")
    return content


def _check_weights(
    source: Path, key: str, content: dict[str, Any], module: nn.Module | None
) -> None:
    """Raise ValueError where the weights under `key` are not those of `module`."""
    if (module is None) != (key not in content):
        raise ValueError(
            f"{source} has EMA weights, but the task has none: call task.setup_ema() first"
            if module is None
            else f"the task has EMA weights, but {source} has none: set them up after loading"
        )
    if module is None:
        return
    saved = {name: _shape(value) for name, value in content[key].items()}
    # without full_state_dict nothing is gathered, and a sharded tensor has its whole shape
    wanted = {name: _shape(value) for name, value in get_model_state_dict(module).items()}
    problems = []
    if missing := [name for name in wanted if name not in saved]:
        problems.append(f"missing {_some(missing)}")
    if unknown := [name for name in saved if name not in wanted]:
        problems.append(f"unknown {_some(unknown)}")
    problems += [
        f"{name} is {saved[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ][:5]
    if problems:
        raise ValueError(f"{source}: its {key} is of another model: {'; '.join(problems)}")


def _check_groups(
    source: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer
) -> None:
    """Raise ValueError where the saved groups are not the optimiser's, or of another kind."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    wanted = [group["params"] for group in _named_groups(model, optimizer)]
    if saved != wanted:
        raise ValueError(
            f"{source}: its optimizer has groups of {[len(g) for g in saved]} parameters, this "
            f"one's are {[len(g) for g in wanted]} or differ in what is in them; make them as for "
            f"the saved run"
        )
    for group, present in zip(state["param_groups"], optimizer.param_groups, strict=True):
        unknown, absent = group.keys() - present.keys(), optimizer.defaults.keys() - group.keys()
        if unknown and absent:  # one alone is a scheduler's entry, or another release of PyTorch
            raise ValueError(
                f"{source}: its optimizer is of another kind than {type(optimizer).__name__}: its "
                f"groups have {_some(sorted(unknown))} and no {_some(sorted(absent))}"
            )


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{rest}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__


def _parameter_names(module: nn.Module, prefix: str = "") -> dict[Tensor, str]:
    """Names in the bare model, as `torch.distributed.checkpoint.state_dict` gives them."""
    if isinstance(module, DistributedDataParallel):
        return _parameter_names(module.module, prefix)
    if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        return _parameter_names(inner, prefix)
    names: dict[Tensor, str] = {}
    for name, child in module.named_children():
        names.update(_parameter_names(child, f"{prefix}{name}."))
    names.update((value, prefix + name) for name, value in module.named_parameters(recurse=False))
    return names


def _named_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimiser's groups, with names in the place of parameters."""
    names = _parameter_names(model)
    groups = []
    for group in optimizer.param_groups:
        if not all(parameter in names for parameter in group["params"]):
            raise ValueError(
                "optimizer has parameters that the task's trainable module does not have; make it "
                "after the module is converted, sharded and on its device"
            )
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
    return groups


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Whole state by parameter names; on other ranks than 0 nothing of use."""
    reshard(model)
    groups = _named_groups(model, optimizer)  # before the collectives, so that errors come first
    if not optimizer.state:
        # PyTorch would take a step of zero gradients to have a state to save, and Adam would count
        # it: a run that is saved before its first step must go on like one that is not
        return {"state": {}, "param_groups": groups}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(model, optimizer, options=whole))


def _set_optimizer_state(
    model: nn.Module, optimizer: Optimizer, content: dict[str, Any] | None
) -> None:
    """The inverse of `_optimizer_state`; `content` on rank 0 only."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    described = None
    if content is not None:
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in content["param_groups"]
        ]
        described = (list(content["state"]), options)
    stateful, options = _from_rank_0(described)
    had_state = set(stateful)
    if stateful:
        if content is not None:
            # with the present options: PyTorch stumbles over saved ones that this optimiser does
            # not have yet, such as a scheduler's `initial_lr`. The saved ones follow below
            content = {**content, "param_groups": _named_groups(model, optimizer)}
        # not strict: parameters that never had a gradient have no state, see below
        whole = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=_distributed(), strict=False
        )
        set_optimizer_state_dict(model, optimizer, content or {}, options=whole)
        # PyTorch has taken a step of zero gradients to make the state that it fills in; where it
        # filled in nothing, there was nothing
        for parameter, name in _parameter_names(model).items():
            if name not in had_state:
                optimizer.state.pop(parameter, None)
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        for key, value in saved.items():
            if isinstance(value, Tensor) and isinstance(now := group.get(key), Tensor):
                value = value.to(now.device)
            group[key] = value

"""The operators one by one: `pool`, `unpool_add`, `stencil`, `allocate` and `attend`.

    python benchmarks/kernels.py [--device cuda] [--dtype bfloat16] [--batch-size 256] [--quick]

Prints one row per operator, shape, pass and contestant: milliseconds, the speed-up over the PyTorch
reference compiled with Inductor, and the share of the device's limit, both measured in the same
run: least bytes / time against a large copy, for attention FLOPs / time against a large matrix
product. Writes JSON with `--json`.

An operator whose result or gradient differs from the same in float64 by more than its roundings
explain is not timed: its row says refused, and the exit status is 1. On the CPU the operators run
their reference, so that the table shows overheads only, and tensors that fit into its caches go
beyond the limit. Times are of the device alone (see
`_common.device_times`); what would not end within `--minutes` is listed as skipped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import _common as common
from _attend_cases import attend_contest
from _kernel_cases import (
    BASELINE,
    BOTH,
    FORWARD,
    OWN,
    PVT,
    SAM,
    VIT_B,
    VIT_L,
    Contest,
    Shape,
    allocate_contest,
    pool_contest,
    stencil_contest,
    unpool_contest,
)

COLUMNS = ("op", "shape", "pass", "contestant", "ms", "speed-up", "of limit", "note")
OPERATORS = {
    "pool": (pool_contest, (VIT_B, VIT_L, PVT)),
    "unpool_add": (unpool_contest, (VIT_B, VIT_L, PVT)),
    "stencil": (stencil_contest, (PVT,)),
    "allocate": (allocate_contest, (VIT_B, VIT_L, PVT)),
    "attend": (attend_contest, (VIT_B, VIT_L, SAM)),
}
#: times the error that the operator may have: PyTorch sums some gradients in half precision
SLACK = 4
#: instead of 4096 keys, whose float64 check takes minutes on the CPU
SMALL_SAM = SAM._replace(name="SAM-B 512", grid=(32, 32))


def call(function: Callable[..., Any], inputs: tuple[Tensor, ...], grad: Tensor | None) -> Any:
    """One pass: the result, or with `grad` the result and the gradients of all inputs."""
    if grad is None:
        with torch.no_grad():
            return function(*inputs)
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad[: out.shape[0]]))


def parts(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def worst_row(found: Tensor, wanted: Tensor) -> float:
    """Largest error of a row, relative to its norm or, if that is larger, to the rows' usual norm;
    of integers, how many differ."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return float((found != wanted).sum())
    own, other = (t.reshape(-1, t.shape[-1]).double() for t in (found.detach(), wanted))
    norm = other.norm(dim=1)
    error = (own - other).norm(dim=1) / norm.clamp(
        min=max(float(norm.square().mean().sqrt()), 1e-30)
    )
    return float(torch.where(error.isnan(), torch.inf, error).max())


def tolerance(contest: Contest, direction: str) -> float:
    """Each rounding to the dtype is off by half a unit in the last place at most, as is each of the
    float32 operations that the result goes through."""
    dtype = contest.inputs[0].dtype
    if not dtype.is_floating_point:
        return 0.0
    roundings = contest.roundings[direction] * common.ROUNDING[dtype]
    return roundings + contest.steps[direction] * common.ROUNDING[torch.float32]


def exact_result(contest: Contest, direction: str, grad: Tensor | None) -> tuple[Tensor, ...]:
    """The pass in float64."""
    wide = tuple(
        t.detach().double().requires_grad_() if t.is_floating_point() else t for t in contest.inputs
    )
    found = parts(call(contest.exact, wide, None if grad is None else grad.double()))
    return tuple(t.detach() for t in found)


def measure(
    contest: Contest, direction: str, limits: dict[str, float], device: torch.device, runs: int
) -> list[common.Row]:
    """The rows of one operator, shape and pass; the operator's own comes first."""
    where = {"op": contest.op, "shape": contest.shape, "pass": direction}
    grad = None
    if direction == BOTH:
        with torch.no_grad():
            out = contest.exact(*contest.inputs)
        grad = torch.randn(out.shape, device=device).to(out.dtype)
    wanted, allowed = exact_result(contest, direction, grad), tolerance(contest, direction)
    calls: dict[str, common.Call] = {}
    errors: dict[str, float] = {}
    notes = {name: f"not here: {reason}" for name, reason in contest.missing.items()}
    for name, function in contest.calls.items():
        run = partial(call, function, contest.inputs, grad)
        try:
            found = parts(run())
            if name not in contest.unlike:
                pairs = zip(found, wanted, strict=True)
                errors[name] = max(worst_row(a, b) for a, b in pairs)
            bound = allowed if name == OWN else SLACK * allowed
            if errors.get(name, 0.0) <= bound:
                calls[name] = run
                run()  # a second call may compile again
            else:
                verdict = "refused" if name == OWN else "not timed"
                notes[name] = f"{verdict}: off by {errors[name]:.1e}, allowed {bound:.1e}"
        except Exception as error:
            notes[name] = common.why(error)
            calls.pop(name, None)
        if name == OWN and OWN not in calls:
            return [{**where, "contestant": OWN, "error": errors.get(OWN), "note": notes[OWN]}]
    del wanted
    common.device_times(calls, device, 2)
    times = common.device_times(calls, device, runs)
    base = next((times[name] for name in times if name.startswith(BASELINE)), None)
    rows = []
    for name in [*contest.calls, *contest.missing]:
        row: common.Row = {**where, "contestant": name, "note": notes.get(name, "")}
        if name in times:
            row["ms"] = statistics.median(times[name])
            row["speed-up"] = None if base is None else common.speed_up(base, times[name])
            reached = contest.work[direction] / (1e-3 * row["ms"])
            row["of limit"] = reached / limits[contest.limit]
            row["error"], row["allowed"] = errors.get(name), allowed
        rows.append(row)
    return rows


def contests(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Contest]]]:
    """Operator, shape and what makes the contest; nothing is built before it is its turn."""
    for op in args.ops:
        build, shapes = OPERATORS[op]
        for shape in shapes[:1] if args.quick else shapes:
            size: Shape = SMALL_SAM if shape is SAM and args.device == "cpu" else shape
            make = partial(build, size, args.batch_size, torch.device(args.device), args.dtype)
            yield op, size.name, make


def run_all(args: argparse.Namespace, limits: dict[str, float]) -> list[common.Row]:
    """All rows; what fails or is out of time is a row too."""
    device, deadline = torch.device(args.device), common.Deadline(args.minutes)
    rows: list[common.Row] = []
    for op, shape, make in tqdm(list(contests(args)), desc="operators"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        passes = (FORWARD,) if op == "allocate" else (FORWARD, BOTH)
        contest = None
        for direction in passes:
            where = {"op": op, "shape": shape, "pass": direction, "contestant": OWN}
            if deadline.near():
                rows.append(
                    {**where, "note": f"skipped: may not end within {args.minutes:g} minutes"}
                )
                continue
            start = time.perf_counter()
            try:
                contest = contest or make()
                rows += measure(contest, direction, limits, device, args.runs)
            except Exception as error:  # also out of memory
                rows.append({**where, "note": common.why(error)})
            deadline.took(time.perf_counter() - start)
        del contest
        common.write_json(args.json, common.environment(device), rows, limits=limits)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=common.default_device(), choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=common.DTYPES, help="bfloat16 on CUDA, else float32")
    parser.add_argument("--batch-size", type=int, help="256 on CUDA, else 4; SAM: a 32nd of it")
    parser.add_argument("--ops", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--runs", type=int, default=15, help="timed rounds of each")
    parser.add_argument("--minutes", type=float, default=9.0, help="rows past it are skipped")
    parser.add_argument("--quick", action="store_true", help="one shape per operator, few runs")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = common.DTYPES[args.dtype or ("bfloat16" if cuda else "float32")]
    args.batch_size = args.batch_size or (256 if cuda else 4)
    args.runs = min(args.runs, 5) if args.quick else args.runs
    device = torch.device(args.device)
    limits = {
        "bytes": common.copy_bandwidth(device),
        "FLOPs": common.matmul_throughput(device, args.dtype),
    }
    rows = run_all(args, limits)
    copied, multiplied = limits["bytes"] / 1e9, limits["FLOPs"] / 1e12
    title = (
        f"{common.environment(device)['device']}, {args.dtype}: limits {copied:.0f} GB/s copied, "
        f"{multiplied:.2f} TFLOP/s multiplied"
    )
    common.print_table(title, COLUMNS, rows)
    # every operator must have been timed, or be skipped for want of time
    bad = [r for r in rows if r["contestant"] == OWN and "ms" not in r]
    bad = [r for r in bad if not r["note"].startswith("skipped")]
    if bad:
        print(f"{len(bad)} passes of an operator were refused or failed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""End-to-end speed: converted models against the dense one and token merging, in one run.

    python benchmarks/models.py vit_small_patch16_224 pvt_v2_b2 --gamma 0.5 --batch-size 1 64 256
    python benchmarks/models.py --quick          # three blocks, batch 2: does it run at all
    python benchmarks/models.py vit_small_patch16_224 --train --batch-size 64

Prints one row per model, batch size, method (dense, per_image, average, and ToMe at the MACs of
per_image, for plain vision transformers) and mode (eager, compiled, graphs: compiled with
`reduce-overhead`). All of one model and batch size are called in turn; milliseconds are medians.
The speed-up is the median of the paired quotients with the compiled dense model, which uses fused
attention; beside it the limit, 1 / MAC ratio by torch's counter, and the share of it. With
`--train` a step is timed instead, forward and backward of a mean loss, of dense and per_image.

A model whose compiled output (with `--train`, gradients) differs from eager is refused, not timed,
and the exit status is 1. What does not fit in memory is a row that says so, as is all that would
not end within `--minutes`: nine of them are enough for few models compiled for the first time, so
name those you want; Inductor's cache makes a second run faster. Batch sizes are taken one after the
other, over all models, in the order given. JSON with `--json`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import _common as common
from _model_cases import AVERAGE, DENSE, METHODS, PER_IMAGE, Prepared, prepare
from _model_steps import (
    COMPILED,
    EAGER,
    GRAPHS,
    MODES,
    compiled,
    infer,
    outcome,
    tolerance,
    train,
)

COLUMNS = (
    "model",
    "batch",
    "method",
    "mode",
    "ratio",
    "limit",
    "ms",
    "speed-up",
    "share of limit",
    "note",
)
GPU_MODELS = (
    "vit_base_patch16_224",
    "vit_small_patch16_224",
    "pvt_v2_b2",
    "swin_tiny_patch4_window7_224",
    "vit_large_patch16_384",
    "samvit_base_patch16",
    "deit_small_patch16_224",
)
CPU_MODELS = ("vit_small_patch16_224",)
#: seconds that the timing of one model and batch size may take
TIMING = 30.0


def late(args: argparse.Namespace) -> str:
    return f"skipped: may not end within {args.minutes:g} minutes"


class Group:
    """All methods and modes of one model at one batch size."""

    def __init__(self, name: str, batch: int, args: argparse.Namespace) -> None:
        self.name, self.batch, self.args = name, batch, args
        self.calls: dict[tuple[str, str], common.Call] = {}
        self.notes: dict[tuple[str, str], str] = {}
        self.seconds: dict[tuple[str, str], float] = {}  # of the first calls
        self.differences: dict[tuple[str, str], float] = {}  # from eager, relative

    def rows(self, prepared: Prepared | str, deadline: common.Deadline) -> list[common.Row]:
        """Measure; instead of a model, `prepared` may be the reason why there is none."""
        keys = [(method, mode) for mode in self.args.modes for method in self.args.methods]
        times: dict[tuple[str, str], list[float]] = {}
        if isinstance(prepared, str):
            self.notes = dict.fromkeys(keys, prepared)
        else:
            torch._dynamo.reset()
            device = torch.device(self.args.device)
            torch.manual_seed(1)
            shape = (self.batch, 3, prepared.side, prepared.side)
            x = torch.randn(shape, device=device).to(self.args.dtype)
            wanted: dict[str, Tensor] = {}
            for key in tqdm(keys, desc=f"{self.name} at batch {self.batch}", leave=False):
                self._try(key, prepared, x, wanted, deadline)
            del wanted
            times = self._time(device)
        return [self._row(key, prepared, times) for key in keys]

    def _try(
        self,
        key: tuple[str, str],
        prepared: Prepared,
        x: Tensor,
        wanted: dict[str, Tensor],
        deadline: common.Deadline,
    ) -> None:
        """First calls of one method and mode, compared with eager."""
        method, mode = key
        if method in prepared.missing:
            self.notes[key] = prepared.missing[method]
            return
        if mode == GRAPHS and x.device.type != "cuda":
            self.notes[key] = "skipped: CUDA graphs need CUDA"
            return
        if deadline.near(TIMING):
            self.notes[key] = late(self.args)
            return
        step = train if self.args.train else infer
        try:
            start = time.perf_counter()
            model = prepared.models[method].train(self.args.train)
            if method not in wanted:
                wanted[method] = outcome(model, step(model, x, False), self.args.train)
            skips = counters["inductor"]["cudagraph_skips"]
            run = compiled(model, mode, whole=method in (PER_IMAGE, AVERAGE))
            call = partial(step, run, x, mode == GRAPHS)
            for _ in range(3):  # CUDA graphs are recorded in the second or third call
                call()
            found = outcome(model, call(), self.args.train)
            difference = float((found - wanted[method]).norm() / wanted[method].norm())
            self.differences[key] = difference
            common.synchronise(x.device)
            self.seconds[key] = time.perf_counter() - start
            deadline.took(self.seconds[key])
            allowed = tolerance(self.args.dtype)
            if not difference <= allowed:
                self.notes[key] = f"refused: {difference:.1e} from eager, allowed {allowed:.1e}"
                return
            if mode == GRAPHS and counters["inductor"]["cudagraph_skips"] > skips:
                self.notes[key] = "compiled, but without CUDA graphs"
            self.calls[key] = call
        except Exception as error:
            self.notes[key] = common.why(error)
        gc.collect()
        if x.device.type == "cuda" and self.notes.get(key) == "out of memory":
            torch.cuda.empty_cache()

    def _time(self, device: torch.device) -> dict[tuple[str, str], list[float]]:
        named = {" ".join(key): call for key, call in self.calls.items()}
        try:
            times = common.wall_times(named, device, self.args.runs, TIMING)
        except Exception as error:
            self.notes.update(dict.fromkeys(self.calls, common.why(error)))
            return {}
        return {key: times[" ".join(key)] for key in self.calls}

    def _row(
        self,
        key: tuple[str, str],
        prepared: Prepared | str,
        times: dict[tuple[str, str], list[float]],
    ) -> common.Row:
        method, mode = key
        row: common.Row = {"model": self.name, "batch": self.batch, "method": method, "mode": mode}
        row["note"] = self.notes.get(key, "")
        if isinstance(prepared, Prepared) and method in prepared.ratios:
            row |= {"size": prepared.side, "ratio": prepared.ratios[method]}
            row["limit"] = 1 / row["ratio"]
        if key in times:
            row["ms"] = statistics.median(times[key])
            row["runs"] = len(times[key])
            row["first calls seconds"] = self.seconds[key]
            row["difference from eager"] = self.differences[key]
            if base := times.get((DENSE, COMPILED)):
                row["speed-up"] = common.speed_up(base, times[key])
                row["share of limit"] = row["speed-up"] * row["ratio"]
        return row


def run_all(args: argparse.Namespace) -> list[common.Row]:
    """All rows, batch size by batch size."""
    device, deadline = torch.device(args.device), common.Deadline(args.minutes)
    prepared: dict[str, Prepared | str] = {}
    rows: list[common.Row] = []
    for batch in tqdm(args.batch_size, desc="batch sizes"):
        for name in tqdm(args.models, desc="models", leave=False):
            if name not in prepared and not deadline.near(TIMING):
                try:
                    size = (args.img_size, args.quick)
                    prepared[name] = prepare(
                        name, args.methods, args.gamma, device, args.dtype, *size
                    )
                except Exception as error:
                    prepared[name] = common.why(error)
            rows += Group(name, batch, args).rows(prepared.get(name, late(args)), deadline)
            save(args, rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def save(args: argparse.Namespace, rows: list[common.Row]) -> None:
    """Also after every model, so that a run that is ended has left something."""
    settings = {
        "gamma": args.gamma,
        "dtype": str(args.dtype),
        "step": "training" if args.train else "inference",
        "quick": args.quick,
    }
    env = common.environment(torch.device(args.device))
    common.write_json(args.json, env, rows, settings=settings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="timm model names; default: a few")
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, nargs="+", help="256 64 1; on the CPU 8 1")
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--runs", type=int, default=15, help="timed calls of each")
    parser.add_argument("--device", default=common.default_device(), choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=common.DTYPES, help="bfloat16 on CUDA, else float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--train", action="store_true", help="time a training step")
    parser.add_argument("--minutes", type=float, default=9.0, help="rows past it are skipped")
    parser.add_argument("--quick", action="store_true", help="three blocks, where that is possible")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.models = args.models or list(GPU_MODELS if cuda and not args.quick else CPU_MODELS)
    args.batch_size = args.batch_size or ([2] if args.quick else [256, 64, 1] if cuda else [8, 1])
    args.dtype = common.DTYPES[args.dtype or ("bfloat16" if cuda else "float32")]
    args.methods = args.methods or list((DENSE, PER_IMAGE) if args.train else METHODS)
    args.modes = args.modes or list((EAGER, COMPILED) if args.train else MODES)
    return args


def main() -> None:
    args = parse()
    # one model class is compiled in several forms
    torch._dynamo.config.recompile_limit = 64
    rows = run_all(args)
    env = common.environment(torch.device(args.device))
    step = "training step" if args.train else "inference"
    title = f"{env['device']}, {args.dtype}, {step}, gamma {args.gamma:g}, torch {env['torch']}"
    common.print_table(title, COLUMNS, rows)
    if refused := sum(row["note"].startswith("refused") for row in rows):
        print(f"{refused} models were refused", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

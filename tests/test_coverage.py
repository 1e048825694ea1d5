"""The coverage command: what it measures, on models whose answers are known, and its lists."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgefx.coverage import hf_cases, timm_cases, torchvision_cases
from dgefx.coverage.__main__ import main
from dgefx.coverage.cases import Case, images, library, select
from dgefx.coverage.measure import (
    Block,
    Result,
    difference,
    measure,
    randomise,
    reachable,
    time_convert,
)
from dgefx.coverage.run import Options, Running, kept, parse, run_case, run_cases
from dgefx.coverage.softmaxes import softmax_modules, unseen
from dgefx.coverage.table import families, grouped, markdown, summary
from dgefx.coverage.verdict import rightly_refused
from tests.helpers import TinyViT


def case(build: Any, side: int = 32, **changes: Any) -> Case:
    return Case("timm:made_up", "tests: global", build, images(side), **changes)


def test_a_model_that_converts() -> None:
    result = measure(case(lambda: TinyViT(dim=32, prefix=1)))
    assert result.status == "converted" and not result.error
    assert result.count("converted") == 2 and result.count("left") == 0
    assert result.exact is not None and result.exact <= 1e-5 and not result.wrong
    assert result.moved is not None and result.moved > 1e-3
    assert result.compiled and result.compile_difference is not None
    assert result.compile_difference <= 1e-5
    assert result.gamma is not None and result.ratio is not None
    assert result.ratio <= result.gamma + 1e-6
    # two counts of one thing
    assert result.counted == pytest.approx(result.ratio, abs=0.005)
    assert result.parameters == sum(p.numel() for p in TinyViT(dim=32, prefix=1).parameters())
    assert result.softmaxes == 2 and result.unseen == []
    assert result.seconds is not None and result.seconds > 0


class Broken(TinyViT):
    """Python that Dynamo cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_model_that_is_not_one_graph_says_so() -> None:
    result = measure(case(lambda: Broken(dim=32)))
    assert result.status == "converted" and result.compiled is False
    assert result.compile_error.startswith("nor is the dense model: ")


class Pooled(nn.Module):
    """One learned query over the tokens, and a softmax that no attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.gate = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.query.expand(len(y), -1, -1), y, y)
        return self.gate(y) * y


def test_a_model_where_nothing_converts_is_a_row_with_reasons() -> None:
    result = measure(case(Pooled))
    assert result.status == "refused" and not result.error and result.exact is None
    (block,) = result.blocks
    assert block.verdict == "refused" and block.what == "pooling head or learned queries"
    text = markdown([result], Options())
    assert "no residual add around it" in text


class Softmaxed(nn.Module):
    """No attention, but a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.gate = nn.Softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.gate(y) * y


def test_softmaxes_without_attention_found() -> None:
    result = measure(case(Softmaxed))
    assert result.status == "unseen" and result.unseen == ["gate"]
    assert families([result]) == {"tests: global": False}  # counts against the library
    known = measure(case(Softmaxed, over_grid=False))
    assert known.status == "no attention" and families([known]) == {}
    aside = measure(case(Softmaxed, aside=(("gate", "a gate"),)))
    assert aside.status == "no attention" and families([aside]) == {}


def test_softmaxes_are_found_where_they_are_taken() -> None:
    torch.manual_seed(0)
    found = softmax_modules(TinyViT(), lambda m: m(torch.randn(2, 3, 32, 32)))
    assert found == ["blocks.0.attn", "blocks.1.attn"]
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert softmax_modules(layer, lambda m: m(torch.randn(2, 9, 16))) == ["self_attn"]
    assert unseen(["a.b", "a", "c.d", "e"], ["a.b", "c"]) == ["e"]


def test_errors_are_results() -> None:
    result = measure(case(lambda: nn.Conv2d(3, 4, 4)))
    assert result.status == "no attention" and not result.error

    class Nan(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.nan

    result = measure(case(Nan))
    assert result.status == "error" and "NaN" in result.error


def test_only_timed() -> None:
    result = time_convert(case(lambda: TinyViT(dim=32)))
    assert result.status == "converted" and result.exact is None
    assert result.seconds is not None and result.gamma is not None
    assert result.ratio is not None and result.ratio <= result.gamma + 1e-6


def test_difference() -> None:
    a = {"x": torch.ones(4), "y": [torch.ones(3), None]}
    assert difference(a, a) == 0.0
    b = {"x": torch.ones(4), "y": [torch.tensor([1.0, 1.0, 2.0]), None]}
    assert difference(a, b) == pytest.approx(1 / 6**0.5)
    assert difference(torch.ones(2), torch.ones(3)) == math.inf
    assert difference(torch.ones(2), [torch.ones(2)] * 2) == math.inf
    assert difference(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_randomise_leaves_no_constant() -> None:
    model = randomise(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    for parameter in model.parameters():
        assert parameter.max() - parameter.min() > 1e-3


@pytest.mark.parametrize(
    ("floor", "gamma"), [(0.2, 0.5), (0.5, 0.5), (0.561, 0.57), (0.9993, 0.9993), (1.0, 1.0)]
)
def test_reachable(floor: float, gamma: float) -> None:
    assert reachable(floor) == gamma >= floor


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        ("channel attention", True),
        ("class attention", True),
        ("pooling head or learned queries", True),
        ("nothing to pool", True),
        ("no query-key scores", True),
        ("not traceable", False),
        ("mixes tokens", False),
        ("layout unknown", False),
        ("no block module", False),
        ("", False),
    ],
)
def test_verdict(kind: str, right: bool) -> None:
    assert rightly_refused(kind) == (kind if right else None)


# -- the table -----------------------------------------------------------------------------------


def row(name: str, family: str, blocks: list[Block], **changes: Any) -> Result:
    return Result(name, family, blocks=blocks, **{"status": "converted", **changes})


def results() -> list[Result]:
    good = [Block("blocks.0", "converted"), Block("blocks.1", "converted")]
    head = Block("pool", "refused", "class attention", "its queries are prefix tokens alone")
    left = [Block(f"blocks.{i}.attn", "left", "", f"matmul_{i} mixes tokens") for i in range(3)]
    return [
        row("timm:a", "a: global", good, exact=1e-7, seconds=2.0, compiled=True, ratio=0.5),
        row("timm:b", "b: mixed", [*good, head], exact=2e-7, seconds=4.0, gamma=0.6, floor=0.59),
        row("timm:c", "c: windows", [*good, *left], exact=1e-7, compiled=False, compile_error="no"),
        row("timm:c2", "c: windows", good, exact=1e-7),
        row("timm:d", "d: none", [], status="no attention", over_grid=False),
        row("timm:e", "e: class", [head], status="refused"),
        row("timm:f", "f: global", good, exact=1e-3),
        row("timm:g", "g: global", [], status="timeout", error="not done after 9 s"),
    ]


def test_families_and_summary() -> None:
    assert families(results()) == {
        "a: global": True,
        "b: mixed": True,
        "c: windows": False,
        "f: global": False,
        "g: global": False,
    }
    text = "\n".join(summary(results()))
    assert "timm: 2 of 5 families" in text and "(40.0%)" in text and "2 families have none" in text
    assert "blocks: 10 converted, 2 rightly refused, 3 that could convert" in text
    assert "5 converted, 5 compared: 4 exact to 1e-05, 1 wrong" in text
    assert "fullgraph=True): 1 of 2" in text
    assert "median 3.0 s, longest 4.0 s" in text
    assert "not measured: timm:g" in text


def test_markdown() -> None:
    text = markdown(results(), Options())
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(results())
    (floor,) = (line for line in table if "| b |" in line)
    assert "floor 0.59" in floor and "2 of 3" in floor
    assert any("no softmax attention" in line for line in table)
    assert any("1e-03 WRONG" in line for line in table)
    # three blocks, one reason
    assert "**left**: matmul_0 mixes tokens: `blocks.0-2.attn` (3)" in text
    assert "rightly refused, class attention" in text
    assert "- timm:c: no" in lines


def test_grouped() -> None:
    assert grouped(["a.0.b", "a.1.b", "a.3.b", "c"]) == "`a.0,1,3.b` (3), `c`"
    assert grouped([""]) == "`(root)`"


# -- names, processes, the command --------------------------------------------------------------


def test_select() -> None:
    (only,) = select(["timm:pvt_v2_b0"])
    assert only.family == "pvt_v2: spatial reduction"
    (other,) = select(["timm:vit_tiny_patch16_384"])  # not listed
    assert other.family == "vision_transformer"
    every = select([])
    assert len({c.name for c in every}) == len(every)
    assert {c.name.partition(":")[0] for c in every} == {"timm", "torchvision", "hf"}
    assert 0 < len(select([], quick=True)) < 20
    with pytest.raises(ValueError, match="no model matches 'timm:nothing'"):
        select(["timm:nothing"])
    with pytest.raises(ValueError, match="unknown source 'keras'"):
        select(["keras:resnet"])


def test_names_are_unique_and_flagged_quick() -> None:
    for module in (timm_cases, torchvision_cases, hf_cases):
        names = [c.name for c in module.cases()]
        assert len(set(names)) == len(names)
        quick = {c.name.partition(":")[2] for c in module.cases() if c.quick}
        assert quick == module._QUICK
        assert len(module.base_cases()) >= 3


def test_an_absent_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"dgefx\[train\]"):
        library("timm")
    assert main(["timm:test_vit"]) == 2


def test_every_timm_module_is_in_one_list() -> None:
    listed, free = set(timm_cases.modules()), timm_cases.ATTENTION_FREE
    assert not listed & free
    known = {name for name in timm.list_modules() if timm.list_models(module=name)}
    new = sorted(known - listed - free)
    assert not new, (
        f"timm {timm.__version__} has modules that dgefx.coverage.timm_cases does not know: {new}. "
        f"For each: if any of its models has query-key attention over tokens, add a small one per "
        f"kind of attention to _LIST and run python -m dgefx.coverage on it; if not, add the "
        f"module to ATTENTION_FREE"
    )
    models = {name: module for module, names in timm_cases.modules().items() for name in names}
    for name, module in models.items():
        assert name in timm.list_models(module=module), f"{name} is not in timm.models.{module}"


def test_modules_called_attention_free_import_no_attention() -> None:
    """Guards the other list: no layer whose name says attention over tokens."""
    import importlib

    suspicious = ("scaled_dot_product", "qkv", "MultiQuery", "q @ k")
    for name in sorted(timm_cases.ATTENTION_FREE):
        module = importlib.import_module(f"timm.models.{name}")
        source = Path(str(module.__file__)).read_text()
        assert not [word for word in suspicious if word in source], name


def test_a_process_that_hangs_ends_with_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    # importing torch alone takes longer
    result = run_case(select(["timm:test_vit"])[0], Options(timeout=0.3))
    assert result.status == "timeout" and "0.3 s" in result.error
    assert time.monotonic() - begun < 30


def test_a_process_that_begins_after_the_end_ends_too() -> None:
    running = Running()
    running.end()
    begun = time.monotonic()
    result = run_case(select(["timm:test_vit"])[0], Options(timeout=100), running)
    assert result.status == "crash" and "SIGKILL" in result.error
    assert time.monotonic() - begun < 30


def test_an_interrupted_run_ends_its_processes() -> None:
    import os
    import signal
    import subprocess

    command = [sys.executable, "-m", "dgefx.coverage", "timm:test_vit", "--timeout", "100"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def command_of(pid: int) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has ended
            return b""

    def children() -> list[int]:
        tasks = Path(f"/proc/{process.pid}/task")
        found = [int(c) for t in tasks.iterdir() for c in (t / "children").read_text().split()]
        # imports start processes too, before the signal is waited for
        return [pid for pid in found if b"coverage.worker" in command_of(pid)]

    if not Path(f"/proc/{process.pid}/task/{process.pid}/children").exists():
        process.kill()
        pytest.skip("needs /proc with the children of a process")
    deadline = time.monotonic() + 60
    while not (workers := children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 130 and "no table was written" in log
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_a_process_that_crashes_is_a_row() -> None:
    missing = dataclasses.replace(select(["timm:test_vit"])[0], name="timm:no_such_model")
    (result,) = run_cases([missing], Options())
    assert result.status == "crash" and "no model matches" in result.error
    assert result.name == "timm:no_such_model"


def test_a_broken_progress_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"name": 3}\n')
    with pytest.raises(ValueError, match="line 1, is no result"):
        kept(tmp_path / "lines", [])
    assert kept(tmp_path / "absent", []) == {}


def test_options() -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, found 0"):
        Options(jobs=0)
    with pytest.raises(ValueError, match="timeout must be"):
        Options(timeout=0)


def test_json_round_trip() -> None:
    for result in results():
        assert parse(json.dumps(dataclasses.asdict(result))) == result


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = tmp_path / "lines"
    kept_before = row("timm:test_vit4", "old", [Block("b", "converted")], exact=1e-7)
    progress.write_text(json.dumps(dataclasses.asdict(kept_before)) + "\n")
    arguments = ["timm:test_vit", "timm:test_vit4", "--out", str(tmp_path)]
    assert main([*arguments, "--progress", str(progress)]) == 0
    assert [parse(line).name for line in progress.read_text().splitlines()] == [
        "timm:test_vit4",
        "timm:test_vit",
    ]
    data = json.loads((tmp_path / "coverage.json").read_text())
    model, old = data["models"]
    assert old == dataclasses.asdict(kept_before)  # not measured again
    assert model["name"] == "timm:test_vit" and model["status"] == "converted"
    assert model["exact"] <= 1e-5 and model["compiled"] is True
    assert data["families"] == {"vision_transformer: global": True, "old": True}
    text = (tmp_path / "coverage.md").read_text()
    assert "| test_vit |" in text and "2 of 2 families" in text
    assert "timm:test_vit" in capsys.readouterr().out


def test_core_imports_no_model_library_and_no_kernel() -> None:
    import subprocess

    code = (
        "import sys, dgefx, dgefx.kernels.attend; "
        "assert 'dgefx.kernels.gpu.attend_forward' not in sys.modules; "
        "assert not [m for m in ('timm', 'torchvision', 'transformers', "
        "'dgefx.coverage') if m in sys.modules]; import dgefx.coverage.__main__; "
        "assert not [m for m in ('timm', 'transformers') if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

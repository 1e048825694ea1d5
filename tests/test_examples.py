"""The fine-tuning examples, run as a user runs them: resumption, processes, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgefx

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
timm = pytest.importorskip("timm")

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = [
    *("--model", "test_vit", "--model-kwargs", "depth=2", "--img-size", "64"),
    *("--gamma", "0.7", "--batch-size", "8", "--limit-batches", "2"),
    *("--dense-epochs", "1", "--epochs", "2", "--calibration-images", "8", "--device", "cpu"),
]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def finished(*command: str | Path, cwd: Path) -> str:
    result = run(*command, cwd=cwd)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    ("script", "options"),
    [
        # all but the gates' noise is drawn in the loader's workers
        pytest.param("finetune_pvt.py", ["--workers", "1"], marks=pytest.mark.slow),
        pytest.param(
            "finetune_swin.py",
            ["--ema", "0.5", "--mixup", "0.5", "--accumulate", "2", "--compare-dense"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    tmp_path: Path, script: str, options: list[str]
) -> None:
    command = (EXAMPLES / script, *SMALL, *options)
    table = finished(*command, "--out", "straight", cwd=tmp_path)
    assert "converted + fine-tuned" in table
    finished(*command, "--out", "parts", "--stop-after-epoch", "1", cwd=tmp_path)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert (parts / "log.csv").read_bytes() != (straight / "log.csv").read_bytes()
    # rows of an epoch that was not finished are done again
    with (parts / "log.csv").open("a") as file:
        last = (parts / "log.csv").read_text().splitlines()[-1].split(",")
        file.write(",".join([last[0], str(int(last[1]) + 1), *last[2:]]) + "\n1,")
    finished(*command, "--out", "parts", "--resume", cwd=tmp_path)
    for name in ("log.csv", "epochs.csv", "model/model.safetensors"):
        assert (parts / name).read_bytes() == (straight / name).read_bytes()
    assert (parts / "granularity.png").is_file()
    dense = timm.create_model("test_vit", depth=2, img_size=64, num_classes=10)
    loaded = dgefx.load(parts / "model", dense).eval()
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    once = [*SMALL, "--epochs", "1", "--limit-batches", "1"]
    table = finished(EXAMPLES / "finetune_pvt.py", *once, "--out", "run", cwd=tmp_path)
    assert "converted + fine-tuned" in table
    dense = timm.create_model("test_vit", depth=2, img_size=64, num_classes=10)
    loaded = dgefx.load(tmp_path / "run" / "model", dense).eval()
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_an_attention_kernel_of_ones_own(tmp_path: Path) -> None:
    printed = finished(EXAMPLES / "custom_attention.py", cwd=tmp_path)
    assert printed.count("│ converted │") == 4
    assert float(printed.split("dense model ")[1].split()[0]) <= 1e-5


TWO = """
import sys, os, torch
sys.path.insert(0, sys.argv.pop(1))
import _recipe, finetune_pvt
task = _recipe.main(finetune_pvt.DEFAULTS)
model = task.trainable_module.module
torch.save(model.state_dict(), f"rank{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = (*SMALL, "--out", "out", "--accumulate", "2")
    table = finished(*launch, "two.py", EXAMPLES, *options, cwd=tmp_path)
    assert table.count("converted + fine-tuned") == 1  # only rank 0 prints
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], start[name]) for name in first)
    # each process has half of the images: 2 batches of 8, one update, per epoch
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 1 + 2


@pytest.mark.slow
def test_two_processes_with_shards(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = (*SMALL, "--fsdp", "--ema", "0.5", "--out", "out")
    script = EXAMPLES / "finetune_swin.py"
    finished(*launch, script, *options, "--stop-after-epoch", "1", cwd=tmp_path)
    table = finished(*launch, script, *options, "--resume", cwd=tmp_path)
    assert table.count("converted + fine-tuned") == 1
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "pvt_v9"], "timm has no 'pvt_v9'"),
        (["--gamma", "1.5"], "--gamma must be above 0 and at most 1"),
        (["--resume"], "there is no run in"),
        (["--router", "linear", "--routing", "nested"], "has no linear router"),
        (["--capacity", "none", "--budget", "per_image"], "capacity=None"),
        (["--mixup", "1", "--batch-size", "3"], "must be even"),
        (["--weights", "nowhere.pt"], "no such file"),
        (["--data", "nowhere"], "no such folder"),
        (["--noise", "2"], "share of the updates"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    from _arguments import parse
    from finetune_pvt import DEFAULTS

    with pytest.raises(SystemExit):
        parse(DEFAULTS, options)
    assert message in capsys.readouterr().err


def test_a_run_is_not_mixed_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from _arguments import parse, settings, settings_file
    from finetune_swin import DEFAULTS

    args = parse(DEFAULTS, ["--out", str(tmp_path)])
    assert args.model_kwargs == DEFAULTS.model_kwargs and args.img_size == 112
    settings_file(args).write_text(__import__("json").dumps(settings(args)))
    parse(DEFAULTS, ["--out", str(tmp_path), "--resume", "--workers", "1"])
    for options, message in (
        (["--resume", "--lr", "1"], "--lr was 0.0002 and is 1.0"),
        ([], "holds a run already"),
    ):
        with pytest.raises(SystemExit):
            parse(DEFAULTS, ["--out", str(tmp_path), *options])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--pretrained"], ["--model-kwargs", "depths=(1,1)"]])
def test_the_small_swin_is_for_the_digits_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from _arguments import parse
    from finetune_swin import DEFAULTS

    args = parse(DEFAULTS, ["--out", str(tmp_path), *options])
    assert args.model_kwargs == ({} if options == ["--pretrained"] else {"depths": (1, 1)})

"""Where the rows of `dgefx.training.loop.train` go: a CSV file, TensorBoard.

Both are callables to be passed as `train(log=...)`, or called from a function that is.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any


class CsvLog:
    """One line per row, written out at once; goes on where a file of an earlier run ends.

    The columns are the keys of the first row that was ever written. A last line that was cut off
    when its run was killed is dropped.

    Args:
        path: made, with its folders, if missing.
        keep_before_step: drop the rows from this step on, which are to be done again by a run that
            is resumed; 0 starts afresh. None: keep all.

    Raises:
        ValueError: the file is no such log, or later a row has other columns.
    """

    def __init__(self, path: str | Path, *, keep_before_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.columns, rows = _read(self.path, keep_before_step)
        # written anew and moved into place, so that a kill in between loses nothing
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if self.columns:
                writer.writerow(self.columns)
            writer.writerows(rows)
        os.replace(part, self.path)
        self._file = self.path.open("a", newline="")

    def __call__(self, row: dict[str, Any]) -> None:
        """Append a row."""
        writer = csv.writer(self._file, lineterminator="\n")
        if not self.columns:
            self.columns = list(row)
            writer.writerow(self.columns)
        if set(row) != set(self.columns):
            raise ValueError(
                f"the row has the columns {list(row)}, {self.path} has {self.columns}; log runs "
                f"with other losses to another file"
            )
        writer.writerow([row[column] for column in self.columns])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> CsvLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read(path: Path, keep_before_step: int | None) -> tuple[list[str], list[list[str]]]:
    """Columns and the rows to keep; no columns where nothing is kept."""
    if keep_before_step == 0 or not path.is_file():
        return [], []
    text = path.read_text()
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not lines:
        return [], []
    columns, rows = lines[0], lines[1:]
    if keep_before_step is None:
        return columns, rows
    if "step" not in columns:
        raise ValueError(f"{path} has no column step, so its rows cannot be told apart by step")
    step = columns.index("step")
    return columns, [row for row in rows if int(row[step]) < keep_before_step]


class TensorBoardLog:
    """One curve per number in the rows.

    Args:
        folder: of the event files.
        keep_before_step: curves of an earlier run in the folder are shown up to this step only.
        prefix: of the curves' names.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self, folder: str | Path, *, keep_before_step: int | None = None, prefix: str = "train"
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLog needs the package tensorboard: pip install tensorboard"
            ) from error
        self.prefix = prefix
        self._writer: Any = SummaryWriter(str(folder), purge_step=keep_before_step)

    def __call__(self, row: dict[str, Any]) -> None:
        """Add the row's numbers at its step."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"{self.prefix}/{name}", value, row["step"])

    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

"""Batches of a columnar file in, records out: what Parquet and Arrow files share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from datalloy.errors import DataError
from datalloy.readers.conversation import MEDIA_KEYS
from datalloy.readers.layouts import MARKS, TEXT_COLUMNS
from datalloy.readers.records import Record
from datalloy.sample import ImageRef

BATCH_ROWS = 64
IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read. `renamed`: those of a LLaMA-Factory entry, to the names of our layouts."""

    renamed: Mapping[str, str] | None = None

    def chosen(self, names: Sequence[str], path: Path) -> list[str]:
        """Those of the file's columns that are read. Raises DataError where they are no conversations, or ambiguous."""
        if self.renamed is not None:
            found = [name for name in names if name in self.renamed or name == "id"]
        else:
            found = [name for name in names if name in TEXT_COLUMNS or name in MEDIA_KEYS]
            self._refuse_unless_one_layout(names, path)
        if len(set(names)) != len(names):
            raise DataError(f"{path} has the columns {', '.join(names)}; no name may stand twice")
        return found

    def is_image(self, column: str) -> bool:
        return column in IMAGE_COLUMNS if self.renamed is None else self.renamed.get(column) == "images"

    def _refuse_unless_one_layout(self, names: Sequence[str], path: Path) -> None:
        layouts = [name for name, marks in MARKS.items() if any(set(mark) <= set(names) for mark in marks)]
        if len(layouts) != 1 or set(IMAGE_COLUMNS) <= set(names):
            raise DataError(
                f"{path} has the columns {', '.join(names)}; wanted: either messages or conversations, prompt and "
                "completion, or instruction and output, and at most one of image and images, and no name twice"
            )


def table_records(
    path: Path,
    batches: Callable[[Path, int, Columns], Iterator[pyarrow.RecordBatch]],
    reference: Callable[[Path, str, int, int], ImageRef],
    columns: Columns | None,
) -> Iterator[Record]:
    """All rows in order, pictures as `reference(path, column, row, index)` under `images`, whatever their column."""
    wanted = columns or Columns()
    rows = (fields for batch in batches(path, BATCH_ROWS, wanted) for fields in batch.to_pylist())
    for row, fields in enumerate(rows):
        for column in [name for name in fields if wanted.is_image(name)]:
            cells = _image_cells(fields.pop(column), path, column, row, reference)
            fields["images" if wanted.renamed is None else column] = cells
        yield Record(row, 0, fields)


def _image_cells(
    value: Any, path: Path, column: str, row: int, reference: Callable[[Path, str, int, int], ImageRef]
) -> list[Any]:
    """References to the pictures in one cell; a picture given by its path alone stays that path."""
    cells = value if isinstance(value, list) else [value] if value is not None else []
    images: list[Any] = []
    for index, cell in enumerate(cells):
        match cell:
            case bytes() | {"bytes": bytes()}:
                images.append(reference(path, column, row, index))
            case {"path": file}:
                images.append(file)
            case _:
                images.append(cell)
    return images

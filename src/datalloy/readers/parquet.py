"""A Parquet file in, its records out; pictures stay in the file as references to their cells.

Columns: `messages` as in messages or `conversations` as in sharegpt (lists of structs), `image` or `images` (a binary,
a struct of bytes and path as Hugging Face datasets writes it, a path, or a list of those), and optionally `id` and
`system`. Video and audio columns are read only to reject their rows; others are not read.

Every batch is validated in full, and page checksums are checked where the file has them. Rows come in small batches,
but a reference reads its row group: memory follows the size of the row groups (100 rows as Hugging Face datasets
writes them), not of the file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from datalloy.errors import DataError
from datalloy.readers import messages, sharegpt
from datalloy.readers.conversation import MEDIA_KEYS
from datalloy.readers.records import Record, open_data_file
from datalloy.sample import ParquetImage, Turn

BATCH_ROWS = 64


def parquet_records(path: Path) -> Iterator[Record]:
    """All rows of the file in order, pictures under `images` whatever their column. Raises DataError."""
    for row, fields in enumerate(_rows(path)):
        for column in ("image", "images"):
            if column in fields:
                fields["images"] = _image_cells(fields.pop(column), path, column, row)
        yield Record(row, 0, fields)


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one row, image paths relative to `root`. Raises RecordError."""
    return messages.read_turns(fields, root) if "messages" in fields else sharegpt.read_turns(fields, root)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_data_file(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            columns = _wanted_columns(parquet.schema_arrow.names, path)
            for group in range(parquet.num_row_groups):
                missing = parquet.metadata.row_group(group).num_rows
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    batch.validate(full=True)
                    missing -= batch.num_rows
                    yield from batch.to_pylist()
                if missing:  # a ParquetImage finds its row by these counts
                    raise pyarrow.ArrowInvalid(f"row group {group} lacks {missing} of its rows")
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a Parquet file that can be read: {error}; write or download it anew"
            ) from error


def _wanted_columns(names: list[str], path: Path) -> list[str]:
    turns = [name for name in ("messages", "conversations") if name in names]
    images = [name for name in ("image", "images") if name in names]
    if len(turns) != 1 or len(images) > 1 or len(set(names)) != len(names):
        raise DataError(
            f"{path} has the columns {', '.join(names)}; wanted: either messages or conversations, at most one of "
            "image and images, and no name twice"
        )
    return [*turns, *(name for name in ("id", "system", *MEDIA_KEYS) if name in names)]


def _image_cells(value: Any, path: Path, column: str, row: int) -> list[Any]:
    """References to the pictures in one cell; a picture given by its path alone stays that path."""
    cells = value if isinstance(value, list) else [value] if value is not None else []
    images: list[Any] = []
    for index, cell in enumerate(cells):
        match cell:
            case bytes() | {"bytes": bytes()}:
                images.append(ParquetImage(path, column, row, index))
            case {"path": file}:
                images.append(file)
            case _:
                images.append(cell)
    return images

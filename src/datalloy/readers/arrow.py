"""An Arrow file of a saved Hugging Face dataset in, its records out; pictures stay in the file.

`save_to_disk` writes Arrow streams, and so does the cache of Hugging Face datasets. They are mapped, not read, so a
picture costs its own bytes. No library beyond pyarrow is needed, and nothing is copied into a cache. Columns are those
of Parquet files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow
import pyarrow.ipc

from datalloy.errors import DataError
from datalloy.readers.records import Record, open_data_file
from datalloy.readers.tables import Columns, table_records

FILE_MAGIC, STREAM_MAGIC = b"ARROW1", b"\xff\xff\xff\xff"


@dataclass(frozen=True, slots=True)
class ArrowImage:
    """A picture whose bytes stand in a column of an Arrow file: row `row`, the `index`-th image of that row."""

    path: Path
    column: str
    row: int
    index: int

    def read(self) -> bytes:
        try:
            cell = read_arrow(self.path).column(self.column)[self.row].as_py()
            item = (cell if isinstance(cell, list) else [cell])[self.index]
        except (pyarrow.ArrowException, LookupError, ValueError) as error:
            raise OSError(f"{self}: {error}") from error
        return item["bytes"] if isinstance(item, dict) else item

    def __str__(self) -> str:
        return f"{self.path}#{self.column}[{self.row}][{self.index}]"


def arrow_records(path: Path, columns: Columns | None = None) -> Iterator[Record]:
    """All rows of the file in order, pictures under `images` whatever their column. Raises DataError."""
    return table_records(path, _batches, ArrowImage, columns)


@lru_cache(maxsize=16)
def read_arrow(path: Path) -> pyarrow.Table:
    """The mapped table of an Arrow stream or file. Raises OSError or ArrowException."""
    source = pyarrow.memory_map(str(path))
    with path.open("rb") as file:
        is_file = file.read(len(FILE_MAGIC)) == FILE_MAGIC
    return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()


def _batches(path: Path, batch_rows: int, wanted: Columns) -> Iterator[pyarrow.RecordBatch]:
    open_data_file(path).close()
    try:
        table = read_arrow(path)
        for batch in table.select(wanted.chosen(table.column_names, path)).to_batches(max_chunksize=batch_rows):
            batch.validate(full=True)
            yield batch
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not an Arrow file that can be read: {error}; save the dataset anew") from error

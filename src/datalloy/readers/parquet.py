"""A Parquet file in, its records out; pictures stay in the file as references to their cells.

Columns: those of any layout (`layouts.TEXT_COLUMNS`), and `image` or `images` (a binary, a struct of bytes and path as
Hugging Face datasets writes it, a path, or a list of those). Video and audio columns are read only to reject their
rows; others are not read.

Every batch is validated in full, and page checksums are checked where the file has them. Rows come in small batches,
but a reference reads its row group: memory follows the size of the row groups (100 rows as Hugging Face datasets
writes them), not of the file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from datalloy.errors import DataError
from datalloy.readers.records import Record, open_data_file
from datalloy.readers.tables import Columns, table_records
from datalloy.sample import ParquetImage


def parquet_records(path: Path, columns: Columns | None = None) -> Iterator[Record]:
    """All rows of the file in order, pictures under `images` whatever their column. Raises DataError."""
    return table_records(path, _batches, ParquetImage, columns)


def _batches(path: Path, batch_rows: int, wanted: Columns) -> Iterator[pyarrow.RecordBatch]:
    with open_data_file(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            yield from _validated(parquet, batch_rows, wanted.chosen(parquet.schema_arrow.names, path))
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a Parquet file that can be read: {error}; write or download it anew"
            ) from error


def _validated(
    parquet: pyarrow.parquet.ParquetFile, batch_rows: int, columns: Sequence[str]
) -> Iterator[pyarrow.RecordBatch]:
    for group in range(parquet.num_row_groups):
        missing = parquet.metadata.row_group(group).num_rows
        for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=columns):
            batch.validate(full=True)
            missing -= batch.num_rows
            yield batch
        if missing:  # a ParquetImage finds its row by these counts
            raise pyarrow.ArrowInvalid(f"row group {group} lacks {missing} of its rows")

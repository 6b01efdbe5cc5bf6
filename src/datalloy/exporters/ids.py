"""A handover in, `ids.parquet` out: what is trained on, by name alone, for any trainer and any join.

One row for every sample that training sees, in its order: `position, id, domain, file, row, line, content_hash`.
"""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from datalloy.exporters.handover import Handover
from datalloy.exporters.rows import complete_file

FILE = "ids.parquet"


def export(handover: Handover, out: Path) -> list[Path]:
    """Write the file. Raises RecipeError for native shares."""
    handover.refuse_native("ids.parquet", "lists rows and has no place for shares")
    samples = handover.samples
    out.mkdir(parents=True, exist_ok=True)
    columns = {
        "position": pyarrow.array(range(len(samples)), pyarrow.int64()),
        "id": pyarrow.array([s.id for s in samples], pyarrow.string()),
        "domain": pyarrow.array([s.domain for s in samples], pyarrow.string()),
        "file": pyarrow.array([str(s.origin.path) for s in samples], pyarrow.string()),
        "row": pyarrow.array([s.origin.row for s in samples], pyarrow.int64()),
        "line": pyarrow.array([s.origin.line for s in samples], pyarrow.int64()),
        "content_hash": pyarrow.array([s.content_hash for s in samples], pyarrow.string()),
    }
    with complete_file(out / FILE) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file, write_page_checksum=True)
    return [out / FILE]

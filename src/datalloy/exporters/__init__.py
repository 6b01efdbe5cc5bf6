"""Chosen samples in, files for a trainer out, one module a format.

`rows` is the user's own format, byte for byte, and the default. All others are given a `Handover` and write a folder
from which the trainer is launched as it stands: data, and the trainer's own configuration with exact counts.
"""

from collections.abc import Callable
from pathlib import Path

from datalloy.exporters import axolotl, energon, ids, llama_factory, ms_swift, trl, webdataset
from datalloy.exporters.handover import Handover, Portion
from datalloy.exporters.rows import by_domain, export_rows

__all__ = ["EXPORTERS", "Handover", "Portion", "by_domain", "export_rows"]

EXPORTERS: dict[str, Callable[[Handover, Path], list[Path]]] = {
    "llama-factory": llama_factory.export,
    "ms-swift": ms_swift.export,
    "trl": trl.export,
    "axolotl": axolotl.export,
    "energon": energon.export,
    "webdataset": webdataset.export,
    "ids": ids.export,
}

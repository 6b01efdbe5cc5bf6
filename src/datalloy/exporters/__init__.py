"""Chosen samples in, files for a trainer out, one module a format; `rows` is the user's own, byte for byte."""

from datalloy.exporters.rows import export_rows

__all__ = ["export_rows"]

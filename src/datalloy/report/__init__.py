"""A finished run folder in, one self-contained page out; several folders in, one page that sets them side by side.

The pages open offline, can be mailed, and make no request; without their script everything can still be read. Charts
are SVG drawn by hand, a few kilobytes each, instead of a plotting library's four megabytes (docs/decisions.md).
"""

from collections.abc import Sequence
from pathlib import Path

from datalloy.report import (
    comparison,
    evidence,
    gallery,
    keeping,
    opening,
    outcome,
    provenance,
    refused,
    shares,
    utilities,
)
from datalloy.report.facts import RunFacts
from datalloy.report.markup import text
from datalloy.report.page import Section, render
from datalloy.run import write_atomically


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a finished run; returns its path. Raises RunError for any other folder."""
    facts = RunFacts(folder)
    page = render(
        title=f"{facts.recipe.name}: what to train on",
        heading=f"{facts.recipe.name}: what to train on",
        opening=opening.header(facts),
        sections=_sections(facts),
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write a page that sets finished runs side by side; returns its path. Raises RunError if one is not finished."""
    runs = comparison.name_runs([RunFacts(folder) for folder in folders])
    title = f"{len(runs)} runs side by side"
    page = render(
        title=title,
        heading=title,
        opening=f'<p class="lead">{text(comparison.lead(runs))}</p>',
        sections=comparison.sections(runs),
    )
    write_atomically(path, page.encode())
    return path


def _sections(facts: RunFacts) -> list[Section]:
    sections = [outcome.section(facts)]
    if facts.has_selection:
        sections.append(keeping.section(facts))
    if facts.has_mixture:
        sections += [shares.section(facts), evidence.section(facts)]
    if facts.has_selection:
        sections += [gallery.section(facts), utilities.section(facts)]
    return [*sections, refused.section(facts), provenance.section(facts)]

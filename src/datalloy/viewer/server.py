"""A run table and its texts in, a local web server out.

Three rules, and tests for each. It listens on 127.0.0.1 alone. It answers to the names of this machine's loopback and
to no other, so that a page whose name is made to point here (DNS rebinding) gets nothing. Every request for data and
every change carries the token of the address that was printed, in a header, which neither a form, nor a picture, nor
another account of the machine can send. The page itself holds no data and needs no token.

Whatever a data file says is sent as JSON and becomes text on the page; pictures are decoded and encoded again.
"""

import hmac
import io
import logging
import secrets
import socket
import sqlite3
import webbrowser
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from datalloy.config import Recipe, load_recipe
from datalloy.errors import DatalloyError, EnvironmentFault, RunError
from datalloy.exporters import export_rows
from datalloy.run import digest, read_provenance
from datalloy.sample import Sample, open_image
from datalloy.viewer.overrides import Overrides
from datalloy.viewer.table import MAX_PAGE, Query, RunTable, facet
from datalloy.viewer.texts import Texts

try:
    import fastapi
    import uvicorn
    from fastapi import Body, HTTPException, Request, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:
    raise EnvironmentFault(f"the viewer needs FastAPI ({error}); pip install 'datalloy[serve]'") from None

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
HOSTS = [LOOPBACK, "localhost"]
TOKEN_HEADER = "X-Datalloy-Token"  # noqa: S105  # the name of a header, no secret
PAGE = {"index.html": "text/html", "viewer.css": "text/css", "viewer.js": "text/javascript"}
PREVIEW = 200  # characters of question and answer in a list
THUMBNAIL, PICTURE = 160, 900  # pixels
REMEMBERED_PICTURES = 256
EDITED = "edited"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class View:
    """One run on the screen, and the run it is compared with. Raises the errors of RunTable, Overrides and recipes."""

    def __init__(self, folder: Path, other: Path | None = None) -> None:
        provenance = read_provenance(folder / "provenance.json")
        self.fingerprint: str = provenance["fingerprint"]
        self.recipe: Recipe = load_recipe(folder)
        self.table = RunTable(folder, RunTable(other) if other else None)
        self.other_data = _differing(provenance, read_provenance(other / "provenance.json")) if other else []
        self.overrides = Overrides(folder, self.fingerprint)
        self.table.overrule(self.overrides.read())
        self.texts = Texts(self.table, self.recipe, provenance["parts"], self.fingerprint)

    def about(self) -> dict[str, Any]:
        """What the page has to know before it asks for rows."""
        table = self.table
        return {
            "name": self.recipe.name,
            "folder": str(table.folder),
            "other": str(table.other.folder) if table.other else None,
            "other_data": self.other_data,
            "rows": len(table),
            "kept": int(table.kept_N.sum()),
            "selected": int(table.selected_N.sum()),
            "overruled": int((table.overruled_N >= 0).sum()),
            "method": table.scores_metadata.get("method"),
            "arm": table.selection_metadata.get("arm"),
            "has_mixture": self.recipe.mixture is not None,
            "targets": table.targets,
            "numbers": list(table.numbers),
            "domain": facet(table.scores["domain"], table.kept_N),
            "state": facet(table.scores["state"], table.kept_N),
            "reason": facet(table.selection["reason"], table.kept_N),
            "texts": asdict(self.texts.progress),
        }

    def rows(self, query: Query, offset: int, limit: int) -> dict[str, Any]:
        """One page of what a query finds. Texts are there for the rows that have been read."""
        found = self.table.find(query, self.texts)
        wanted = found.rows[offset : offset + limit].tolist()
        rows = {row: self.table.row(row) for row in wanted}
        for row, sample in self.texts.samples(wanted):
            question = " ".join(turn.text for turn in sample.turns if turn.role == "user")
            rows[row] |= {"question": _cut(question), "answer": _cut(sample.answer), "pictures": len(sample.images)}
        return {"total": len(found.rows), "kept": found.kept, "offset": offset, "rows": list(rows.values())}

    def histogram(self, query: Query) -> dict[str, Any]:
        """How the number of the query is spread over what it would find without limits on that number."""
        wide = query.model_copy(update={"least": None, "most": None, "sort": query.by})
        return self.table.histogram(self.table.find(wide, self.texts).rows, query.by)

    def sample(self, row: int) -> dict[str, Any]:
        """Everything about one row: its turns, each part a text or the number of a picture."""
        sample = self.texts.sample(row)
        return {**self.table.row(row), "origin": sample and str(sample.origin), "turns": sample and _turns(sample)}

    def decide(self, rows: list[int], kept: bool | None) -> dict[str, Any]:
        """Keep, drop, or go back to what the selection says (None). What the selection says anyway is not written."""
        changes = [
            (self.table.key(row), kept if kept is not None and kept != self.table.selected_N[row] else None)
            for row in rows
        ]
        self.table.overrule(self.overrides.change(changes))
        return {"kept": int(self.table.kept_N.sum()), "overruled": int((self.table.overruled_N >= 0).sum())}

    def export(self) -> dict[str, Any]:
        """Write the rows of the edited selection, each once, byte for byte; the folder is named by what it holds."""
        samples = self.texts.unchanged_samples(np.flatnonzero(self.table.kept_N))
        folder = self.table.folder / EDITED / digest([[s.domain, s.id] for s in samples])[:8]
        files = export_rows(samples, folder, sources=self.recipe.domains)
        return {"folder": str(folder), "rows": len(samples), "files": [path.name for path in files]}


def _differing(provenance: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the domains that both runs have, read from files of different content."""
    mine, theirs = (run["parts"]["inputs"] for run in (provenance, other))
    both = sorted(key for key in mine.keys() & theirs.keys() if key.startswith("domains."))
    return [key.removeprefix("domains.") for key in both if mine[key] != theirs[key]]


def _cut(text: str) -> str:
    return text if len(text) <= PREVIEW else text[:PREVIEW] + " …"


def _turns(sample: Sample) -> list[dict[str, Any]]:
    number = iter(range(len(sample.images)))
    return [
        {"role": turn.role, "parts": [part if isinstance(part, str) else next(number) for part in turn.parts]}
        for turn in sample.turns
    ]


def thumbnail(sample: Sample, index: int, side: int) -> bytes:
    """A picture of the sample as PNG, at most `side` pixels wide and high. Raises OSError or ValueError."""
    picture = open_image(sample.images[index])
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


Rows = Annotated[list[Annotated[int, Field(ge=0)]], Body(min_length=1, max_length=10_000)]
RowNumber = Annotated[int, fastapi.Path(ge=0)]


def build_app(view: View, token: str) -> fastapi.FastAPI:
    """The server's application: the page, and under `/api` what it shows and changes."""
    app = fastapi.FastAPI(title="Datalloy", docs_url=None, redoc_url=None, openapi_url=None)
    picture = lru_cache(maxsize=REMEMBERED_PICTURES)(
        lambda row, index, side: thumbnail(_present(view.texts.sample(row)), index, side)
    )

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get(TOKEN_HEADER, "").encode()
        if request.url.path.startswith("/api") and not hmac.compare_digest(given, token.encode()):
            response: Response = fastapi.responses.JSONResponse(
                {"detail": "open the address that `datalloy view` printed: it carries the token"}, status_code=403
            )
        else:
            response = await answer(request)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)

    @app.exception_handler(DatalloyError)
    async def refuse(_: Request, error: DatalloyError) -> Response:
        return fastapi.responses.JSONResponse({"detail": str(error)}, status_code=409)

    @app.exception_handler(sqlite3.Error)
    async def damaged(_: Request, error: sqlite3.Error) -> Response:
        detail = f"{view.texts.path} cannot be read: {error}; delete it and view the run again"
        return fastapi.responses.JSONResponse({"detail": detail}, status_code=409)

    @app.get("/")
    def index() -> Response:
        return _asset("index.html")

    @app.get("/{name}")
    def asset(name: str) -> Response:
        return _asset(name)

    @app.get("/api/run")
    def run() -> dict[str, Any]:
        return view.about()

    @app.get("/api/texts")
    def texts() -> dict[str, Any]:
        return asdict(view.texts.progress)

    @app.get("/api/rows")
    def rows(
        query: Annotated[Query, fastapi.Depends(_query)],
        offset: Annotated[int, fastapi.Query(ge=0)] = 0,
        limit: Annotated[int, fastapi.Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> dict[str, Any]:
        return view.rows(query, offset, limit)

    @app.get("/api/histogram")
    def histogram(query: Annotated[Query, fastapi.Depends(_query)]) -> dict[str, Any]:
        return view.histogram(query)

    @app.get("/api/agreement")
    def agreement() -> dict[str, Any]:
        return view.table.agreement()

    @app.get("/api/sample/{row}")
    def sample(row: RowNumber) -> dict[str, Any]:
        return view.sample(_known(view, row))

    @app.get("/api/picture/{row}/{index}")
    def shown_picture(row: RowNumber, index: RowNumber, large: bool = False) -> Response:
        try:
            data = picture(_known(view, row), index, PICTURE if large else THUMBNAIL)
        except (OSError, ValueError, IndexError) as error:
            raise HTTPException(404, f"the picture cannot be shown: {error}") from None
        return Response(data, media_type="image/png")

    @app.post("/api/overrides")
    def overrides(rows: Rows, kept: Annotated[bool | None, Body()]) -> dict[str, Any]:
        return view.decide([_known(view, row) for row in rows], kept)

    @app.post("/api/export")
    def export() -> dict[str, Any]:
        return view.export()

    return app


def _query(request: Request) -> Query:
    """The query of a request. Unknown keys and values are refused."""
    given = {key: value for key, value in request.query_params.items() if key not in ("offset", "limit")}
    try:
        return Query.model_validate(given)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def _known(view: View, row: int) -> int:
    if row >= len(view.table):
        raise HTTPException(404, f"there is no row {row}; the run has {len(view.table)}")
    return row


def _present(sample: Sample | None) -> Sample:
    if sample is None:
        raise ValueError("its text has not been read yet")
    return sample


def _asset(name: str) -> Response:
    if name not in PAGE:
        raise HTTPException(404, "not found")
    data = resources.files("datalloy.viewer").joinpath("page", name).read_bytes()
    return Response(data, media_type=f"{PAGE[name]}; charset=utf-8")


def serve(
    folder: Path, other: Path | None = None, *, port: int = 0, say: Callable[[str], None], open_page: bool = False
) -> None:
    """Show a run until the process is stopped. `say` gets the address, token included; port 0 is any free one.

    Raises RunError where a folder holds no selection, EnvironmentFault where the port is taken.
    """
    for path in filter(None, (folder, other)):
        if not (path / "provenance.json").is_file():
            raise RunError(f"{path} is no run folder; `datalloy run RECIPE` makes one and prints its path")
    view = View(folder, other)
    token = secrets.token_urlsafe(24)
    app = build_app(view, token)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except (OSError, OverflowError) as error:
            raise EnvironmentFault(f"port {port} of {LOOPBACK} cannot be used: {error}; leave --port out") from None
        view.texts.start()
        # behind the #, so that no server, log or Referer ever sees the token
        address = f"http://{LOOPBACK}:{listener.getsockname()[1]}/#{token}"
        say(address)
        if open_page:
            webbrowser.open(address)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])

"""The viewer's server: what it finds, what it writes, and whom it refuses. No model is loaded, no port is opened."""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from datalloy import cli
from datalloy import viewer as viewer_package
from datalloy.errors import DataError, EnvironmentFault, RunError
from datalloy.scores import SCHEMA_VERSION, Scores, write_table
from drawn_run import HOSTILE, draw_run, read_selection

MISSING = "FastAPI is not installed; pip install 'datalloy[serve]'"
pytest.importorskip("fastapi", reason=MISSING)
pytest.importorskip("uvicorn", reason=MISSING)
pytest.importorskip("httpx2", reason="Starlette's TestClient is not usable; pip install 'datalloy[dev]'")

from fastapi.testclient import TestClient  # noqa: E402

from datalloy.viewer import server, texts  # noqa: E402
from datalloy.viewer.overrides import MAX_OVERRIDES, Overrides  # noqa: E402
from datalloy.viewer.server import HEADERS, TOKEN_HEADER, View, build_app  # noqa: E402
from datalloy.viewer.table import Query, RunTable  # noqa: E402

TOKEN = "a-token-of-the-tests"
ROWS = 40


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def folder(drawn_data, tmp_path) -> Path:
    return draw_run(drawn_data, tmp_path / "run", ROWS)


@pytest.fixture
def other(drawn_data, tmp_path) -> Path:
    return draw_run(drawn_data, tmp_path / "other", ROWS, seed=1, fraction=0.3)


@pytest.fixture
def view(folder) -> View:
    shown = View(folder)
    shown.texts.read_all()
    assert shown.texts.progress.is_complete, shown.texts.progress.fault
    return shown


def client_of(view: View, token: str = TOKEN, host: str = "127.0.0.1:8123") -> TestClient:
    headers = {TOKEN_HEADER: token} if token else {}
    return TestClient(build_app(view, TOKEN), base_url=f"http://{host}", headers=headers)


@pytest.fixture
def client(view) -> TestClient:
    return client_of(view)


def ids(client: TestClient, **asked: object) -> list[str]:
    response = client.get("/api/rows", params={"limit": 200, **asked})
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()["rows"]]


# --- finding ---------------------------------------------------------------------------------------------------------


def test_rows_come_best_first_and_those_without_a_utility_last(client, folder):
    scores = Scores.read(folder / "scores.parquet")
    order = np.argsort(-scores.utility, kind="stable")  # NaN sorts last
    assert ids(client) == scores.id[order].tolist()
    assert ids(client)[-4:] == ids(client, descending=False)[-4:]


@pytest.mark.parametrize("column", ["domain", "id", "state", "reason", "loss", "rank", "utility:goal"])
def test_every_column_sorts_both_ways(client, column):
    up, down = ids(client, sort=column, descending=False), ids(client, sort=column, descending=True)
    assert sorted(up) == sorted(down)
    known = {row["id"]: row[column] for row in client.get("/api/rows", params={"limit": 200}).json()["rows"]}
    values = [known[name] for name in up if known[name] is not None]
    assert values == sorted(values)
    assert [known[name] for name in down if known[name] is not None] == sorted(values, reverse=True)


def test_pages_together_are_the_whole(client):
    pages = [ids(client, offset=offset, limit=7) for offset in range(0, ROWS, 7)]
    assert [name for page in pages for name in page] == ids(client)
    assert ids(client, offset=10_000) == []


def test_filters_leave_exactly_what_they_name(client, folder):
    scores, selection = Scores.read(folder / "scores.parquet"), read_selection(folder)
    by_name = {
        "domain": ("table", scores.domain == "table"),
        "state": ("nonfinite", scores.state == "nonfinite"),
        "reason": ("below_fraction", selection.reason == "below_fraction"),
        "decision": ("dropped", ~selection.kept),
    }
    for name, (value, mask) in by_name.items():
        assert set(ids(client, **{name: value})) == set(scores.id[mask])
    both = client.get("/api/rows", params={"domain": "table", "decision": "kept"}).json()
    assert (both["total"], both["kept"]) == (int(((scores.domain == "table") & selection.kept).sum()),) * 2


def test_a_range_includes_its_ends_and_no_missing_number(client, folder):
    scores = Scores.read(folder / "scores.parquet")
    low, high = np.nanquantile(scores.utility, [0.25, 0.75])
    within = (scores.utility >= low) & (scores.utility <= high)
    assert set(ids(client, least=low, most=high)) == set(scores.id[within])
    assert set(ids(client, by="loss", most=2)) == set(scores.id)
    assert set(ids(client, least=-1e9)) == set(scores.id[scores.is_ok])


def test_text_is_found_in_question_answer_and_id_whatever_its_case(client):
    assert ids(client, text="ANSWER 17") == ["s0000017"]
    assert set(ids(client, text="WIE GROSS")) == set(ids(client)) - {"s0000001"}  # sharp s folds to ss
    assert ids(client, text="S0000003") == ["s0000003"]
    assert ids(client, text="%") == ids(client, text="' OR 1 --") == []
    assert ids(client, text="</script>") == ["s0000001"]


def test_an_unknown_column_or_filter_is_refused_with_what_is_known(client):
    refused = client.get("/api/rows", params={"sort": "price"})
    assert (refused.status_code, "known are utility," in refused.json()["detail"]) == (409, True)
    assert client.get("/api/rows", params={"colour": "red"}).status_code == 422
    assert client.get("/api/rows", params={"least": "nan"}).status_code == 422
    assert client.get("/api/rows", params={"limit": 201}).status_code == 422


def test_a_histogram_counts_every_known_number_once(client, folder):
    scores, selection = Scores.read(folder / "scores.parquet"), read_selection(folder)
    found = client.get("/api/histogram", params={"least": 0.5}).json()
    assert len(found["edges"]) == len(found["kept"]) + 1
    assert sum(found["kept"]) == selection.kept[scores.is_ok].sum()
    assert sum(found["dropped"]) == (~selection.kept[scores.is_ok]).sum()


def test_the_counts_of_a_run_add_up(client, folder):
    about = client.get("/api/run").json()
    assert about["rows"] == ROWS
    assert about["kept"] == about["selected"] == read_selection(folder).kept.sum()
    for name in ("domain", "state", "reason"):
        assert sum(entry["rows"] for entry in about[name]) == ROWS
        assert sum(entry["kept"] for entry in about[name]) == about["kept"]


# --- texts and pictures ----------------------------------------------------------------------------------------------


def test_a_sample_comes_with_its_turns_pictures_and_origin(client, drawn_data):
    row = client.get("/api/rows", params={"text": "s0000001"}).json()["rows"][0]
    sample = client.get(f"/api/sample/{row['row']}").json()
    assert sample["turns"] == [
        {"role": "user", "parts": [0, f"Question 1: {HOSTILE}"]},
        {"role": "assistant", "parts": ["answer 1"]},
    ]
    path, line = sample["origin"].rsplit(":", 1)
    assert json.loads(Path(path).read_text().splitlines()[int(line) - 1])["id"] == "s0000001"


def test_a_picture_is_encoded_anew_and_made_small(client):
    answer = client.get("/api/picture/0/0")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")
    assert client.get("/api/picture/0/1").status_code == client.get(f"/api/picture/{ROWS}/0").status_code == 404


def test_a_picture_that_is_gone_is_said_and_harms_nothing_else(tmp_path):
    view = View(draw_run(tmp_path / "data", tmp_path / "run", 6))
    view.texts.read_all()
    (tmp_path / "data" / "red.png").unlink()
    client = client_of(view)
    assert "red.png" in client.get("/api/picture/0/0").json()["detail"]
    assert len(ids(client)) == 6


def test_texts_are_read_once(view, folder, monkeypatch):
    monkeypatch.setattr(texts.readers, "read", None)
    again = View(folder)
    again.texts.read_all()
    assert again.texts.progress.is_complete
    assert again.texts.search("answer 17").tolist() == view.texts.search("answer 17").tolist()


def test_texts_that_were_half_read_when_the_viewer_was_killed_are_read_again(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    first = View(folder)
    monkeypatch.setattr(texts, "_line", stop)
    with pytest.raises(KeyboardInterrupt):
        first.texts.read_all()
    monkeypatch.undo()
    again = View(folder)
    again.texts.read_all()
    assert len(again.texts.search("answer")) == ROWS


def test_a_damaged_file_of_texts_is_made_anew(view, folder):
    view.texts.path.write_bytes(b"not a database at all" * 100)
    again = View(folder)
    again.texts.read_all()
    assert again.texts.progress.is_complete


def test_texts_of_another_version_are_read_again(view, folder, monkeypatch):
    monkeypatch.setattr(texts, "SCHEMA_VERSION", texts.SCHEMA_VERSION + 1)
    assert not View(folder).texts._is_made()


def test_texts_that_are_damaged_while_they_are_shown_are_said_to_be(view, client):
    view.texts.path.write_bytes(b"not a database at all" * 100)
    refused = client.get("/api/rows")
    assert (refused.status_code, "delete it and view the run again" in refused.json()["detail"]) == (409, True)


@pytest.mark.parametrize("harm", ["changed", "absent"])
def test_data_that_changed_since_the_run_are_not_shown_but_the_scores_are(harm, tmp_path):
    view = View(draw_run(tmp_path / "data", tmp_path / "run", 6))
    path = tmp_path / "data" / "chart.jsonl"
    path.write_text(path.read_text() + "\n") if harm == "changed" else path.unlink()
    view.texts.read_all()
    assert ("has changed since the run" if harm == "changed" else "is not there") in view.texts.progress.fault
    client = client_of(view)
    assert len(ids(client)) == 6
    assert client.get("/api/rows", params={"text": "x"}).status_code == 409
    assert client.post("/api/export").status_code == 409


def test_while_texts_are_being_read_rows_are_shown_and_a_search_is_refused(folder):
    client = client_of(View(folder))
    assert len(ids(client)) == ROWS
    assert "wait until they are" in client.get("/api/rows", params={"text": "x"}).json()["detail"]


def test_every_kind_of_picture_that_readers_make_can_be_shown():
    source = Path(viewer_package.__file__).parent.parent
    paths = [source / "sample.py", *(source / "readers").glob("*.py")]
    classes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    kinds = {c.name for c in classes if isinstance(c, ast.ClassDef) and _reads_bytes(c) and c.name != "ImageRef"}
    assert kinds == set(texts.IMAGE_KINDS)


def _reads_bytes(node: ast.ClassDef) -> bool:
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    read = methods.get("read")
    # without arguments: all of it, as pictures are read; with a size it is a file
    return read is not None and len(read.args.args) == 1 and ast.unparse(read.returns or ast.Constant(None)) == "bytes"


# --- overruling ------------------------------------------------------------------------------------------------------


def decide(client: TestClient, rows: list[int], kept: bool | None) -> dict:
    response = client.post("/api/overrides", json={"rows": rows, "kept": kept})
    assert response.status_code == 200, response.text
    return response.json()


def test_overruling_is_a_file_of_its_own_and_the_selection_stays(client, view, folder):
    before = (folder / "selection.parquet").read_bytes()
    dropped, kept = int(np.flatnonzero(~view.table.selected_N)[0]), int(np.flatnonzero(view.table.selected_N)[0])
    assert decide(client, [dropped], True) == {"kept": int(view.table.selected_N.sum()) + 1, "overruled": 1}
    assert decide(client, [kept], False) == {"kept": int(view.table.selected_N.sum()), "overruled": 2}
    assert (folder / "selection.parquet").read_bytes() == before
    written = json.loads((folder / "overrides.json").read_text())
    assert set(written) == {"schema_version", "fingerprint", "overrides"}
    keys = {(*view.table.key(dropped), True), (*view.table.key(kept), False)}
    assert {(row["domain"], row["id"], row["kept"]) for row in written["overrides"]} == keys
    assert set(ids(client, decision="overruled")) == {view.table.key(row)[1] for row in (dropped, kept)}


def test_overruling_lasts_until_it_is_taken_back(client, view, folder):
    decide(client, [3, 4], not bool(view.table.selected_N[3]))
    assert View(folder).table.overruled_N.tolist() == view.table.overruled_N.tolist()
    assert decide(client, [3, 4], None)["overruled"] == 0
    assert (View(folder).table.kept_N == view.table.selected_N).all()


def test_agreeing_with_the_selection_is_no_overruling(client, view):
    kept = int(np.flatnonzero(view.table.selected_N)[0])
    assert decide(client, [kept], True)["overruled"] == 0
    decide(client, [kept], False)
    assert decide(client, [kept], True)["overruled"] == 0


def test_two_viewers_of_one_run_lose_nothing_of_each_other(client, folder):
    first, second = View(folder), View(folder)
    flips = [not bool(kept) for kept in first.table.selected_N]
    first.decide([0], flips[0])
    assert second.decide([1], flips[1])["overruled"] == 2


def test_the_order_of_decisions_does_not_change_the_file(folder):
    written = []
    for order in ([("chart", "a"), ("table", "b")], [("table", "b"), ("chart", "a")]):
        (folder / "overrides.json").unlink(missing_ok=True)
        for key in order:
            Overrides(folder, "f").change([(key, True)])
        written.append((folder / "overrides.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ('{"schema_version": 1, "fingerprint": "f"}', "damaged"),
        ('{"schema_version": 1, "fingerprint": "f", "overrides": [{"domain": "a", "id": 3, "kept": true}]}', "no text"),
        ('{"schema_version": 1, "fingerprint": "f", "overrides": [{"domain": "a", "id": "b", "kept": 1}]}', "true or"),
        ('{"schema_version": 2, "fingerprint": "f", "overrides": []}', "schema version 2"),
        ('{"schema_version": 1, "fingerprint": "g", "overrides": []}', "another run"),
    ],
)
def test_a_file_of_decisions_that_is_not_ours_is_refused(text, message, tmp_path):
    (tmp_path / "overrides.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Overrides(tmp_path, "f").read()


def test_a_decision_on_a_sample_that_is_not_there_is_refused(view):
    with pytest.raises(DataError, match="'nobody' of domain 'chart' is not in"):
        view.table.overrule({("chart", "nobody"): True})
    with pytest.raises(DataError, match="'nobody' of domain 'zoo' is not in"):
        view.table.overrule({("zoo", "nobody"): True})


def test_another_selection_is_not_made_by_overruling(tmp_path):
    with pytest.raises(DataError, match="another selection is made by another recipe"):
        Overrides(tmp_path, "f").change([(("chart", str(n)), True) for n in range(MAX_OVERRIDES + 1)])
    assert not (tmp_path / "overrides.json").exists()


@pytest.mark.parametrize(
    "body", [{"rows": [], "kept": True}, {"rows": [-1], "kept": True}, {"rows": [0]}, {"kept": True}]
)
def test_an_empty_or_incomplete_decision_is_refused(body, client, folder):
    assert client.post("/api/overrides", json=body).status_code == 422
    assert not (folder / "overrides.json").exists()


# --- exporting -------------------------------------------------------------------------------------------------------


def test_the_export_holds_the_kept_rows_byte_for_byte_after_overruling(client, view, drawn_data):
    decide(client, [0, 1, 2], True)
    decide(client, [10, 11], False)
    written = client.post("/api/export").json()
    kept = {view.table.key(int(row)) for row in np.flatnonzero(view.table.kept_N)}
    assert written["rows"] == len(kept)
    for domain in ("chart", "table"):
        lines = (drawn_data / f"{domain}.jsonl").read_bytes().splitlines(keepends=True)
        wanted = [line for line in lines if (domain, json.loads(line)["id"]) in kept]
        assert (Path(written["folder"]) / f"{domain}.jsonl").read_bytes() == b"".join(wanted)


def test_the_folder_of_an_export_is_named_by_what_it_holds(client, view):
    first = client.post("/api/export").json()["folder"]
    decide(client, [0], not bool(view.table.selected_N[0]))
    second = client.post("/api/export").json()["folder"]
    decide(client, [0], None)
    assert first != second
    assert client.post("/api/export").json()["folder"] == first


# --- comparing -------------------------------------------------------------------------------------------------------


def test_two_runs_are_joined_by_domain_and_id(folder, other):
    table = RunTable(folder, RunTable(other))
    theirs = Scores.read(other / "scores.parquet")
    for row in (0, 9, 39):
        place = int(np.flatnonzero((theirs.domain == table.key(row)[0]) & (theirs.id == table.key(row)[1]))[0])
        shown = table.row(row)
        expected = None if np.isnan(theirs.utility[place]) else theirs.utility[place]
        assert shown["other_utility"] == expected
        assert shown["other_kept"] == read_selection(other).kept[place]


def test_agreement_counts_every_common_sample_once(folder, other, client):
    found = RunTable(folder, RunTable(other)).agreement()
    assert sum(found["kept_by"].values()) == found["both"] == ROWS
    assert (found["only_here"], found["only_there"]) == (0, 0)
    assert sum(map(sum, found["grid"]["counts"])) == ROWS - 4  # four have no utility
    assert RunTable(folder, RunTable(folder)).agreement()["spearman"] == pytest.approx(1)
    assert client.get("/api/agreement").status_code == 409


def test_samples_of_one_run_alone_are_counted(folder, tmp_path):
    smaller = draw_run(tmp_path / "less", tmp_path / "small", 30)
    found = RunTable(folder, RunTable(smaller)).agreement()
    assert (found["both"], found["only_here"], found["only_there"]) == (30, 10, 0)
    table = RunTable(smaller, RunTable(folder))
    assert (table.agreement()["only_here"], table.agreement()["only_there"]) == (0, 10)


def test_runs_of_different_data_under_the_same_ids_are_said_to_be(folder, other, tmp_path):
    assert View(folder, other).about()["other_data"] == []
    longer = draw_run(tmp_path / "more", tmp_path / "longer", ROWS + 9)
    assert View(folder, longer).about()["other_data"] == ["chart", "table"]


def test_what_was_decided_differently_can_be_filtered(folder, other):
    view = View(folder, other)
    mine, theirs = read_selection(folder).kept, read_selection(other).kept
    assert len(view.table.find(Query(decision="differs"), view.texts).rows) == (mine != theirs).sum() > 0


# --- a million -------------------------------------------------------------------------------------------------------


def big_run(folder: Path, rows: int) -> RunTable:
    """Scores and selection alone, written straight to their files: drawing texts for a million would be the test."""
    folder.mkdir()
    random = np.random.default_rng(0)
    keys = {"id": np.char.zfill(np.arange(rows).astype(str), 7), "domain": np.repeat(["a", "b"], rows // 2)}
    integers, numbers = np.ones(rows, dtype=np.int64), random.normal(size=rows)
    scored = {**keys, "supervised_tokens": integers, "length_tokens": integers, "loss": numbers, "utility": numbers}
    scored |= {"utility:goal": numbers, "utility_se": np.ones(rows), "state": np.full(rows, "ok")}
    about = {"kind": "scores", "version": SCHEMA_VERSION, "metadata": {"method": "exact", "signed": True}}
    write_table(folder / "scores.parquet", pa.table(scored), **about)
    chosen = {**keys, "rank": integers, "kept": numbers > 0, "reason": np.full(rows, "top_fraction")}
    write_table(folder / "selection.parquet", pa.table(chosen), kind="selection", version=1, metadata={})
    return RunTable(folder)


class NoTexts:
    """Stands in for texts that have not been read."""

    def samples(self, rows):
        return ()


def calls_of(work) -> int:
    """How many Python functions run."""
    made = 0

    def count(_frame, event, _argument):
        nonlocal made
        made += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return made


def test_a_page_of_a_million_rows_costs_what_a_page_of_a_thousand_costs(tmp_path):
    calls, shown = {}, {}
    for rows in (1_000, 1_000_000):
        view = SimpleNamespace(table=big_run(tmp_path / str(rows), rows), texts=NoTexts())
        query = Query(domain="b", least=0.0)
        View.rows(view, query, 0, 50)  # the first page sorts and filters, once
        calls[rows] = calls_of(lambda view=view, query=query: View.rows(view, query, 100, 50))
        assert view.table._found.cache_info().misses == 1
        shown[rows] = View.rows(view, query, 0, 3)["rows"]
        best = np.sort(view.table.numbers["utility"][rows // 2 :])[::-1][:3]
        assert [row["utility"] for row in shown[rows]] == best.tolist()
    assert calls[1_000] == calls[1_000_000]


def test_contributions_are_left_on_disk(folder):
    assert "contributions" in Scores.read(folder / "scores.parquet").table.column_names
    assert "contributions" not in RunTable(folder).scores.column_names


# --- whom it refuses -------------------------------------------------------------------------------------------------

ROUTES = ["run", "texts", "rows", "histogram", "agreement", "sample/0", "picture/0/0"]


def test_the_routes_named_here_are_all_there_are(view):
    found = {route.path for route in build_app(view, TOKEN).routes}
    patterns = {f"/api/{name}" for name in (*ROUTES[:5], "sample/{row}", "picture/{row}/{index}")}
    assert found == patterns | {"/", "/{name}", "/api/overrides", "/api/export"}


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "0.0.0.0:8123", "[::1]:8123", "192.168.0.9"]
)
@pytest.mark.parametrize("path", ["/", "/viewer.js", "/api/run"])
def test_a_request_under_another_name_of_this_machine_is_refused(host, path, view):
    """The defence against DNS rebinding: the token's owner may be tricked into asking, the name gives it away."""
    assert client_of(view).get(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:65000", "localhost"])
def test_the_names_of_the_loopback_are_answered(host, view):
    assert client_of(view, host=host).get("/api/run").status_code == 200


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1], "é"])
@pytest.mark.parametrize("route", ROUTES)
def test_data_are_given_to_nobody_without_the_token(route, token, view):
    response = client_of(view, "").get(f"/api/{route}", headers={TOKEN_HEADER: token.encode("latin-1")})
    assert response.status_code == 403
    assert "drawn" not in response.text


@pytest.mark.parametrize("route", ["overrides", "export"])
def test_nothing_is_written_without_the_token(route, view, folder):
    before = sorted(folder.rglob("*"))
    assert client_of(view, "").post(f"/api/{route}", json={"rows": [0], "kept": True}).status_code == 403
    elsewhere = {"Cookie": f"token={TOKEN}", "Authorization": f"Bearer {TOKEN}"}
    assert client_of(view, "").post(f"/api/{route}?token={TOKEN}", headers=elsewhere).status_code == 403
    assert sorted(folder.rglob("*")) == before


def test_reading_verbs_write_nothing(client, folder):
    for route in ("overrides", "export"):
        assert client.get(f"/api/{route}").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/%2e%2e/server.py",
        "/..%2fserver.py",
        "/page/index.html",
        "/server.py",
        "//etc/passwd",
        "/docs",
        "/openapi.json",
        "/api/picture/0/..%2f..%2fetc%2fpasswd",
        "/api/sample/-1",
        "/api/sample/../../x",
    ],
)
def test_nothing_but_the_page_and_the_rows_can_be_asked_for(path, client):
    assert client.get(path).status_code in (404, 422)


@pytest.mark.parametrize("path", ["/", "/viewer.js", "/api/run", "/api/nothing", "/api/sample/999", "/nothing"])
def test_every_answer_has_the_headers_that_keep_browsers_strict(path, client):
    headers = client.get(path, headers={"Origin": "http://evil.example"}).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "access-control-allow-origin" not in headers


def test_the_page_needs_no_token_and_holds_no_data(view):
    page = client_of(view, "").get("/").text
    assert "drawn" not in page
    assert TOKEN not in page


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """What would be served: the server's socket is looked at and closed again."""
    seen = SimpleNamespace(address=None, config=None)

    class Server:
        def __init__(self, config):
            seen.config = config

        def run(self, sockets):
            seen.address = sockets[0].getsockname()

    monkeypatch.setattr(server.uvicorn, "Server", Server)
    return seen


def test_view_listens_on_the_loopback_and_prints_its_address(folder, served, capsys):
    assert cli.answer(["view", str(folder)]) == 0
    printed = capsys.readouterr().out.strip()
    assert served.address[0] == "127.0.0.1"
    assert printed.startswith(f"http://127.0.0.1:{served.address[1]}/#")
    assert len(printed.partition("#")[2]) >= 32


def test_every_start_has_a_token_of_its_own(folder, served, capsys):
    cli.answer(["view", str(folder)])
    cli.answer(["view", str(folder)])
    first, second = (line.partition("#")[2] for line in capsys.readouterr().out.split())
    assert first != second


def test_a_port_that_is_taken_is_said(folder, served):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentFault, match="cannot be used"):
            server.serve(folder, port=taken.getsockname()[1], say=print)


def test_a_folder_that_is_no_run_or_has_no_selection_is_refused(tmp_path, folder, capsys):
    assert cli.answer(["view", str(tmp_path / "nothing")]) == 3
    assert "is no run folder" in capsys.readouterr().err
    (folder / "selection.parquet").unlink()
    with pytest.raises(RunError, match="has no selection"):
        View(folder)


def test_a_selection_of_other_scores_is_refused(folder, tmp_path):
    other = draw_run(tmp_path / "more", tmp_path / "other", ROWS + 1)
    (folder / "selection.parquet").write_bytes((other / "selection.parquet").read_bytes())
    with pytest.raises(DataError, match="list different samples"):
        View(folder)

"""The viewer's page in headless Chromium, served as `datalloy view` serves it: what a person sees and can do."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import BROWSER, FOCUSABLE, FOCUSED, LEAST_CONTRAST, MISSING, SMALLEST_LETTERS, Chromium
from drawn_run import HOSTILE, draw_run

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed; pip install 'datalloy[serve]'")
pytest.importorskip("fastapi", reason="FastAPI is not installed; pip install 'datalloy[serve]'")

from datalloy.viewer.server import View, build_app  # noqa: E402

pytestmark = pytest.mark.skipif(BROWSER is None, reason=MISSING)

TOKEN = "a-token-of-the-tests"
SCREENS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
PATIENCE = 60.0  # seconds until something that must happen is given up
PAGE = Path(__file__).parent.parent / "src/datalloy"


# samples are answered when the test says so; `answered` counts those that the page has had time to show
SLOW_SAMPLES = """(() => {
  const whole = window.fetch;
  const wait = new Promise((resolve) => { window.answer = resolve; });
  Object.assign(window, { asked: 0, answered: 0 });
  window.fetch = async (address, ...rest) => {
    if (!String(address).includes("sample/")) return whole(address, ...rest);
    window.asked += 1;
    await wait;
    const answer = await whole(address, ...rest);
    setTimeout(() => { window.answered += 1; }, 200);
    return answer;
  };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    return draw_run(data, tmp_path_factory.mktemp("runs") / "run", 60)


@pytest.fixture(scope="module")
def origin(data, folder) -> Iterator[str]:
    """The address of a server that shows the run beside another one of the same data."""
    other = draw_run(data, folder.parent / "other", 60, seed=1, fraction=0.3)
    view = View(folder, other)
    view.texts.read_all()
    server = uvicorn.Server(uvicorn.Config(build_app(view, TOKEN), log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def shown(browser, origin, folder) -> Iterator[Chromium]:
    open_page(browser, origin)
    yield browser
    (folder / "overrides.json").unlink(missing_ok=True)


def open_page(browser: Chromium, origin: str, width: int = 1280, scheme: str = "light", token: str = TOKEN) -> None:
    browser.open("about:blank")  # a change of the part behind # alone loads nothing
    browser.open(f"{origin}/#{token}", width=width, scheme=scheme)
    if token:
        until(browser, "document.body?.dataset.ready === 'yes'")
        until(browser, "[...document.querySelectorAll('td img')].every(i => i.naturalWidth > 0)")


def until(browser: Chromium, condition: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not browser.run(condition):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        time.sleep(0.02)


def open_sample(browser: Chromium, sample_id: str) -> None:
    browser.run(f"[...document.querySelectorAll('tbody tr')].find(r => r.textContent.includes('{sample_id}')).click()")
    until(browser, f"document.getElementById('detail').textContent.includes('{sample_id}')")


def choose(browser: Chromium, name: str, value: str, event: str) -> None:
    browser.run(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = '{value}'; "
        f"e.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def decisions(folder: Path) -> dict[str, bool]:
    path = folder / "overrides.json"
    rows = json.loads(path.read_text())["overrides"] if path.exists() else []
    return {row["id"]: row["kept"] for row in rows}


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_opens_without_complaint_or_foreign_request_and_can_be_read(browser, origin, width, scheme):
    open_page(browser, origin, width, scheme)
    browser.run("document.getElementById('filters').open = true")
    open_sample(browser, "s0000001")
    assert browser.complaints == []
    foreign = [url for url in browser.requests if not url.startswith((f"{origin}/", f"blob:{origin}/"))]
    assert foreign == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    ratio, where, seen = browser.run(LEAST_CONTRAST)
    assert seen > 100
    assert ratio >= 4.5, where
    assert browser.run(SMALLEST_LETTERS) > 9
    assert browser.run("parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) < 128") == (scheme == "dark")


def test_hostile_text_stays_text(shown):
    open_sample(shown, "s0000001")
    said = shown.run("[...document.querySelectorAll('#detail .said')].map(e => e.textContent)")
    assert said == [f"Question 1: {HOSTILE}", "answer 1"]
    assert shown.run("document.querySelectorAll('img[onerror], body script').length") == 0
    assert "Page.javascriptDialogOpening" not in {event["method"] for event in shown.events}


def test_the_token_leaves_the_address_bar_and_survives_a_reload(shown):
    assert shown.run("location.href").endswith("/")
    shown.call("Page.reload")
    until(shown, "document.body?.dataset.ready === 'yes'")


def test_without_the_token_there_is_a_way_out_and_no_data(browser, origin):
    browser.open("about:blank")
    browser.open(origin)
    browser.run("sessionStorage.clear()")
    open_page(browser, origin, token="")
    until(browser, "!document.getElementById('message').hidden")
    assert "open the address that `datalloy view` printed" in browser.run("document.body.innerText")
    assert browser.run("document.querySelectorAll('tbody tr').length") == 0


def test_everything_that_can_be_used_is_reached_by_the_tab_key_and_seen_to_be(shown):
    shown.run("document.getElementById('previous').disabled = false")
    wanted = {name for name in shown.run(FOCUSABLE) if not name.startswith(("TR", "TABLE"))}  # one row stands for all
    reached = set()
    for _ in range(80):
        shown.press("Tab", 9)
        name, outline, width = shown.run(FOCUSED)
        if not name.startswith(("BODY", "HTML")):
            assert outline != "none", name
            assert width >= 2, name
        reached.add(name)
    assert wanted <= reached
    assert any(name.startswith("TR") for name in reached)


def test_a_sample_is_found_opened_dropped_and_taken_back_by_keys_alone(shown, folder):
    shown.press("/", 191)
    assert shown.run("document.activeElement.id") == "text"
    shown.call("Input.insertText", text="s0000004")
    until(shown, "document.querySelectorAll('tbody tr').length === 1")
    shown.run("document.activeElement.blur()")
    shown.press("ArrowDown", 40)
    shown.press("Enter", 13)
    until(shown, "document.getElementById('detail').textContent.includes('s0000004')")
    was_kept = shown.run("document.querySelector('#detail .decision').textContent.startsWith('kept')")
    shown.press("d" if was_kept else "k", 68 if was_kept else 75)
    until(shown, "document.querySelectorAll('tbody tr.overruled').length === 1")
    assert decisions(folder) == {"s0000004": not was_kept}
    shown.press("u", 85)
    until(shown, "document.querySelectorAll('tbody tr.overruled').length === 0")
    assert decisions(folder) == {}
    shown.press("Escape", 27)
    assert shown.run("document.getElementById('detail').hidden")


def test_a_sample_that_is_closed_while_it_is_read_again_stays_closed(shown):
    shown.press("ArrowDown", 40)
    shown.press("Enter", 13)
    until(shown, "!document.getElementById('detail').hidden")
    shown.run(SLOW_SAMPLES)
    shown.press("d", 68)
    until(shown, "window.asked === 1")
    shown.press("Escape", 27)
    shown.run("window.answer()")
    until(shown, "window.answered === 1")
    assert shown.run("document.getElementById('detail').hidden")
    shown.press("u", 85)
    until(shown, "document.querySelectorAll('tbody tr.overruled').length === 0")


def test_pages_turn_and_headers_sort(shown):
    choose(shown, "limit", "25", "change")
    until(shown, "document.querySelectorAll('tbody tr').length === 25")
    first = shown.run("document.querySelector('tbody tr').textContent")
    shown.run("document.getElementById('next').click()")
    until(shown, "document.getElementById('page').textContent.startsWith('page 2')")
    assert shown.run("document.querySelector('tbody tr').textContent") != first
    shown.run("[...document.querySelectorAll('th button')].find(b => b.textContent.startsWith('domain')).click()")
    until(shown, "document.querySelector('th[aria-sort=ascending]') !== null")
    until(shown, "document.querySelector('tbody tr').textContent.includes('s0000000')")


def test_two_runs_are_shown_beside_each_other(shown):
    assert shown.run("!document.getElementById('compare').hidden")
    assert shown.run("document.querySelectorAll('#grid rect.cell').length") > 10
    choose(shown, "decision", "differs", "input")
    until(shown, "!document.getElementById('found').textContent.startsWith('60 ')")
    said = shown.run("[...document.querySelectorAll('tbody .decision')].map(e => e.textContent)")
    assert said
    assert all(re.match("kept.*other run: dropped|dropped.*other run: kept", text) for text in said)


def test_the_viewer_has_the_colours_of_the_report():
    def colours(path: Path) -> list[tuple[str, str]]:
        return re.findall(r"--([a-z-]+): (#\w+)", path.read_text())

    report, viewer = colours(PAGE / "report/page.css"), colours(PAGE / "viewer/page/viewer.css")
    names = {name for name, _ in report}
    own = {"kept", "dropped"}
    assert {name for name, _ in viewer} - names <= own
    assert {pair for pair in viewer if pair[0] not in own} <= set(report)

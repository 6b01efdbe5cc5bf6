"""The page of a run: what it says, that text of the data stays text, and what a browser makes of it."""

import base64
import hashlib
import html.parser
import io
import json
import re
import shlex
from dataclasses import asdict

import numpy as np
import PIL.Image
import pytest

from chromium import (
    BROWSER,
    FOCUSABLE,
    FOCUSED,
    LEAST_CONTRAST,
    MISSING,
    SMALLEST_LETTERS,
    Chromium,
)
from datalloy.bakeoff import FULL, Arm, race
from datalloy.config import load_recipe
from datalloy.errors import RunError
from datalloy.report import charts, comparison, gallery, keeping, markup, write_comparison, write_report
from datalloy.report.facts import RunFacts
from datalloy.report.opening import claims, next_steps, recommendation
from datalloy.sample import FileImage
from finished_run import HOSTILE, finish_run

KINDS = {
    "three": {},
    "two": {"domains": ("chart", "table")},
    "five": {"domains": ("a", "b", "c", "d", "e")},
    "plain": {"mixture": False},
    "whole domains": {"selection": False},
    "losses": {"signed": False, "mixture": False, "bakeoff": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("it's a folder & more")
    made = {}
    for kind, settings in KINDS.items():
        (root / kind).mkdir()
        made[kind] = finish_run(root / kind, **settings)
        write_report(made[kind])
    return made


@pytest.fixture(scope="module")
def three(folders):
    return Page(folders["three"])


class Page(html.parser.HTMLParser):
    """The page as a browser reads it: its elements with their attributes, and its text."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder, self.source = folder, (folder / "report.html").read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.words: list[str] = []
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.raw.get(self._inside, self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


# --- what it says


def test_the_first_sentence_says_what_to_train_on_and_how_much_better_it_was(folders):
    said = recommendation(RunFacts(folders["three"]))
    assert said.startswith("Train on 63 of the 90 samples (those with the lowest loss, 70 % of each domain), mixed as ")
    assert re.search(r"42 % chart, 42 % counting and 17 % table: ", said)
    assert re.search(r"0\.\d{3} exact match on 12 held-out items, \+0\.05\d \[\+0\.0\d+, \+0\.0\d+\] against not", said)
    assert said in Page(folders["three"]).text


def test_a_gain_that_is_not_shown_is_said_to_be_open_and_a_loss_to_be_a_loss(tmp_path):
    for gain, words in ((0.001, "a gain that is not shown"), (-0.2, "which is a loss")):
        folder = finish_run(tmp_path, gain=gain, name=f"run{gain}")
        assert recommendation(RunFacts(folder)).endswith(f"{words}.")


def test_a_bakeoff_of_one_round_says_what_was_not_tried_and_draws_no_curve(three):
    arms = [FULL, Arm("random", 0.5, "domain"), *(Arm("low_loss", share, "domain") for share in (0.2, 0.5, 0.8))]
    base_V = np.linspace(0, 1, 20)
    outcome = race(
        arms,
        lambda arm, steps, number: base_V + (1 - arm.fraction),
        base_V=base_V,
        weight_V=np.full(20, 0.05),
        budget_steps=180,
        longest_steps=120,
        seed=0,
    )
    said = keeping._bakeoff(asdict(outcome))
    assert "Beware: the bake-off&#x27;s budget was too small to try random 50% domain, low_loss 20% domain." in said
    assert "a selection wins only by a lead over the full pool beyond its interval" in said
    assert "<svg" not in said.partition("All short runs")[2]
    assert "All short runs" not in said
    assert "the best again for longer" in three.text
    assert "All short runs" in three.text


def test_where_training_did_harm_the_page_says_so_first_and_does_not_offer_to_export(tmp_path):
    facts = RunFacts(finish_run(tmp_path, gain=-0.2))
    assert recommendation(facts).startswith("If you train on this pool at all, ")
    assert [line.split()[1] for _, line in next_steps(facts)] == ["view"]


def test_every_claim_comes_with_what_was_measured_and_a_word_for_it(folders, three):
    found = {claim.what: claim for claim in claims(RunFacts(folders["three"]))}
    assert found["better than not training"].verdict == ("shown", "good")
    assert {"better than keeping every sample", "better than equal shares of the domains"} <= found.keys()
    for claim in found.values():
        assert markup.gained(claim.mean, claim.interval) in three.text
    words = {(claim.interval[0] > 0, claim.interval[1] < 0): claim.verdict[0] for claim in found.values()}
    assert words.items() <= {(True, False): "shown", (False, True): "refuted", (False, False): "not shown"}.items()


def test_the_commands_can_be_pasted_into_a_shell(folders):
    facts = RunFacts(folders["three"])
    for _, line in next_steps(facts):
        words = shlex.split(line)
        assert words[0] == "datalloy"
        assert str(folders["three"]) in " ".join(words)


def test_the_price_is_the_sum_of_what_every_stage_noted(folders, three):
    facts = RunFacts(folders["three"])
    by_stage = {work.stage: work for work in facts.work}
    assert by_stage["experts, one a domain"].seconds == 9.0
    assert by_stage["verification of the mixture"].what == "2 training runs"
    assert by_stage["confirmation of the pick"].what == "2 training runs"
    assert by_stage["bake-off of selections"].seconds == 0.5 * int(by_stage["bake-off of selections"].what.split()[0])
    assert facts.seconds == sum(work.seconds for work in facts.work)
    assert "of computing" in three.text


def test_a_final_model_that_is_a_verified_run_is_paid_for_once(tmp_path):
    folder = finish_run(tmp_path)
    record = json.loads((folder / "units" / "model.json").read_text())
    record["data"]["seconds"] = 3.5  # that of the first real run
    (folder / "units" / "model.json").write_text(json.dumps(record))
    assert "final training" not in {work.stage for work in RunFacts(folder).work}


@pytest.mark.parametrize("kind", KINDS)
def test_every_link_leads_to_a_section_of_the_page(folders, kind):
    page = Page(folders[kind])
    assert {link.removeprefix("#") for tag, a in page.elements if tag == "a" for link in [a["href"]]} <= set(
        page.attributes("id")
    )
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_each_run_has_the_sections_that_it_can_fill(folders):
    titles = {kind: re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', Page(folders[kind]).source) for kind in KINDS}
    full = ["Did it help?", "What to keep", "The mixture", "How far to trust the mixture", "Samples to look at"]
    full += ["Utilities", "Rejected and leaked", "Provenance"]
    assert titles["three"] == titles["two"] == titles["five"] == full
    assert titles["plain"] == titles["losses"] == [t for t in full if "mixture" not in t]
    assert titles["whole domains"] == [t for t in full if t not in ("What to keep", "Samples to look at", "Utilities")]


def test_pictures_of_a_mixture_are_a_triangle_a_line_or_pairs_of_the_largest_domains(folders):
    labels = {kind: Page(folders[kind]).attributes("aria-label") for kind in ("three", "two", "five")}
    assert "Expected value, over all mixtures of chart, counting, table" in labels["three"]
    assert "Expected value as chart and table trade their shares" in labels["two"]
    pairs = [label for label in labels["five"] if label and label.startswith("Expected value as")]
    assert len(pairs) == 6
    assert not any("e trade" in pair for pair in pairs)


def test_only_losses_were_measured_and_the_page_says_so(folders):
    text = Page(folders["losses"]).text
    assert "Only losses were measured" in text
    assert "rated by loss alone" in text
    assert "Highest loss" in text
    assert "Most useful" not in text


def test_samples_are_shown_with_their_pictures_and_the_target_items_they_help_and_harm(three):
    assert "Target items it helps most:" in three.text
    assert "Target items it harms most:" in three.text
    sources = three.attributes("src")
    assert len(sources) > 20
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_a_picture_that_is_gone_is_said_to_be_missing(tmp_path):
    folder = finish_run(tmp_path)
    for path in (tmp_path / "data").glob("*.png"):
        path.write_bytes(b"no picture any more")
    page = Page(write_report(folder).parent)
    assert "missing" in page.text
    assert not page.attributes("src")


def test_rejected_records_have_file_line_reason_and_leaks_are_told(three):
    assert "3 of 129 records were rejected. 1 of them are copies of target or held-out items." in three.text
    assert "unreadable image" in three.text
    assert ":5" in three.text


def test_a_folder_that_is_no_finished_run_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(RunError, match=r"holds no finished run; `datalloy run RECIPE --run .*` makes one"):
        write_report(tmp_path)


def test_writing_it_again_gives_the_same_page(folders):
    before = (folders["three"] / "report.html").read_bytes()
    assert write_report(folders["three"]).read_bytes() == before


# --- text of the data stays text

ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "script", "body"),
    *("header", "nav", "main", "section", "article"),
    *("h1", "h2", "h3", "p", "div", "span", "b", "bdi", "a", "ul", "li", "dl", "dt", "dd", "pre", "code", "button"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure", "figcaption", "img"),
    *("svg", "line", "rect", "circle", "text", "polygon", "polyline"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_element_or_handler_comes_from_the_data(folders, kind):
    page = Page(folders[kind])
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("style", "srcset", "srcdoc", "action")}
    assert len(page.raw["script"]) == len(page.raw["style"]) == 1


def test_hostile_text_is_shown_as_it_is_written(three):
    visible = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
    assert visible in three.text
    assert not {c for c in three.source if c in "\u202e\x1b"}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_on_the_page_points_outside_it(folders, kind):
    page = Page(folders[kind])
    for name in ("src", "href", "data", "poster"):
        assert all(value.startswith(("data:", "#")) for value in page.attributes(name))
    assert not re.search(r"url\(|@import|https?:", "".join(page.raw["style"] + page.raw["script"]))


def test_the_policy_allows_its_own_style_and_script_alone(three):
    (policy,) = (a["content"] for tag, a in three.elements if tag == "meta" and "http-equiv" in a)
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(three.raw[kind][0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_every_character_that_moves_or_hides_others_is_shown_by_its_number():
    assert markup.text("a\u202eb\u2066\u200b\x00\x1b\x9b\u2028\ud800\U000e0041") == (
        "a\\u202eb\\u2066\\u200b\\u0000\\u001b\\u009b\\u2028\\ud800\\ue0041"
    )
    assert markup.text("für\n\tعربي \u200d") == "für\n\tعربي \u200d"
    assert markup.text("<a b='c' d=\"e\">&") == "&lt;a b=&#x27;c&#x27; d=&quot;e&quot;&gt;&amp;"
    assert markup.text("x" * 9, 5) == "xxxx…"


def test_of_a_picture_nothing_reaches_the_page_but_its_pixels(tmp_path):
    picture = PIL.Image.new("RGB", (300, 100), "white")
    picture.paste("red", (0, 0, 150, 100))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    exif[0x010E] = "<script>alert(3)</script>"
    path = tmp_path / "evil.jpg"
    picture.save(path, "JPEG", exif=exif, icc_profile=b"profile <script>", comment=b"<script>")
    path.write_bytes(path.read_bytes() + b"<script>alert(4)</script>")
    drawn = gallery._picture(FileImage(path), 160, "words")
    data = base64.b64decode(re.search(r"base64,([^\"]*)", drawn).group(1))
    assert b"script" not in data
    shown = PIL.Image.open(io.BytesIO(data))
    assert shown.size == (53, 160)
    assert set(shown.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert shown.getpixel((26, 10))[2] < 60 < 200 < shown.getpixel((26, 150))[2]


# --- numbers and charts


def test_numbers_are_written_with_signs_and_without_false_certainty():
    assert markup.gained(0.0212, (-0.004, 0.04)) == "+0.021 [\u22120.004, +0.040]"
    assert markup.number(0.0000123) == "1.23e\u221205"
    assert [markup.percent(v) for v in (0, 0.001, 0.5, 0.999, 1)] == ["0 %", "under 1 %", "50 %", "over 99 %", "100 %"]
    assert markup.listed(["a", "b", "c"]) == "a, b and c"


def test_an_axis_has_round_ticks_inside_its_span():
    span = charts.Span.around([0.61, 0.74])
    assert span.low < 0.61 < 0.74 < span.high
    assert charts.Span(0, 1).ticks() == [0, 0.25, 0.5, 0.75, 1]
    assert charts.Span(-0.9, 2.2).ticks() == [0, 1, 2]
    assert charts.Span.around([5.0]).ticks()


def test_a_row_draws_its_interval_where_its_axis_says():
    drawn = charts.strips([charts.Strip("a", 0.5, (0.25, 1.0), "words")], zero=0.0, span=charts.Span(0, 1))
    assert 'x1="25.00%" x2="100.00%"' in drawn
    assert 'cx="50.00%"' in drawn
    assert 'class="zero" x1="0.00%"' in drawn


def test_all_values_are_in_the_bars_of_a_histogram():
    values = np.array([-1000.0, -1, -0.1, 0, 0.001, 5, 1000])
    drawn = charts.histogram([("kept", "kept", values)], warp=charts.Warp.of(values), ends=(-10, 10), label="l")
    assert sum(int(n) for n in re.findall(r"<title>(\d+) kept", drawn)) == len(values)


def test_the_corners_of_the_triangle_are_the_domains():
    weight_NK = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
    marks = [charts.Mark(weight_K, "m", "dot") for weight_K in weight_NK]
    drawn = charts.triangle("abc", weight_NK, np.arange(3.0), marks, words="abc", label="l")
    assert [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)] == [
        tuple(corner) for corner in charts.CORNERS
    ]


# --- in a browser

SCREENS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
needs_browser = pytest.mark.skipif(BROWSER is None, reason=MISSING)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def _open(browser, folder, width=1280, scheme="light"):
    url = (folder / "report.html").as_uri()
    browser.open(url, width=width, scheme=scheme)
    return url


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("kind", ["three", "five"])
def test_it_opens_without_complaint_request_or_sideways_scrolling_and_can_be_read(
    folders, browser, kind, width, scheme
):
    url = _open(browser, folders[kind], width, scheme)
    browser.run(OPEN_ALL)
    assert browser.complaints == []
    assert browser.requests == [url]
    assert browser.run("document.documentElement.scrollWidth") <= width
    ratio, where, seen = browser.run(LEAST_CONTRAST)
    assert seen > 200
    assert ratio >= 4.5, where
    assert browser.run(SMALLEST_LETTERS) > 10.5
    dark = browser.run("parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) < 128")
    assert dark == (scheme == "dark")


@needs_browser
def test_everything_that_can_be_used_is_reached_by_the_tab_key_and_seen_to_be(folders, browser):
    _open(browser, folders["three"])
    wanted, reached = browser.run(FOCUSABLE), []
    for _ in range(len(wanted) + 5):
        browser.press("Tab", 9)
        name, outline, width = browser.run(FOCUSED)
        if not name.startswith("BODY"):
            assert outline != "none", name
            assert width >= 2, name
        reached.append(name)
    assert set(wanted) <= set(reached)


@needs_browser
def test_a_command_is_copied_with_the_keyboard(folders, browser):
    _open(browser, folders["three"])
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("document.querySelector('button').focus()")
    browser.press("Enter", 13)
    line = next(iter(next_steps(RunFacts(folders["three"]))))[1]
    copied = "new Promise(r => setTimeout(async () => r(await navigator.clipboard.readText()), 50))"
    assert browser.run(copied) == line
    assert browser.run("document.querySelector('button').textContent") == "Copied"


@needs_browser
def test_a_mark_says_what_it_stands_for_where_it_is_pointed_at(folders, browser):
    _open(browser, folders["three"])
    place = browser.run(
        "(() => { const m = document.querySelector('polygon.mark'); "
        "m.scrollIntoView({block: 'center', behavior: 'instant'}); "
        "const b = m.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    assert browser.run("document.querySelector('.tip').hidden") is False
    assert re.match(r"chart \d+ %|chart over 99 %", browser.run("document.querySelector('.tip').textContent"))


@needs_browser
def test_without_its_script_the_page_says_the_same(folders, browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        _open(browser, folders["three"])
        tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    said = " ".join(str(node.get("name", {}).get("value", "")) for node in tree)
    assert recommendation(RunFacts(folders["three"])) in said
    assert "Copy" not in said.split()


# --- several runs


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Two runs on the same data, the second with a worse model, and one on other items."""
    root = tmp_path_factory.mktemp("several")
    first, second = (finish_run(root, gain=gain, name=name) for gain, name in ((0.05, "first"), (-0.1, "second")))
    (root / "elsewhere").mkdir()
    return first, second, finish_run(root / "elsewhere", rows=20, mixture=False)


def test_runs_on_the_same_items_are_held_against_each_other(side_by_side, tmp_path):
    first, second, _ = side_by_side
    write_comparison([second, first], tmp_path / "report.html")
    text = Page(tmp_path).text
    assert re.search(
        r"first did best: 0\.\d+ exact match on 12 items, \+0\.1[45]\d \[.*\] against second; .* is shown", text
    )
    assert "first over second" in text
    assert "Nothing differs: recipe, inputs, versions." in text
    assert "rank agreement of utilities" in text


def test_runs_on_other_items_are_not_held_against_each_other(side_by_side, tmp_path):
    first, _, elsewhere = side_by_side
    write_comparison([first, elsewhere], tmp_path / "report.html")
    page = Page(tmp_path)
    assert "measured on different items" not in page.text  # the held-out file is the same to the byte
    (elsewhere / "provenance.json").write_text(
        (elsewhere / "provenance.json").read_text().replace('"evaluation.holdout": "', '"evaluation.holdout": "0')
    )
    write_comparison([first, elsewhere], tmp_path / "report.html")
    text = Page(tmp_path).text
    assert "These runs were measured on different items, so their marks cannot be held against each other." in text
    assert " over several/first" not in text
    assert "inputs.domains.chart" in text


def test_runs_are_called_by_what_tells_them_apart(side_by_side):
    def named(*folders):
        return [run.name for run in comparison.name_runs([RunFacts(folder) for folder in folders])]

    first, second, elsewhere = side_by_side
    assert named(first, second) == ["first", "second"]
    assert named(elsewhere, first) == ["run", "first"]
    with pytest.raises(RunError, match="a run is given twice"):
        named(first, first)


def test_a_gain_of_any_model_over_another_is_the_reverse_of_the_others_gain(tmp_path):
    facts = RunFacts(finish_run(tmp_path))
    gain, reverse = facts.gain("base"), facts.gain(facts.advised, of="base")
    assert gain.mean != 0
    assert reverse.mean == -gain.mean
    assert reverse.interval == pytest.approx((-gain.interval[1], -gain.interval[0]))


def test_a_loss_that_falls_is_a_gain(tmp_path):
    folder = finish_run(tmp_path)
    facts = RunFacts(folder)
    facts.recipe = load_recipe(folder / "config.yaml", ("evaluation.holdout.metric=loss",))
    assert facts.gain("base").mean == pytest.approx(-RunFacts(folder).gain("base").mean)
    assert facts.marks().mean() == pytest.approx(-RunFacts(folder).headline().mean)


@needs_browser
def test_the_page_of_several_runs_fits_a_phone_and_asks_for_nothing(side_by_side, tmp_path, browser):
    page = write_comparison(side_by_side, tmp_path / "comparison.html")
    for width, scheme in SCREENS:
        browser.open(page.as_uri(), width=width, scheme=scheme)
        assert (browser.complaints, browser.requests) == ([], [page.as_uri()])
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(LEAST_CONTRAST)[0] >= 4.5

"""Hostile data and checkpoints as a whole, and what no module of the package may do."""

import ast
import csv
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import PIL.Image
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from datalloy import confined
from datalloy import vlm as vlm_module
from datalloy.config import DataSource
from datalloy.errors import DataError, ModelError
from datalloy.evaluators import TABLE_COLUMNS, Measure, table_text
from datalloy.readers import read_all
from datalloy.sample import Origin, Sample, Turn
from datalloy.vlm import VLM, EncodeError
from drawn import build_vlm, draw_samples

SOURCE = Path(__file__).parent.parent / "src" / "datalloy"
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def write(folder: Path, *records: dict) -> DataSource:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSource(path=str(path), format="messages")


# Data


def test_ids_of_any_kind_are_kept_and_name_no_file(tmp_path):
    ids = ["../../etc/passwd", "/etc/passwd", "x" * 100_000, "a\nb", "{}%s${x}", "CON", "."]
    source = write(tmp_path, *({"id": given, "messages": TURNS} for given in ids))
    samples, rejects = read_all(source, "d")
    assert [sample.id for sample in samples] == ids
    assert rejects == []
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_magic_keys_are_data(tmp_path):
    magic = {
        "_target_": "os.system",
        "py/object": "os.system",
        "py/reduce": [{"py/function": "os.system"}, ["touch hacked"]],
        "auto_map": {"AutoModel": "evil.Model"},
        "__class__": "x",
        "$ref": "file:///etc/passwd",
    }
    plain, marked = (read_all(write(tmp_path, {**extra, "messages": TURNS}), "d")[0][0] for extra in ({}, magic))
    assert plain.content_hash == marked.content_hash
    assert plain.turns == marked.turns


def test_a_huge_line_is_never_held_in_memory(tmp_path):
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.truncate(3 * 1024**3)  # a line of zeros, sparse on disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps({"messages": TURNS}).encode())
    code = (
        "import sys; from datalloy.config import DataSource; from datalloy.readers import read_all\n"
        "samples, rejects = read_all(DataSource(path=sys.argv[1], format='messages'), 'd')\n"
        "print(len(samples), [(reject.line, reject.reason) for reject in rejects])"
    )

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * 1024**3, 2 * 1024**3))

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=limit_memory, check=False
    )
    assert done.stdout.strip() == "1 [(1, 'line_too_long')]", done.stderr


def test_data_are_read_without_network_and_without_running_anything(tmp_path, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a network connection or another program was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    (tmp_path / "train.py").write_text("raise SystemExit('a loading script was run')")
    values = [
        "http://127.0.0.1/x.png",
        "https://user@2130706433/x.png",
        "http://[::1]/x.png",
        "HTTP://EXAMPLE.ORG/x.png",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "s3://bucket/x.png",
        "hf://datasets/a/b/x.png",
        "simplecache::s3://bucket/x.png",
        "zip://x.png::https://example.org/x.zip",
    ]
    question = {"role": "user", "content": "<image>?"}
    records = [{"messages": [question, TURNS[1]], "images": [value]} for value in values]
    block = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    records.append({"messages": [{"role": "user", "content": [block]}, TURNS[1]]})
    samples, rejects = read_all(write(tmp_path, *records), "d")
    assert samples == []
    assert [reject.reason for reject in rejects] == ["image_url"] * len(records)


def tar_header(name: str, size: bytes = b"00000000000\0", kind: bytes = b"0", link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def base256(number: int) -> bytes:
    """A size field as GNU tar writes it, where numbers may be huge or below zero."""
    return (b"\x80" if number >= 0 else b"\xff") + (number % 256**11).to_bytes(11, "big")


GOOD_MEMBER = tar_header("1.json", b"%011o\0" % 2) + b"{}".ljust(512, b"\0")


@pytest.mark.parametrize("kind", [b"0", b"L", b"x"], ids=["file", "long name", "pax"])
@pytest.mark.parametrize("size", [-(2**70), -1024, -512, -1, 2**34, 2**62, 2**70])
def test_a_tar_whose_sizes_lie_is_refused_at_once(tmp_path, size, kind):
    path = tmp_path / "train.tar"
    path.write_bytes(GOOD_MEMBER + tar_header("2.json", base256(size), kind) + bytes(1024))
    with pytest.raises(DataError, match=r"train\.tar is not a tar that can be read"):
        read_all(DataSource(path=str(path), format="webdataset"), "d")


def test_members_of_a_tar_that_are_links_devices_or_point_elsewhere_are_never_followed(tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps({"messages": TURNS}))
    members = [
        tar_header("a.json", kind=b"2", link=str(tmp_path / "secret.json")),
        tar_header("b.json", kind=b"1", link="1.json"),
        tar_header("c.json", kind=b"3"),
        tar_header("d.json", kind=b"6"),
        tar_header("../../e.json", b"%011o\0" % 2) + b"{}".ljust(512, b"\0"),
        tar_header("/etc/f.json", b"%011o\0" % 2) + b"{}".ljust(512, b"\0"),
    ]
    path = tmp_path / "train.tar"
    path.write_bytes(b"".join(members) + bytes(1024))
    samples, rejects = read_all(DataSource(path=str(path), format="webdataset"), "d")
    assert samples == []
    assert [reject.reason for reject in rejects] == ["bad_member"] * 4 + ["missing_messages"] * 2


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "link.jsonl", "a\0b"])
def test_a_list_of_datasets_cannot_name_a_file_outside_its_folder(tmp_path, name):
    (tmp_path / "secret.jsonl").write_text(json.dumps({"messages": TURNS}))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to("../secret.jsonl")
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name}}))
    with pytest.raises(DataError, match="lies outside the list's folder"):
        read_all(DataSource(path=f"{folder}/dataset_info.json#mine"), "d")


# Data changed in ways whose effect is known


def outcome(source: DataSource) -> tuple[set[tuple], list[tuple[int, str]]]:
    samples, rejects = read_all(source, "d")
    return {(s.id, s.content_hash) for s in samples}, [(r.row, r.reason) for r in rejects]


LINES = st.lists(
    st.sampled_from(
        [
            *(json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, TURNS[1]]}) for n in range(6)),
            *(json.dumps({"id": f"x{n}", "messages": TURNS}) for n in range(3)),
            '{"messages": []}',
            "{torn",
            "7",
        ]
    ),
    max_size=12,
)


def write_raw(folder: Path, lines: list[str]) -> DataSource:
    path = folder / "train.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return DataSource(path=str(path), format="messages")


@given(LINES, st.randoms())
def test_the_order_of_lines_changes_no_sample(tmp_path_factory, lines, random):
    folder = tmp_path_factory.getbasetemp()
    shuffled = list(lines)
    random.shuffle(shuffled)
    kept, rejects = outcome(write_raw(folder, lines))
    again, others = outcome(write_raw(folder, shuffled))
    assert kept == again
    assert sorted(reason for _, reason in rejects) == sorted(reason for _, reason in others)


@given(LINES, st.sampled_from(["{torn", "7", '{"messages": []}', '{"a": NaN}', "\ufeff{}"]), st.data())
def test_a_bad_line_more_adds_one_reject_and_changes_no_sample(tmp_path_factory, lines, bad, data):
    folder = tmp_path_factory.getbasetemp()
    kept, rejects = outcome(write_raw(folder, lines))
    at = data.draw(st.integers(min(1, len(lines)), len(lines)))
    again, others = outcome(write_raw(folder, [*lines[:at], bad, *lines[at:]]))
    assert again == kept
    assert len(others) == len(rejects) + 1


@given(LINES)
def test_a_file_twice_over_gives_every_sample_without_an_id_a_numbered_copy(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp()
    kept, rejects = outcome(write_raw(folder, lines))
    twice, others = outcome(write_raw(folder, lines + lines))
    named = [sample for sample in kept if sample[0].startswith("x")]
    assert kept <= twice
    assert len(twice) == 2 * len(kept) - len(named)
    assert len(others) == 2 * len(rejects) + len(named)


# A collection of bad inputs, each with what becomes of it

COLLECTION = Path(__file__).parent / "bad_inputs"
EXPECTED = json.loads((COLLECTION / "expected.json").read_text())


def test_every_file_of_the_collection_has_an_expected_outcome():
    files = {path.name for path in COLLECTION.iterdir()} - {"expected.json", "README.md", "images"}
    assert files == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_bad_input_ends_as_expected(name):
    expected = EXPECTED[name]
    source = DataSource(path=str(COLLECTION / name), format=expected.get("format", "auto"))
    if "refused" in expected:
        with pytest.raises(DataError, match=re.escape(expected["refused"])):
            read_all(source, "d")
        return
    samples, rejects = read_all(source, "d")
    assert len(samples) == expected["accepted"]
    assert [[reject.line or reject.row, reject.reason] for reject in rejects] == expected["rejected"]


def test_the_processor_gets_pictures_and_never_a_path(proxy, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a connection was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    given = []
    call = type(proxy.processor).__call__

    def watch(self, *args, images=None, **options):
        given.extend(images or [])
        return call(self, *args, images=images, **options)

    monkeypatch.setattr(type(proxy.processor), "__call__", watch)
    samples = draw_samples(3)
    for sample in samples:
        proxy.encode(sample)
    assert len(given) == 3
    assert all(type(picture) is PIL.Image.Image for pictures in given for picture in pictures)


# Checkpoints

EVIL = """\
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig as Evil
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_vlm(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForImageTextToText"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("processor_config.json", "AutoProcessor"),
        ("preprocessor_config.json", "AutoImageProcessor"),
    ],
)
@pytest.mark.parametrize("model_type", ["idefics3", "evil"])
def test_code_beside_a_checkpoint_is_never_run(checkpoint, tmp_path, monkeypatch, file, key, model_type):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may be run"))
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    mark = tmp_path / "code was run"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    settings = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    names = "evil.Evil" if key != "AutoTokenizer" else ["evil.Evil", "evil.Evil"]
    (folder / file).write_text(json.dumps({**settings, "auto_map": {key: names}}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    try:
        VLM.load(str(folder), device="cpu")
    except ModelError:
        pass  # refused or loaded by our own libraries' code; what counts is that theirs was not run
    else:
        assert model_type != "evil"
    assert not mark.exists()


QUESTION_AND_ANSWER = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}: {% for part in message.content %}{{ part.text }}{% endfor %}<end_of_utterance>
{% endfor -%}"""
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def with_template(checkpoint: Path, folder: Path, template: str) -> VLM:
    copy = Path(shutil.copytree(checkpoint, folder / "copy"))
    (copy / "chat_template.jinja").write_text(template)
    return VLM.load(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "more than 1 s or died"),
        ("{{ 'a' * 10**10 }}", "asked for more than|does not take"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "asked for more",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take a question|no end-of-turn token"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('touch hacked') }}", "does not take|no end-of-turn token"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError|more than 1 s or died|asked for more"),
    ],
)
def test_a_hostile_chat_template_is_stopped_and_named(checkpoint, tmp_path, monkeypatch, template, message):
    monkeypatch.setattr(confined, "CPU_SECONDS", 1)
    with pytest.raises(ModelError, match=message):
        with_template(checkpoint, tmp_path, template)
    assert not Path("hacked").exists()


def test_a_template_that_stops_at_some_records_costs_those_records_and_in_the_end_the_run(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(confined, "CPU_SECONDS", 1)
    trigger = "{% if 'now' in messages[0].content[0].text %}" + ENDLESS + "{% endif %}"
    vlm = with_template(checkpoint, tmp_path, trigger + QUESTION_AND_ANSWER)

    def sample(question: str) -> Sample:
        turns = (Turn("user", (question,)), Turn("assistant", ("4",)))
        return Sample("s", "d", turns, Origin(Path("pool.jsonl"), 0, 1), "")

    for number in range(vlm_module.MOST_STOPS):
        with pytest.raises(EncodeError) as refused:
            vlm.encode(sample(f"now {number}"))
        assert refused.value.reason == "template_limit"
        assert vlm.encode(sample("later")).supervised_tokens > 1
    with pytest.raises(ModelError, match=r"had to be stopped again and again, at last at pool\.jsonl:1"):
        vlm.encode(sample("now"))


# What no module does


def calls() -> list[tuple[str, ast.Call]]:
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]


def called(node: ast.Call) -> str:
    """The last name of what is called: `load` of `torch.load(...)`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def imported() -> dict[str, set[str]]:
    """Modules by what they import, full names."""
    found: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for full in names:
                found.setdefault(full, set()).add(name)
    return found


def test_remote_code_is_refused_in_every_call():
    for name, node in calls():
        if called(node) == "from_pretrained" and ast.unparse(node.func).startswith("transformers."):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{name}:{node.lineno}"
    assert not any("trust_remote_code=True" in (SOURCE / name).read_text() for name in TREES)
    assert transformers.__version__.split(".")[0] == "5"


def test_no_module_reads_pickles_or_runs_code_from_data():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "hydra"}
    assert {full: by for full, by in imported().items() if full.split(".")[0] in modules} == {}
    for name, node in calls():
        where, text = f"{name}:{node.lineno}", ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert text not in {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "yaml.unsafe_load"}, (
            where
        )
        assert text != "np.load" or given.get("allow_pickle") == "False", where
        assert text != "yaml.load" or "Loader" in given, where
        assert given.get("shell") in (None, "False"), where


def test_no_archive_is_unpacked():
    assert not {"zipfile", "shutil.unpack_archive"} & imported().keys()
    unpackers = {"extract", "extractall", "unpack_archive", "_extract_member"}
    assert [f"{name}:{node.lineno}" for name, node in calls() if called(node) in unpackers] == []


def test_csv_is_written_in_one_place_and_without_formulas():
    writers = [name for name, node in calls() if ast.unparse(node.func) in {"csv.writer", "csv.DictWriter"}]
    assert writers == ["evaluators/__init__.py"]
    assert [name for name, node in calls() if called(node) in {"to_csv", "write_csv"}] == []
    measure = Measure(*["=cmd|' /C calc'!A0"] * len(TABLE_COLUMNS))
    (row,) = list(csv.reader(io.StringIO(table_text([measure]))))[1:]
    assert row == ["'=cmd|' /C calc'!A0"] * len(TABLE_COLUMNS)


def test_pictures_are_opened_in_one_place():
    openers = {name for name, node in calls() if ast.unparse(node.func) in {"PIL.Image.open", "Image.open"}}
    assert openers == {"sample.py"}
    assert not any(full.startswith("transformers.image_utils") for full in imported())


NETWORK = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "socket", "ftplib", "fsspec"}
ALLOWED = (
    "run.py",  # the host's name in provenance.json
    "engines/on_ray.py",  # the host's name in the message of a worker's fault; Ray does the talking
    "viewer/",  # answers the local browser
    "judge",  # asks the judge that the recipe names
    "scorers/judge",
)


def test_the_core_reaches_no_network():
    """Models and datasets that a recipe names by their place in the hub are fetched by huggingface_hub."""
    by_module: dict[str, set[str]] = {}
    for full, names in imported().items():
        if full in NETWORK or full.split(".")[0] in NETWORK:
            for name in names:
                by_module.setdefault(name, set()).add(full)
    assert {name: found for name, found in by_module.items() if not name.startswith(ALLOWED)} == {}
    assert imported()["huggingface_hub"] == {"vlm.py", "locations.py"}


def test_logging_takes_arguments_and_no_text_from_data_is_a_format():
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    for name, node in calls():
        where = f"{name}:{node.lineno}"
        if called(node) in levels and ast.unparse(node.func).startswith("log"):
            assert isinstance(node.args[0], ast.Constant), where
        if called(node) in {"format", "format_map"} and isinstance(node.func, ast.Attribute):
            template = node.func.value
            assert isinstance(template, ast.Constant) or ast.unparse(template) == "super()", where
        assert called(node) not in {"Template", "from_string"}, where


# Supply chain

ROOT = SOURCE.parent.parent
FLOORS = {"jinja2": "3.1.6", "torch": "2.6", "pillow": "12.3", "pyarrow": "14.0.1"}


def test_versions_are_pinned_with_hashes_and_have_no_known_holes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {need.name.lower(): need.specifier for need in map(Requirement, project["dependencies"])}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    entry = re.compile(r"^([\w.-]+)==(\S+)(?: \\\n    --hash=sha256:[0-9a-f]{64})+$", re.MULTILINE)
    locked = {
        canonicalize_name(name): version for name, version in entry.findall((ROOT / "requirements.lock").read_text())
    }
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert {name: pinned.get(name) for name in locked} == locked, "run scripts/lock.sh"
    assert set(map(canonicalize_name, floors)) - {"torch"} <= locked.keys()  # torch: a build that fits the machine
    for name, floor in FLOORS.items():
        (lowest,) = (Version(part.version) for part in floors[name] if part.operator == ">=")
        assert lowest >= Version(floor), name
        assert Version(pinned.get(name, str(lowest))) >= lowest


def test_building_the_package_downloads_nothing():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build == {"requires": ["setuptools>=77"], "build-backend": "setuptools.build_meta"}
    assert not (ROOT / "setup.py").exists()

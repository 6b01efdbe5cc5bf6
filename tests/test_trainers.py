"""Exports for other trainers: our own readers read back what was run, counts are exact, configurations load.

The trainers' own parsers are asked where they can be: TRL and webdataset beside us; LLaMA-Factory and ms-swift in
environments of their own, whose Python is named by DATALLOY_LLAMA_FACTORY_PYTHON and DATALLOY_MS_SWIFT_PYTHON. What
they last said stands in docs/integrations.md.
"""

import hashlib
import json
import os
import shlex
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import PIL.Image
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import reader_contract
from datalloy import cli
from datalloy.config import DataSource, ExportFormat, Train, load_recipe
from datalloy.errors import DataError, RecipeError
from datalloy.exporters import EXPORTERS, Handover, Portion, by_domain
from datalloy.exporters.handover import batch_split, unique_ids
from datalloy.exporters.writing import text_with_placeholders
from datalloy.mixing import Part
from datalloy.mixture import plan_shares
from datalloy.readers import read_all
from datalloy.readers.conversation import split_placeholders
from datalloy.run import Run
from datalloy.sample import FileImage, Origin, Sample, Turn
from datalloy.selection import Selection
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.workflows import Workflow
from reader_contract import ALL, LAYOUTS, Conversation, samples_of

SYSTEM = Conversation(("<image>\n\nSee?\n<image>", "\n yes"), ("circle.png", "square.png"))
TRAIN = Train(batch_size=8, micro_batch_size=3, rank=4, max_tokens=512)
CHOSEN = (0, 1, 2, 0, 3, 0)
SELF_CONTAINED = ("webdataset", "energon", "ids")


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Real ones, and different, in place of the contract's."""

    def write(folder: Path) -> None:
        for name, colour in (("square.png", "red"), ("circle.png", "blue")):
            PIL.Image.new("RGB", (2, 2), colour).save(folder / name)

    monkeypatch.setattr(reader_contract, "write_pictures", write)


def handover(folder: Path, layout: str = "messages-jsonl", *, native: bool = False, chosen=CHOSEN) -> Handover:
    """Two domains whose samples share ids; rows of the first repeat."""
    (folder / "data").mkdir(parents=True)
    shapes = samples_of(LAYOUTS[layout](folder / "data", [*ALL, SYSTEM]))
    system = Turn("system", ("Be brief.",))
    others = [replace(s, domain="others", turns=(system, *s.turns)) for s in shapes[:2]]
    samples = [*(shapes[n] for n in chosen), *others]
    distinct = by_domain(list({(s.domain, s.id): s for s in samples}.values()))
    counts = Counter(s.domain for s in samples)
    portions = [Portion(name, rows, counts[name]) for name, rows in distinct.items()]
    return Handover("demo", "org/model", TRAIN, 1, samples, portions, native)


def shown(sample: Sample) -> tuple:
    """A sample without its place and its id; neighbouring texts of a turn are one text, as every model sees them."""
    turns = []
    for turn in sample.turns:
        parts: list = []
        for part in turn.parts:
            value = part if isinstance(part, str) else part.read()
            if parts and isinstance(value, str) and isinstance(parts[-1], str):
                parts[-1] += value
            else:
                parts.append(value)
        turns.append((turn.role, tuple(parts)))
    return tuple(turns)


def source(path, root: Path) -> DataSource:
    return DataSource(path=str(path), media_root=str(root))


def read_samples(given: DataSource) -> list[Sample]:
    samples, rejects = read_all(given, "again")
    assert rejects == []
    return samples


def dataset_arguments(out: Path) -> list[str]:
    words = shlex.split((out / "train.sh").read_text().replace("\\\n", " "), comments=True)
    start = words.index("--dataset") + 1
    return words[start : next(i for i in range(start, len(words)) if words[i].startswith("--"))]


def sources_in(name: str, out: Path, root: Path) -> list[DataSource]:
    """What the configuration that was written says to read, in its order."""
    match name:
        case "llama-factory":
            config = yaml.safe_load((out / "train.yaml").read_text())
            return [
                source(f"{config['dataset_dir']}/dataset_info.json#{n}", root) for n in config["dataset"].split(",")
            ]
        case "ms-swift":
            return [source(argument.rpartition("#")[0], root) for argument in dataset_arguments(out)]
        case "trl":
            config = yaml.safe_load((out / "sft.yaml").read_text())
            return [source(one["data_files"], root) for one in config["datasets"]]
        case "axolotl":
            config = yaml.safe_load((out / "config.yaml").read_text())
            return [source(one["path"], root) for one in config["datasets"]]
        case "webdataset":
            return [source(out, root)]
    (split,) = yaml.safe_load((out / "metadataset.yaml").read_text())["splits"].values()
    (entries,) = split.values()
    return [source(out / entry["path"], root) for entry in entries for _ in range(entry.get("repetitions", 1))]


CONVERSATIONS = [name for name in EXPORTERS if name != "ids"]


@pytest.mark.parametrize("layout", ["messages-jsonl", "parquet-messages-binary", "webdataset-tar"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_written_is_read_back_as_what_was_trained_on(tmp_path, name, layout):
    given = handover(tmp_path, layout)
    EXPORTERS[name](given, tmp_path / "out")
    again = [shown(s) for one in sources_in(name, tmp_path / "out", tmp_path) for s in read_samples(one)]
    assert Counter(again) == Counter(map(shown, given.samples))


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "energon"])
def test_rows_keep_their_order_and_their_ids(tmp_path, name):
    given = handover(tmp_path)
    EXPORTERS[name](given, tmp_path / "out")
    sets = by_domain(given.samples).values() if name in ("llama-factory", "ms-swift") else [given.samples]
    again = [read_samples(one) for one in sources_in(name, tmp_path / "out", tmp_path)]
    assert [[shown(s) for s in rows] for rows in again] == [[shown(s) for s in rows] for rows in sets]
    assert [[s.id for s in rows] for rows in again] == [list(unique_ids(rows)) for rows in sets]


SEQUENTIAL = {
    "llama-factory": ("train.yaml", {"mix_strategy": "concat", "disable_shuffling": True}),
    "trl": ("sft.yaml", {"train_sampling_strategy": "sequential"}),
    "axolotl": ("config.yaml", {"curriculum_sampling": True, "shuffle_merged_datasets": False}),
}


def as_schedule(given: Handover) -> Handover:
    """The same rows, the domains by turns, to be trained on as they lie."""
    return replace(given, samples=sorted(given.samples, key=lambda s: s.id), is_schedule=True)


@pytest.mark.parametrize("name", [*SEQUENTIAL, "ms-swift", "webdataset"])
def test_a_mixture_is_written_in_the_order_of_training(tmp_path, name):
    given = as_schedule(handover(tmp_path))
    assert len(list(groupby(s.domain for s in given.samples))) > 2
    EXPORTERS[name](given, tmp_path / "out")
    (one,) = sources_in(name, tmp_path / "out", tmp_path)
    again = read_samples(one)
    assert [shown(s) for s in again] == [shown(s) for s in given.samples]
    assert [s.id for s in again] == list(unique_ids(given.samples))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_trainer_is_told_to_keep_the_order_of_a_mixture_and_of_nothing_else(tmp_path, name):
    file, wanted = SEQUENTIAL[name]
    plain, given = handover(tmp_path), as_schedule(handover(tmp_path / "mixed"))
    for case in (plain, given, replace(given, native=True)):
        if case.native and name == "axolotl":
            continue
        EXPORTERS[name](case, tmp_path / "out")
        config = yaml.safe_load((tmp_path / "out" / file).read_text())
        found = {key: config.get(key) for key in wanted if key != "mix_strategy" or case is given}
        assert found == (wanted if case is given else dict.fromkeys(found))


@pytest.mark.parametrize(("is_schedule", "native", "expected"), [(True, False, 2), (False, False, 0), (True, True, 0)])
def test_ms_swift_shuffles_no_mixture(tmp_path, is_schedule, native, expected):
    given = replace(handover(tmp_path), is_schedule=is_schedule, native=native)
    EXPORTERS["ms-swift"](given, tmp_path / "out")
    script = (tmp_path / "out/train.sh").read_text()
    assert script.count("shuffle false") == expected
    assert ("--dataset_shuffle false" in script) == ("--train_dataloader_shuffle false" in script) == bool(expected)


def test_ids_list_every_row_in_order(tmp_path):
    given = handover(tmp_path)
    (path,) = EXPORTERS["ids"](given, tmp_path / "out")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [(r["position"], r["id"], r["domain"], r["row"], r["content_hash"]) for r in rows] == [
        (n, s.id, s.domain, s.origin.row, s.content_hash) for n, s in enumerate(given.samples)
    ]


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_file_is_named_and_writing_again_gives_the_same_bytes(tmp_path, name):
    given = handover(tmp_path, "webdataset-tar")
    written = EXPORTERS[name](given, tmp_path / "out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.resolve() for path in written} == {path.resolve() for path in files}
    EXPORTERS[name](given, tmp_path / "out")
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name not in SELF_CONTAINED])
def test_pictures_that_are_files_stay_where_they_are(tmp_path, name):
    EXPORTERS[name](handover(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "media").exists()


# Settings


@pytest.mark.parametrize(
    ("name", "file", "steps", "micro", "accumulation"),
    [
        ("llama-factory", "train.yaml", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        ("trl", "sft.yaml", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        ("axolotl", "config.yaml", "max_steps", "micro_batch_size", "gradient_accumulation_steps"),
    ],
)
def test_a_configuration_has_the_runs_settings(tmp_path, name, file, steps, micro, accumulation):
    given = handover(tmp_path)
    EXPORTERS[name](given, tmp_path / "out")
    config = yaml.safe_load((tmp_path / "out" / file).read_text())
    assert config[steps] == given.steps
    assert config[micro] * config[accumulation] == TRAIN.batch_size
    assert config["learning_rate"] == TRAIN.learning_rate
    assert "org/model" in config.values()


def test_a_micro_batch_divides_the_batch():
    assert batch_split(TRAIN) == (2, 4)
    assert batch_split(Train(batch_size=8)) == (1, 8)
    assert batch_split(Train(batch_size=4, micro_batch_size=9)) == (4, 1)


def test_ms_swift_is_launched_with_the_count_of_each_file(tmp_path):
    EXPORTERS["ms-swift"](handover(tmp_path), tmp_path / "out")
    counts = {Path(a.rpartition("#")[0]): int(a.rpartition("#")[2]) for a in dataset_arguments(tmp_path / "out")}
    assert {path.name: count for path, count in counts.items()} == {"shapes.jsonl": 6, "others.jsonl": 2}
    assert all(len(path.read_text().splitlines()) == count for path, count in counts.items())
    assert subprocess.run(["sh", "-n", str(tmp_path / "out/train.sh")], check=False).returncode == 0


def test_energon_repeats_every_row_as_often_as_it_is_trained_on_and_stores_it_once(tmp_path):
    EXPORTERS["energon"](handover(tmp_path), tmp_path / "out")
    entries = yaml.safe_load((tmp_path / "out/metadataset.yaml").read_text())["splits"]["train"]["blend_epochized"]
    assert [(e["path"], e["repetitions"]) for e in entries] == [
        ("./others-x1", 1),
        ("./shapes-x1", 1),
        ("./shapes-x3", 3),
    ]
    assert all((tmp_path / "out" / e["path"] / ".nv-meta/dataset.yaml").is_file() for e in entries)
    assert subprocess.run(["sh", "-n", str(tmp_path / "out/prepare.sh")], check=False).returncode == 0


def test_trl_learns_from_completions_where_every_conversation_has_one_answer(tmp_path):
    EXPORTERS["trl"](handover(tmp_path / "many"), tmp_path / "messages")
    config = yaml.safe_load((tmp_path / "messages/sft.yaml").read_text())
    assert config["assistant_only_loss"] is True
    given = handover(tmp_path / "one", chosen=(0, 2))
    single = [s for s in given.samples if len(s.turns) < 4]
    EXPORTERS["trl"](replace(given, samples=single), tmp_path / "completions")
    config = yaml.safe_load((tmp_path / "completions/sft.yaml").read_text())
    assert "assistant_only_loss" not in config
    assert pyarrow.parquet.read_schema(tmp_path / "completions/train.parquet").names == [
        *("id", "prompt", "completion", "images")
    ]


# Native shares


@pytest.mark.parametrize("name", ["axolotl", "webdataset", "ids"])
def test_native_shares_are_refused_where_the_trainer_has_none(tmp_path, name):
    with pytest.raises(RecipeError, match="use weights: exact"):
        EXPORTERS[name](handover(tmp_path, native=True), tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-factory", "ms-swift", "trl", "energon"])
def test_native_shares_write_every_row_once(tmp_path, name):
    given = handover(tmp_path, native=True)
    EXPORTERS[name](given, tmp_path / "out")
    again = [shown(s) for one in sources_in(name, tmp_path / "out", tmp_path) for s in read_samples(one)]
    assert Counter(again) == Counter(shown(s) for portion in given.portions for s in portion.samples)


def test_native_shares_stand_in_the_trainers_own_syntax(tmp_path):
    given = handover(tmp_path, native=True)
    for name in ("llama-factory", "ms-swift", "trl", "energon"):
        EXPORTERS[name](given, tmp_path / name)
    factory = yaml.safe_load((tmp_path / "llama-factory/train.yaml").read_text())
    assert (factory["mix_strategy"], factory["interleave_probs"]) == ("interleave_over", "0.750000,0.250000")
    assert [a.rpartition("/")[2] for a in dataset_arguments(tmp_path / "ms-swift")] == [
        "shapes.jsonl#6",
        "others.jsonl#2",
    ]
    trl = yaml.safe_load((tmp_path / "trl/sft.yaml").read_text())
    assert [one["fraction"] for one in trl["datasets"]] == [0.75, 0.25]
    blend = yaml.safe_load((tmp_path / "energon/metadataset.yaml").read_text())["splits"]["train"]["blend"]
    assert [entry["weight"] for entry in blend] == [0.75, 0.25]


def test_the_drift_of_drawn_shares_is_stated(tmp_path):
    given = handover(tmp_path, native=True)
    assert given.drawn_drift == pytest.approx({"shapes": (8 * 0.75 * 0.25) ** 0.5, "others": (8 * 0.75 * 0.25) ** 0.5})
    for name, file in (("llama-factory", "train.yaml"), ("energon", "metadataset.yaml")):
        EXPORTERS[name](given, tmp_path / name)
        assert "standard deviation of shapes +-1, others +-1 samples" in (tmp_path / name / file).read_text()


# Texts and ids


PIECES = st.one_of(st.text("a\n \u2028", max_size=4), st.just(FileImage(Path("x.png"))))


@given(st.lists(PIECES, max_size=6))
def test_any_text_around_pictures_survives_the_placeholders(parts):
    turn = Turn("user", tuple(part for part in parts if part != ""))
    sample = Sample("x", "d", (turn,), Origin(Path("x"), 0), "")
    merged: list = []
    for part in turn.parts:
        text = part if isinstance(part, str) else None
        if merged and text is not None and merged[-1] is not None:
            merged[-1] += text
        else:
            merged.append(text)
    assert split_placeholders(text_with_placeholders(sample, turn)) == merged


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_text_that_says_image_is_kept_in_blocks_and_refused_in_strings(tmp_path, name):
    given = handover(tmp_path, "messages-typed-blocks", chosen=(0,))
    first = given.samples[0]
    turns = (Turn("user", (*first.images, "What does <image> mean?")), Turn("assistant", ("a tag",)))
    told = replace(given, samples=[replace(first, turns=turns)])
    if name in ("llama-factory", "ms-swift"):
        with pytest.raises(DataError, match="its text says '<image>' where no picture is"):
            EXPORTERS[name](told, tmp_path / "out")
    else:
        EXPORTERS[name](told, tmp_path / "out")
        (again,) = [s for one in sources_in(name, tmp_path / "out", tmp_path) for s in read_samples(one)]
        assert shown(again) == shown(told.samples[0])


def test_ids_of_repeated_rows_step_aside_for_given_ones():
    rows = [Sample(id, "d", (), Origin(Path("x"), 0), "") for id in ("a", "a", "a-2", "a", "b")]
    assert list(unique_ids(rows)) == ["a", "a-3", "a-2", "a-4", "b"]


# The trainers themselves


def as_strings(sample: Sample) -> dict:
    """A row as LLaMA-Factory and ms-swift see it."""
    turns = [[turn.role, text_with_placeholders(sample, turn)] for turn in sample.turns]
    return {"turns": turns, "pictures": [hashlib.sha256(image.read()).hexdigest() for image in sample.images]}


def asked(variable: str, script: str, out: Path) -> dict:
    command = [os.environ[variable], str(Path(__file__).parent / "trainers" / script), str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not os.environ.get("DATALLOY_LLAMA_FACTORY_PYTHON"),
    reason="DATALLOY_LLAMA_FACTORY_PYTHON names no Python of an environment with it (pip install llamafactory)",
)
def test_llama_factory_reads_what_was_trained_on(tmp_path):
    given = handover(tmp_path)
    EXPORTERS["llama-factory"](given, tmp_path / "out")
    rows = asked("DATALLOY_LLAMA_FACTORY_PYTHON", "llama_factory_reads.py", tmp_path / "out")
    assert rows == {name: [as_strings(s) for s in samples] for name, samples in by_domain(given.samples).items()}


@pytest.mark.skipif(
    not os.environ.get("DATALLOY_MS_SWIFT_PYTHON"),
    reason="DATALLOY_MS_SWIFT_PYTHON names no Python of an environment with ms-swift (pip install ms-swift)",
)
def test_ms_swift_reads_what_was_trained_on(tmp_path):
    given = handover(tmp_path)
    EXPORTERS["ms-swift"](given, tmp_path / "out")
    rows = asked("DATALLOY_MS_SWIFT_PYTHON", "ms_swift_reads.py", tmp_path / "out")
    assert list(rows.values()) == [[as_strings(s) for s in samples] for samples in by_domain(given.samples).values()]


@pytest.mark.parametrize("chosen", [(0, 1, 2, 0), (0, 2)], ids=["messages", "completions"])
def test_trl_reads_what_was_trained_on(tmp_path, chosen):
    trl = pytest.importorskip("trl", reason="TRL is not installed; pip install 'datalloy[trainers]'")
    from trl.data_utils import prepare_multimodal_messages

    given = handover(tmp_path, "parquet-messages-binary", chosen=chosen)
    samples = [s for s in given.samples if len(chosen) > 2 or len(s.turns) < 4]
    EXPORTERS["trl"](replace(given, samples=samples, is_schedule=True), tmp_path / "out")
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    _, settings, model, mixture = parser.parse_args_and_config(["--config", str(tmp_path / "out/sft.yaml")])
    assert (settings.max_steps, settings.max_length, model.model_name_or_path) == (given.steps, None, "org/model")
    assert settings.train_sampling_strategy == "sequential"
    rows = trl.get_dataset(mixture)["train"]
    assert len(rows) == len(samples)
    for row, sample in zip(rows, samples, strict=True):
        turns = row["messages"] if len(chosen) > 2 else [*row["prompt"], *row["completion"]]
        prepared = prepare_multimodal_messages(turns, row["images"])
        texts = [[block["text"] for block in turn["content"] if block["type"] == "text"] for turn in prepared]
        assert texts == [[part for part in turn.parts if isinstance(part, str)] for turn in sample.turns]
        assert [image.size for image in row["images"]] == [(2, 2)] * len(sample.images)


def test_webdataset_reads_what_was_trained_on(tmp_path):
    webdataset = pytest.importorskip(
        "webdataset", reason="webdataset is not installed; pip install 'datalloy[trainers]'"
    )
    given = handover(tmp_path)
    (shard,) = EXPORTERS["webdataset"](given, tmp_path / "out")
    rows = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(rows) == len(given.samples)
    for row, sample in zip(rows, given.samples, strict=True):
        record = json.loads(row["json"])
        assert [turn["role"] for turn in record["messages"]] == [turn.role for turn in sample.turns]
        assert [row[name] for name in record["images"]] == [image.read() for image in sample.images]


# The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that has come as far as an export needs: random half of a drawn pool, nothing trained."""
    folder = tmp_path_factory.mktemp("chain")
    plan = PoolPlan(samples={"chart": 12, "counting": 12}, targets=("chart",), target_items=8, holdout_items=0)
    write_pool(folder / "data", plan, seed=1)
    (folder / "recipe.yaml").write_text(
        "name: small\nbase: tiny\n"
        "domains: {chart: {path: data/chart.jsonl}, counting: {path: data/counting.jsonl}}\n"
        "targets: {chart: {path: data/chart.target.jsonl}}\n"
        "score: {method: random, warmup_fraction: 0}\nselect: {keep_fraction: 0.5, drop_toxic: false}\n"
        "train: {batch_size: 4, samples: 48}\n"
    )
    return folder


def test_one_run_is_exported_for_every_trainer(run_folder, capsys):
    recipe, run = run_folder / "recipe.yaml", run_folder / "run"
    assert cli.answer(["export", str(recipe), "--run", str(run)]) == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "units").glob("*.json")}
    arguments = [word for name in EXPORTERS for word in ("--to", name)]
    assert cli.answer(["export", str(recipe), "--run", str(run), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "export-ids")
    assert "sequential" not in (run / "export-trl/sft.yaml").read_text()  # without a mixture trainers shuffle
    kept = Selection.read(run / "selection.parquet").kept_keys()
    ids = pyarrow.parquet.read_table(run / "export-ids/ids.parquet")
    assert sorted(zip(ids["domain"].to_pylist(), ids["id"].to_pylist(), strict=True)) == sorted(zip(*kept, strict=True))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in CONVERSATIONS:
        again = [s for one in sources_in(name, run / f"export-{name}", run_folder) for s in read_samples(one)]
        assert len(again) == len(ids)


def test_native_shares_have_a_folder_of_their_own(run_folder):
    recipe, run = run_folder / "recipe.yaml", run_folder / "run"
    command = ["export", str(recipe), "--run", str(run), "--to", "trl", "--weights", "native"]
    assert cli.answer(command) == 0
    fractions = [
        one["fraction"] for one in yaml.safe_load((run / "export-trl-native/sft.yaml").read_text())["datasets"]
    ]
    assert sum(fractions) == pytest.approx(1)


def test_an_unknown_trainer_is_refused_with_those_there_are(run_folder, capsys):
    assert cli.answer(["export", str(run_folder / "recipe.yaml"), "--to", "keras"]) == 2
    assert "one of rows, llama-factory, ms-swift, trl" in capsys.readouterr().err


def test_the_formats_of_a_recipe_are_the_exporters():
    assert set(get_args(ExportFormat)) == {"rows", *EXPORTERS}


def test_parts_of_a_mixture_are_portions_with_their_exact_counts(run_folder, tmp_path):
    rows = handover(tmp_path).samples
    sizes = (("chart.1", rows[:2]), ("chart.2", rows[2:3]), ("counting", rows[4:]))
    parts = [Part(name, name.split(".")[0], samples) for name, samples in sizes]
    available = {part.name: len(part.samples) for part in parts}
    planned = plan_shares({"chart.1": 0.75, "chart.2": 0.0, "counting": 0.25}, available, 48)
    workflow = Workflow(Run(load_recipe(run_folder / "recipe.yaml", ["mixture={}"]), tmp_path / "run"))
    workflow.__dict__["mixing"] = SimpleNamespace(
        parts=parts, shares=lambda: [asdict(share) for share in planned], training_set=lambda: rows
    )
    given = workflow._handover(native=True)
    assert {portion.name: portion.count for portion in given.portions} == {"chart.1": 36, "counting": 12}
    assert given.shares == {"chart.1": 0.75, "counting": 0.25}
    assert given.is_schedule
    assert given.steps * given.train.batch_size == 48

"""Recipes: what is accepted, what is refused and in which words, how paths and overrides are resolved."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datalloy.config import Recipe, Select, load_recipe
from datalloy.errors import RecipeError
from datalloy.strict_yaml import dump_yaml, parse_yaml
from datalloy.template import RECIPE_TEMPLATE

SMALLEST = """\
name: small
base: tiny
domains: {chart: {path: chart.jsonl}}
targets: {goal: {path: goal.jsonl}}
"""


@pytest.fixture
def load(tmp_path):
    def write_and_load(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return write_and_load


@pytest.fixture
def fault(load, tmp_path):
    """The message about a faulty recipe, without the file it names."""

    def message(text: str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/recipe.yaml", "")

    return message


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "select: {keep_fraction: 50}",
            "select.keep_fraction is 50, must be auto or a number in (0, 1]; for 50 % write 0.5",
        ),
        ("select: {keep_fraction: 0}", "select.keep_fraction is 0, must be auto or a number in (0, 1]"),
        ("select: {keep_fraction: most}", 'select.keep_fraction is "most", must be auto or a number in (0, 1]'),
        ("select: {drop_toxic: no}", 'select.drop_toxic is "no", must be true or false'),
        ("select: {drop_toxic: 1}", "select.drop_toxic is 1, must be true or false"),
        (
            "select: {toxic_confidence: 95}",
            "select.toxic_confidence is 95, must be a number in (0.5, 1); for 95 % write 0.95",
        ),
        ("select: {budget_tokens: 0}", "select.budget_tokens is 0, must be a whole number of at least 1 or null"),
        ("select: {within: pool}", 'select.within is "pool", must be one of domain, global'),
        (
            "select: {bakeoff_fractions: [0.1, 2]}",
            "select.bakeoff_fractions.1 is 2, must be a number in (0, 1]; for 2 % write 0.02",
        ),
        (
            "select: {bakeoff_fractions: []}",
            "select.bakeoff_fractions is [], must be a list that is not empty, each a number in (0, 1]",
        ),
        ("select:", "select is null, must be a mapping of keys to values"),
        ("score: {probes: 1.5}", "score.probes is 1.5, must be a whole number of at least 1"),
        ("score: {probes: 3.0}", "score.probes is 3.0, must be a whole number of at least 1"),
        ('score: {probes: "3"}', 'score.probes is "3", must be a whole number of at least 1'),
        ("score: {probes: true}", "score.probes is true, must be a whole number of at least 1"),
        ("score: {seed: -1}", "score.seed is -1, must be a whole number in [0, 4294967296)"),
        (
            "score: {step: .nan}",
            "score.step is NaN, must be one of auto, batch_share, visible_effect or a number above 0",
        ),
        ("score: {warmup_fraction: .inf}", "score.warmup_fraction is Infinity, must be a number in [0, 1]"),
        ("train: {weight_decay: .nan}", "train.weight_decay is NaN, must be a number of at least 0"),
        ("train: {report_to: [7]}", "train.report_to.0 is 7, must be text"),
        ("engine: slurm", 'engine is "slurm", must be one of local, ray'),
        ("proxy: [a]", 'proxy is ["a"], must be text or null'),
        ("evaluation: {h: {path: a, weight: .inf}}", "evaluation.h.weight is Infinity, must be a number above 0"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(line, message, fault):
    assert fault(f"{SMALLEST}{line}\n") == f": {message}"


def test_every_faulty_key_gets_a_line_of_its_own(fault):
    lines = fault(SMALLEST + "device: tpu\nselect: {keep_fraction: 2, within: all}\n").splitlines()
    assert len(lines) == 3
    assert all("must be" in line for line in lines)


def test_a_long_wrong_value_is_cut(fault):
    message = fault(SMALLEST + f"device: {'x' * 5000}\n")
    assert len(message) < 300
    assert "xxx ..., must be one of auto" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("selct: {}", "unknown key selct; did you mean select?"),
        ("score: {mehtod: tail}", "unknown key score.mehtod; did you mean method?"),
        ("evaluation: {holdout: {path: a, metrc: anls}}", "unknown key evaluation.holdout.metrc; did you mean metric?"),
        ("leakage: {zzz: 1}", "unknown key leakage.zzz; valid keys: on_leak, image_distance"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one_at_its_depth(line, message, fault):
    assert fault(f"{SMALLEST}{line}\n") == f": {message}"


def test_a_misspelt_key_inside_a_named_domain_is_found(fault):
    assert fault(SMALLEST.replace("path: chart", "pat: chart")).splitlines() == [
        ": domains.chart.path is missing; it has no default",
        ": unknown key domains.chart.pat; did you mean path?",
    ]


@pytest.mark.parametrize("key", ["name", "base", "domains", "targets"])
def test_a_missing_key_is_named(key, fault):
    kept = "".join(line for line in SMALLEST.splitlines(keepends=True) if not line.startswith(key))
    assert fault(kept) == f": {key} is missing; it has no default"


@pytest.mark.parametrize("name", ["a b", "../x", "", "x" * 65, ".hidden"])
def test_names_are_fit_for_file_names(name, fault):
    assert "must be 1 to 64 letters" in fault(SMALLEST.replace("small", f'"{name}"'))
    assert 'domains has the name "' in fault(SMALLEST.replace("chart:", f'"{name}":'))


def test_no_domains_are_refused(fault):
    assert fault(SMALLEST.replace("{chart: {path: chart.jsonl}}", "{}")).startswith(
        ": domains is {}, must be a mapping"
    )


def test_two_budgets_are_refused(fault):
    assert "at most one budget can be given, found budget_samples and budget_flops" in fault(
        SMALLEST + "select: {budget_flops: 1e15, budget_samples: 10}\n"
    )


def test_real_steps_in_low_precision_are_refused(fault):
    assert "replayed_items measures real steps, which need precision float32" in fault(
        SMALLEST + "score: {replayed_items: 2, precision: bfloat16}\n"
    )


def test_a_name_stands_for_one_set_in_the_metrics(fault):
    assert "targets and evaluation both have the name goal" in fault(
        SMALLEST + "evaluation: {goal: {path: other.jsonl}}\n"
    )


def test_a_whole_number_stands_for_a_float_but_not_the_reverse(load):
    assert load(SMALLEST + "train: {epochs: 2}\n").train.epochs == 2.0


def test_a_list_stands_for_a_tuple(load):
    assert load(SMALLEST + "select: {bakeoff_arms: [exact, length]}\n").select.bakeoff_arms == ("exact", "length")


@pytest.mark.parametrize(
    ("method", "select", "raced"),
    [
        ("auto", "{}", True),
        ("auto", "{keep_fraction: 0.5}", True),
        ("auto", "{keep_fraction: 0.5, bakeoff_arms: [low_loss]}", False),
        ("auto", "{bakeoff_arms: [low_loss], bakeoff_fractions: [0.5]}", False),
        ("exact", "{}", True),
        ("exact", "{bakeoff_fractions: [0.5]}", False),
        ("exact", "{keep_fraction: 0.5}", False),
    ],
)
def test_a_bakeoff_follows_where_there_is_more_than_one_way_to_select(load, method, select, raced):
    assert load(SMALLEST + f"score: {{method: {method}}}\nselect: {select}\n").is_raced == raced


@pytest.mark.parametrize(
    ("score", "select", "step"),
    [
        ("{}", "{}", "visible_effect"),
        ("{}", "{keep_fraction: 0.5}", "visible_effect"),
        ("{}", "{bakeoff_arms: [calibrated]}", "batch_share"),
        ("{method: calibrated}", "{}", "batch_share"),
        ("{method: exact, step: visible_effect}", "{}", "visible_effect"),
        ("{step: batch_share}", "{}", "batch_share"),
        ("{step: 0.25}", "{}", 0.25),
    ],
)
def test_a_step_that_is_left_open_is_a_batchs_share_where_one_score_selects_alone(load, score, select, step):
    assert load(SMALLEST + f"score: {score}\nselect: {select}\n").scoring_step == step


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Select().keep_fraction = 0.5


# --- files and YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("device: cpu\ndevice: cuda", ":6: malformed YAML: key 'device' is given twice"),
        ("device: &here cpu\nengine: *here", ":6: malformed YAML: an alias (*name) is not accepted"),
        ("device: !!python/name:os.system", ":5: malformed YAML: a tag (!name) is not accepted"),
        ("device: !!str cpu", ":5: malformed YAML: a tag (!name) is not accepted"),
        ("1: cpu", ":5: malformed YAML: a key is text, found 1; put it in quotes"),
        ("[a]: cpu", ":5: malformed YAML: a key is text, found ['a']; put it in quotes"),
        ("device: [", "malformed YAML: while parsing a flow node"),
        ("device: " + "[" * 5000, ": malformed YAML: nested too deeply"),
        ("device: " + "1" * 5000, ": malformed YAML: a number of thousands of digits"),
        ("device: \0", ": malformed YAML: unacceptable character"),
        ('device: "\\ud800"', 'device is "\\ud800", must be one of'),
        ("<<: {device: cpu}", "unknown key <<"),
        ("--- {}", "malformed YAML: expected a single document"),
    ],
)
def test_faulty_yaml_is_refused_with_its_line(line, message, fault):
    assert message in fault(f"{SMALLEST}{line}\n")


def test_a_bomb_of_aliases_is_refused_at_the_first(fault):
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert fault(bomb).startswith(":2: malformed YAML: an alias")


@pytest.mark.parametrize(
    ("text", "found"), [("", "empty"), ("# only words\n", "empty"), ("- a\n", '["a"]'), ("a\n", '"a"')]
)
def test_a_recipe_that_is_no_mapping_is_refused(text, found, fault):
    assert f" is {found}, must be a mapping of keys to values" in fault(text)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(SMALLEST.encode() + b"proxy: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yaml: byte \d+ is not UTF-8"):
        load_recipe(path)


def test_a_missing_recipe_says_how_to_get_one(tmp_path):
    with pytest.raises(RecipeError, match="No such file or directory; `datalloy init` writes one"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("100_000", 100000),
        ("-7", -7),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_plain_scalars_are_read_as_yaml_1_2_reads_them(text, value):
    found = parse_yaml(f"key: {text}", "here")["key"]
    assert (found, type(found)) == (value, type(value))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_dumped_yaml_is_read_back_equal(data):
    assert parse_yaml(dump_yaml(data), "here") == data


# --- paths and overrides ---------------------------------------------------------------------------------------------


def test_data_paths_are_relative_to_the_recipe(load, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    recipe = load(SMALLEST.replace("{path: chart.jsonl}", "{path: in/chart.jsonl, media_root: ../pictures}"))
    assert recipe.domains["chart"].path == f"{tmp_path}/in/chart.jsonl"
    assert recipe.domains["chart"].media_root == f"{tmp_path}/../pictures"


def test_data_paths_start_from_the_data_root_where_one_is_given(load, tmp_path):
    recipe = load(SMALLEST + "data_root: packs\n")
    assert recipe.targets["goal"].path == f"{tmp_path}/packs/goal.jsonl"


def test_an_absolute_path_and_the_home_folder_are_kept(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load(SMALLEST.replace("chart.jsonl", "/data/chart.jsonl").replace("goal.jsonl", "~/goal.jsonl"))
    assert recipe.domains["chart"].path == "/data/chart.jsonl"
    assert recipe.targets["goal"].path == "/home/someone/goal.jsonl"


def test_a_model_is_a_folder_beside_the_recipe_or_a_hub_id(load, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    recipe = load(SMALLEST.replace("tiny", "org/model") + "proxy: org/other\n")
    assert (recipe.base, recipe.proxy_model) == (f"{tmp_path}/org/model", "org/other")


def test_tiny_is_the_embedded_model_even_beside_a_folder_of_that_name(load, tmp_path):
    (tmp_path / "tiny").mkdir()
    assert load(SMALLEST).base == "tiny"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("score.method=tail", "score", "method", "tail"),
        ("select.bakeoff_fractions=[0.2, 1]", "select", "bakeoff_fractions", (0.2, 1.0)),
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
    ],
)
def test_set_overrides_one_key(override, section, key, value, load):
    recipe = load(SMALLEST + "train: {rank: 3}\n", override).dump()
    expected = load(SMALLEST + "train: {rank: 3}\n").dump()
    expected[section][key] = list(value) if isinstance(value, tuple) else value
    assert recipe == expected


def test_set_reaches_into_a_named_domain_and_the_last_one_wins(load):
    recipe = load(SMALLEST, "domains.chart.limit=5", "domains.chart.limit=7", "evaluation.held.path=held.jsonl")
    assert recipe.domains["chart"].limit == 7
    assert recipe.evaluation["held"].path.endswith("/held.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score.probes=0", " --set score.probes=0: score.probes is 0, must be a whole number of at least 1"),
        ("score.prbes=3", " --set score.prbes=3: unknown key score.prbes; did you mean probes?"),
        ("name.sub=3", '--set name.sub=3: sub would be a key of "small", which is a value, not a section'),
        ("score.method", "--set takes KEY=VALUE with a dotted key such as score.method=tail, found 'score.method'"),
        ("=3", "--set takes KEY=VALUE with a dotted key such as score.method=tail, found '=3'"),
        ("score.step=[", "--set score.step=[: malformed YAML: while parsing a flow node"),
    ],
)
def test_a_wrong_override_is_named(override, message, fault):
    assert fault(SMALLEST, override).startswith(message)


def test_a_dumped_recipe_is_loaded_back_equal_from_any_folder(load, tmp_path):
    recipe = load(
        SMALLEST + "train: {learning_rate: 1e-5}\nselect: {budget_flops: 100}\n", "domains.chart.media_root=p"
    )
    folder = tmp_path / "runs" / "elsewhere"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(recipe.dump()))
    assert load_recipe(folder / "config.yaml") == load_recipe(folder) == recipe


# --- the template ----------------------------------------------------------------------------------------------------


def test_the_template_is_a_recipe_with_the_defaults(load):
    recipe = load(RECIPE_TEMPLATE)
    smallest = load(SMALLEST)
    for section in ("score", "select", "train", "evaluate", "leakage", "max_rejected_fraction"):
        assert getattr(recipe, section) == getattr(smallest, section)


def test_what_the_template_leaves_commented_out_is_valid_too(load):
    commented_keys = tuple(f"# {key}: " for key in Recipe.model_fields)
    lines = [line[2:] if line.startswith(commented_keys) else line for line in RECIPE_TEMPLATE.splitlines()]
    assert load("\n".join(lines)).proxy == "path-or-hub-id"


@pytest.mark.parametrize("key", Recipe.model_fields)
def test_the_template_explains_every_key(key):
    """In the paragraph of the key, before it."""
    paragraph = next(p for p in RECIPE_TEMPLATE.split("\n\n") if re.search(rf"^(# )?{key}: ?", p, re.MULTILINE))
    assert re.match(r"# [A-Z]", paragraph)


def test_the_example_recipes_load():
    for path in (Path(__file__).parent.parent / "examples").glob("*.yaml"):
        assert load_recipe(path).name


# --- mixture


def _with_mixture(tmp_path, mixture: str, domains: str = "{a: {path: a.jsonl}, b: {path: b.jsonl}}"):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: m\nbase: tiny\ndomains: {domains}\ntargets: {{t: {{path: t.jsonl}}}}\nmixture: {mixture}\n")
    return load_recipe(path)


def test_an_empty_mixture_section_switches_the_search_on_with_its_defaults(tmp_path):
    assert _with_mixture(tmp_path, "{}").mixture.verify_runs == 3


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ("{guard_rails: {x: 0.1}}", "guard_rails names x, which is no target: t"),
        ("{groups: {g: {domains: [a, c]}}}", "groups.g names c, which is no domain: a, b"),
        ("{buckets: 7}", "mixture.buckets is 7"),
        ("{objective: best}", "one of mean, weighted, worst, pareto"),
    ],
)
def test_a_mixture_section_that_names_what_is_not_there_is_refused(tmp_path, mixture, said):
    with pytest.raises(RecipeError, match=said):
        _with_mixture(tmp_path, mixture)


def test_one_domain_cannot_be_mixed_unless_it_is_split_into_buckets(tmp_path):
    one = "{a: {path: a.jsonl}}"
    with pytest.raises(RecipeError, match="at least two domains"):
        _with_mixture(tmp_path, "{}", one)
    assert _with_mixture(tmp_path, "{buckets: 2}", one).mixture.buckets == 2


# --- what is not a recipe to be read ----------------------------------------------------------------------------------


def test_a_recipe_with_a_key_in_it_is_refused_without_repeating_it(load):
    key = "hf_" + "a1B2" * 8
    with pytest.raises(RecipeError, match=r"recipe\.yaml:5: this looks like a key") as caught:
        load(f"{SMALLEST}train: {{report_to: [{key}]}}\n")
    assert key not in str(caught.value)
    with pytest.raises(RecipeError, match="looks like a key"):
        load(SMALLEST, f"base=https://user:{key}@example.org/model")


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_a_recipe_that_is_no_small_regular_file_is_refused_without_reading_it(tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "recipe.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(RecipeError, match=r"a named pipe|a device|at most 1,048,576"):
        load_recipe(path)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes_as_a_recipe_are_refused_by_our_own_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)

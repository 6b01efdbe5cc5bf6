"""What users can rely on: a list of names, and an import that costs nothing."""

import pkgutil
import subprocess
import sys

import pytest

import datalloy

HEAVY = ("torch", "transformers", "numpy", "pyarrow", "sklearn", "scipy", "pydantic", "PIL")


def test_the_public_names_are_these():
    assert datalloy.__all__ == [
        "DatalloyError",
        "Mixture",
        "Recipe",
        "Sample",
        "Scores",
        "Selection",
        "check",
        "evaluate",
        "export",
        "load_recipe",
        "merge_checkpoints",
        "mix",
        "run_all",
        "score",
        "select",
        "train",
        "verify",
    ]


@pytest.mark.parametrize("name", datalloy.__all__)
def test_every_public_name_is_something_to_call(name):
    assert callable(getattr(datalloy, name))


def test_no_public_name_is_that_of_a_module():
    """Importing the module would put it in the name's place."""
    assert not set(datalloy.__all__) & {module.name for module in pkgutil.iter_modules(datalloy.__path__)}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'datalloy' has no attribute 'optimize'"):
        datalloy.optimize  # noqa: B018


def test_every_verb_is_documented():
    assert all(getattr(datalloy, name).__doc__ for name in datalloy.__all__)


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, datalloy; print([name for name in {HEAVY} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"

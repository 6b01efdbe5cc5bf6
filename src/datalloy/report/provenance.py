"""Where every figure comes from: the recipe, the inputs' hashes, the versions, the machine."""

from datalloy.report.facts import RunFacts
from datalloy.report.markup import details, table, text
from datalloy.report.page import Section
from datalloy.strict_yaml import dump_yaml


def section(facts: RunFacts) -> Section:
    record = facts.provenance
    about = {"run folder": facts.path, "fingerprint": record["fingerprint"], "started": record["started"]}
    about |= {key: record[key] for key in ("python", "platform", "cores")}
    about |= {"datalloy": record["parts"]["datalloy"], **record["parts"]["libraries"]}
    rows = [[text(key), f"<code>{text(value)}</code>"] for key, value in about.items()]
    inputs = [[text(key), f"<code>{text(value)}</code>"] for key, value in record["parts"]["inputs"].items()]
    body = (
        table(["what", "value"], rows, label="provenance")
        + details("Hashes of the inputs", table(["input", "SHA-256"], inputs, label="hashes of the inputs"))
        + details(
            "The complete recipe",
            f'<div class="scroll" tabindex="0" role="region" aria-label="the recipe">'
            f"<pre>{text(dump_yaml(facts.recipe.dump()))}</pre></div>",
        )
    )
    takeaway = "Running config.yaml of this folder again repeats the run; every figure here comes from its files."
    return Section("provenance", "Provenance", takeaway, body)

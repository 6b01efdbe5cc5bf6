"""Run in an environment with LLaMA-Factory: the rows of an exported folder as its own loader and converter see them.

    python llama_factory_reads.py FOLDER     one JSON object a set on stdout

Pictures come as their SHA-256.
"""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml
from datasets import load_dataset
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.parser import get_dataset_list


def read(folder: Path) -> dict:
    config = yaml.safe_load((folder / "train.yaml").read_text())
    names = config["dataset"].split(",")
    arguments = SimpleNamespace(media_dir=config["dataset_dir"], streaming=False)
    return {
        name: rows(attributes, Path(config["dataset_dir"]), arguments)
        for name, attributes in zip(names, get_dataset_list(names, config["dataset_dir"]), strict=True)
    }


def rows(attributes, folder: Path, arguments) -> list:
    table = load_dataset("json", data_files=str(folder / attributes.dataset_name), split="train")
    convert = get_dataset_converter(attributes.formatting, attributes, arguments)
    found = []
    for row in table:
        made = convert(row)
        system = [["system", made["_system"]]] if made["_system"] else []
        turns = [[turn["role"], turn["content"]] for turn in [*made["_prompt"], *made["_response"]]]
        pictures = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in made["_images"] or []]
        found.append({"turns": system + turns, "pictures": pictures})
    return found


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))

"""Run in an environment with ms-swift: the rows of an exported folder as its own `load_dataset` sees them.

    python ms_swift_reads.py FOLDER     one JSON object a dataset argument on stdout

Pictures come as their SHA-256.
"""

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

from swift.dataset import load_dataset


def read(folder: Path) -> dict:
    words = shlex.split(re.sub(r"\\\n", " ", (folder / "train.sh").read_text()), comments=True)
    start = words.index("--dataset") + 1
    end = next(i for i in range(start, len(words)) if words[i].startswith("--"))
    return {argument: rows(argument) for argument in words[start:end]}


def rows(argument: str) -> list:
    table, _ = load_dataset(argument, split_dataset_ratio=0, shuffle=False)
    return [
        {
            "turns": [[turn["role"], turn["content"]] for turn in row["messages"]],
            "pictures": [hashlib.sha256(Path(image["path"]).read_bytes()).hexdigest() for image in row["images"] or []],
        }
        for row in table
    ]


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))

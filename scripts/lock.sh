#!/bin/sh
# Write requirements.lock: the versions of constraints.txt with the SHA-256 of every file the index has for them, so that
# `pip install --require-hashes -r requirements.lock` installs what was tested or nothing. Needs uv and an index.
# torch is left out as in constraints.txt: scripts/setup.sh picks the build that fits the machine.
set -eu
cd "$(dirname "$0")/.."
uv=${UV:-uv}
"$uv" pip compile --quiet --no-deps --no-annotate --no-header --generate-hashes \
    --python-version 3.11.0 constraints.txt --output-file requirements.lock

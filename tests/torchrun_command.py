"""`datalloy` as torchrun starts it in the tests: small shards, so that a small pool has some for every process."""

import sys

from datalloy import cli, workflows

workflows.SHARD = 12
sys.argv[0] = "datalloy"
cli.main()

"""What every file of results says about itself: the commit it was made with, and the machine."""

import os
import platform
import subprocess

import torch


def provenance() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"commit": commit, "machine": machine, "torch": torch.__version__}

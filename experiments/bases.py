"""The base that experiments train: the embedded model as it is shipped, or blurred, so that it has something to learn.

The shipped model answers the drawn world's questions about as well as a few hundred samples can teach it, so that no
selection of them can do much good. `blurred` adds noise to every weight tensor, of a share of the tensor's own spread:
the skills are still in the model, and training brings them out again. `strongly_blurred` is a base that does not
know its tasks: its loss tells little of whether an answer is wrong. The same two for every experiment.
"""

from pathlib import Path

import torch

from datalloy.vlm import VLM

BASES = ("blurred", "strongly_blurred", "shipped")
BLUR = {"blurred": 0.3, "strongly_blurred": 0.8}  # standard deviation of the noise, as a share of the tensor's


def base_path(name: str, folder: Path) -> str:
    """What a recipe's `base` says; a blurred model is written to `folder` where it is not there yet."""
    if name == "shipped":
        return "tiny"
    path = (folder / name).absolute()
    if not path.exists():
        vlm = VLM.load("tiny")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in vlm.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(BLUR[name] * parameter.std() * noise)
        vlm.save(path)
    return str(path)

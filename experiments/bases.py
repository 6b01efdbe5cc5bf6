"""The base that experiments train: the embedded model as it is shipped, or blurred, so that it has something to learn.

The shipped model answers the drawn world's questions about as well as a few hundred samples can teach it, so that no
selection of them can do much good. `blurred` adds noise to every weight tensor, of a share of the tensor's own spread:
the skills are still in the model, and training brings them out again. `strongly_blurred` is a base that does not
know its tasks: its loss tells little of whether an answer is wrong. `blurred_2x` and `blurred_4x` are larger models:
layers that change nothing yet are put behind each layer of the decoder, before noise from another seed is added.
The same bases for every experiment.
"""

import copy
from pathlib import Path

import torch

from datalloy.vlm import VLM

BASES = ("blurred", "strongly_blurred", "shipped")
# standard deviation of the noise, as a share of the tensor's, and its seed
BLUR = {"blurred": (0.3, 0), "strongly_blurred": (0.8, 0), "blurred_2x": (0.3, 1), "blurred_4x": (0.3, 1)}
# layers of the decoder behind each of its three: 2.1 and 4.2 times the parameters in all
MORE_LAYERS = {"blurred_2x": 2, "blurred_4x": 6}


def base_path(name: str, folder: Path) -> str:
    """What a recipe's `base` says; a blurred model is written to `folder` where it is not there yet."""
    if name == "shipped":
        return "tiny"
    path = (folder / name).absolute()
    if not path.exists():
        vlm = VLM.load("tiny")
        if name in MORE_LAYERS:
            grow(vlm, MORE_LAYERS[name])
        blur, seed = BLUR[name]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in vlm.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(blur * parameter.std() * noise)
        vlm.save(path)
    return str(path)


def grow(vlm: VLM, more: int) -> None:
    """Puts `more` copies behind each layer of the decoder whose outputs are zero: the same function, ready to learn."""
    decoder = vlm.model.model.text_model
    layers = []
    for layer in decoder.layers:
        copies = [copy.deepcopy(layer) for _ in range(more)]
        for idle in copies:
            torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
            torch.nn.init.zeros_(idle.mlp.down_proj.weight)
        layers += [layer, *copies]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    decoder.layers = torch.nn.ModuleList(layers)
    vlm.model.config.text_config.num_hidden_layers = len(layers)

"""A few weights that identify a base model: a diff has a meaning only on the weights that it was made from."""

import base64
from collections.abc import Callable, Collection

import torch
from torch import Tensor

MAX_SAMPLES = 256
"""Weights in a fingerprint, spread over all parameters; more where a model has more parameters, one of each."""

Fingerprint = dict[str, str]
"""Parameter name -> some of its weights, fp32, little-endian, in base64."""


def take(names: Collection[str], load: Callable[[str], Tensor]) -> Fingerprint:
    """The fingerprint of a model's floating parameters, which `load` gives by their names; costs no pass over them."""
    samples = {name: _sample(load(name), max(1, MAX_SAMPLES // len(names))) for name in names}
    return {name: base64.b64encode(one.numpy().tobytes()).decode() for name, one in samples.items() if one.numel()}


def differing(
    fingerprint: Fingerprint, names: Collection[str], load: Callable[[str], Tensor], new_last_rows: Collection[str] = ()
) -> list[str]:
    """Those of the parameters, as of [`take`], whose weights are not those of the fingerprint; others it does not tell.

    Weights that were only rounded to another dtype are the same. The last sample of parameters in `new_last_rows` is
    not compared: it may belong to a word that was added to the vocabulary, whose row was made at random.
    """
    found = []
    for name in fingerprint.keys() & set(names):
        told = torch.frombuffer(bytearray(base64.b64decode(fingerprint[name])), dtype=torch.float32)
        parameter = load(name)
        sample = _sample(parameter, told.numel())
        if name in new_last_rows and len(sample) > 1:
            told, sample = told[:-1], sample[:-1]
        dtypes = {parameter.dtype, torch.float32, torch.bfloat16, torch.float16}
        if not any(torch.equal(told.to(d).float(), sample) or torch.equal(told, sample.to(d).float()) for d in dtypes):
            found.append(name)
    return sorted(found)


@torch.no_grad()
def _sample(parameter: Tensor, count: int) -> Tensor:
    count = min(parameter.numel(), count)
    positions = torch.linspace(0, parameter.numel() - 1, count, dtype=torch.float64).long()
    return torch.take(parameter.detach(), positions.to(parameter.device)).float().cpu()

"""A few weights that identify a base model: a diff has a meaning only on the weights that it was made from."""

import base64
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

MAX_SAMPLES = 256
"""Weights in a fingerprint, spread over all parameters; more where a model has more parameters, one of each."""

Fingerprint = dict[str, str]
"""Parameter name -> some of its weights, fp32, little-endian, in base64."""


def take(parameters: Mapping[str, Tensor]) -> Fingerprint:
    """The fingerprint of a model's floating parameters, by their names in it; costs no pass over the weights."""
    taken = {name: _sample(p, max(1, MAX_SAMPLES // len(parameters))) for name, p in parameters.items() if p.numel()}
    return {name: base64.b64encode(sample.numpy().tobytes()).decode() for name, sample in taken.items()}


def differing(
    fingerprint: Fingerprint, parameters: Mapping[str, Tensor], new_last_rows: Collection[str] = ()
) -> list[str]:
    """Names of the parameters whose weights are not those of the fingerprint, among those that both have.

    Weights that were only rounded to another dtype are the same. The last sample of parameters in `new_last_rows` is
    not compared: it may belong to a word that was added to the vocabulary, whose row was made at random.
    """
    found = []
    for name in fingerprint.keys() & parameters.keys():
        told = torch.frombuffer(bytearray(base64.b64decode(fingerprint[name])), dtype=torch.float32)
        sample = _sample(parameters[name], told.numel())
        if name in new_last_rows and len(sample) > 1:
            told, sample = told[:-1], sample[:-1]
        dtypes = {parameters[name].dtype, torch.float32, torch.bfloat16, torch.float16}
        if not any(torch.equal(told.to(d).float(), sample) or torch.equal(told, sample.to(d).float()) for d in dtypes):
            found.append(name)
    return sorted(found)


@torch.no_grad()
def _sample(parameter: Tensor, count: int) -> Tensor:
    count = min(parameter.numel(), count)
    positions = torch.linspace(0, parameter.numel() - 1, count, dtype=torch.float64).long()
    return torch.take(parameter.detach(), positions.to(parameter.device)).float().cpu()

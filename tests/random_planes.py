"""Random valid planes, and models whose block linears were replaced by them."""

from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pbsp.binarization.planes import Planes, block_count
from pbsp.binarization.rotation import rotation_for
from pbsp.binarization.scales import round_scales
from pbsp.integrations.modules import replace_module
from pbsp.integrations.transformers import PbspQuantizationConfig, attach
from pbsp.methods.integers import DENSE
from pbsp.models.experts import split_experts
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import PlanePattern, parse_patterns
from tiny import tiny_model


def random_signs(pattern: PlanePattern, rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pattern, Lattice):
        codes = torch.randint(0, 1 << pattern.bits, (rows, columns // pattern.group), generator=generator)
        return pattern.codes()[codes].view(rows, columns)
    noise = torch.rand(rows, columns // pattern.group, pattern.group, generator=generator)
    kept = noise.topk(pattern.kept, -1).indices
    values = 2 * torch.randint(0, 2, kept.shape, generator=generator) - 1
    return torch.zeros_like(noise).long().scatter_(-1, kept, values).view(rows, columns).to(torch.int8)


def random_planes(
    text: str, rows: int, columns: int, *, scale_block: int = 48, seed: int = 0, rotation: int = 1
) -> Planes:
    """Planes of these patterns; "3 bit": the bits of integers, dense planes that share scales."""
    shared = text.endswith(" bit")
    patterns = (DENSE,) * int(text.split()[0]) if shared else parse_patterns(text)
    signs = [random_signs(pattern, rows, columns, seed=seed + n) for n, pattern in enumerate(patterns)]
    shape = (len(patterns), rows, block_count(columns, scale_block))
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    magnitudes = torch.tensor([0.1 / 4**n for n in range(len(patterns))])
    scales = round_scales(scales * magnitudes[:, None, None])
    if shared:
        scales = torch.stack([scales[0] / 2**plane for plane in range(len(patterns))])
    return Planes(patterns, torch.stack(signs), scales, scale_block, rotation, shared)


def packed_model(name: str, text: str = "4:8+2:8", *, make=random_planes, model=None):
    """A tiny model as compress leaves it: what `make` gives in place of every linear but the head."""
    model = model or tiny_model(name)
    split_experts(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and path != "lm_head":
            rows, columns = (module.weight.T if isinstance(module, Conv1D) else module.weight).shape
            found = make(text, rows, columns, seed=len(path))
            if isinstance(found, Planes) and len(path) % 2:  # some are rotated, some not
                found = replace(found, rotation=rotation_for(columns, 16))
            replace_module(model, path, PackedLinear.of(found, module.bias))
    config = PbspQuantizationConfig(left_uncompressed={"lm_head": "head"}, provenance={"seed": 0})
    attach(model, config)
    return model

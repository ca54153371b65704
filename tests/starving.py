"""A model with an expert that gets no token."""

import copy

import torch
from transformers import AutoModelForCausalLM

from tiny import CONFIGS


def starving_model():
    """A Mixtral whose tokens take one expert each: of scores x, −x, y and 0, never the last."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["mixtral"])
    config.num_experts_per_tok = 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for layer in model.model.layers:
        router = layer.mlp.gate.weight.data
        router[1], router[3] = -router[0], 0
    return model

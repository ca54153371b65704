"""Saved models: how tests load them, look into them and damage them."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pbsp.packed_linear import PackedLinear
from tiny import tiny_tokens


def logits(model):
    with torch.no_grad():
        return model(tiny_tokens()).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def packed_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

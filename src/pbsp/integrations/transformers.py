"""Compressed models as transformers knows them; importing this module registers the method "pbsp"."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pbsp.errors import ConfigError, FormatError
from pbsp.integrations.embeddings import (
    RowsEntry,
    check_embedding,
    embedding_entries,
    place_embeddings,
    unpack_embeddings,
)
from pbsp.integrations.keys import ModelKeys
from pbsp.integrations.modules import check_place, dense_module, empty_linear, packed_entry, replace_module
from pbsp.models.experts import fuse_experts, split_experts
from pbsp.packed_linear import PackedLinear
from pbsp.storage.checkpoint import FORMAT_VERSION, LayerEntry, check_layer, read_headers
from pbsp.storage.layouts import MARKERS

METHOD = "pbsp"


class PbspQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model's config.json.

    Attributes:
        layers: entry of each packed linear, by module name.
        left_uncompressed: reason for each linear that was left as it was, by module name.
        embeddings: entry of each embedding or head that is stored in 8 or 4 bit, by module name.
        provenance: how the model was made: settings, corpus digest, seed, versions; plain JSON.
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, LayerEntry] | None = None,
        left_uncompressed: Mapping[str, str] | None = None,
        embeddings: Mapping[str, RowsEntry] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue] - registered ones are str
        self.layers = dict(layers or {})
        self.left_uncompressed = dict(left_uncompressed or {})
        self.embeddings = dict(embeddings or {})
        self.provenance = copy.deepcopy(dict(provenance or {}))

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config that a file holds; the result is a pair with `kwargs` if these are asked back.

        Raises:
            FormatError: another version, an unknown or missing key, or an entry that is not whole.
        """
        version = config_dict.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"the model has format version {version!r}; this pbsp reads version {FORMAT_VERSION}: "
                "install the pbsp that wrote it, or compress the model again"
            )
        config_dict = {"embeddings": {}, **config_dict}  # absent where none is quantized
        objects = ("layers", "left_uncompressed", "embeddings", "provenance")
        if unknown := set(config_dict) - {"quant_method", "format_version", *objects}:
            raise FormatError(f"unknown keys in quantization_config: {', '.join(sorted(unknown))}")
        for key in objects:
            if not isinstance(config_dict.get(key), Mapping):
                raise FormatError(f"{key} in quantization_config is missing or not an object")
        for name, reason in config_dict["left_uncompressed"].items():
            if not isinstance(reason, str):
                raise FormatError(f"left_uncompressed in quantization_config gives no reason for {name}")
        layers = {name: LayerEntry.from_dict(name, entry) for name, entry in config_dict["layers"].items()}
        config = cls(
            layers=layers,
            left_uncompressed=config_dict["left_uncompressed"],
            embeddings={
                name: RowsEntry.from_dict(name, entry) for name, entry in config_dict["embeddings"].items()
            },
            provenance=config_dict["provenance"],
        )
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, the same for equal configs."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "layers": {name: entry.to_dict() for name, entry in self.layers.items()},
            "left_uncompressed": dict(self.left_uncompressed),
            "embeddings": {name: entry.to_dict() for name, entry in self.embeddings.items()},
            "provenance": copy.deepcopy(self.provenance),
        }


class PbspHfQuantizer(HfQuantizer):
    """Checks a compressed model's files, then puts packed linears where its dense ones would be."""

    @property
    def _config(self) -> PbspQuantizationConfig:
        assert isinstance(self.quantization_config, PbspQuantizationConfig)
        return self.quantization_config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse the config as a request to compress while loading."""
        if not self.pre_quantized:
            raise ConfigError(
                "PbspQuantizationConfig describes a model that is compressed already; it cannot compress one "
                "while it loads. Load the model without it and call pbsp.compress"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Check everything that can be checked, so that nothing is half loaded, then swap the modules."""
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise FormatError("a compressed model loads from its safetensors files only")
        tensors = read_headers(checkpoint_files)
        split_experts(model, holding={*self._config.layers, *self._config.left_uncompressed})
        # The base model alone (AutoModel) has shorter names than the causal model that was saved.
        names = ModelKeys(model, self)
        layers = {names.module_name(name): entry for name, entry in self._config.layers.items()}
        for name, entry in layers.items():
            check_place(model, name, entry)
            replace_module(model, name, empty_linear(model.get_submodule(name), entry.form))
        embeddings = {names.module_name(name): entry for name, entry in self._config.embeddings.items()}
        if model.get_output_embeddings() is None:  # a base model has no place for the head's
            places = dict(model.named_modules())
            embeddings = {name: entry for name, entry in embeddings.items() if name in places}
        place_embeddings(model, embeddings)
        keys = ModelKeys(model, self)
        stored = keys.by_model_key(tensors)
        for key in stored:
            layer, _, suffix = key.rpartition(".")
            if suffix in MARKERS and layer not in layers:
                raise FormatError(
                    f"tensor {key} belongs to a packed layer that quantization_config does not list"
                )
        if missing := keys.missing(stored):
            raise FormatError(f"the model is incomplete; its files lack {', '.join(missing)}")
        with torch.device("cpu"):  # the model is being built on the meta device
            for name, entry in layers.items():
                check_layer(name, entry, stored)
            for name, entry in embeddings.items():
                check_embedding(name, entry, stored)
        self._config.layers = layers
        self._config.embeddings = embeddings
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Bring the packed linears to the layout that the CPU kernels read, one at a time.

        From here on the model is saved under its own names, those of the config, whatever its source's
        files called them.
        """
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.prepare()
        vars(model)["_weight_conversions"] = []  # None would stand for the architecture's usual ones
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Packed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters can be trained on the packed model."""
        return True

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make it a plain model, all of it in `dtype`; None keeps the dtype that it has now."""
        return super().dequantize(model, dtype or model.dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put dense modules, of the kind the architecture has there, in the packed ones' place."""
        wanted = dtype or model.dtype
        recast = wanted != model.dtype  # else leave alone what transformers keeps in float32
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                replace_module(model, name, dense_module(module, wanted))
            elif isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                delattr(module.config, "_is_quantized")
        fuse_experts(model)
        unpack_embeddings(model, wanted)
        if recast:
            nn.Module.to(model, wanted)
        return model


# Called, not used as decorators: these would hide the classes' own types from type checkers.
register_quantization_config(METHOD)(PbspQuantizationConfig)
register_quantizer(METHOD)(PbspHfQuantizer)


def attach(
    model: PreTrainedModel, config: PbspQuantizationConfig, *, layers: Mapping[str, LayerEntry] | None = None
) -> None:
    """Make `save_pretrained` write a model whose linears were replaced as a compressed one.

    `config.layers` is filled in from the model's packed linears; call it again if they change.

    Args:
        layers: the entries, where the packed linears have no values to make them from.

    Raises:
        FormatError: no module of the model is packed.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise FormatError("the model has no packed linear, so there is nothing to save in packed form")
    known = layers or {}
    config.layers = {name: known.get(name) or packed_entry(module) for name, module in packed.items()}
    config.embeddings = embedding_entries(model)
    quantizer = PbspHfQuantizer(config, pre_quantized=True)
    for attribute, value in (
        ("hf_quantizer", quantizer),
        ("is_quantized", True),
        ("quantization_method", METHOD),
    ):
        setattr(model, attribute, value)  # as from_pretrained does
    quantizer.postprocess_model(model)

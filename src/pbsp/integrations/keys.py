"""Names of stored tensors and of modules, as transformers will match them when it loads.

It renames keys (a base model loads from a causal model's files, old names from new ones) and merges
some, and only warns of what it then misses: the checks need to see the names as it does.
"""

import re
from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from pbsp.storage.checkpoint import StoredTensor


class ModelKeys:
    """The keys of a model's state, and which of them each stored key fills."""

    def __init__(self, model: PreTrainedModel, quantizer: HfQuantizer) -> None:
        self._model = model
        self._state = model.state_dict()
        conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def module_name(self, name: str) -> str:
        """The model's own name for the linear that the config calls `name`."""
        return next(self._filled_by(f"{name}.weight")).removesuffix(".weight")

    def by_model_key(self, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
        """The stored tensors by the keys that they fill."""
        return {key: tensor for tensor in tensors for key in self._filled_by(tensor.key)}

    def missing(self, filled: Iterable[str]) -> list[str]:
        """Keys that are not among `filled` and that the model needs.

        Not tied weights, nor what the architecture lists as dispensable, nor a classifier's head on
        a model that was saved without one.
        """
        model = self._model
        missing = set(self._state) - set(filled) - set(model.all_tied_weights_keys)
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        saved_as_another = type(model).__name__ not in (model.config.architectures or ())
        if saved_as_another and model.base_model is not model and model.get_output_embeddings() is None:
            missing = {key for key in missing if key.startswith(f"{model.base_model_prefix}.")}
        return sorted(key for key in missing if not any(pattern.search(key) for pattern in ignored))

    def _filled_by(self, stored_key: str) -> Iterator[str]:
        """The first key is the one that transformers names a merged or split tensor by."""
        prefix = self._model.base_model_prefix
        key, source = rename_source_key(stored_key, self._renamings, self._converters, prefix, self._state)
        if key not in self._state and stored_key in self._state:
            key, source = rename_source_key(stored_key, [], [], prefix, self._state)
        yield key
        for converter in self._converters:
            if source in converter.source_patterns:
                yield from (
                    key.replace(converter.target_patterns[0], target)
                    for target in converter.target_patterns[1:]
                )

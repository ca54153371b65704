"""Which keys of a model's state each stored tensor fills, as transformers will match them when it loads.

It renames keys (a base model loads from a causal model's files, old names from new ones) and merges some.
"""

from collections.abc import Iterator

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer


class StoredKeys:
    """From a stored tensor's name to the keys of `model.state_dict()` that it fills."""

    def __init__(self, model: PreTrainedModel, quantizer: HfQuantizer | None = None) -> None:
        self._state = model.state_dict()
        self._prefix = model.base_model_prefix
        conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def filled_by(self, stored_key: str) -> Iterator[str]:
        """The first key is the one that transformers names a merged or split tensor by."""
        key, source = rename_source_key(
            stored_key, self._renamings, self._converters, self._prefix, self._state
        )
        if key not in self._state and stored_key in self._state:
            key, source = rename_source_key(stored_key, [], [], self._prefix, self._state)
        yield key
        for converter in self._converters:
            if source in converter.source_patterns:
                yield from (
                    key.replace(converter.target_patterns[0], target)
                    for target in converter.target_patterns[1:]
                )

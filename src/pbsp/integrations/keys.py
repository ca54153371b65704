"""Names of a compressed model's stored tensors and of modules, as transformers will match them when it loads.

It only warns of what it then misses: the checks need to see the names as it does.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from pbsp.models.keys import StoredKeys
from pbsp.storage.checkpoint import StoredTensor


class ModelKeys:
    """The keys of a model's state, and which of them each stored key fills."""

    def __init__(self, model: PreTrainedModel, quantizer: HfQuantizer) -> None:
        self._model = model
        self._state = model.state_dict()
        self._stored = StoredKeys(model, quantizer)

    def module_name(self, name: str) -> str:
        """The model's own name for the linear that the config calls `name`."""
        return next(self._stored.filled_by(f"{name}.weight")).removesuffix(".weight")

    def by_model_key(self, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
        """The stored tensors by the keys that they fill."""
        return {key: tensor for tensor in tensors for key in self._stored.filled_by(tensor.key)}

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

"""A model larger than memory: its weights stay in their safetensors files but for the part that is in use.

Its parts are the decoder blocks and what lies outside them: embeddings, final norm, head. A part is read by
transformers' own loading code, so that it has the values it would have in a model that was loaded whole.
"""

import copy
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from pbsp.errors import ModelError
from pbsp.models.blocks import decoder_blocks
from pbsp.models.experts import ExpertLinears, split_experts
from pbsp.models.keys import StoredKeys
from pbsp.models.quiet import quiet_libraries
from pbsp.models.survey import Survey, once_each, survey

OUTSIDE = ""
"""The name of the part that is no decoder block."""
_ATTRIBUTE = "pbsp_shards"


class Shards:
    """Where a model's weights lie, and which of its parts are in memory.

    Args:
        empty: as `from_pretrained` makes it on the meta device; this model is taken over.
        files: its safetensors files.
        device: where a part goes when it is read.

    Attributes:
        scratch: folder for what is too large for memory while the model is calibrated.
        blocks: names of the decoder blocks.
        model: what is walked and compressed; its experts are split. Its weights are on the meta device
            outside `resident`; buffers that no file holds, as rotary frequencies, always have values.

    Raises:
        ModelError: two parts share a weight, or see `decoder_blocks`.
    """

    def __init__(self, empty: PreTrainedModel, files: list[Path], device: torch.device) -> None:
        self.device = device
        self.scratch = tempfile.gettempdir()
        self.model = copy.deepcopy(empty)
        split_experts(self.model)
        self._empty = empty
        self.blocks = [block.name for block in decoder_blocks(self.model)]
        self._refuse_shared_weights()
        self._stored = self._locate(files)
        self._users: Counter[str] = Counter()
        self._fill_buffers()
        vars(self.model)[_ATTRIBUTE] = self

    @property
    def parts(self) -> list[str]:
        """Names of all parts."""
        return [OUTSIDE, *self.blocks]

    @cached_property
    def survey(self) -> Survey:
        """What the weights' values say; read once, part by part.

        Raises:
            ModelError: a weight is NaN or infinite.
        """
        return survey(self._all_tensors())

    def part_bytes(self) -> dict[str, int]:
        """What each part takes in memory."""
        return {
            part: sum(tensor.nbytes for _, tensor in once_each(self._tensors(self.model, part)))
            for part in self.parts
        }

    def part_of(self, key: str) -> str:
        """The part that a parameter or a stored tensor's key belongs to."""
        found = (name for name in self.blocks if key.startswith(f"{name}."))
        return next(found, OUTSIDE)

    @contextmanager
    def resident(self, part: str) -> Iterator[None]:
        """Have a part's weights in memory while the context lasts; contexts may be nested."""
        self.keep(part)
        try:
            yield
        finally:
            self._users[part] -= 1
            if not self._users[part]:
                _clear(self.model, self._tensors(self.model, part))

    def keep(self, part: str) -> None:
        """Have a part's weights in memory from now on."""
        self._users[part] += 1
        if self._users[part] == 1:
            self._read(part)

    def _read(self, part: str) -> None:
        """Read a part into the empty model, and hand its tensors over."""
        files: dict[Path, list[str]] = defaultdict(list)
        for file, key in self._stored[part]:
            files[file].append(key)
        conversions = get_model_conversion_mapping(self._empty)
        try:
            with ExitStack() as opened, quiet_libraries():
                state = {}
                for file, keys in files.items():
                    # Not mapped into memory: all pages that were looked at would count as this process's.
                    reader = opened.enter_context(safe_open(file, framework="pt", backend="pread"))
                    state |= {key: reader.get_slice(key) for key in keys}
                settings = LoadStateDictConfig(
                    device_map={"": self.device},
                    dtype=self._empty.dtype,
                    weight_mapping=conversions,  # pyright: ignore[reportArgumentType] - typed too narrowly
                )
                found, _ = convert_and_load_state_dict_in_model(
                    model=self._empty, state_dict=state, load_config=settings, disk_offload_index=None
                )
                if part == OUTSIDE:
                    self._empty.tie_weights(missing_keys=set(found.missing_keys), recompute_mapping=False)
                    self.model.all_tied_weights_keys = self._empty.all_tied_weights_keys
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the weights of {part or 'the model'} cannot be read: {error}") from None
        if found.conversion_errors or found.mismatched_keys:
            raise ModelError(f"the weights of {part or 'the model'} in its files are not those of its config")
        self._hand_over(part)

    def _hand_over(self, part: str) -> None:
        """Move a part's tensors from the empty model to the one in use, experts as linears."""
        if part != OUTSIDE:
            split_experts(self._empty.get_submodule(part))
        tensors = dict(self._tensors(self._empty, part))
        assert tensors.keys() == dict(self._tensors(self.model, part)).keys(), "the part was compressed"
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ModelError(f"the model's files lack {name}; copy or download it again")
            _put(self.model, name, tensor.requires_grad_(False) if tensor.is_floating_point() else tensor)
        if part != OUTSIDE:
            block = self._empty.get_submodule(part)
            for name, module in list(block.named_modules()):
                if isinstance(module, ExpertLinears):
                    block.set_submodule(name, module.emptied)
        _clear(self._empty, self._tensors(self._empty, part))

    def _tensors(self, model: PreTrainedModel, part: str) -> Iterator[tuple[str, Tensor]]:
        """A part's stored tensors by their names; one with two names comes twice."""
        if part != OUTSIDE:
            prefixed = model.get_submodule(part).state_dict(prefix=f"{part}.", keep_vars=True)
            yield from prefixed.items()
            return
        for name, tensor in model.state_dict(keep_vars=True).items():
            if self.part_of(name) == OUTSIDE:
                yield name, tensor

    def _all_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `stored_tensors` gives them, in another order."""
        for part in self.parts:
            with self.resident(part):
                yield from once_each(self._tensors(self.model, part))

    def _locate(self, files: list[Path]) -> dict[str, list[tuple[Path, str]]]:
        """Each part's tensors: file, and name in it."""
        keys = StoredKeys(self._empty)
        found: dict[str, list[tuple[Path, str]]] = defaultdict(list)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    found[self.part_of(next(keys.filled_by(key)))].append((file, key))
        return found

    def _refuse_shared_weights(self) -> None:
        for target, source in self._empty.all_tied_weights_keys.items():
            if self.part_of(target) != OUTSIDE or self.part_of(source) != OUTSIDE:
                raise ModelError(
                    f"{target} shares its weight with {source}, so the model cannot be read block by block; "
                    "use --memory whole"
                )

    def _fill_buffers(self) -> None:
        """Give values to the buffers that no file holds."""
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            made = AutoModelForCausalLM.from_config(
                copy.deepcopy(self._empty.config), dtype=self._empty.dtype
            )
        for name, _ in list(self.model.named_non_persistent_buffers()):
            _put(self.model, name, made.get_buffer(name).to(self.device))


def shards_of(model: nn.Module) -> Shards | None:
    """The shards that the model is read from part by part; None for one that is in memory as a whole."""
    return vars(model).get(_ATTRIBUTE)


def resident(model: nn.Module, part: str) -> AbstractContextManager[None]:
    """Have a part of the model, by its name, in memory while the context lasts."""
    shards = shards_of(model)
    return nullcontext() if shards is None else shards.resident(part)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor


def _clear(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Leave the names, shapes and types of these tensors; what was one tensor stays one."""
    emptied: dict[int, Tensor] = {}
    for name, tensor in list(tensors):
        if id(tensor) not in emptied:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            emptied[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        _put(model, name, emptied[id(tensor)])

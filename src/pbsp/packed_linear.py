"""The module that takes a linear's place in a compressed model."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.binarization.rotation import rotate, unrotate
from pbsp.compiled import DTYPES, REFERENCE, kernel_name
from pbsp.errors import FormatError
from pbsp.kernels import reference
from pbsp.kernels.product import planes_linear
from pbsp.kernels.rows import rows_linear
from pbsp.kernels.runtime import RuntimePlanes, form_numbers
from pbsp.storage.bits import CODES
from pbsp.storage.layouts import Form, Packed, Representation, pack
from pbsp.storage.planes import OFFSETS, SCALES, PackedPlanes, PlanesForm
from pbsp.storage.rows import RowsForm

_PREPARING = threading.Lock()


class PackedLinear(nn.Module):
    """Y = x Wᵀ + bias, W held as its layout packs it; y has x's dtype.

    The packed tensors are integers, so that moving the model to another float dtype leaves them alone.
    The codes are called `weight`, as a linear's are: a loader that does not know them stops on their
    shape, and code that asks for `linear.weight.device` keeps working.

    On the CPU, `weight` of layout `planes` holds the runtime layout instead of the codes, see `prepare`:
    one of the two is enough, and each gives the other. Whatever leaves the module (state dicts, pickles,
    copies, another device) has the codes.

    Attributes:
        form: layout, patterns and sizes.
        prepared: whether `weight` is in the runtime layout.
        conv1d: whether a `Conv1D` of transformers stood here, which stores its weight transposed.
            Only `dequantize` cares.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        form: Form,
        *,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the tensors without a value; `bias_dtype` None means no bias."""
        super().__init__()
        self.form = form
        self.in_features = form.in_features
        self.out_features = form.out_features
        self.conv1d = False
        self.prepared = False
        self._numbers = form_numbers(form) if isinstance(form, PlanesForm) else None
        self._rotation = getattr(form, "rotation", 1)  # layout `paper` has none
        empty = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in form.specs().items()
        }
        if empty[CODES].shape[1] == form.in_features:
            raise FormatError(
                f"rows of {form.in_features} weights take {form.in_features} bytes as "
                f"{form.label}: "
                "packed and dense weights would have one shape, and a loader could take one for the other"
            )
        self._set_packed(empty)
        bias = (
            None
            if bias_dtype is None
            else nn.Parameter(torch.empty(form.out_features, dtype=bias_dtype, device=device))
        )
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, representation: Representation, bias: Float[Tensor, "out"] | None = None) -> "PackedLinear":
        """A linear that computes with `representation`; the bias is kept as it is."""
        packed = pack(representation)
        module = cls(packed.form, bias_dtype=None if bias is None else bias.dtype, device="meta")
        module._set_packed(packed.tensors())
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        module.prepare()
        return module

    def _set_packed(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name == CODES:
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    def prepare(self) -> bool:
        """Change to the runtime layout where the compiled kernels compute; whether it has that now.

        Loading does this once per layer, so that codes and runtime layout of one layer alone are in memory
        at a time; a module that got its codes otherwise does it when it first computes.

        Raises:
            ConfigError: PBSP_KERNEL is unknown, or cannot run here.
        """
        with _PREPARING:
            if self.prepared or self.weight.device.type != "cpu":
                return self.prepared
            packed = self.packed
            if isinstance(packed, PackedPlanes) and kernel_name() != REFERENCE:
                self._set_weight(RuntimePlanes.of(packed).layout)
                self.prepared = True
        return self.prepared

    def _unprepare(self) -> None:
        """Back to the codes."""
        if self.prepared:
            codes = self.packed.codes
            self._set_weight(codes)
            self.prepared = False

    def _set_weight(self, tensor: Tensor) -> None:
        # The first use may be in inference mode, whose tensors cannot be used in training later.
        with torch.inference_mode(False):
            self.weight = nn.Parameter(
                tensor.clone() if tensor.is_inference() else tensor, requires_grad=False
            )

    @property
    def _runtime(self) -> RuntimePlanes:
        assert isinstance(self.form, PlanesForm), "only these are prepared"
        return RuntimePlanes(
            self.form, self.weight.detach(), getattr(self, SCALES).detach(), getattr(self, OFFSETS).detach()
        )

    @property
    def packed(self) -> Packed:
        """The stored tensors; they share memory with the module, but for codes of a prepared one."""
        if self.prepared:
            return self._runtime.packed()
        return self.form.packed({name: getattr(self, name).detach() for name in self.form.specs()})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product by the compiled kernels if there is one for it, else as `kernels.reference` says."""
        if isinstance(self.form, RowsForm):
            y = rows_linear(self._turned(x), self.weight.detach(), self.form.bits)
            return y if self.bias is None else y + self.bias
        if x.device.type == "cpu" and x.dtype in DTYPES and (self.prepared or self._prepare_outside_graphs()):
            assert self._numbers is not None, "only planes are prepared"
            matrix = (self.weight, getattr(self, SCALES), getattr(self, OFFSETS), *self._numbers)
            return planes_linear(x, matrix, self.bias)
        return reference.packed_linear(self._turned(x), self.packed, self.bias)

    def _turned(self, x: Tensor) -> Tensor:
        """In the basis of the matrix; compiled products with planes do that themselves."""
        if self._rotation == 1:
            return x
        return rotate(x if x.dtype == torch.float64 else x.float(), self._rotation).to(x.dtype)

    def _prepare_outside_graphs(self) -> bool:
        return not torch.compiler.is_compiling() and self.prepare()

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The matrix W, decoded."""
        size = self._rotation
        decoded = dtype if size == 1 else torch.float32
        matrix = (
            self._runtime.decode(decoded) if self.prepared else reference.decode_dense(self.packed, decoded)
        )
        return unrotate(matrix, size).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        if self.prepared and fn(self.weight.new_empty(0)).device.type != "cpu":
            self._unprepare()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared:
            destination[prefix + CODES] = self.packed.codes

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if prefix + CODES in state_dict:
            self._unprepare()
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.prepared:
            codes = nn.Parameter(self.packed.codes, requires_grad=False)
            state |= {"_parameters": {**self._parameters, CODES: codes}, "prepared": False}
        return state

    def extra_repr(self) -> str:
        """What print(model) shows."""
        turned = "" if self._rotation == 1 else f", rotation={self._rotation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.form.label}, "
            f"layout={self.form.layout}{turned}, bias={self.bias is not None}"
        )

"""The module that takes a linear's place in a compressed model."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.errors import FormatError
from pbsp.kernels.reference import decode_dense, packed_linear
from pbsp.pruning.pattern import format_patterns
from pbsp.storage.bits import CODES
from pbsp.storage.layouts import Form, Packed, Representation, pack


class PackedLinear(nn.Module):
    """Y = x Wᵀ + bias, W held as its layout packs it; y has x's dtype.

    The packed tensors are integers, so that moving the model to another float dtype leaves them alone.
    The codes are called `weight`, as a linear's are: a loader that does not know them stops on their
    shape, and code that asks for `linear.weight.device` keeps working.

    Attributes:
        form: layout, patterns and sizes.
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
        empty = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in form.specs().items()
        }
        if empty[CODES].shape[1] == form.in_features:
            raise FormatError(
                f"rows of {form.in_features} weights take {form.in_features} bytes as "
                f"{format_patterns(form.patterns)}: "
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
        return module

    def _set_packed(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name == CODES:
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    @property
    def packed(self) -> Packed:
        """The stored tensors; they share memory with the module."""
        return self.form.packed({name: getattr(self, name).detach() for name in self.form.specs()})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Decode and multiply; see `kernels.reference`."""
        return packed_linear(x, self.packed, self.bias)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The matrix W, decoded."""
        return decode_dense(self.packed, dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, layout={self.form.layout}, "
            f"patterns={format_patterns(self.form.patterns)}, scale_block={self.form.scale_block}, "
            f"bias={self.bias is not None}"
        )

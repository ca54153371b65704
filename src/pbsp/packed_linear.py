"""The module that takes a linear's place in a compressed model."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.binarization.planes import Planes
from pbsp.errors import FormatError
from pbsp.kernels.reference import decode_dense, packed_linear
from pbsp.pruning.pattern import Pattern, format_patterns
from pbsp.storage.bits import CODES, OFFSETS, SCALES, packed_shapes
from pbsp.storage.packing import PackedPlanes, pack_planes


class PackedLinear(nn.Module):
    """Y = x Wᵀ + bias, W held as packed planes; y has x's dtype.

    The planes are integers, so that moving the model to another float dtype leaves them alone. The
    codes are called `weight`, as a linear's are: a loader that does not know them stops on their
    shape, and code that asks for `linear.weight.device` keeps working.

    Attributes:
        conv1d: whether a `Conv1D` of transformers stood here, which stores its weight transposed.
            Only `dequantize` cares.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    weight_scale_offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        patterns: tuple[Pattern, ...],
        *,
        scale_block: int,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the tensors without a value; `bias_dtype` None means no bias."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.patterns = patterns
        self.scale_block = scale_block
        self.conv1d = False
        empty = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in packed_shapes(patterns, out_features, in_features, scale_block).items()
        }
        if empty[CODES].shape[1] == in_features:
            raise FormatError(
                f"rows of {in_features} weights take {in_features} bytes as {format_patterns(patterns)}: "
                "packed and dense weights would have one shape, and a loader could take one for the other"
            )
        self.weight = nn.Parameter(empty[CODES], requires_grad=False)
        self.register_buffer(SCALES, empty[SCALES])
        self.register_buffer(OFFSETS, empty[OFFSETS])
        bias = (
            None
            if bias_dtype is None
            else nn.Parameter(torch.empty(out_features, dtype=bias_dtype, device=device))
        )
        self.register_parameter("bias", bias)

    @classmethod
    def from_planes(cls, planes: Planes, bias: Float[Tensor, "out"] | None = None) -> "PackedLinear":
        """A linear that computes with `planes`; the bias is kept as it is."""
        packed = pack_planes(planes)
        module = cls(
            packed.in_features,
            len(packed.codes),
            packed.patterns,
            scale_block=packed.scale_block,
            bias_dtype=None if bias is None else bias.dtype,
            device="meta",
        )
        module.weight = nn.Parameter(packed.codes, requires_grad=False)
        module.weight_scale = packed.scales
        module.weight_scale_offset = packed.offsets
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return module

    @property
    def packed(self) -> PackedPlanes:
        """The stored planes; shares memory with the module."""
        return PackedPlanes(
            self.patterns,
            self.in_features,
            self.scale_block,
            self.weight.data,
            self.weight_scale,
            self.weight_scale_offset,
        )

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Decode and multiply; see `kernels.reference`."""
        return packed_linear(x, self.packed, self.bias)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The matrix W, decoded."""
        return decode_dense(self.packed, dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"patterns={format_patterns(self.patterns)}, scale_block={self.scale_block}, "
            f"bias={self.bias is not None}"
        )

"""What a compression did, layer by layer: returned by `compress`, saved with the model, shown by `inspect`."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One compressed linear layer.

    Attributes:
        nominal_bits: kept weights per weight, as the paper counts; no masks, no scales.
        stored_bits: bits per weight of the layer's stored tensors, scales and padding included.
        output_error: tr(R S Rᵀ)/tr(W S Wᵀ) on the calibration moment S that the layer was solved with.
    """

    name: str
    pattern: str
    out_features: int
    in_features: int
    nominal_bits: float
    stored_bits: float
    output_error: float

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class CompressionReport:
    """A whole run. Bits are per weight, over all linear layers of the decoder blocks.

    Attributes:
        nominal_bits: over the compressed layers.
        stored_bits: over all of them; a layer left uncompressed counts with its 16 bits.
        left_uncompressed: linear layer → reason.
        calibration: what the moments were measured on (`Windows.describe`).
        seconds: wall time by stage.
    """

    nominal_bits: float
    stored_bits: float
    layers: tuple[LayerReport, ...]
    left_uncompressed: dict[str, str]
    calibration: dict[str, Any]
    seconds: dict[str, float]
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`."""
        layers = tuple(LayerReport(**layer) for layer in values["layers"])
        return CompressionReport(**{**values, "layers": layers})

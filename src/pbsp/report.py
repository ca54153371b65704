"""What a compression did, layer by layer; `compress` returns it and it is saved with the model."""

from dataclasses import asdict, dataclass
from typing import Any

from pbsp.allocation.coarse import CoarseAllocation
from pbsp.errors import FormatError
from pbsp.packed_linear import PackedLinear
from pbsp.recovery.block import BlockRecovery
from pbsp.recovery.model import ModelRecovery
from pbsp.storage.bits import stored_bits
from pbsp.storage.counting import count_bits
from pbsp.storage.layouts import Form, Representation


@dataclass(frozen=True)
class LayerReport:
    """One compressed linear layer.

    Attributes:
        layout: how it is stored, a name in `storage.layouts.FORMS`; "none" for values that no layout holds.
        nominal_bits: sign bits per weight, as the paper counts; no masks, no scales.
        stored_bits: bits per weight of the layer's stored tensors, scales and padding included.
        output_error: tr(R S Rᵀ)/tr(W S Wᵀ) on the calibration moment S that the layer was solved with.
    """

    name: str
    layout: str
    pattern: str
    out_features: int
    in_features: int
    nominal_bits: float
    stored_bits: float
    output_error: float

    @staticmethod
    def of(name: str, layer: PackedLinear, output_error: float) -> "LayerReport":
        """The bits of `layer`, counted from its tensors."""
        tensors = layer.packed.tensors()
        nominal = layer.form.nominal_bits(tensors.__getitem__)
        return LayerReport.counted(
            name, layer.form, nominal, bits=stored_bits(tensors.values()), output_error=output_error
        )

    @staticmethod
    def of_values(
        name: str, representation: Representation, pattern: str, output_error: float
    ) -> "LayerReport":
        """The bits that the numbers of `representation` would take; it has no layout."""
        rows, columns = representation.dense().shape
        return LayerReport(
            name=name,
            layout="none",
            pattern=pattern,
            out_features=rows,
            in_features=columns,
            nominal_bits=representation.nominal_bits,
            stored_bits=count_bits(representation) / (rows * columns),
            output_error=output_error,
        )

    @staticmethod
    def counted(
        name: str, form: Form, nominal_bits: float, *, bits: int, output_error: float
    ) -> "LayerReport":
        """The report of a layer whose packed tensors take `bits` in all."""
        return LayerReport(
            name=name,
            layout=form.layout,
            pattern=form.label,
            out_features=form.out_features,
            in_features=form.in_features,
            nominal_bits=nominal_bits,
            stored_bits=bits / (form.out_features * form.in_features),
            output_error=output_error,
        )

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BlockReport:
    """What one decoder block took.

    Attributes:
        seconds: wall time of reading, measuring, solving and tuning it.
        peak_rss_bytes: of the process so far: it need not grow from block to block.
    """

    name: str
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Bits:
    """Bits per weight over a model's linear layers.

    Attributes:
        nominal: kept weights per weight, over the compressed layers.
        stored: over all linear layers of the decoder blocks; one left uncompressed counts in full.
    """

    nominal: float
    stored: float

    @staticmethod
    def over(layers: tuple[LayerReport, ...], *, left_weights: int, left_bits: int) -> "Bits":
        """The means over compressed `layers` and `left_weights` others, stored in `left_bits` in all."""
        compressed = sum(layer.weights for layer in layers)
        nominal = sum(layer.nominal_bits * layer.weights for layer in layers)
        stored = sum(layer.stored_bits * layer.weights for layer in layers)
        return Bits(nominal / compressed, (stored + left_bits) / (compressed + left_weights))


@dataclass(frozen=True)
class CompressionReport:
    """A whole run.

    Attributes:
        nominal_bits, stored_bits: see `Bits`.
        packed: whether every layer has a layout, so that the model can be saved as small as it is.
        left_uncompressed: linear layer → reason.
        plain_moments: attention whose values could not be weighted by it → reason.
        uncalibrated: linear layer of an expert that had too few tokens → what it was solved on instead.
        coarse: an allocation over blocks, where it was asked for.
        recovered: what tuning each block did, where that was asked for.
        distilled: what tuning the whole model did, where that was asked for.
        blocks: time and memory of each; of those that an earlier run finished, what they took there.
        memory: "blocks" if the model was read block by block, else "whole".
        embeddings: how the input embedding and the head are stored.
        expected_loss: nats per token that the plan was expected to add, where a budget chose it.
        tried: whether that plan was corrected by a trial on a copy.
        source: the model that was compressed.
        source_bytes: size of its weight files; 0 where that is not known.
        calibration: what the moments were measured on (`Windows.describe`).
        processes: how many shared the work.
        seconds: wall time by stage.
        peak_rss_bytes: of the process, at the end of the run; of several processes each has its own.
    """

    nominal_bits: float
    stored_bits: float
    layers: tuple[LayerReport, ...]
    packed: bool
    left_uncompressed: dict[str, str]
    plain_moments: dict[str, str]
    uncalibrated: dict[str, str]
    coarse: CoarseAllocation | None
    recovered: tuple[BlockRecovery, ...]
    distilled: ModelRecovery | None
    blocks: tuple[BlockReport, ...]
    memory: str
    embeddings: str
    expected_loss: float | None
    tried: bool
    source: str
    source_bytes: int
    calibration: dict[str, Any]
    processes: int
    seconds: dict[str, float]
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; with the cosines that the paper's importances come from."""
        values = asdict(self)
        if self.coarse is not None and self.coarse.rule == "paper":
            values["coarse"]["cosines"] = [1 - importance for importance in self.coarse.importances]
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`; FormatError if it is not one of this version."""
        later = {
            "recovered": [],
            "distilled": None,
            "embeddings": "16 bit",
            "processes": 1,
            "blocks": [],
            "memory": "whole",
            "tried": False,
        }  # not in the first reports
        try:
            values = {**later, **values}
            coarse = values["coarse"]
            if coarse is not None:
                names = ("importances", "ranks", "kept")
                coarse = CoarseAllocation(coarse["rule"], *(tuple(coarse[name]) for name in names))
            distilled = values["distilled"]
            if distilled is not None:
                curve = tuple((step, train, held) for step, train, held in distilled["curve"])
                distilled = ModelRecovery(**{"rate": None, **distilled, "curve": curve})
            objects = {
                "layers": tuple(LayerReport(**layer) for layer in values["layers"]),
                "recovered": tuple(BlockRecovery(**block) for block in values["recovered"]),
                "blocks": tuple(BlockReport(**block) for block in values["blocks"]),
                "coarse": coarse,
                "distilled": distilled,
            }
            return CompressionReport(**{**values, **objects})
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the model's report is not one of this version ({error!r})") from None

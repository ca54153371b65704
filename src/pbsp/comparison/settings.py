"""What the numbers of a comparison depend on besides the rows, by name, to be compared and shown."""

from collections.abc import Sequence

from pbsp.calibration.windows import Windows
from pbsp.compress import versions
from pbsp.models.load import LoadedModel
from pbsp.models.precision import weights_digest


def settings_of(loaded: LoadedModel, calibration: Windows, texts: Sequence[Windows]) -> dict[str, str]:
    """Name → value; a name that ends in "digest" says the same as others, but surely."""
    return {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "calibration text": calibration.text,
        "calibration windows": str(len(calibration)),
        "calibration context": str(calibration.context),
        "calibration seed": str(calibration.seed),
        "texts": ", ".join(text.text for text in texts),
        "text windows": ", ".join(str(len(text)) for text in texts),
        "text context": ", ".join(dict.fromkeys(str(text.context) for text in texts)),
        **{f"version of {name}": version for name, version in versions().items()},
        "model digest": weights_digest(loaded.model)[:16],
        "calibration digest": calibration.digest[:16],
        "texts digest": ", ".join(text.digest[:16] for text in texts),
    }

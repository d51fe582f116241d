"""Convert the stored values of a DICOM radiograph to 8 bits for display (DICOM PS3.3 C.7.6.3 and C.11)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgll_encoder.data.dicom.header import UnusableDicomError, number, numbers, value

PIXEL_FIELDS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "RescaleType", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelData",
)  # fmt: skip
"""Header fields needed to decode the pixels; only the picture is written."""

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Larger pictures are refused, as `mgll_encoder.common.images` refuses them."""

FLAT = 3
"""A picture has no contrast if the 1st and 99th percentile of its gray values (0 to 255) differ by less than this."""

_COLORS = (
    "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "HSV", "ARGB", "CMYK",
)  # fmt: skip

_CONVERT = "convert it to Explicit VR Little Endian with dcmtk or gdcm"

Values = NDArray[np.float64]


def gray_values(header: Any) -> NDArray[np.uint8]:
    """Decode the picture to gray values, dense tissue white.

    Steps: the modality's table or rescale; the black and white points (from the first usable VOI table, else the first
    window with a width, else the range of the values); inversion of MONOCHROME1; black padding.

    Args:
        header: A pydicom data set with `PIXEL_FIELDS`.

    Returns:
        Gray values [rows, columns].

    Raises:
        UnusableDicomError: it is in color, has several frames, cannot be decoded, or has no contrast.
    """
    inverted = _check_layout(header)
    stored = _decoded(header)
    padding = _padding(stored, header)
    if padding.all():
        raise UnusableDicomError("no contrast", "all pixels are padding")
    values = _of_modality(stored, header)
    if values[~padding].min() == values[~padding].max():
        raise UnusableDicomError("no contrast", "all pixels have one value")
    shown = _voi(values, padding, header)
    gray = np.round((1 - shown if inverted else shown) * 255).astype(np.uint8)
    low, high = np.percentile(gray[~padding], (1, 99))
    if high - low < FLAT:
        raise UnusableDicomError(
            "no contrast", "its window is outside the range of its values, or a few values are outliers"
        )
    gray[padding] = 0
    return gray


def _check_layout(header: Any) -> bool:
    """Refuse anything but a single gray picture; return whether low values are white."""
    if value(header, "PixelData") is None:
        raise UnusableDicomError("no pixel data")
    photometric = str(value(header, "PhotometricInterpretation") or "").strip()
    if photometric in _COLORS:
        raise UnusableDicomError(f"color image ({photometric})", "radiographs are MONOCHROME1 or MONOCHROME2")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableDicomError("photometric interpretation missing or unknown")
    if number(header, "SamplesPerPixel", 1) != 1:
        raise UnusableDicomError("several samples per pixel")
    if number(header, "NumberOfFrames", 1) > 1:
        raise UnusableDicomError(
            "several frames", "a radiograph is one picture: export its frames one by one"
        )
    if number(header, "Rows", 0) * number(header, "Columns", 0) > MOST_PIXELS:
        raise UnusableDicomError("too large", f"more than {MOST_PIXELS:,} pixels")
    bits = number(header, "BitsStored", 0)
    if not _transfer_syntax(header).is_compressed and number(header, "HighBit", bits - 1) != bits - 1:
        raise UnusableDicomError("unusual bits", "the high bit is not the last of the stored bits")
    return photometric == "MONOCHROME1"


def _transfer_syntax(header: Any) -> Any:
    """Return the encoding of the pixels; that of the header if the file does not specify it."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if value(header.file_meta, "TransferSyntaxUID") is None:
        implicit, little = header.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    syntax = UID(str(value(header.file_meta, "TransferSyntaxUID")))
    if not syntax.is_transfer_syntax:
        raise UnusableDicomError("no decoder (unknown encoding)", _CONVERT)
    return syntax


def _decoded(header: Any) -> NDArray[Any]:
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import JPEGExtended12Bit

    syntax = _transfer_syntax(header)
    kind = syntax.name
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UnusableDicomError(f"no decoder ({kind})", _CONVERT) from None
    # Pillow is a decoder for this format, but reads only 8 bits.
    too_deep = (
        syntax == JPEGExtended12Bit
        and decoder.available_plugins == ("pillow",)
        and number(header, "BitsStored", 0) > 8
    )
    if too_deep or not decoder.is_available:
        raise UnusableDicomError(f"no decoder ({kind})", "install it with pip install 'mgll-mllm[dicom]'")
    try:
        stored = pixel_array(header)
    except MemoryError:
        raise UnusableDicomError("too large", "not enough memory") from None
    except Exception:  # damaged pixels raise errors of any kind, which may quote the header
        raise UnusableDicomError(
            f"pixels cannot be decoded ({kind})", "the file is damaged or truncated"
        ) from None
    if stored.ndim != 2 or not stored.size:
        raise UnusableDicomError(f"pixels cannot be decoded ({kind})", "they are not a single picture")
    return stored


def _padding(stored: NDArray[Any], header: Any) -> NDArray[np.bool_]:
    """Return which pixels are padding."""
    ends = [*numbers(header, "PixelPaddingValue")[:1], *numbers(header, "PixelPaddingRangeLimit")[:1]]
    if not numbers(header, "PixelPaddingValue") or not all(map(math.isfinite, ends)):
        return np.zeros(stored.shape, np.bool_)
    low, high = (_as_stored(int(end), header) for end in (min(ends), max(ends)))
    return (stored >= low) & (stored <= high)


def _as_stored(end: int, header: Any) -> int:
    """Truncate a value to the stored bits, as pydicom does with pixels."""
    bits = int(number(header, "BitsStored", 16)) or 16
    end %= 2**bits
    signed = number(header, "PixelRepresentation", 0) == 1
    return end - 2**bits if signed and end >= 2 ** (bits - 1) else end


@dataclass(frozen=True)
class _Table:
    """A lookup table.

    Attributes:
        first: The value mapped to the first entry; smaller values are, too.
        entries: Output values, [n].
    """

    first: float
    entries: Values

    def __call__(self, values: NDArray[Any]) -> Values:
        places = np.clip(np.rint(values - self.first), 0, len(self.entries) - 1)
        return self.entries[places.astype(np.int64)]


def _tables(header: Any, sequence: str) -> list[_Table]:
    """Return the tables of a sequence, without damaged or constant ones."""
    tables = []
    for item in value(header, sequence) or ():
        descriptor, data = numbers(item, "LUTDescriptor"), value(item, "LUTData")
        if len(descriptor) == 3 and all(map(math.isfinite, descriptor)) and data is not None:
            entries = _entries(data, int(descriptor[0]) % 2**16 or 2**16, header)
            if len(entries) and entries.min() < entries.max():
                tables.append(_Table(descriptor[1], entries))
    return tables


def _entries(data: Any, count: int, header: Any) -> Values:
    """Return the entries of a table: 16-bit words, or bytes if the data are too short for words."""
    if not isinstance(data, bytes):
        return np.atleast_1d(np.asarray(data, np.float64))[:count] % 2**16
    order = "<" if header.original_encoding[1] else ">"
    kind = f"{order}u2" if len(data) >= 2 * count else "u1"
    return np.frombuffer(data[: len(data) // 2 * 2], kind)[:count].astype(np.float64)


def _of_modality(stored: NDArray[Any], header: Any) -> Values:
    """Apply the modality transform."""
    if value(header, "ModalityLUTSequence"):
        if not (tables := _tables(header, "ModalityLUTSequence")):
            raise UnusableDicomError("damaged header", "field ModalityLUTSequence contains no table")
        return tables[0](stored)
    slope, intercept = number(header, "RescaleSlope", 1), number(header, "RescaleIntercept", 0)
    return stored.astype(np.float64) * slope + intercept


def _voi(values: Values, padding: NDArray[np.bool_], header: Any) -> Values:
    """Scale values to 0 to 1, with low values black before any inversion."""
    if tables := _tables(header, "VOILUTSequence"):
        shown = tables[0](values)
        low, high = float(tables[0].entries.min()), float(tables[0].entries.max())
    elif window := _window(header):
        shown, low, high = window(values), 0.0, 1.0
    else:
        real = values[~padding]
        shown, low, high = values, float(real.min()), float(real.max())
    return np.clip((shown - low) / (high - low), 0, 1)


def _window(header: Any) -> Callable[[Values], Values] | None:
    """Return the first window with a center and a width; None if there is none."""
    name = str(value(header, "VOILUTFunction") or "LINEAR").strip()
    if name not in _WINDOWS:
        raise UnusableDicomError("unknown window function", f"expected one of {', '.join(_WINDOWS)}")
    function, least = _WINDOWS[name]
    for center, width in zip(numbers(header, "WindowCenter"), numbers(header, "WindowWidth"), strict=False):
        if math.isfinite(center) and math.isfinite(width) and width > 0 and width >= least:
            return lambda values: function(values, center, width)
    return None


def _linear(values: Values, center: float, width: float) -> Values:
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return (values - (center - 0.5)) / (width - 1) + 0.5


def _linear_exact(values: Values, center: float, width: float) -> Values:
    return (values - center) / width + 0.5


def _sigmoid(values: Values, center: float, width: float) -> Values:
    return 0.5 * (1 + np.tanh(2 * (values - center) / width))  # 1 / (1 + exp(-4 (x - c) / w)), no overflow


_WINDOWS: dict[str, tuple[Callable[[Values, float, float], Values], float]] = {
    "LINEAR": (_linear, 1.0),
    "LINEAR_EXACT": (_linear_exact, 0.0),
    "SIGMOID": (_sigmoid, 0.0),
}
"""VOI function -> how it maps values to 0..1 before clipping (PS3.3 C.11.2.1.2 and .3), and its minimum width."""

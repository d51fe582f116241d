"""DICOM radiographs for tests."""

from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mgll_encoder.data.xray import Wanted, read_radiograph


def radiograph(
    path: Path, pixels: np.ndarray, *, bits: int = 12, photometric: str = "MONOCHROME2", **fields: object
) -> Path:
    """Write a DICOM file of 16-bit allocated pixels.

    Args:
        path: The file.
        pixels: Stored values [rows, columns]; signed if their type is.
        bits: Bits stored.
        photometric: Photometric interpretation.
        **fields: Further header fields, None to leave one out.
    """
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
    header.Modality, header.StudyDescription, header.SeriesDescription = "CR", "XR CHEST 2 VIEWS", "PA"
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.Rows, header.Columns = pixels.shape
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, bits, bits - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.astype("<i2" if pixels.dtype.kind == "i" else "<u2").tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, header, enforce_file_format=True)
    return path


def ramp(high: int = 4095) -> np.ndarray:
    """Values from 0 to ``high`` in rows of 16."""
    return np.linspace(0, high, 256).reshape(16, 16).round().astype(np.uint16)


def gray(path: Path) -> np.ndarray:
    """Decode a file to gray values."""
    return read_radiograph(path, Wanted(("CR", "DX")))[0]

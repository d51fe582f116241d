"""Reading DICOM radiographs: header fields, pixels, de-identified texts."""

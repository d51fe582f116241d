"""Reading DICOM radiographs: single header fields, pixels, texts without identities."""

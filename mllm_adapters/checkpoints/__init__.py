"""Model folders on disk: finding them, reading their headers, hashing and copying their files."""

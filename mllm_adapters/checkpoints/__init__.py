"""Model folders on disk: finds them, reads their headers, hashes and copies their files."""

"""Image and text towers that belong together: the text tower of a source, and both written as a CLIP."""

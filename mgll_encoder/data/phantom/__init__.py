"""A procedural fundus phantom for demos and tests."""

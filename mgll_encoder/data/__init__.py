"""Data for pretraining: manifests, builders from label tables, and the fundus phantom."""

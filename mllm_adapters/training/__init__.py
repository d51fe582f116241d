"""Stages, recipes and the engine around transformers' Trainer."""

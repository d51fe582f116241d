"""Fits the connector of a swapped tower in closed form."""

"""Fitting the connectors of a swapped tower in closed form."""

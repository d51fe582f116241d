"""Fitting the readers of a swapped tower in closed form."""

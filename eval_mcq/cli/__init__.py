"""The command ``eval-mcq``."""

"""Bytes <-> numpy: picture files and array files. Knows neither HTTP nor torch."""

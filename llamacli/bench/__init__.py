"""Measurement: speed, quality, limits of the machine, expert routing, plots, and the comparison with llama.cpp."""

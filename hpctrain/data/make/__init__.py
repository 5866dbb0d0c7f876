"""Data sets made here, without a download: real handwritten digits, and random volumes with known parameters."""

"""Evaluate and report: benchmark scores, KL to the reference, accuracy recovery. Imports `recovery` only."""

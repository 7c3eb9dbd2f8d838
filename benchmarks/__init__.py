"""Timings: rivals on the same arrays, in turns, in one run. A benchmark is not a test."""

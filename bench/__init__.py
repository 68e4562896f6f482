"""Throughput reports: `python bench/run.py`. See bench/README.md for the method."""

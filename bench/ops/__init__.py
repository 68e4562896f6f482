"""Operators, one file each, as the benchmark runs them; bench_operators.py is the pytest-benchmark suite."""

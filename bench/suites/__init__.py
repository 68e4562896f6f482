"""Suites: each yields its cases."""

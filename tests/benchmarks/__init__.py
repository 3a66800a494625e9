"""Measurements against limits and peers; run by hand, not by the tests."""

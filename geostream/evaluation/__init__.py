"""Evaluation: embed a split, rank the positives of its queries, and compute the metrics of the field."""

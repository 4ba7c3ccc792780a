"""Benchmarks: figures as ratios against an alternative measured in the same run."""

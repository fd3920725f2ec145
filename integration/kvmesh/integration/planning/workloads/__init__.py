"""Workload files, one per kind of traffic; copy one and change it."""

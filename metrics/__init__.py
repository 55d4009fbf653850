"""Prometheus: reads events and snapshots. Nobody calls it to count."""

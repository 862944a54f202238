"""Pelton side by side with other engines: `make bench-peers`, or `python -m benchmarks.peers --help`."""

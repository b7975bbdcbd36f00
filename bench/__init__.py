"""Measures the gateway against nginx on one pinned core; `python -m bench --help` says how. See README.md for the method."""

"""The command line ``fisedit``."""

"""Speeds, each as a ratio measured in one run: `make bench`, or `python -m bench` for all, `python -m bench engine` for one."""

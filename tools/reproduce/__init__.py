"""The tables and figures of four papers as commands: `python -m tools.reproduce`."""

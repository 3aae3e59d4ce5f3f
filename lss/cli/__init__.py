"""The command line: one verb a file; a verb hands one room's results to another."""

from lss.cli.main import main

__all__ = ["main"]

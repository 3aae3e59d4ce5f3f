"""Runs that are killed, stopped, signalled and starved, and what is left of them."""

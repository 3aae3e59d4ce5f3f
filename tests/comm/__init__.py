"""Collectives, counted and watched, without ranks."""

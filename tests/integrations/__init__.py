"""Tests of models of other libraries."""

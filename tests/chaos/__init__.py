"""Faults under traffic: `make chaos` runs all of them one by one, `test_chaos.py` a few at once."""

"""Pyro programs to run and to copy; each file has one function `build(data, prior)` that returns a
Pyro program.
"""

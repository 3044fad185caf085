"""The command line `pyro-bmr`."""

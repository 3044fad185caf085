"""An `nn.Module` as a Pyro program: what its parameters are once wrappers are taken off, and the
program with one site each.
"""

"""Data as tensors ready to fit: named sets, the readers of files, the standardisation and the
held-out split.
"""

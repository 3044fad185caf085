"""The mathematics of reduction: tensors in, tensors out, and torch alone. One formula or structure
a file.
"""

"""Handwritten Triton kernels, one file each. Importing one imports triton."""

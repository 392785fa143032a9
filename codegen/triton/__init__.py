"""Hand-written Triton kernels, one file for each operator. Importing one imports triton."""

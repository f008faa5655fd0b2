"""The Triton back end: the ops of `octavo.kernels.ops` on a GPU, or on the interpreter."""

"""The Python side of the compiled CPU kernels: the library, plans of masks, reused memory."""

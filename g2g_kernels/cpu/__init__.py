"""What the compiled CPU kernels need on the Python side: the library, plans of masks, reused memory."""

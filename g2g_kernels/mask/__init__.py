"""Who is connected to whom: groups, units and their packed weights (:class:`~g2g_kernels.BlockMask`)."""

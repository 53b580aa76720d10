"""A G2GNet exported to ONNX, for batches of any size, and run by ONNX Runtime."""

import onnxruntime
import torch

from g2gnet import G2GNet

net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10).eval()
net.backend = "torch"
x = torch.rand(8, 784)
batch = torch.export.Dim("batch", min=1)
with torch.no_grad():
    torch.onnx.export(
        net, (x,), "net.onnx", dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"], verbose=False
    )
session = onnxruntime.InferenceSession("net.onnx")
(counts,) = session.run(None, {"x": torch.rand(3, 784).numpy()})
print(counts.shape)

"""The torch.compile backend, quantized modules, the weight store and reports."""

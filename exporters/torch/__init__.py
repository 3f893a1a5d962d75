"""The torch.compile backend's parts: products, weights, dispatch, and the seam to torch."""

"""The passes on torch.fx graphs, as Dynamo and torch.export make them."""

"""What `samples/peers.py` is made of: environments, models, workers, rounds and the table."""

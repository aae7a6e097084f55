"""What to train, on which layout, how fast and at what cost: answers before a GPU is rented."""

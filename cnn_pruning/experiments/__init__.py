"""What experiments need: data, training, and several processes that work together."""

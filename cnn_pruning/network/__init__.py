"""What the method knows of a network: its filters, what goes with them, and their maps."""

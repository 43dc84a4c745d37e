"""What is live: every sequence with its state, and the streams of their clients."""

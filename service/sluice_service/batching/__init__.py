"""What runs next: inputs, queues, runs, and the model versions that execute them."""

"""Communication beside backward: ordered queues, failures that end training, and what is counted."""

"""The gRPC services: they decode requests, call the host and encode answers and errors."""

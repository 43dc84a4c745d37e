"""The gRPC services: decode, call the host, encode, turn errors into statuses."""

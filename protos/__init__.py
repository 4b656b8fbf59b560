"""The gRPC contract between the aggregation server and its clients; it depends on nothing."""

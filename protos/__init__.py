"""The gRPC contract between the aggregation server and its clients; it depends on nothing.

There is no service in this version: updates travel as Flower messages (``fedmerge.common.wire``).
"""

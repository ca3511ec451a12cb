"""A real S3 server on this machine, for development and tests: OpenStack Swift with its s3api filter."""

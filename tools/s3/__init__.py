"""A real S3 store on this machine, for development and tests: OpenStack Swift, or Ceph's gateway."""

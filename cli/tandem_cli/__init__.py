"""The `tandem` command: run a project on this machine, assign GPUs, check the host, export a model."""

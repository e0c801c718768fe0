"""One file per operation: fp32 reference, fast CPU path, dispatch. Depends on torch alone."""

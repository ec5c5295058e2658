"""The trainer, the same loop written by hand, and the same training with other libraries."""

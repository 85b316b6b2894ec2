"""The live objects of a training, as every flow sees them."""

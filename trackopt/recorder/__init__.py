"""The recorder: a process of its own that carries the journal into TensorBoard and MLflow.

It tails the journal, keeps a cursor for each sink, and outlives the training process, so that whatever that one wrote
before it died still arrives.
"""

"""The recorder: a separate process that delivers the journal to TensorBoard and MLflow.

It tails the journal and keeps a cursor per sink. It outlives the training process, so that the records of a killed
run are still delivered.
"""

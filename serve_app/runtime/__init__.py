"""What runs in a replica: scheduling, the step engine, micro-batches, the pipeline. No torch, no Ray."""

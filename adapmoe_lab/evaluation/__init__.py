"""What a configuration costs: loss, tasks and latency, measured."""

"""What a trace shows of routing, prediction and cost."""

"""The executor that the host drives layer by layer: any policy, any precision."""

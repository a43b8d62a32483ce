"""Makes it happen: expert store, device cache, transfers, decoding, hardware probe."""

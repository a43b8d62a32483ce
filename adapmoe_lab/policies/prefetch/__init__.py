"""Which predicted experts are worth fetching before they are needed."""

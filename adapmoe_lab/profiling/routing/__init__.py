"""Recording which experts a text is routed to."""

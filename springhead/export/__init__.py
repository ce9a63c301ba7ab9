"""What other tools read: OpenLineage events, Croissant descriptions, data cards and model cards."""

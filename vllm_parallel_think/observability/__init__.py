"""What is shown of groups to people: metrics, spans, the page of recent requests."""

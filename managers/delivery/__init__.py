"""What leaves the house: deliveries from the event log to webhooks, S3 and EventBridge. Knows no web framework."""
